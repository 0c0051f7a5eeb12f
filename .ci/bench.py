"""Measure the proxy against its upstream alone (direct) and against a bare relay.

    python .ci/bench.py [quick] [--also OTHER_PROGRAM.py]

All take turns under the same loads, so that whatever else the machine does affects all of them.
"""
import argparse
import asyncio
import collections
import contextlib
import math
import os
import platform
import re
import statistics
import sys
import threading
import time

import servers
from ollama import LAST_CHUNK

STAMP = re.compile(rb'"content":"(\d{19})')  # what a frame says: its number, or its time in ns
STAMP_BYTES = 30


class LoadStream(asyncio.Protocol):
    """A stream of the load client. It counts its frames and notes when they came."""

    def __init__(self, path, model):
        self.request = servers.request_bytes(*servers.chat_request(path, model))
        self.expected, self.paced = int(model.split(":")[1]), model.startswith("paced")
        self.frames, self.delays, self.rest, self.done, self.whole = 0, [], b"", False, False
        self.began, self.first = time.monotonic(), math.nan
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data):
        now, data = time.monotonic_ns(), self.rest + data
        found = STAMP.findall(data)
        if found and not self.frames:
            self.first = now / 1e9 - self.began
        self.frames += len(found)
        if self.paced:
            self.delays += [(now - int(stamp)) / 1e6 for stamp in found]
        self.done = self.done or b"[DONE]" in data or b'"done":true' in data
        self.rest = data[1 - STAMP_BYTES:]  # less than a stamp, so that none is counted twice
        if data.endswith(b"\r\n" + LAST_CHUNK):
            self.whole = self.done and self.frames == self.expected
            self.transport.close()

    def connection_lost(self, error):
        self.ended.set_result(None)


Load = collections.namedtuple("Load", "frames seconds delays first broken")


async def load(port, path, model, count, deadline):
    """Run so many streams at once. One that is not over in time counts as broken."""
    loop, streams, began = asyncio.get_running_loop(), [], time.monotonic()
    for _ in range(count):
        streams.append((await loop.create_connection(
            lambda: LoadStream(path, model), "127.0.0.1", port))[1])
    await asyncio.wait([stream.ended for stream in streams], timeout=deadline)
    return Load(sum(s.frames for s in streams), time.monotonic() - began,
                sorted(delay for s in streams for delay in s.delays),
                streams[0].first, sum(not s.whole for s in streams))


class Bench:
    """The rows of the table. A cell is the median of what was measured."""

    def __init__(self, names, quick):
        self.names, self.rows, self.broken = names, {}, collections.Counter()
        self.frames, self.singles = (2000, 5) if quick else (20_000, 20)
        self.streams, self.seconds = (100, 2) if quick else (1000, 10)

    def note(self, row, name, value):
        self.rows.setdefault(row, collections.defaultdict(list))[name].append(value)

    def load(self, name, server, model, count):
        path = "/api/chat" if name in ("direct", "relay") else "/v1/chat/completions"
        deadline = self.seconds + 3 * servers.DEADLINE
        result = asyncio.run(load(server.port, path, model, count, deadline))
        self.broken[name] += result.broken
        return result

    def burst(self, name, server):
        for count in (1, 50):
            got = self.load(name, server, f"burst:{self.frames // count}", count)
            self.note(f"frames/s, burst, streams: {count}", name, got.frames / got.seconds)

    def paced(self, name, server):
        """Run 100 streams with 20 frames/s each."""
        before = server.cpu_seconds()
        got = self.load(name, server, f"paced:{self.seconds * 10}:20", 100)
        used = (server.cpu_seconds() - before) / (got.frames or math.nan)
        for percent in (50, 99):
            delay = (got.delays or [math.nan])[len(got.delays) * percent // 100]
            self.note(f"latency p{percent}, ms, 100 streams x 20/s", name, delay)
        if name != "direct":
            self.note("CPU per frame, µs, same load", name, used * 1e6)

    def first_token(self, name, server):
        for _ in range(self.singles):
            got = self.load(name, server, "burst:1", 1)
            self.note("time to first token, ms, alone", name, got.first * 1e3)

    def memory(self, name, server):
        """Measure a fresh process. The load runs in this thread, so another one looks."""
        self.load(name, server, "burst:1", 1)
        self.note("memory, MiB, at rest", name, server.mebibytes())
        load = f"{self.streams:,} streams x 5/s"
        timer = threading.Timer(self.seconds * 0.8, lambda: self.note(
            f"memory, MiB, {load}", name, server.mebibytes()))
        timer.start()
        got = self.load(name, server, f"paced:{5 * self.seconds}:5", self.streams)
        timer.join()
        self.note(f"broken, {load}", name, got.broken)

    def ratios(self, row, name):
        """Return name/relay of each round."""
        pairs = zip(self.rows[row][name], self.rows[row]["relay"])
        return [value / (relay or math.nan) for value, relay in pairs]

    def add_latencies(self):
        """Add rows that say how much later frames come than straight from the upstream."""
        for row in [row for row in self.rows if row.startswith(("latency", "time to first"))]:
            direct = statistics.median(self.rows[row]["direct"])
            for name in self.names[1:]:
                more = statistics.median(self.rows[row][name]) - direct
                self.note(f"added {row}", name, more)

    def print_table(self):
        compared = self.names[2:]  # proxy, also
        titles = [*self.names, *(f"{name}/relay" for name in compared)]
        print("| |", " | ".join(titles), "|")
        print("|---|" + "---:|" * len(titles))
        for row in self.rows:
            values = [*(self.rows[row][name] for name in self.names),
                      *(self.ratios(row, name) for name in compared)]
            cells = [statistics.median(value or [math.nan]) for value in values]
            cells = [f"{v:,.0f}" if v >= 1000 else f"{v:.2f}" for v in cells]
            print("|", row, "|", " | ".join(cells).replace("nan", "-"), "|")
        for row in self.rows:
            for name in compared if row.startswith(("CPU", "frames")) else ():
                print(f"each round's {name}/relay, {row}:",
                      *(f"{ratio:.2f}" for ratio in self.ratios(row, name)))
        print("broken streams:", *(f"{name} {count}" for name, count in self.broken.items()))


def main():
    parser = argparse.ArgumentParser(description="Measure the proxy against a bare relay.")
    parser.add_argument("quick", nargs="?", choices=["quick"], help="run shorter loads")
    parser.add_argument("--also", metavar="PROGRAM", help="another proxy to compare with")
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, "
          f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}")
    servers.allow_many_files()
    with servers.start_ollama() as upstream:
        starters = {"relay": lambda: servers.Server(servers.HERE / "relay.py", upstream.port),
                    "proxy": lambda: servers.start_proxy(upstream)}
        if args.also:
            starters["also"] = lambda: servers.start_proxy(upstream, args.also)
        table = Bench(["direct", *starters], args.quick)
        run_rounds(table, upstream, starters)
    table.add_latencies()
    table.print_table()
    return 1 if any(table.broken.values()) else 0


def run_rounds(table, upstream, starters):
    """Run three rounds of each load, then five starts, then the memory of fresh processes."""
    with contextlib.ExitStack() as stack:
        running = {"direct": upstream}
        running.update((name, stack.enter_context(start())) for name, start in starters.items())
        for measure in (table.burst, table.paced, table.first_token):
            for _ in range(3):
                for name, server in running.items():
                    measure(name, server)
    for _ in range(5):
        for name, start in starters.items():
            with start() as server:
                table.note("start-up, ms", name, server.start_seconds * 1e3)
    for name, start in starters.items():
        with start() as server:
            table.memory(name, server)


if __name__ == "__main__":
    sys.exit(main())
