"""Do at random everything that clients and upstreams do, well or badly.

    python .ci/soak.py [SECONDS [SEED]]

Each answer must end the way it should, and nothing may be left over.
"""
import collections
import contextlib
import functools
import http.client
import json
import random
import re
import socket
import struct
import sys
import threading
import time

import servers
from ollama import BROKEN

# What the clients do, and how often. "slow" reads a long stream with pauses, "chunked" sends its
# request in chunks.
DOINGS = {"stream": 5, "chunked": 3, "whole": 4, "raw": 3, "framed": 3, "slow": 1, "abort": 6,
          "malformed": 3}
GOOD_MODELS = ["burst:1", "burst:300", "burst:3000", "paced:20:100", "slow_start:5"]
LEFT_MODELS = ["silent:0", "slow_start:5", "paced:200:100", "burst:3000"]
MALFORMED = [
    b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", b"GET /" + b"x" * 70_000,
    b"POST /v1/chat/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    *(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + rest for rest in (
        b"\r\n", b"Content-Length: x\r\n\r\n", b"Content-Length: 99999999999\r\n\r\n",
        b"Content-Length: 5\r\n\r\n{\"a\":", b"Content-Length: 2\r\n\r\n{}",
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
    *(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
      + body for body in (  # a body that is not valid, or not a chat
          b"0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"x\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n",
          b"+2\r\n{}\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"2 \r\n{}\r\n0\r\n\r\n",
          b"2\n{}\n0\n\n", b"2\r\n{} 0\r\n\r\n", b"1\r\n{}\r\n0\r\n\r\n", b"\r\n2\r\n{}\r\n",
          b"f" * 17 + b"\r\n{}", b"fffffff\r\n{}", b"2;" + b"x" * 70_000))]
SLACK = 4  # threads and descriptors that may be there beyond those at the start
MORE_MEBIBYTES = 8  # than after the warm-up; a leak of 1 KiB a request is more in the usual time


class SoakClient:
    """Does one thing after another, on one connection as long as that is kept alive."""

    def __init__(self, port, seed, results):
        self.port, self.random, self.results = port, random.Random(seed), results
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=servers.DEADLINE)

    def run(self, until):
        while time.monotonic() < until:
            doing = self.random.choices(list(DOINGS), list(DOINGS.values()))[0]
            bad = f"{self.random.choice(list(BROKEN))}:{self.random.randrange(10)}"
            model = self.random.choice([self.random.choice(GOOD_MODELS), bad])
            act, what = getattr(self, doing, self.ask), ""
            try:
                act(doing, "burst:10000" if doing == "slow" else model)
            except Exception as error:  # noqa: BLE001  whatever it is, it is a result
                what = f"{model}: {error!r}"[:300]
                self.connection.close()
            self.results.append((doing, what))
            time.sleep(self.random.random() * 0.1)
        self.connection.close()

    def request(self, doing, model):
        path = "/api/chat" if doing in ("raw", "framed") else "/v1/chat/completions"
        accept = "text/event-stream" if doing == "framed" else "*/*"
        return servers.chat_request(path, model, doing != "whole", accept)

    def ask(self, doing, model):
        method, path, body, headers = self.request(doing, model)
        if doing == "chunked":  # http.client sends what an iterator yields in a chunk each
            cut = self.random.randrange(len(body))
            body = iter([body[:cut], body[cut:]])
        self.connection.request(method, path, body, headers)
        response, body, cut = self.connection.getresponse(), b"", False
        read = functools.partial(response.read1, 1 << 16) if response.chunked else response.read
        try:
            for count, piece in enumerate(iter(read, b"")):
                body += piece
                time.sleep(0.2 if doing == "slow" and count % 1000 == 0 else 0)
        except (http.client.IncompleteRead, ConnectionResetError):
            cut = True
            self.connection.close()
        judge(doing, model, response.status, body, cut)

    def abort(self, doing, model):
        """Hang up, by FIN or RST, within the request, before the answer or in its midst."""
        doing = self.random.choice(list(DOINGS))
        request = servers.request_bytes(*self.request(doing, self.random.choice(LEFT_MODELS)),
                                chunked=doing == "chunked")
        if self.random.random() < 0.2:
            request = request[:self.random.randrange(len(request))]
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(request)
            connection.settimeout(0.001 + self.random.random() * 0.3)
            with contextlib.suppress(OSError):
                connection.recv(self.random.randrange(1, 5000))
            if self.random.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def malformed(self, doing, model):
        request = self.random.choice(MALFORMED)
        try:
            with socket.create_connection(("127.0.0.1", self.port), servers.DEADLINE) as connection:
                connection.sendall(request)
                response = http.client.HTTPResponse(connection)
                response.begin()
                judge_error(response.status, response.read())
        except Exception as error:
            raise AssertionError(f"{request[-60:]} got {error!r}") from error


def judge(doing, model, status, body, cut):
    """Check that an answer is whole if the upstream's was, and else does not look whole."""
    good, count, seen = model.split(":")[0] not in BROKEN, int(model.split(":")[1]), body[-200:]
    if status != 200:
        assert not good, f"status {status} {seen}"
        return judge_error(status, body)
    if doing == "raw":
        assert good == (b'"done":true' in body and not cut), f"cut: {cut}, {seen}"
    elif doing == "whole":
        assert good and not cut, f"cut: {cut}, {seen}"
    else:
        *events, rest = body.split(b"\n\n")
        ends = [e for e in events if e == b"data: [DONE]" or e.startswith(b'data: {"error":')]
        assert not rest and not cut and ends == events[-1:], f"cut: {cut}, {ends}, {seen}"
        assert good == (ends == [b"data: [DONE]"]), f"{ends}"
    said = re.findall(rb"\d{19}", body)  # the numbers of the frames, or their times
    assert said == sorted(set(said)), "frames twice, or out of order"
    assert len(said) == count if good else len(said) <= count, f"{len(said)} frames of {count}"
    return None


def judge_error(status, body):
    names = sorted(json.loads(body)["error"])
    assert status >= 400 and names == ["code", "message", "param", "type"], f"{status} {body[:200]}"


Usage = collections.namedtuple("Usage", "upstream threads descriptors mebibytes")


def usage(upstream, server):
    """Return the number of connections open at the upstream, and what the proxy has."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", upstream.port)) as connection:
        connection.request("GET", "/api/version")
        open_there = json.loads(connection.getresponse().read())["open"]
    return Usage(open_there, len(server.proc("task")), len(server.proc("fd")),
                 round(server.mebibytes(), 1))


def is_idle(now, start):
    return (now.upstream == 0 and now.threads <= start.threads + SLACK
            and now.descriptors <= start.descriptors + SLACK)


def soak_phase(upstream, server, seconds, seed, results):
    """Run twenty clients. Return the usage once nothing is left of them, or time is up."""
    start, until = usage(upstream, server), time.monotonic() + seconds
    threads = [threading.Thread(target=SoakClient(server.port, f"{seed} {i}", results).run,
                                args=[until]) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 2 * servers.DEADLINE
    while not is_idle(usage(upstream, server), start) and time.monotonic() < deadline:
        time.sleep(0.1)
    return usage(upstream, server)


def print_results(results):
    """Print how often each thing happened. Return the number of failures."""
    counts = collections.Counter(results)
    for (doing, what), count in sorted(counts.items())[:60]:
        print(f"{count:6} {doing}: {f'FAILED {what}' if what else 'passed'}")
    failed = sum(count for (_, what), count in counts.items() if what)
    print(f"{len(results) - failed} passed, {failed} failed")
    return failed


def main():
    seconds, seed = [*sys.argv[1:], *["180", random.randrange(10**6)][len(sys.argv[1:]):]][:2]
    print(f"soak of {seconds} s, seed {seed}", flush=True)
    results = []
    servers.allow_many_files()
    with servers.start_ollama() as upstream, servers.start_proxy(upstream) as server:
        time.sleep(1)  # until it has asked the upstream for its version
        start = usage(upstream, server)
        warm = soak_phase(upstream, server, float(seconds) * 0.2, f"{seed} warm-up", results)
        end = soak_phase(upstream, server, float(seconds) * 0.8, seed, results)
        checks = {"process": server.process.poll() is None, "idle": is_idle(end, start),
                  "memory": not end.mebibytes > warm.mebibytes + MORE_MEBIBYTES,
                  "stderr": not any("Traceback" in line for line in server.said)}
    results += [(name, "" if good else "see above") for name, good in checks.items()]
    for name, value in (("start", start), ("after warm-up", warm), ("end", end)):
        print(f"{name}: {value}")
    if not checks["stderr"]:
        print(*[line for line in server.said if not line.startswith("{")][-60:], sep="")
    return 1 if print_results(results) else 0


if __name__ == "__main__":
    sys.exit(main())
