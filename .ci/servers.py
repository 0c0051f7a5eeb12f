"""Start servers, each in a process of its own, and make the chat requests that load them."""
import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ollama import LAST_CHUNK, chunk

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "ndjson_sse_proxy.py"
DEADLINE = 10  # seconds; only something that fails takes this long


class Server:
    """A server process. Its first line on stderr contains its URL."""

    def __init__(self, *command):
        began, self.said = time.monotonic(), []
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NDJSON_", "OLLAMA_"))}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=clean, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace")
        first = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", first)
        if not found:
            self.process.kill()
            raise SystemExit(f"{command[0]} did not start:\n{first}{self.process.stderr.read()}")
        self.url, self.port = found[0], int(found[1])
        socket.create_connection(("127.0.0.1", self.port)).close()
        self.start_seconds = time.monotonic() - began
        # Keep reading, or the pipe fills up and the server blocks.
        threading.Thread(target=self.said.extend, args=[self.process.stderr], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(DEADLINE)

    def proc(self, name):
        """Return a file of Linux' /proc, or a folder's names. Other systems have none."""
        path = Path(f"/proc/{self.process.pid}/{name}")
        with contextlib.suppress(OSError):
            return os.listdir(path) if path.is_dir() else path.read_text()
        return ""

    def cpu_seconds(self):
        """Return the CPU time used so far."""
        fields = self.proc("stat").rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else math.nan

    def mebibytes(self):
        """Return the size of the resident memory."""
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
            pages = self.proc("statm").split()[1:2]
            return (int(pages[0]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20) if pages else
                    int(subprocess.check_output(command)) / 1024)
        return math.nan


def start_ollama():
    return Server(HERE / "ollama.py")


def start_proxy(upstream, program=PROGRAM):
    return Server(program, "--listen", "127.0.0.1:0", "--upstream", upstream.url,
                  "--max-connections", "2000")


def start_demo():
    return Server(PROGRAM, "--listen", "127.0.0.1:0", "--demo")


def allow_many_files():
    """Raise the descriptor limit of this process and of those it starts."""
    with contextlib.suppress(ImportError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 10_000 if hard == resource.RLIM_INFINITY else min(10_000, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def chat_request(path, model, stream=True, accept="*/*"):
    """Return a chat request as the arguments of HTTPConnection.request()."""
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": model, "stream": stream, "messages": messages}).encode()
    return "POST", path, body, {"Accept": accept, "Content-Type": "application/json"}


def request_bytes(method, path, body, headers, chunked=False):
    """Return a request as it goes over the wire, its body in one piece or in two chunks."""
    length = f"Content-Length: {len(body)}"
    if chunked:
        length, body = "Transfer-Encoding: chunked", chunk(body[:9]) + chunk(body[9:]) + LAST_CHUNK
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", length]
    lines += map(": ".join, headers.items())
    return "\r\n".join([*lines, "", ""]).encode() + body
