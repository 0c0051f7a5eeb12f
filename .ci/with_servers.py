"""Run a command with two URLs behind it, both of proxies in front of the scripted Ollama.

    python .ci/with_servers.py [--demo] COMMAND ARGUMENT...

With --demo, the first URL belongs to a proxy that was started with --demo.
"""
import subprocess
import sys

from servers import start_demo, start_ollama, start_proxy


def main():
    with_demo = sys.argv[1] == "--demo"
    command = sys.argv[2:] if with_demo else sys.argv[1:]
    with start_ollama() as upstream, start_proxy(upstream) as proxy, (
            start_demo() if with_demo else proxy) as first:
        command += [first.url, proxy.url]
        status = subprocess.run(command, check=False, timeout=300).returncode
        if status:
            print(f"{command} failed. The proxy's log:\n", *first.said, sep="", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
