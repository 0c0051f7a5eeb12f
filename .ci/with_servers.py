"""Run a command with two URLs behind it: a proxy with --demo, and one before recorded exchanges.

    python .ci/with_servers.py COMMAND ARGUMENT...
"""
import re
import subprocess
import sys
import threading
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import ndjson_sse_proxy as proxy  # noqa: E402
import test_proxy  # noqa: E402


def main() -> int:
    demo = subprocess.Popen([sys.executable, str(TOP / "ndjson_sse_proxy.py"), "--demo", "--listen",
                             "127.0.0.1:0"], stderr=subprocess.PIPE, text=True)
    first = demo.stderr.readline()
    threading.Thread(target=demo.stderr.read, daemon=True).start()  # so that its log can't block it
    recorded = test_proxy.FakeOllama(test_proxy.RECORDED["hello"])
    server = proxy.ProxyServer(proxy.Config(listen=proxy.parse_url("127.0.0.1:0"),
                                            upstream=proxy.parse_url(recorded.url)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = re.search(r"listens on (\S+)", first)[1]
        return subprocess.run([*sys.argv[1:], url, server.url], timeout=300).returncode
    finally:
        demo.terminate()
        demo.wait(10)


sys.exit(main())
