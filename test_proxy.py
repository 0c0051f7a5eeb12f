"""Tests of ndjson_sse_proxy. They read as its specification: each name says situation and outcome.

FakeOllama plays exact bytes over a real socket; most of them were recorded from a real Ollama.
Nothing here sleeps: tests wait on events, or on a socket, with a deadline. A new field, or a new
fault of Ollama, takes a test of at most five lines. These two run with the others:

    def test_seed_goes_up_as_an_option(start):
        server, fake = start(RECORDED["length"])  # what Ollama answers
        assert chat(server, seed=7).text() == "Hello from a"  # what the client shows
        line, headers, body = fake.requests.get(timeout=DEADLINE)  # what Ollama was asked
        assert json.loads(body)["options"] == {"seed": 7}

    def test_upstream_dies_after_a_record_sends_error_not_done(start):
        server, fake = start(HEAD + chunk(says("Hel")), RESET)
        assert_failed(chat(server), code="upstream_cut")
"""
import argparse
import contextlib
import doctest
import functools
import gc
import http.client
import io
import json
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

import ndjson_sse_proxy as proxy_module
from ndjson_sse_proxy import ProxyError, ProxyServer, parse_url, read_settings, start_demo, to_ollama_chat

HERE = Path(__file__).parent
PROGRAM = HERE / "ndjson_sse_proxy.py"
DEADLINE = 10  # seconds; only a test that fails waits so long

# ---- Recordings of a real Ollama ---------------------------------------------------------------
# The bytes that came off its socket, except that all have the same times and durations here, that some
# are shorter by whole records, and that "generate" lacks its `context`. A "|" parts the pieces of a
# text: each came in a record of its own.

DATE = "Sun, 22 Nov 2026 22:21:53 GMT"
WHOLE, PARTS = "application/json; charset=utf-8", "application/json"  # the two forms of one value
GREETING = 'Hello| from| a| tiny| model|:| |你|好| 🙂| naï|ve|.|\n|Se|cond| line|,| with| "|qu|otes|".'
DEATH = {"error": "an error was encountered while running the model: unexpected EOF"}
EXCEEDED = (
    '{"error":{"code":400,"message":"request (%d tokens) exceeds the available context size (4096 tokens), '
    'try increasing it","type":"exceed_context_size_error","n_prompt_tokens":%d,"n_ctx":4096}}')


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(status, kind, date, *texts, chunked):
    body = b"".join(chunk(text.encode()) for text in texts) + b"0\r\n\r\n" if chunked else texts[0].encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nDate: {date}\r\n{length}\r\n\r\n".encode() + body


def plays(*values, kind="application/x-ndjson", status=200):
    end = "\n" if kind.endswith("ndjson") else ""
    texts = [json.dumps(value, ensure_ascii=False, separators=(",", ":")) + end for value in values]
    return whole(f"{status} {http.client.responses[status]}", kind, DATE, *texts, chunked=kind != WHOLE)


def record(model, said="", key="content", done=False, **more):
    said = {key: said} if key == "response" else {"message": {"role": "assistant", "content": "", key: said}}
    return {"model": model, "created_at": "2026-11-22T22:21:53.596884368Z", **said, "done": done, **more}


def spoken(model, text, key="content"):
    return [record(model, piece, key) for piece in text.split("|")]


def calling(model, index, identity, city):
    function = {"index": index, "name": "get_weather", "arguments": {"city": city}}
    return record(model, [{"id": identity, "function": function}], "tool_calls")


def last(model, reason, prompt, count, said="", key="content"):
    return record(model, said, key, True, done_reason=reason, total_duration=98387329, load_duration=1001154,
        prompt_eval_count=prompt, prompt_eval_duration=3912000, eval_count=count, eval_duration=90075000)


THOUGHT = spoken("think", "Le|t| |me| consid|er| it| ca|r|efully|.|\n", "thinking")
RECORDED = {
    "hello": plays(*spoken("hello", GREETING), last("hello", "stop", 9, 27)),
    "hello_whole": plays(last("hello", "stop", 9, 27, GREETING.replace("|", "")), kind=WHOLE),
    "generate": plays(*spoken("hello", GREETING, "response"), last("hello", "stop", 9, 27, key="response")),
    "length": plays(*spoken("hello", "Hello| from| a"), last("hello", "length", 9, 3)),
    "stop": plays(*spoken("hello", "Hello| from| a| tiny"), last("hello", "stop", 9, 5)),
    **{why: plays(record("hello", done=True, done_reason=why), kind=WHOLE) for why in ("load", "unload")},
    "think": plays(*THOUGHT, *spoken("think", "Fort|y| tw|o|,| of| course|!"), last("think", "stop", 9, 28)),
    "think_format": plays(*THOUGHT, *spoken("think", "|{\n\n|         | }"), last("think", "stop", 26, 4)),
    "tool": plays(calling("tool", 0, "call_yrnoeg3h", "Paris"), last("tool", "stop", 49, 18)),
    "parallel": plays(*spoken("tool2", "Let| me| check|.\n"), calling("tool2", 0, "call_4fllz4pc", "Paris"),
                      calling("tool2", 1, "call_1xjvo761", "Oslo"), last("tool2", "stop", 49, 40)),
    "logprobs": plays(*[record("hello", text, logprobs=[{
        "token": text, "logprob": 0, "bytes": [*text.encode()], "top_logprobs": [
            {"token": t, "logprob": p, "bytes": [*t.encode()]} for t, p in ((text, 0), ("!", -67.875))]}])
        for text in ("Hello", " from", " a")], last("hello", "length", 9, 3)),
    "format_schema": plays(*spoken("hello", '{"|o|k|":\n|\n| f|alse|,\n|"|n|":\n| \t|"|b|lu|e|"\n\n| |}'),
                           last("hello", "stop", 9, 28)),
    "format_anyof": plays(last("hello", "stop", 9, 40, (
        '{\n\n    "name":"a",\n               \t  \t "arguments":{\n\t\t\t    \t\t\t\t\t\t\t\t\t\t\t\t\t"x":'
        'false\n\n\t\t\t\t\t\t\t\t \t\t\t\t   \t\t\t }\n\n\t\t   \t\t\t\t\t\t\t\t\t\t\t }')), kind=WHOLE),
    "die_mid": plays(*spoken("loop", "O|ne| two| thr|ee"), DEATH),
    "die_mid_generate": plays(*spoken("loop", "O|ne| two| thr|ee", "response"), DEATH),
    "version": plays({"version": "0.0.0"}, kind=WHOLE),
    "notfound": whole("404 Not Found", "text/plain", DATE, "404 page not found", chunked=False),
    **{name: plays({"error": error}, kind=kind, status=status) for name, status, kind, error in [
        ("missing", 404, WHOLE, "model 'nosuch' not found"),
        ("badopt", 500, WHOLE, 'option "num_ctx" must be of type integer'),
        ("badfmt", 500, PARTS, 'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object'),
        ("think_bad", 400, WHOLE,
         'invalid think value: "extreme" (must be "high", "medium", "low", "max", true, or false)'),
        ("keepalive_bad", 400, WHOLE, 'time: invalid duration "soon"'),
        ("toolargs_string", 400, WHOLE, "Value looks like object, but can't find closing '}' symbol"),
        ("think_on_hello", 400, WHOLE, '"hello" does not support thinking'),
        ("tools_on_hello", 400, WHOLE, "registry.ollama.ai/library/hello:latest does not support tools"),
        ("over_trunc_false", 400, PARTS, EXCEEDED % (9009, 9009)),
        ("hist_trunc_false", 400, WHOLE, EXCEEDED % (6489, 6489)),
        ("over_shift_false", 400, PARTS, "the prompt is longer than the context length currently available "
         "to the model; shorten the prompt, adjust the context length in settings, or use a model with a "
         "longer context length"),
        ("images", 400, PARTS, '{"error":{"code":400,"message":"Multimodal data provided, but model does not '
         'support multimodal requests.","type":"invalid_request_error"}}')]},
}

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
FINAL = b'{"message":{"content":""},"done":true,"done_reason":"stop"}\n'


def says(text):
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": False}).encode() + b"\n"


# ---- The fake Ollama, the proxy and the client of the tests ------------------------------------

RESET = object()  # a step, as are bytes to send and events to wait for: break the connection by RST
HOLD = object()  # a step: do nothing until the proxy hangs up; then `left` is set


class Endless(bytes):
    """A step: say these bytes until the proxy hangs up."""
    sent = 0  # how many


def reset_on_close(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class FakeOllama:
    """Plays steps on each connection, then sends FIN. Once the proxy has hung up, `hung_up` is set."""

    def __init__(self, *steps, size=None, answers=()):
        self.steps, self.size = steps, size  # size: send pieces of so many bytes
        self.answers = list(answers)  # steps for the first connections, in their order
        self.requests = queue.Queue()  # (request line, headers, body)
        self.hung_up, self.left = threading.Event(), threading.Event()  # left: see HOLD
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.close = self.listener.close
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # it is closed
            for connection, _ in iter(self.listener.accept, None):
                threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as reader:
            connection.settimeout(DEADLINE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = list(iter(lambda: reader.readline().decode("latin-1").strip(), ""))
            headers = http.client.HTTPMessage()
            for name, _, value in (line.partition(":") for line in head[1:]):
                headers[name] = value.strip()  # unparsed, since some are odd
            if head:
                self.requests.put((head[0], headers, reader.read(int(headers.get("Content-Length", 0)))))
                self.play(connection, self.answers.pop(0) if self.answers else self.steps)
        self.hung_up.set()

    def play(self, connection, steps):
        for step in steps:
            if step is RESET:
                return reset_on_close(connection)
            if step is HOLD:
                if not connection.recv(1):
                    self.left.set()
                return
            if isinstance(step, threading.Event):
                step.wait(DEADLINE)
            elif isinstance(step, Endless):
                while True:
                    connection.sendall(step)
                    step.sent += len(step)
            else:
                size = self.size or len(step) or 1
                for i in range(0, len(step), size):
                    connection.sendall(step[i:i + size])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


DEFAULTS = vars(read_settings(["--listen", "127.0.0.1:0"], {}))


def make_settings(upstream, **changes):
    """The default settings with changes by name, on a free port."""
    settings = argparse.Namespace(**{**DEFAULTS, "upstream": parse_url(upstream)})
    assert set(changes) <= set(DEFAULTS)
    vars(settings).update(changes)
    return settings


@pytest.fixture
def start(request):
    """start(*steps, size=, answers=) -> (proxy, FakeOllama); or upstream=, a URL. The rest are settings."""
    def start(*steps, size=None, answers=(), upstream=None, **settings):
        fake = FakeOllama(*steps, size=size, answers=answers)
        request.addfinalizer(fake.close)
        server = ProxyServer(make_settings(upstream or fake.url, **settings))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.002}, daemon=True).start()

        def stop():
            server.shutdown()
            server.server_close()
            server.stopping = True  # no request may write to the log of the next test
            poll(lambda: not server.observer.counts["active_requests"])
        request.addfinalizer(stop)
        return server, fake
    return start


@pytest.fixture
def demo(start, monkeypatch):
    """A proxy in front of the demo, without its pace."""
    monkeypatch.setattr(proxy_module.DemoHandler, "pace", 0)
    return start(upstream=start_demo())[0]


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """A queue of what the proxy says on stderr; and a watchdog that looks often."""
    lines = queue.Queue()
    monkeypatch.setattr(proxy_module, "say", lines.put)
    monkeypatch.setattr(proxy_module, "TICK_SECONDS", 0.02)
    return lines


class Answer:
    """What a client got. `cut`: the body ended before its end was said."""

    def __init__(self, response):
        self.status, self.headers, self.cut = response.status, response.headers, False
        try:
            self.body = response.read()
        except http.client.IncompleteRead as error:
            self.body, self.cut = error.partial, True

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of each frame; and the form of every frame is checked."""
        assert self.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        *frames, rest = self.body.decode().split("\n\n")
        assert not rest and all(f.startswith("data: ") and len(f.splitlines()) == 1 for f in frames), frames
        return [frame[len("data: "):] for frame in frames]

    def chunks(self):
        return [json.loads(data) for data in self.events() if data != "[DONE]"]

    def deltas(self, name="content"):
        return "".join(c["delta"].get(name, "") for chunk in self.chunks() for c in chunk.get("choices", []))

    def text(self):
        """What a client would show, streamed or whole."""
        if "event-stream" in self.headers["Content-Type"]:
            assert self.events()[-1] == "[DONE]" and not self.cut
            return self.deltas()
        return self.json()["choices"][0]["message"]["content"]


def connect(server):
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=DEADLINE)


def call(server, method, path, body=None, headers=None):
    with contextlib.closing(connect(server)) as connection:
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        connection.request(method, path, data, headers or {})
        return Answer(connection.getresponse())


def chat(server, stream=True, **fields):
    return call(server, "POST", "/v1/chat/completions", {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields})


def assert_failed(answer, status=502, code=None):
    """The stream, or the whole answer, says that it failed and does not look finished."""
    if answer.status == 200:
        events = answer.events()
        error = json.loads(events[-1])
        assert not answer.cut and "[DONE]" not in events and "choices" not in error
        assert not any('"finish_reason":"' in data for data in events)
    else:
        assert answer.status == status
        error = answer.json()
    assert sorted(error["error"]) == ["code", "message", "param", "type"]
    assert code in (None, error["error"]["code"])
    return error["error"]


exec(compile("if True:" + re.sub(r"(?m)^\S.*", "", __doc__), __file__, "exec"))  # the tests above


# ---- 2. Errors -----------------------------------------------------------------------------------


END = b"0\r\n\r\n"
SAID = HEAD + chunk(says("some"))
SSE = {"Accept": "text/event-stream"}
BODY = b'{"model":"m","messages":[]}'
STREAMED = b'{"model":"m","messages":[],"stream":true}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def raw(server, data):
    """Send bytes and FIN, read until the proxy closes. It does not look for hang-ups meanwhile."""
    with mock.patch.object(proxy_module, "TICK_SECONDS", DEADLINE), socket.create_connection(
            ("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(data)
        with contextlib.suppress(OSError):  # the proxy was faster
            client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def posted(body):
    """A chat request as bytes."""
    return POST + HOST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def json_answer(value, status=200):
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        status, len(body), body)


def model_list(*ids):
    return json_answer({"object": "list", "data": [
        {"id": i, "object": "model", "created": 1795385879, "owned_by": "library"} for i in ids]})


REFUSALS = {**RECORDED, "redirect": b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
            "error line": HEAD + chunk(b'{"error":"model \'x\' not found"}\n') + END}
OVERFLOW = {"code": "context_length_exceeded", "param": "messages"}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("name, status, fields, text", [
    ("missing", 404, {"code": "model_not_found", "param": "model"}, "run `ollama pull nosuch`"),
    ("error line", 404, {"code": "model_not_found", "param": "model"}, "ollama pull x"),
    ("badopt", 400, {"code": None, "param": "options.num_ctx"}, '^option "num_ctx" must be of type integer'),
    ("badfmt", 400, {"code": None, "param": "response_format"}, "invalid format"),
    ("think_on_hello", 400, {}, "does not support thinking"),
    ("toolargs_string", 400, {"code": "upstream_error", "param": None}, "^Value looks like object"),
    ("images", 400, {"code": "upstream_error", "param": None}, "^Multimodal data provided, but model"),
    ("over_trunc_false", 400, OVERFLOW, "^This model's maximum context length is 4096 tokens.* 9009 tokens"),
    ("hist_trunc_false", 400, OVERFLOW, "6489 tokens.* options.num_ctx .* or --option num_ctx=N"),
    ("over_shift_false", 400, OVERFLOW, "num_ctx"),
    ("notfound", 502, {"code": "upstream_protocol"}, "Is that an Ollama?"),
    ("die_mid", 502, {"code": "upstream_error"}, "^an error was encountered while running the model: unexp"),
    ("redirect", 502, {"code": "upstream_protocol"}, "Is that an Ollama?"),
])
def test_refusal_keeps_its_status_and_says_what_to_do(start, stream, name, status, fields, text):
    server, _ = start(REFUSALS[name])
    answer = chat(server, stream=stream)
    error = assert_failed(answer, status)
    assert answer.status == status or answer.deltas() == "One two three"  # what came before the error
    assert {**error, **fields} == error and re.search(text, error["message"])
    assert '{"' not in error["message"]  # Ollama's text, without the JSON around it


def test_fault_of_the_proxy_itself_is_a_500_and_its_traceback_is_logged(start, monkeypatch, log):
    monkeypatch.setattr(proxy_module, "translate", lambda *_: 1 / 0)
    server, _ = start(RECORDED["length"])
    assert assert_failed(chat(server), 500)["type"] == "server_error"
    assert "ZeroDivisionError" in "\n".join(log.queue)
    monkeypatch.setattr(proxy_module.Reply, "write", mock.Mock(side_effect=proxy_module.ClientGone))
    assert raw(server, posted(BODY)) == b""  # and then it is logged, too
    poll(lambda: [json.loads(line)["status"] for line in log.queue if line[0] == "{"] == [500, 500])


# ---- 3. NDJSON in --------------------------------------------------------------------------------


def ndjson(*lines):
    """A 200 of Ollama's with these lines; a record becomes a line."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    return HEAD + chunk(b"".join(lines)) + b"0\r\n\r\n"


def test_blank_lines_crlf_and_a_missing_last_newline_change_nothing(start):
    server, _ = start(ndjson(says("a")[:-1], b"\r\n\r\n\n  ", says("b"), FINAL[:-1]))
    assert chat(server).text() == chat(server, False).text() == "ab"


BAD_LINES = {
    "array": b"[1]",
    "null": b"null",
    "half an object": b"{",
    "two objects": says("x")[:-1] + says("y")[:-1],
    "not UTF-8": b'{"message":{"content":"\xff"}}',
    "byte order mark": b"\xef\xbb\xbf" + says("x")[:-1],
    "nested too deeply": b'{"message":{},"a":' + b"[" * 100_000,
    "integer of 5000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "longer than 4 MiB": says("x" * (4 << 20))[:-1],
    "no message": b"{}",
    "message": b'{"message":"x"}',
    "thinking": b'{"message":{"thinking":[]}}',
    "tool_calls": b'{"message":{"tool_calls":{}}}',
    "call": b'{"message":{"tool_calls":[1]}}',
    "call without a name": b'{"message":{"tool_calls":[{"function":{}}]}}',
    "id of a call": b'{"message":{"tool_calls":[{"id":1,"function":{"name":"f"}}]}}',
    "arguments of a call": b'{"message":{"tool_calls":[{"function":{"name":"f","arguments":[1]}}]}}',
    "done": b'{"message":{},"done":1}',
    "logprob": b'{"message":{},"logprobs":[5]}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_line_that_is_no_object_or_of_the_wrong_shape_is_an_error(start, line):
    server, _ = start(ndjson(says("good"), line + b"\n", FINAL))
    for streamed in True, False:
        assert_failed(chat(server, streamed), 502, "upstream_protocol")


# ---- 4. SSE out ----------------------------------------------------------------------------------


def test_frame_is_one_line_whatever_the_text(start):
    texts = ["a\nb", "a\r\nb", "a\rb", "\n\n", "\u2028\x85", "\0\x0b\x0c\x1c", "data: x\n\n", "🙂", "\ud83d"]
    server, _ = start(ndjson(*map(says, texts), FINAL))
    chunks = chat(server).chunks()  # which looks at the form of each frame
    assert [c["choices"][0]["delta"]["content"] for c in chunks[1:-1]] == texts


@pytest.mark.parametrize("size", [None, 1], ids=["at once", "by bytes"])
@pytest.mark.parametrize("name, method, path", [
    ("hello", "POST", "/api/chat"),
    ("generate", "POST", "/api/generate"),
    ("die_mid_generate", "POST", "/api/generate"),  # the error is the last frame
    ("version", "GET", "/api/version"),  # not a stream, so it needs no done
])
def test_native_route_passes_bytes_or_makes_each_line_a_frame(start, size, name, method, path):
    server, _ = start(RECORDED[name], size=size)
    lines = [line for line in RECORDED[name].decode().split("\r\n") if line.startswith("{")]
    body = b"{}" if method == "POST" else None
    assert call(server, method, path, body).body.decode() == "".join(lines)
    events = call(server, method, path, body, SSE).events()
    assert events == [line.rstrip("\n") for line in lines] + ["[DONE]"] * ("error" not in lines[-1])


def test_native_refusal_passes_unchanged_unless_frames_were_asked_for(start, log):
    server, _ = start(json_answer({"error": "model 'x' not found"}, 400))
    answer = call(server, "POST", "/api/chat", {})
    assert (answer.status, answer.body) == (400, b'{"error": "model \'x\' not found"}')
    assert next_record(log)["error"] == "status_400" and "Retry-After" not in answer.headers
    assert_failed(call(server, "POST", "/api/chat", {}, SSE), 404, "model_not_found")


# ---- 5. Stream -----------------------------------------------------------------------------------


HELLO = "Hello from a tiny model: 你好 🙂 naïve.\nSecond line, with \"quotes\"."


@pytest.mark.parametrize("size", [None, 1, 7])
def test_recorded_text_goes_out_in_openais_form_however_it_is_split(start, size):
    server, fake = start(RECORDED["hello"], size=size)
    answer = chat(server, stream_options={"include_usage": True})
    assert answer.headers["Cache-Control"] == "no-cache" and answer.headers["X-Accel-Buffering"] == "no"
    assert answer.text() == HELLO and answer.headers["X-Request-Id"].startswith("req_")
    assert "Connection" not in answer.headers  # so it stays open
    assert not {"X-Accel-Buffering", "Cache-Control"} & set(chat(server, False).headers)
    chunks, whole = answer.chunks(), chat(server, False).json()
    choices = [c["choices"][0] for c in chunks[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(c["delta"]) == ["content"] for c in choices[1:-1])
    assert choices[-1] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    message = {"role": "assistant", "content": HELLO}
    assert whole["choices"] == [{"index": 0, "finish_reason": "stop", "message": message}]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"] == {
        "prompt_tokens": 9, "completion_tokens": 27, "total_tokens": 36}
    for c in [*chunks, whole]:
        assert c["object"] == ("chat.completion" if c is whole else "chat.completion.chunk")
        assert c["model"] == "m" and isinstance(c["created"], int)
        assert c["system_fingerprint"] == "fp_ollama" and re.fullmatch(r"chatcmpl-\w{16,}", c["id"])
    assert {c["id"] for c in chunks} == {chunks[0]["id"]} != {whole["id"]}
    assert fake.hung_up.wait(DEADLINE)


@pytest.mark.parametrize("asked", [None, False, True])
def test_stream_says_its_usage_only_if_asked_and_a_cached_prompt_counts_as_0(start, asked):
    server, _ = start(ndjson({"message": {}, "done": True, "eval_count": 3}))
    usage = {"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 3}
    chunks = chat(server, stream_options={"include_usage": asked}).chunks()
    assert [c["usage"] for c in chunks if "usage" in c] == [usage] * bool(asked)
    assert chat(server, False).json()["usage"] == usage


def both(start, answer, **fields):
    """What Ollama's answer becomes: the choices of the stream, and the one of the whole answer."""
    server, _ = start(answer)
    streamed = [c["choices"][0] for c in chat(server, **fields).chunks()]
    return streamed, chat(server, False, **fields).json()["choices"][0]


def test_recorded_thinking_goes_out_under_both_names(start):
    streamed, whole = both(start, RECORDED["think"])
    for name in "reasoning", "reasoning_content", "content":
        text = "Forty two, of course!" if name == "content" else "Let me consider it carefully.\n"
        assert "".join(c["delta"].get(name, "") for c in streamed) == whole["message"][name] == text


def calls(*ids, **message):
    """A record that calls f once for each id; "" is a call without an id."""
    function = {"index": 0, "name": "f", "arguments": {"a": 2 ** 64}}
    tool_calls = [{"id": i, "function": function} if i else {"function": function} for i in ids]
    return {"message": {**message, "tool_calls": tool_calls}}


def test_each_part_of_a_record_is_a_delta_and_calls_are_numbered_over_the_whole_stream(start):
    lines = ndjson(calls("a", "", thinking="t", content="c"), calls("a", "b"), FINAL)
    streamed, whole = both(start, lines)
    assert [sorted(c["delta"]) for c in streamed[:4]] == [
        ["content", "role"], ["reasoning", "reasoning_content"], ["content"], ["tool_calls"]]
    sent = [call for c in streamed for call in c["delta"].get("tool_calls", [])]
    assert [call["index"] for call in sent] == [0, 1, 2, 3]
    assert sent[0] == {"index": 0, "id": "a", "type": "function", "function": {
        "name": "f", "arguments": '{"a":18446744073709551616}'}}
    ids = [call["id"] for call in sent]
    assert len(set(ids)) == 4 and ids[3] == "b"
    assert all(0 < len(i) <= 40 for i in ids)  # OpenAI's limit, when they come back
    functions = [call["function"] for call in whole["message"]["tool_calls"]]
    assert functions == [call["function"] for call in sent] and whole["message"]["content"] == "c"


@pytest.mark.parametrize("fields, reason, count, expected", [
    ({"parallel_tool_calls": True}, "stop", 3, "tool_calls"),
    ({"parallel_tool_calls": False}, "length", 1, "length"),
    ({"tool_choice": "none"}, "stop", 0, "stop"),
    ({"tool_choice": "none"}, "length", 0, "length"),
    ({"tool_choice": "none"}, "load", 0, "stop"),
    ({"tool_choice": "none"}, None, 0, "stop"),
], ids=str)
def test_client_gets_the_calls_and_the_finish_reason_it_expects(start, fields, reason, count, expected):
    lines = ndjson(says("Hm."), calls("a", "b"), {**calls("c"), "done": True, "done_reason": reason})
    streamed, whole = both(start, lines, tools=[function()], **fields)
    assert len(whole["message"].get("tool_calls", [])) == count
    assert (whole["message"]["content"], whole["finish_reason"]) == ("Hm.", expected)
    assert [c["finish_reason"] for c in streamed] == [None] * (count + 2) + [expected]


def test_logprobs_go_out_with_all_members_that_openai_has(start):
    hello = {"token": "Hello", "logprob": 0, "bytes": [72, 101, 108, 108, 111], "top_logprobs": [
        {"token": "!", "logprob": -67.875, "bytes": [33]}]}
    other = {"token": "", "logprob": -1}
    streamed, whole = both(start, ndjson({"message": {"content": "Hello"}, "logprobs": [hello]},
                                         {"message": {"content": ""}, "logprobs": [other]}, FINAL))
    content = [hello, {**other, "bytes": None, "top_logprobs": []}]
    assert [c["logprobs"]["content"] for c in streamed[1:-1]] == [[token] for token in content]
    assert whole["logprobs"] == {"refusal": None, "content": content}


@pytest.mark.parametrize("answer, text, functions, reason", [
    (RECORDED["format_anyof"], None, [{"name": "a", "arguments": '{"x":false}'}], "tool_calls"),
    (ndjson(says('{"name": '), says('"g"}'), FINAL), None, [{"name": "g", "arguments": "{}"}], "tool_calls"),
    (ndjson(says('{"name": "g'), FINAL), '{"name": "g', [], "length"),
    (ndjson(says('{"name": "g'), FINAL.replace(b"stop", b"length")), '{"name": "g', [], "length"),
], ids=["recorded", "without arguments", "cut", "cut by its length"])
def test_forced_call_is_the_whole_content_and_stays_text_if_cut(start, answer, text, functions, reason):
    streamed, whole = both(start, answer, tools=[function()], tool_choice="required")
    assert [c["finish_reason"] for c in streamed] == [None, None, reason] and whole["finish_reason"] == reason
    for part in streamed[1]["delta"], whole["message"]:
        assert [call["function"] for call in part.get("tool_calls", [])] == functions
        assert part.get("content") == text


# ---- 6. Request ----------------------------------------------------------------------------------


def native(start, **fields):
    """What goes up for a chat with these fields, of which none is ignored."""
    server, fake = start(RECORDED["length"])
    answer = chat(server, False, **fields)
    assert answer.status == 200 and "X-Ignored-Fields" not in answer.headers, answer.body
    return json.loads(fake.requests.get(timeout=DEADLINE)[2])


@pytest.mark.parametrize("truncate", [False, True])
def test_chat_goes_up_streamed_and_uncut_and_unknown_fields_are_named(start, truncate):
    server, fake = start(RECORDED["length"], allow_truncation=truncate)
    answer = chat(server, False, colour="red", messages=[{"role": "system", "content": "x", "mood": 1}])
    assert answer.headers["X-Ignored-Fields"] == "colour, messages[0].mood"
    line, headers, body = fake.requests.get(timeout=DEADLINE)
    assert line == "POST /api/chat HTTP/1.1" and headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"model": "m", "messages": [{"role": "system", "content": "x"}],
                                "stream": True, "truncate": truncate, "options": {}}


def function(name="f", **members):
    return {"type": "function", "function": {"name": name, **members}}


EFFORTS = dict(none=False, minimal="low", low="low", medium="medium", high="high", xhigh="max", max="max")
SCHEMA = {"$defs": {"x": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}


@pytest.mark.parametrize("fields, name, value", [
    ({"model": "other"}, "model", "other"),
    ({"max_tokens": 5, "options": {"num_predict": 9}}, "options", {"num_predict": 5}),
    ({"max_completion_tokens": 6, "max_tokens": 5}, "options", {"num_predict": 6}),
    ({"temperature": 0, "options": {"temperature": 1}}, "options", {"temperature": 0}),
    ({"stop": "x"}, "options", {"stop": ["x"]}),
    *[({"reasoning_effort": effort, "think": True}, "think", think) for effort, think in EFFORTS.items()],
    ({"reasoning": {"effort": "high"}}, "think", "high"),
    ({"reasoning": {"summary": "auto"}}, "think", "absent"),
    ({"response_format": {"type": "text"}, "format": "json"}, "format", ""),
    ({"response_format": {"type": "json_object"}}, "format", "json"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "format", SCHEMA),
    ({"tools": [function()], "tool_choice": "auto"}, "tools", [function()]),
    ({"tools": [function()], "tool_choice": "none"}, "tools", "absent"),
], ids=str)
def test_field_goes_up_under_ollamas_name_and_in_its_form(start, fields, name, value):
    assert repr(native(start, **fields).get(name, "absent")) == repr(value)


HINTS = {"n": 1, "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k",
         "prompt_cache_options": {}, "prompt_cache_retention": "24h", "verbosity": "low",
         "prediction": {"type": "content", "content": "x"}, "service_tier": "auto", "store": False,
         "logit_bias": {}, "function_call": None, "functions": [], "modalities": ["text"]}


def test_own_fields_of_ollama_go_up_unchanged_and_hints_and_null_have_no_effect(start):
    own = {"keep_alive": "5m", "think": "high", "format": "json", "truncate": True, "shift": False,
           "logprobs": True, "top_logprobs": 2}
    options = {"top_p": 0.5, "seed": 7, "presence_penalty": -1, "frequency_penalty": 1.5, "num_ctx": 4096,
               "num_predict": 3, "num_keep": 4, "num_batch": 8, "num_gpu": 0, "main_gpu": 1, "num_thread": 2,
               "repeat_last_n": 64, "top_k": 40, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.1,
               "use_mmap": False, "stop": ["x", "y"]}
    expected = {**native(start), **own, "options": {**options, "new": 1}}
    nulls = dict.fromkeys(["temperature", "tools", "response_format"])
    assert native(start, **own, **options, options={"new": 1}, **HINTS, **nulls) == expected
    assert native(start, **own, options={**options, "new": 1}) == expected


def test_each_message_stays_one_in_its_place_and_results_find_their_calls(start):
    assert native(start, messages=[
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [
            {"type": "text", "text": "What is "},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw==", "detail": "low"}},
            {"type": "image_url", "image_url": "data:image/jpeg;base64,AAAA"},
            {"type": "text", "text": "this?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "refusal": None, "tool_calls": [
            {"id": f"c{i}", **function(f"f{i}", arguments=a)}
            for i, a in enumerate(['{"city":"Paris"}', "", "not json", "[1]"])]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ])["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is this?", "images": ["iVBORw==", "AAAA"]},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [
            {"id": f"c{i}", "function": {"index": i, "name": f"f{i}", "arguments": a}}
            for i, a in enumerate([{"city": "Paris"}, {}, {}, {}])]},
        {"role": "tool", "tool_call_id": "c1", "tool_name": "f1", "content": "sunny"},
    ]


def test_forced_call_goes_up_as_a_format_whose_references_still_hold(start):
    def schema(name, root="#"):
        return {"properties": {name: {"$ref": root + "/$defs/T"}}, "$defs": {"T": {"type": "string"}}}
    tools = [function(name, parameters=schema(name)) for name in "fg"]
    moved = [schema(name, f"#/$defs/{i}") for i, name in enumerate("fg")]
    forced = [{"type": "object", "required": ["name", "arguments"], "properties": {
        "name": {"const": name}, "arguments": {"$ref": f"#/$defs/{i}"}}} for i, name in enumerate("fg")]
    sent = native(start, tools=tools, tool_choice="required")
    assert sent["format"] == {"anyOf": forced, "$defs": {"0": moved[0], "1": moved[1]}}
    assert "tools" not in sent and [m["role"] for m in sent["messages"]] == ["user", "system"]
    assert [json.loads(s)["name"] for s in sent["messages"][1]["content"].splitlines()[1:]] == ["f", "g"]
    sent = native(start, tools=tools[::-1], tool_choice=function("f"))
    assert sent["format"] == {**forced[0], "$defs": {"0": moved[0]}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name, field, status, asked", [
    ("think_on_hello", {"reasoning_effort": "high"}, 200, [True, False]),
    ("think_on_hello", {"think": True}, 400, [True]),
    ("missing", {"reasoning_effort": "high"}, 404, [True]),
], ids=str)
def test_effort_is_left_out_for_a_model_that_cannot_think(start, stream, name, field, status, asked):
    server, fake = start(RECORDED["length"], answers=[[RECORDED[name]]])
    answer = chat(server, stream, **field)
    assert answer.status == status
    assert ["think" in json.loads(body) for _, _, body in fake.requests.queue] == asked
    assert answer.headers["X-Ignored-Fields"] == ("reasoning_effort" if status == 200 else None)


def said(*parts, **members):
    """The field `messages` with one message."""
    return {"messages": [{"role": "user", "content": list(parts), **members}]}


UNSUPPORTED = {"store": True, "logit_bias": {"50256": -100}, "audio": {"voice": "x"}, "moderation": {"a": 1},
               "modalities": ["text", "audio"], "web_search_options": {"a": 1}, "functions": [{"name": "f"}],
               "function_call": "auto", "n": 2}
WRONG = {"model": 1, "messages": {}, "stream": "yes", "stream_options": True, "max_tokens": "9", "top_p": [],
         "max_completion_tokens": 1.5, "temperature": "hot", "seed": 1.5, "num_ctx": True, "stop": 5,
         "tools": {}, "reasoning_effort": "huge", "response_format": "json", "options": [], "keep_alive": [],
         "think": 1, "truncate": 1, "tool_choice": "required"}
FORMAT, TOOL, MESSAGE = "response_format", "tools[0].function", "messages[0]"
CALL, PART = "messages[0].tool_calls[0]", "messages[0].content[0]"


@pytest.mark.parametrize("param, fields", [
    *[(name, {name: None}) for name in ("model", "messages")],
    *[(name, {name: value}) for table in (UNSUPPORTED, WRONG) for name, value in table.items()],
    *[("tool_choice", {"tools": [function()], "tool_choice": wish}) for wish in ("always", function("g"))],
    ("stream_options.include_usage", {"stream_options": {"include_usage": "yes"}}),
    (FORMAT + ".type", {FORMAT: {"type": "xml"}}),
    (FORMAT + ".json_schema", {FORMAT: {"type": "json_schema"}}),
    (FORMAT + ".json_schema.schema", {FORMAT: {"type": "json_schema", "json_schema": {"name": "n"}}}),
    ("tools[0]", {"tools": [1]}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    (TOOL, {"tools": [{"type": "function"}]}),
    (TOOL + ".name", {"tools": [function("")]}),
    *[(TOOL + ".parameters", {"tools": [function(parameters=value)]}) for value in ("x", [], False)],
    (MESSAGE, {"messages": ["hi"]}),
    (MESSAGE + ".role", {"messages": [{"content": "hi"}]}),
    (MESSAGE + ".role", said(role="function", name="f")),
    (MESSAGE + ".content", said(content=1)),
    (MESSAGE + ".function_call", said(function_call={"name": "f"})),
    (CALL + ".id", said(role="assistant", tool_calls=[function()])),
    (CALL + ".function", said(role="assistant", tool_calls=[{"id": "c"}])),
    (CALL + ".function.arguments", said(role="assistant", tool_calls=[{"id": "c", **function(arguments=1)}])),
    (PART + ".type", said({"type": "input_audio", "input_audio": {"data": "AAAA"}})),
    (PART + ".text", said({"type": "text", "text": 1})),
    (PART + ".image_url", said({"type": "image_url"})),
    *[(PART + ".image_url", said({"type": "image_url", "image_url": {"url": url}})) for url in (
        "https://example.com/x.png", "file:///etc/passwd", "data:image/png;base64,!!!!",
        "data:image/png;base64,AAA", "data:image/svg+xml;base64,AAAA", "data:image/png,AAAA")],
], ids=str)
def test_field_that_cannot_be_obeyed_is_a_400_that_names_it(start, param, fields):
    server, fake = start()
    body = {name: v for name, v in {"model": "m", "messages": [], **fields}.items() if v is not None}
    error = assert_failed(call(server, "POST", "/v1/chat/completions", body), 400)
    assert error["param"] == param and param in error["message"] and fake.requests.empty()


@pytest.mark.parametrize("path, body, headers, status, hint", [
    *[("/v1/chat/completions", body, {}, 400, "JSON") for body in (
        b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000, BODY[:-1] + b',"top_p":NaN}')],
    ("/v1/chat/completions", b"{}", {"Content-Encoding": "zstd"}, 415, "Content-Encoding"),
    *[("/v1/embeddings", body, {}, 400, "check_embedding_ctx_length=False") for body in (
        b'{"input":[1,2]}', b'{"input":[[1,2]]}')],
], ids=lambda value: ascii(value)[-60:])
def test_body_that_cannot_be_used_is_refused_with_a_reason(start, path, body, headers, status, hint):
    server, fake = start(json_answer({"error": "invalid input type"}, 400))
    answer = call(server, "POST", path, body, {"Content-Length": str(len(body)), **headers})
    error = assert_failed(answer, status)
    assert hint in error["message"] and error["type"] == "invalid_request_error"
    assert fake.requests.empty() or path == "/v1/embeddings"


@pytest.mark.parametrize("depth", range(200, 3000, 200))
def test_schema_that_is_nested_ever_deeper_goes_up_or_is_a_400(start, depth):
    server, _ = start(RECORDED["length"])
    tool = json.dumps(function(parameters={"a": 7})).replace("7", "[" * depth + "]" * depth)
    body = b'{"model":"m","messages":[],"tool_choice":"required","tools":[%b]}' % tool.encode()
    assert call(server, "POST", "/v1/chat/completions", body).status in (200, 400)


@pytest.mark.parametrize("name", ["child", "default", "const", "enum", "examples", "$ref", "properties"])
def test_reference_to_the_whole_schema_goes_up_as_one_to_its_new_place(start, name):
    groups = "properties", "patternProperties", "$defs", "definitions", "dependentSchemas"
    schema = {group: {name: {"$ref": "#"}, "list": {"anyOf": [{"$ref": "#"}]}} for group in groups}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in "fg"]
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for fields in {"tools": tools}, {"tools": tools[:1]}, {"response_format": wrapped}:
        found = native(start, **fields, **{"tool_choice": "required"} if "tools" in fields else {})["format"]
        places = re.findall(r'"\$ref": "#(.*?)"', json.dumps(found))
        assert len(places) > 1 and all(places)
        for place in places:
            target = found
            for step in place.split("/")[1:]:
                target = target[step]
            assert "list" in target["properties"]


# ---- 7. Waiting for Ollama -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("ending", [(), (RESET,)], ids=["FIN", "RST"])
def test_answer_cut_after_every_single_byte_never_looks_finished(start, ending, stream):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    recording = head + chunk(says("Hi")) + chunk(FINAL) + END
    body, end = recording.index(b"\r\n\r\n") + 4, recording.index(b"\n", recording.index(b'"done":true')) + 1
    server, fake = start()
    for i in range(end):
        fake.steps = (recording[:i], *ending)
        assert_failed(chat(server, stream=stream), 502, "upstream_cut" if i == 0 or i >= body else None)
    for i in range(end, len(recording)):
        fake.steps = (recording[:i],)  # by RST the line itself may be lost
        assert chat(server, stream=stream).text() == "Hi"


WITHOUT_CHUNKS = HEAD.replace(b"Transfer-Encoding: chunked", b"%b") + says("some")
BROKEN_ANSWERS = {
    "good end without done": ("upstream_cut", SAID + END),
    "good end within a line": ("upstream_cut", SAID + chunk(b'{"message":{"content":"cut in the mid') + END),
    "end before the Content-Length": ("upstream_cut", WITHOUT_CHUNKS % b"Content-Length: 999"),
    "end of unknown length": ("upstream_protocol", WITHOUT_CHUNKS % b"Connection: close"),
    "end within the head": ("upstream_protocol", HEAD[:40]),
    "another head to come": ("upstream_protocol", b"HTTP/1.1 103 x\r\n\r\n" + HEAD + chunk(FINAL) + END),
    "no HTTP": ("upstream_protocol", b"garbage\r\n\r\n"),
    "200 with HTML": (None, b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>"),
    "chunk size that is no number": ("upstream_cut", SAID + b"xyz\r\n"),
    "negative chunk size": (None, SAID + b"-5\r\nabc\r\n"),
    "line that is no JSON": ("upstream_protocol", SAID + chunk(b"<html>\n")),
    "line without end": ("upstream_protocol", SAID + chunk(b"x" * (5 << 20))),
    "done that is no boolean": (None, SAID + chunk(FINAL.replace(b"true", b'"false"')) + END),
    "silence": ("upstream_timeout", HOLD),
    "silence after a record": ("upstream_timeout", SAID, HOLD),
}


@pytest.mark.parametrize("how", ["stream", "whole", "frames"])
@pytest.mark.parametrize("case", BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS)
def test_upstream_that_is_cut_garbled_or_silent_never_looks_finished(start, how, case):
    code, *steps = case
    server, _ = start(*steps, idle_timeout=0.1 if HOLD in steps else DEADLINE)
    answer = call(server, "POST", "/api/chat", {}, SSE) if how == "frames" else chat(server, how == "stream")
    assert_failed(answer, 504 if HOLD in steps else 502, code)


def mutated(rng, data):
    """The same bytes with a few changes: some replaced, left out, put in, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at, size = rng.randrange(len(data)), rng.choice([1, 1, 1, 5, 40])
        new = rng.choice([b"", b"\r\n", b"\n", b"0", b"\xff", b'"', b"{", b"\0", b"-1", b"1" * 30])
        data[at:at + rng.choice([0, size])] = new
    return bytes(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data)


@pytest.mark.parametrize("name", ["hello", "length", "tool", "die_mid", "missing", "hello_whole"])
def test_random_upstream_answer_ends_well_or_says_an_error(start, log, name):
    rng, (server, fake) = random.Random(name), start(idle_timeout=0.2)
    for i in range(60):
        fake.steps = (mutated(rng, RECORDED[name]), *rng.choice([(), (RESET,)]))
        answer = chat(server, stream=i % 2 == 0)
        if answer.status != 200 or b'{"error":' in answer.body:
            assert_failed(answer, answer.status)
        else:
            answer.text()  # checks that it is whole
            assert answer.body.count(b'"finish_reason":"') == 1
    assert "Traceback" not in "".join(log.queue), "\n".join(log.queue)[-3000:]


def test_upstream_that_is_not_there_is_a_502_whose_address_only_the_log_has(start, log):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server, _ = start(upstream=f"http://127.0.0.1:{port}")
    error = assert_failed(chat(server), 502, "upstream_unreachable")
    assert "ollama serve" in error["message"] and str(port) not in error["message"]
    assert f"http://127.0.0.1:{port}: " in log.get(timeout=DEADLINE)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a reset hides what came before it")
def test_refusal_that_ends_the_upload_with_a_reset_is_passed_on(start):
    server, fake = start()

    def refuse(connection):
        with connection:
            connection.recv(10)
            connection.sendall(json_answer({"error": "too large for Ollama"}, 400))
    fake.serve = refuse
    answer = chat(server, messages=[{"role": "user", "content": "x" * (8 << 20)}])
    assert assert_failed(answer, 400)["message"] == "too large for Ollama"


def test_upstream_that_does_not_take_the_request_is_a_504(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(proxy_module, "CONNECT_SECONDS", 99)
    server, fake = start(idle_timeout=0.1)
    fake.serve = lambda connection: fake.left.wait(DEADLINE)
    assert_failed(chat(server, **said({"type": "text", "text": "x" * (16 << 20)})), 504, "upstream_timeout")
    fake.left.set()


class Client(contextlib.AbstractContextManager):
    """A client's bare socket: the test says what it sends when, and how it goes away."""

    def __init__(self, server, path="/v1/chat/completions", method="POST", headers=(), **fields):
        self.socket = socket.create_connection(("127.0.0.1", server.server_port), DEADLINE)
        if path:
            self.ask(path, method, headers, **fields)

    def ask(self, path="/v1/chat/completions", method="POST", headers=(), **fields):
        fields = {"model": "m", "messages": [], "stream": True, **fields}
        body = json.dumps(fields) if method == "POST" else ""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
        self.socket.sendall("\r\n".join([*lines, "", body]).encode())

    def read_until(self, end, times=1):
        """What comes, until it has this text so many times, or to the end of the connection."""
        seen = b""
        while seen.count(end) < times and (more := self.socket.recv(65536)):
            seen += more
        return seen

    def leave(self, ending="FIN"):
        if ending == "RST":
            reset_on_close(self.socket)
        self.socket.close()

    def __exit__(self, *_):
        self.leave()


def poll(condition):
    """Wait until it is true."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the time is up"
        threading.Event().wait(0.01)


@pytest.fixture(params=["POLLRDHUP", "peek"])
def looks(request, monkeypatch):
    """Both ways to see a hang-up: that of Linux, and that of all others."""
    if request.param == "peek":
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)


@pytest.mark.parametrize("ending", ["FIN", "RST"])
@pytest.mark.parametrize("said", [b"", HEAD, SAID], ids=["before the head", "after it", "in the answer"])
@pytest.mark.parametrize("path, form", [
    ("/v1/chat/completions", "stream"), ("/v1/chat/completions", "whole"), ("/v1/models", "whole"),
    ("/v1/embeddings", "whole"), ("/api/chat", "stream"), ("/api/chat", "frames")])
def test_client_that_goes_away_closes_the_upstream_connection(start, looks, path, form, said, ending):
    server, fake = start(said, HOLD)
    client = Client(server, path, "GET" if path == "/v1/models" else "POST", stream=form != "whole",
                    headers=["Accept: text/event-stream"] if form == "frames" else [])
    fake.requests.get(timeout=DEADLINE)
    if said == SAID and form != "whole":
        client.read_until(b"some")
    client.leave(ending)
    assert fake.left.wait(DEADLINE)
    poll(lambda: b"client_hangups_total 1\n" in call(server, "GET", "/metrics").body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "forced call"])
def test_client_that_goes_away_is_noticed_although_ollama_talks_and_nothing_is_sent(start, stream):
    server, fake = start(HEAD, Endless(chunk(says("a"))))
    client = Client(server, stream=stream, tools=[function()], tool_choice="required")
    fake.requests.get(timeout=DEADLINE)
    client.leave()
    poll(lambda: b"client_hangups_total 1\n" in call(server, "GET", "/metrics").body)
    assert fake.hung_up.wait(DEADLINE)
    assert stream or b'/completions",status="499"} 1\n' in call(server, "GET", "/metrics").body


def test_forced_call_gets_heartbeats_although_ollama_talks(start):
    server, _ = start(HEAD, Endless(chunk(says("a"))), heartbeat=0.1)
    with Client(server, tools=[function()], tool_choice="required") as client:
        assert client.read_until(b'"delta":{}', 2).count(b"data: ") >= 3


@pytest.mark.parametrize("said", [SAID, b"HTTP/1.1 404 x\r\nContent-Length: 100\r\n\r\n{"],
                         ids=["an answer", "a refusal"])
def test_thousand_clients_that_go_away_leave_nothing_behind(start, log, request, said):
    rng, (server, fake), threads = random.Random(7), start(said, HOLD), threading.active_count()

    def left_after(count):
        clients = [Client(server, stream=rng.random() < 0.7) for _ in range(count)]
        for _ in clients:
            fake.requests.get(timeout=DEADLINE)
        for client in clients:
            client.leave(rng.choice(["FIN", "RST"]))
        poll(lambda: threading.active_count() <= threads)
        log.queue.clear()
        descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        gc.collect()
        return descriptors, len(gc.get_objects())
    request.addfinalizer(gc.enable)
    gc.disable()  # what is not closed stays open: the garbage collector does not come to help
    before, *_, after = [left_after(100) for _ in range(6)]  # and as many in the other case
    assert after[0] <= before[0] and after[1] < before[1] + 500


def test_heartbeats_come_before_the_first_record_and_an_early_next_request_is_no_hang_up(start, looks):
    more = threading.Event()
    server, _ = start(more, SAID, chunk(FINAL) + b"0\r\n\r\n", heartbeat=0.01)
    with Client(server, "/v1/chat/completions?trace=1", stop="x" * 9000) as client:
        seen = client.read_until(b'"delta":{}')  # so the proxy has read the first request
        client.ask()
        seen += client.read_until(b'"delta":{}', 2)
        assert b": POST /api/chat {" in seen  # the trace need not wait for the first record, either
        more.set()
        seen, _, later = (seen + client.read_until(b"[DONE]", 2)).partition(b"[DONE]")
    assert b"[DONE]" in later and seen.count(b": POST") == 1
    frames = [json.loads(text) for text in re.findall(rb"^data: (\{.*\})$", seen, re.MULTILINE)]
    choices = [(frame["choices"][0]["delta"], frame["choices"][0]["finish_reason"]) for frame in frames]
    assert choices[1:3] == [({}, None)] * 2
    assert [choice for choice in choices if choice != ({}, None)] == [
        ({"role": "assistant", "content": ""}, None), ({"content": "some"}, None), ({}, "stop")]
    assert len({frame["id"] for frame in frames}) == 1


@pytest.mark.parametrize("path, beat", [
    ("/v1/chat/completions", '"delta":{}'), ("/api/chat", ": heartbeat\n\n")])
def test_failure_after_a_heartbeat_is_an_error_frame(start, path, beat):
    for code, before, after in ("model_not_found", b"", RECORDED["missing"]), ("upstream_cut", HEAD, b""):
        more = threading.Event()
        server, _ = start(before, more, after, heartbeat=0.01)
        with Client(server, path, headers=["Accept: text/event-stream"]) as client:
            seen = client.read_until(beat.encode())
            more.set()
            seen = (seen + client.read_until(b"\r\n0\r\n\r\n")).decode()
        assert seen.startswith("HTTP/1.1 200 ") and beat in seen
        assert f'"code":"{code}"' in seen and "[DONE]" not in seen


def test_heartbeat_of_0_sends_none_so_that_a_late_failure_has_its_status(start):
    server, _ = start(HOLD, heartbeat=0, idle_timeout=0.3)
    assert chat(server).status == 504


def test_whole_answer_or_line_that_never_ends_is_refused_at_the_cap(start, monkeypatch, log):
    monkeypatch.setattr(proxy_module, "MAX_BODY_BYTES", 10_000)
    server, fake = start(HEAD, chunk(b"x" * 1000) * 20)
    assert call(server, "POST", "/api/chat", {}).status in (200, 502)
    assert next_record(log)["error"] == "upstream_protocol"
    fake.steps = (HEAD, chunk(says("x" * 1000)) * 20)
    assert_failed(chat(server, stream=False), 502, "upstream_protocol")
    assert_failed(chat(server, tools=[function("f")], tool_choice="required"), 502, "upstream_protocol")
    fake.steps = (HEAD, chunk(says("x" * 1000)) * 20 + chunk(FINAL))
    assert len(chat(server).text()) == 20_000  # it is not collected


LINES, EVENTS, CUT = "application/x-ndjson", "text/event-stream", "upstream cut"
EVENT = b"event: %b\ndata: {}\n\n"
CONTEXT = json.dumps({"done": True, "context": list(range(5000)), "eval_count": 7}).encode()
ODD_COUNTS = FINAL[:-2] + b',"eval_count":true,"eval_count":-5,"eval_count":1.5,"eval_count":"5"}'
USAGE = b'{"done":false,"usage":{"input_tokens":9,"output_tokens":7}}'
# None of these is an end mark.
OTHER_LINES = says('"done":true}\n') + b'{"done":"true"}\n[{"done":true}]\n' + (
    b'{"message":{"tool_calls":[{"function":{"arguments":{"done":true,"error":"no"}}}]}}\n')
OTHER_EVENTS = b'data: event: message_stop data: [DONE]\n\nevent: message_stopped\n\ndata: "[DONE]"\n\n'
ENDINGS = {
    "lines, done": ("/api/generate", LINES, says("a") + CONTEXT, "done"),
    "lines, odd counts": ("/api/chat", LINES, ODD_COUNTS, "done"),
    "lines, cut in the last": ("/api/chat", LINES, says("a") + CONTEXT[:-9], CUT),
    "lines, not done": ("/api/chat", "Application/X-NDJSON; charset=utf-8", OTHER_LINES, CUT),
    "lines, error": ("/api/chat", LINES, says("a") + b'{"error":"died"}\n', "error"),
    "messages, stop": ("/v1/messages", EVENTS, EVENT.replace(b"\n", b"\r\n") % b"message_stop", "done"),
    "messages, no stop": ("/v1/messages", "TEXT/Event-Stream ;x", OTHER_EVENTS, CUT),
    "messages, no blank line": ("/v1/messages", EVENTS, (EVENT % b"message_stop")[:-1], CUT),
    "messages, error": ("/v1/messages", EVENTS, OTHER_EVENTS + EVENT % b"error", "error"),
    "responses, completed": ("/v1/responses", EVENTS, EVENT % b"response.completed\ndata: {}", "done"),
    "responses, incomplete": ("/v1/responses", EVENTS, EVENT % b"response.incomplete", "done"),
    "responses, failed": ("/v1/responses", EVENTS, EVENT % b"response.failed", "error"),
    "completions, DONE": ("/v1/completions", EVENTS, OTHER_EVENTS + b"data: [DONE]\n\n", "done"),
    "completions, no newline": ("/v1/completions", EVENTS, OTHER_EVENTS + b"data: [DONE]", CUT),
    "JSON": ("/v1/messages", "application/json; charset=utf-8", USAGE, "done"),
    "nothing": ("/v1/audio/transcriptions", "text/plain", b"", CUT),
    "page": ("/v1/audio/transcriptions", "text/html \x01", b"<script>", "done"),
}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("path, kind, body, end", ENDINGS.values(), ids=ENDINGS)
def test_passed_answer_is_complete_only_with_its_end_mark(start, log, size, path, kind, body, end):
    server, _ = start(HEAD.replace(LINES.encode(), kind.encode()) + chunk(body) + END, size=size)
    answer, record = call(server, "POST", path, {"model": "m"}), next_record(log)
    if answer.status == 502:  # nothing was sent before the cut was seen
        answer.body, answer.cut = body, assert_failed(answer)["code"] == "upstream_cut"
    assert (answer.body, answer.cut, record["end"]) == (body, end == CUT, end)
    assert "nosniff" in answer.headers.values() and "\x01" not in str(answer.headers)
    assert ("error" in record) == (end != "done")
    assert record.get("completion_tokens") == (7 if body.endswith((CONTEXT, USAGE)) else None)
    assert record.get("prompt_tokens") == (9 if body == USAGE else None)
    assert ("first_token_seconds" in record) == ("audio" not in path and body not in (b"", USAGE))


@pytest.mark.parametrize("status, body, expected, text", [
    (404, b'{"error":"not here"}', 404, "not here"), (500, b'{"error":{}}', 500, ""), (500, b"", 502, ""),
    (429, b'{"error":{"message":"bad"}}', 429, "bad"),
    (404, b"404 page not found", 502, "404 page not found")])
def test_refusal_of_any_form_is_openais_error_on_openais_routes(start, status, body, expected, text):
    retry = b"Retry-After: 7\r\n" * (status == 429)
    server, _ = start(b"HTTP/1.1 %d x\r\n%bContent-Length: %d\r\n\r\n%b" % (status, retry, len(body), body))
    for name in "completions", "embeddings", "responses", "messages", "audio/transcriptions":
        answer = call(server, "POST", "/v1/" + name, b"{}")
        assert text in assert_failed(answer, expected)["message"]
        assert answer.headers["Retry-After"] == ("7" if retry else None)


@pytest.mark.parametrize("text", ["unsupported $ref #", "failed to parse grammar", "invalid JSON schema"])
def test_schema_that_ollama_refuses_is_a_400_that_names_the_field_it_came_from(start, text):
    server, _ = start(json_answer({"error": text}, 500))
    for fields in ({"format": {"type": "object"}}, {"tools": [function()], "tool_choice": "required"},
                   {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}):
        error = assert_failed(chat(server, **fields), 400)
        assert error["param"] in fields and list(fields)[0] in error["message"]


@pytest.mark.parametrize("num_ctx, longer", [(None, True), (4096, True), (4097, False)])
def test_overflow_advises_to_raise_num_ctx_only_while_that_can_help(start, num_ctx, longer):
    server, _ = start(RECORDED["over_trunc_false"])
    message = assert_failed(chat(server, num_ctx=num_ctx), 400, "context_length_exceeded")["message"]
    assert ("options.num_ctx" in message and "--option num_ctx=" in message) == longer, message


@pytest.mark.parametrize("count", ["true", "-5", "9" * 400, "1.5", '"5"', "[]", "1e3"], ids=lambda c: c[:9])
def test_token_count_that_is_no_count_is_a_breach_of_protocol(start, log, count):
    server, _ = start(HEAD + chunk(FINAL[:-2] + b',"eval_count":%b}\n' % count.encode()) + END)
    assert_failed(chat(server), 502, "upstream_protocol")
    assert "completion_tokens" not in next_record(log)


@pytest.mark.parametrize("number", [24, 23], ids=["EMFILE", "ENFILE"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/api/chat"])
def test_lack_of_descriptors_is_a_503_to_try_again(start, monkeypatch, path, number):
    connect = mock.Mock(side_effect=OSError(number, "Too many open files"))
    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)  # that of `call`, too
    answer = raw(start()[0], POST.replace(b"/v1/chat/completions", path) + HOST + LENGTH + b"\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: " in answer and b"reach" not in answer


# ---- 8. Authenticate, shape, observe -------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_clients_keys_never_reach_the_upstream(start, path):
    server, fake = start(RECORDED["length"])
    keys = {"Authorization": "Bearer secret", "x-api-key": "secret", "Cookie": "secret"}
    call(server, "POST", path, {"model": "m", "messages": []}, keys)
    assert "secret" not in str(fake.requests.get(timeout=DEADLINE)[1])


ALICE, BOB = ("alice", "sk-alice-0123"), ("", "sk-bob-01234567")


def bearer(key):
    return {"Authorization": "Bearer " + key}


@pytest.mark.parametrize("header, accepted", [
    *[(header, True) for header in (
        "Authorization: Bearer sk-alice-0123", "authorization: bearer  sk-bob-01234567 ",
        "x-api-key: sk-alice-0123")],
    *[(header, False) for header in (
        "Accept: */*", "Authorization: Bearer ", "Authorization: Bearer sk-wrong-key",
        "Authorization: Bearer sk-alice-012", "Authorization: Bearer alice:sk-alice-0123",
        "Authorization: Bearer \xfc\xfc\xfc\xfc", "Authorization: Basic sk-alice-0123",
        "Authorization: sk-alice-0123", "x-api-key: sk-wrong-key")]])
def test_only_who_has_a_key_may_call_and_the_log_hides_it(start, log, header, accepted):
    server, fake = start(model_list("m"), api_key=(ALICE, BOB))
    headers = dict([header.split(": ")])
    show = call(server, "POST", "/api/show", b"{}", headers)
    paths = "/v1/models", "/metrics", "/nosuch", "/", "/healthz"
    statuses = [call(server, "GET", path, headers=headers).status for path in paths]
    assert [show.status, *statuses] == ([200] * 3 + [404] if accepted else [401] * 4) + [200, 200]
    if not accepted:
        assert show.headers["WWW-Authenticate"] == "Bearer" and fake.requests.empty()
        assert show.json()["error"]["code"] == "invalid_api_key"
    lines = [log.get(timeout=DEADLINE) for _ in range(6)]
    assert re.search(rf"show.*status\W+{show.status}\b", "\n".join(lines)) and "sk-" not in "".join(lines)


def write_keys(path, text):
    """Write a key file and make it older than one that may still be being written."""
    path.write_text(text, encoding="utf-8")
    os.utime(str(path), (time.time() - 9,) * 2)


def test_key_file_is_read_anew_when_it_changes_unless_it_is_broken(start, tmp_path, monkeypatch, log):
    path, more = tmp_path / "keys", threading.Event()
    write_keys(path, "# callers\n\nalice:sk-alice-0123\nsk-bob-01234567\n")
    server, _ = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n", api_key_file=str(path))

    def get_in():
        return [call(server, "GET", "/metrics", headers=bearer(key)).status == 200 for _, key in (ALICE, BOB)]
    with Client(server, headers=["x-api-key: sk-alice-0123"]) as client:
        client.read_until(b"some")
        assert get_in() == [True, True]
        write_keys(path, "sk-bob-01234567\n")
        assert get_in() == [False, True]
        more.set()
        assert b"data: [DONE]\n\n" in client.read_until(b"[DONE]\n\n")  # it is not cut
    write_keys(path, "alice:sk-alice-0123\nshort\n")  # the log says it, but not once a request
    assert get_in() == [False, True] and "".join(log.queue).count("the previous keys stay valid") == 1
    path.unlink()
    assert get_in() == [False, True]
    write_keys(path, "alice:sk-alice-0123\n")
    with monkeypatch.context() as patch:
        busy = mock.Mock(side_effect=OSError(24, "Too many open files"))
        patch.setattr(proxy_module, "open", busy, raising=False)
        assert get_in() == [False, True] and "Too many open files" in "".join(log.queue)
    assert get_in() == [True, False]
    write_keys(path, "")  # nobody has a key any more; that is not the same as asking for none
    assert get_in() == [False, False] and call(server, "GET", "/metrics").status == 401


@pytest.mark.parametrize("headers, status", [
    *[(headers, 200) for headers in (
        "Host: LOCALHOST:1", "Host: 127.0.0.1", "Host: [::1]:11435", "Host: 192.0.2.1", "Host: a.localhost",
        "Host: box", "Host: box.local", "Host: BOX.internal:80", "Origin: http://localhost:3000",
        "Origin: https://127.0.0.1", "Origin: http://[::1]:5", "Origin: app://obsidian.md",
        "Origin: tauri://localhost", "Host: box:1, Origin: http://box:1")],
    *[(headers, 403) for headers in (
        "Host: evil.example", "Host: localhost.evil.example", "Host: 127.0.0.1.evil.example",
        "Host: box.locale", "Origin: http://evil.example", "Origin: http://localhost.evil.example",
        "Origin: http://localhost:1@evil.example", "Origin: null", "Host: other:1, Origin: http://box:1")]])
def test_host_and_page_must_be_local_even_for_a_simple_request(start, hooks, headers, status):
    headers = dict(header.split(": ") for header in headers.split(", "))
    accept = hooks("def authenticate(headers): return 'anyone'")
    for settings in {}, {"insecure": True}, {"hooks": accept}, {"hooks": accept, "api_key": [ALICE]}:
        server, fake = start(RECORDED["hello"], **settings)
        answer = call(server, "POST", "/v1/chat/completions", {"model": "m", "messages": []},
                      {"Content-Type": "text/plain", **headers})
        assert answer.status == status and fake.requests.empty() == (status == 403)
        allowed = headers.get("Origin") if status == 200 else None
        assert answer.headers["Access-Control-Allow-Origin"] == allowed
        assert call(server, "OPTIONS", "/", headers={"Origin": "http://[::1]", **headers}).status == status


def test_any_host_and_page_may_try_where_keys_are_set(start):
    server, _ = start(api_key=[ALICE])
    site = {"Host": "evil.example", "Origin": "null", "Access-Control-Request-Headers": "authorization, x-a"}
    for method, key, status in ("GET", {}, 401), ("GET", bearer(ALICE[1]), 200), ("OPTIONS", {}, 200):
        answer = call(server, method, "/metrics", headers={**site, **key})
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert "x-request-id" in answer.headers["Access-Control-Expose-Headers"]
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, x-a"
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST, OPTIONS"


def test_other_machines_are_served_with_keys_and_refused_without():
    with pytest.raises(ValueError, match="--insecure"):
        ProxyServer(make_settings("box", listen=parse_url("[::]:0")))
    ProxyServer(make_settings("box", listen=parse_url("0.0.0.0:0"), api_key=[ALICE])).server_close()


def sent(fake):
    return json.loads(fake.requests.get(timeout=DEADLINE)[2])


def test_alias_goes_up_as_its_model_and_answers_under_its_own_name(start):
    server, fake = start(RECORDED["hello"], alias=(("gpt-4o", "hello"),))
    answer = chat(server, model="gpt-4o")
    assert {c["model"] for c in answer.chunks()} == {"gpt-4o"} and sent(fake)["model"] == "hello"
    for path in "/api/chat", "/api/show", "/v1/embeddings", "/v1/responses", "/v1/messages":
        call(server, "POST", path, {"model": "gpt-4o"})
        assert sent(fake)["model"] == "hello", path
    fake.steps = [model_list("hello:latest")]
    assert [m["id"] for m in call(server, "GET", "/v1/models").json()["data"]] == ["hello:latest", "gpt-4o"]
    assert call(server, "GET", "/v1/models/gpt-4o").json()["id"] == "gpt-4o"


def test_defaults_fill_what_the_request_leaves_open(start):
    server, fake = start(RECORDED["hello"], keep_alive="1h", option=[("seed", 5), ("top_k", 5)])
    chat(server, seed=1, keep_alive=0)
    body = sent(fake)
    assert (body["options"], body["keep_alive"]) == ({"seed": 1, "top_k": 5}, 0)
    for path in "/api/chat", "/api/generate", "/api/embed", "/api/embeddings":
        call(server, "POST", path, {"options": {"top_k": 9}})
        assert sent(fake) == {"options": {"seed": 5, "top_k": 9}, "keep_alive": "1h"}, path
    call(server, "POST", "/v1/responses", {"model": "m"})
    assert sent(fake) == {"model": "m"}


@pytest.mark.parametrize("name", ["Model", "MODEL", "Messages", "option\u017f"])
def test_passed_body_in_capitals_cannot_slip_past_the_alias(start, name):
    server, fake = start(RECORDED["version"], alias=(("a", "b"),))
    assert call(server, "POST", "/api/chat", {name: "a"}).status == 400 and fake.requests.empty()


def test_key_file_without_keys_is_a_mistake_at_the_start(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "young").touch()
    (tmp_path / "raw").write_bytes(b"\xfc")
    write_keys(tmp_path / "old", "")
    write_keys(tmp_path / "bad", "sk-bob-01234567\nalice: sk-alice-0123\n")
    for name, text in [("fifo", ""), ("young", "no keys"), ("old", "no keys"), ("bad", "line 2"),
                       ("raw", "line 1")]:
        said = mistake("--demo", "--listen", "127.0.0.1:0", "--api-key-file", str(tmp_path / name))
        assert str(tmp_path / name) in said and text in said


def statuses(server, *keys):
    """What callers with these keys get."""
    return [call(server, "GET", "/v1/models", headers=bearer(key)).status for key in keys]


def test_young_key_file_is_read_again_though_size_and_times_are_the_same(start, tmp_path, monkeypatch, log):
    path, stat = tmp_path / "keys", os.stat
    path.write_bytes(b"\xef\xbb\xbf    # made on Windows\r\n    alice:sk-alice-0123\r\n\r\n")
    same = stat(path)  # as a coarse clock would say it again
    monkeypatch.setattr(os, "stat", lambda at, **kwargs: same if at == str(path) else stat(at, **kwargs))
    server, _ = start(model_list("m"), api_key=[BOB, BOB], api_key_file=str(path))
    path.write_text("")
    assert statuses(server, ALICE[1], BOB[1], ALICE[1]) == [200, 200, 200]
    assert "\n".join(log.queue).count("still being written") == 1
    path.write_text("sk-carol-0123\n")
    assert statuses(server, ALICE[1], BOB[1], "sk-carol-0123") == [401, 200, 200]


def test_slower_reader_of_the_key_file_cannot_bring_an_older_version_back(start, tmp_path, monkeypatch):
    path = tmp_path / "keys"

    def slow():
        monkeypatch.delattr(proxy_module, "open")
        yield from path.read_text().splitlines()
        write_keys(path, "sk-bob-01234567\n")
        faster = threading.Thread(target=statuses, args=[server, BOB[1]])
        faster.start()
        faster.join(0.2)  # it may wait for this one
    write_keys(path, "sk-alice-0123\n")
    server, _ = start(model_list("m"), api_key_file=str(path))
    monkeypatch.setattr(proxy_module, "open", lambda *_, **__: contextlib.nullcontext(slow()), raising=False)
    write_keys(path, "sk-alice-0123\nsk-carol-0123\n")
    statuses(server, ALICE[1])
    assert statuses(server, ALICE[1], BOB[1]) == [401, 200]


@pytest.fixture
def hooks(tmp_path):
    """hooks(source) -> the path of a file with it."""
    path = tmp_path / "hooks.py"
    return lambda source: path.write_text(source, encoding="utf-8") and str(path)


def next_record(log):
    """What the log's next line of JSON says; it comes just after the answer."""
    line = next(line for line in iter(lambda: log.get(timeout=DEADLINE), None) if line[0] == "{")
    return {name: value for name, value in json.loads(line).items() if value not in (None, [])}


@pytest.mark.parametrize("token, caller", [("let me in", "carol"), ("guess", None), ("", None)])
def test_authenticate_hook_names_the_caller_or_refuses(start, hooks, log, token, caller):
    server, _ = start(model_list("m"), hooks=hooks(
        "def authenticate(headers):\n    if not headers['X-Token']: raise PermissionError('no token')\n"
        "    return 'carol' if headers['X-Token'] == 'let me in' else None"))
    answer = call(server, "GET", "/v1/models", headers={"X-Token": token})
    assert answer.status == (200 if caller else 401) and next_record(log).get("caller") == caller
    assert token or answer.json()["error"]["message"] == "no token"


def test_shape_hook_changes_the_body_on_every_route(start, hooks):
    server, fake = start(RECORDED["hello"], hooks=hooks(
        "def shape(route, body, caller): return {**body, 'seed': len(route)} if 'model' in body else 5"))
    for path in "/v1/chat/completions", "/api/chat", "/v1/responses":
        call(server, "POST", path, {"model": "m", "messages": []})
        assert b'"seed":%d' % len(path) in fake.requests.get(timeout=DEADLINE)[2]
        assert [call(server, "POST", path, body).status for body in (b"{}", b"not JSON")] == [500, 400]
    assert call(server, "POST", "/v1/audio/transcriptions", b"RIFF").status == 500 and fake.requests.empty()


def test_shape_hook_sees_what_is_sent_although_a_name_is_there_twice(start, hooks):
    server, fake = start(RECORDED["hello"], hooks=hooks("def shape(r, body, c): assert body['a'] == 2"))
    assert call(server, "POST", "/api/chat", b'{"a":1,"a":2}').status == 200
    assert fake.requests.get(timeout=DEADLINE)[2] == b'{"a":2}'


@pytest.mark.parametrize("hook", ["authenticate(headers)", "shape(route, body, caller)"])
@pytest.mark.parametrize("raised", [
    *[f"ProxyError(429, 'x', headers={headers})" for headers in (
        "{'Retry-After': '1'}", "['Retry-After: 1']", "[('X', '\\u20ac')]", "5")],
    *[f"ProxyError({values})" for values in (
        "99, 'x'", "200, 'x'", "'429', 'x'", "429, float('nan')", "429, 'x', code={1}",
        "429, 'x', param={1}", "")],
    "type('Empty', (ProxyError,), {'__init__': lambda self: None})()", "SystemExit(3)", "GeneratorExit()",
    "StopIteration()", "socket.timeout('x')", "ConnectionResetError()", "PermissionError(13, '', '/secret')",
    "ValueError('\\r\\n\\x85\\u2028\\x0b\\x1b\\n'.join(['{\"status\":200}'] * 2))"])
def test_hook_that_breaks_or_raises_what_cannot_be_sent_is_a_500(start, hooks, log, hook, raised):
    server, fake = start(hooks=hooks(
        f"import socket\nfrom ndjson_sse_proxy import ProxyError\ndef {hook}: raise {raised}"))
    answer = raw(server, POST + HOST + LENGTH + b"\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 500 ") and b'"type":"server_error"' in answer
    assert b"secret" not in answer and fake.requests.empty()
    poll(lambda: log.queue[-1][0] == "{")
    lines = "\n".join(log.queue).split("\n")  # what is raised can't forge one
    assert "Traceback" in str(lines) and all(line.isascii() and line.isprintable() for line in lines)
    assert [json.loads(line)["status"] for line in lines if line[0] == "{"] == [500]


def test_request_is_one_line_of_json_without_secrets_although_the_observe_hook_breaks(start, hooks, log):
    server, _ = start(RECORDED["hello"], api_key=[ALICE], hooks=hooks("def observe(record): 1 / 0"))
    answer = call(server, "POST", "/v1/chat/completions", {
        "model": "m", "messages": [{"role": "user", "content": "SECRET"}], "x": 1}, bearer(ALICE[1]))
    record = next_record(log)
    assert 0 < record.pop("first_token_seconds") <= record.pop("seconds")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.pop("time"))
    assert record == {
        "id": answer.headers["X-Request-Id"], "client": "127.0.0.1", "caller": "alice", "method": "POST",
        "route": "/v1/chat/completions", "model": "m", "status": 200, "prompt_tokens": 9,
        "completion_tokens": 27, "end": "done", "ignored": ["x"]}
    poll(lambda: any("ZeroDivisionError" in line for line in log.queue))
    assert raw(server, (b"GET /healthz HTTP/1.1\r\n%b\r\n" % HOST) * 2).count(b"ok\n") == 2


@pytest.mark.parametrize("path, accept", [
    ("/v1/chat/completions", "*/*"), ("/api/chat", "*/*"), ("/api/chat", EVENTS)])
@pytest.mark.parametrize("steps, until, end, error", [
    ([RECORDED["hello"]], b"[DONE]", "done", None),
    ([RECORDED["die_mid"]], b"[DONE]", "error", "upstream_error"),
    ([SAID + END], b"[DONE]", CUT, "upstream_cut"), ([SAID], b"[DONE]", CUT, "upstream_cut"),
    ([HEAD, chunk(says("x" * 1000)) * 5000], b"xxx", "client hang-up", None),
], ids=["done", "error", "no end mark", "cut", "client leaves"])
def test_log_says_how_a_stream_ended(start, log, path, accept, steps, until, end, error):
    client = Client(start(*steps)[0], path, headers=["Connection: close", "Accept: " + accept])
    client.read_until(until)
    client.leave("RST")
    record = next_record(log)
    assert (record["end"], record.get("error")) == (end, error) and "first_token_seconds" in record
    assert record["model"] == "m"
    assert record.get("completion_tokens") == (27 if end == "done" else None)


def metrics(server):
    """The samples of /metrics, once no other request is under way."""
    answer = None

    def quiet():
        nonlocal answer
        answer = call(server, "GET", "/metrics")
        return b"active_requests 1\n" in answer.body
    poll(quiet)
    assert answer.headers["Content-Type"].startswith("text/plain; ")
    return dict(re.findall("(?m)^ndjson_sse_proxy_(.*) (.*)$", answer.body.decode()))


def test_metrics_count_requests_tokens_times_and_failures(start):
    server, fake = start(RECORDED["hello"])
    chat(server)
    fake.steps = [SAID]
    chat(server, model='quo"te')
    chat(server, stream=False)
    call(server, "GET", "/nosuch")
    found = {re.sub('model="m",', "", name): value for name, value in metrics(server).items()}
    assert 0 < float(found.pop("first_token_seconds_sum")) < float(found.pop("request_seconds_sum"))
    assert int(found.pop("request_seconds_count")) >= 4
    assert {name: value for name, value in found.items() if "/metrics" not in name} == {
        'requests_total{route="/v1/chat/completions",status="200"}': "2", "active_requests": "1",
        'requests_total{route="/v1/chat/completions",status="502"}': "1", "client_hangups_total": "0",
        'requests_total{route="none",status="404"}': "1", 'upstream_errors_total{kind="cut"}': "2",
        'tokens_total{kind="prompt"}': "9", 'tokens_total{kind="completion"}': "27",
        "first_token_seconds_count": "3"}


def test_metrics_and_log_cannot_be_grown_by_inventing_names(start, log):
    server, fake = start(RECORDED["missing"])
    chat(server, model="invented")
    call(server, "BREW", "/invented")
    assert "invented" not in str(metrics(server)) and "BREW" not in str(metrics(server))
    fake.steps = [RECORDED["length"]]
    for i in range(150):
        chat(server, model=f"model-{i}")
    chat(server, model="\ud800\x9b\x7f\n" + "m" * 100_000, **{"\x7f\n" + "f" * 100_000: 1})
    poll(lambda: "mmm" in log.queue[-1])
    line = log.queue[-1]
    assert line.isascii() and line.isprintable() and len(line) < 1000 and len(metrics(server)) < 250


# ---- 9. Downstream -------------------------------------------------------------------------------


def test_frame_arrives_before_the_next_record_and_a_hang_up_ends_a_stream_without_silence(start):
    more = threading.Event()
    server, fake = start(SAID, more, Endless(chunk(says("more"))), size=1)
    connection = connect(server)
    connection.request("POST", "/v1/chat/completions", STREAMED)
    with connection.getresponse() as response:
        frames = [response.readline() + response.readline() for _ in range(2)]
        assert b'"content":"some"' in frames[1] and frames[1].endswith(b"\n\n")
        more.set()
    connection.close()
    assert fake.hung_up.wait(DEADLINE)


def test_frames_do_not_wait_for_the_confirmation_of_the_last_one(start, monkeypatch):
    server, _ = start()
    seen, setsockopt = [], socket.socket.setsockopt
    monkeypatch.setattr(socket.socket, "setsockopt", lambda self, *option: (
        seen.append((self.getsockname()[1], *option)), setsockopt(self, *option)))
    assert call(server, "GET", "/healthz").status == 200
    assert (server.server_port, socket.IPPROTO_TCP, socket.TCP_NODELAY, True) in seen


@pytest.mark.parametrize("method, path", [("POST", path) for path in (
    "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
    "/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show")] + [
    ("GET", path) for path in ("/api/tags", "/api/ps", "/api/version", "/api/status")])
def test_passed_route_gives_and_takes_bytes_unread_and_a_cut_answer_stays_cut(start, method, path):
    status = 404 if path.startswith("/api/") else 200  # a native refusal passes, too
    data = b'{"spacing":   "kept", "bad utf-8": "\xff"}'
    server, fake = start(b"HTTP/1.1 %d x\r\nContent-Type: a/b\r\nContent-Length: %d\r\n\r\n%b" % (
        status, len(data), data))
    sent = b"\x00 not json, \xff" * (method == "POST")
    wishes = {"Content-Type": "a/b; boundary=x", "Content-Encoding": "zstd", "anthropic-version": "1"}
    answer = call(server, method, path + "?beta=true", sent, wishes)
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (status, "a/b", data)
    line, headers, body = fake.requests.get(timeout=DEADLINE)
    assert line == f"{method} {path}?beta=true HTTP/1.1" and body == sent
    assert {name: headers[name] for name in wishes} == wishes
    for cut, *reset in [SAID], [WITHOUT_CHUNKS % b"Content-Length: 99"], [
            WITHOUT_CHUNKS % b"Connection: close", RESET]:
        fake.steps = (cut.replace(b"application/x-ndjson", b"a/b"), *reset)  # whose only end is HTTP's
        answer = call(server, method, path, sent)  # by RST all of it may be lost
        assert answer.cut and answer.body == says("some") or reset and answer.status == 502


@pytest.mark.parametrize("method, path, status, hint", [
    *[("POST", path, 404, "{url}/v1") for path in (
        "/chat/completions", "/v1/v1/chat/completions", "/api/v1/embeddings", "/models")],
    ("POST", "/v1/v1/messages", 404, "{url} here|without /v1"),  # that client adds it
    *[("GET", path, 404, "") for path in (
        "/v1/images/generations", "/api/nosuch", "/v1/models/", "/metrics/x", "/api/tags/", "/api/tags;x",
        "/API/tags", "/api//tags", "//api/tags", "/api/./tags", "/v1/../api/tags", "/api/%2e%2e/api/tags",
        "/api%2Ftags", "/api%252ftags", "/api/tags%00", "/api/blobs/")],
    *[("POST", "/api/" + name, 403, "") for name in ("pull", "push", "create", "copy", "blobs/sha256:0")],
    ("DELETE", "/api/delete", 403, ""),
])
def test_route_that_is_not_served_is_refused_with_a_hint_and_not_forwarded(start, method, path, status, hint):
    server, fake = start()
    answer = call(server, method, path)
    error = assert_failed(answer, status)
    assert re.search(hint.format(url=server.url), error["message"])
    assert error["type"] == {403: "permission_error", 404: "not_found_error"}[status]
    assert fake.requests.empty() and answer.headers["X-Request-Id"]


def test_root_says_the_base_url_under_the_name_that_the_client_uses(start):
    server, _ = start()
    answer = call(server, "GET", "/", headers={"Host": "a.localhost:80"})
    assert b"base_url is http://a.localhost:80/v1" in answer.body


def test_head_is_answered_where_get_is_without_a_body(start):
    server, fake = start(b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 9\r\n\r\n")
    answer = raw(server, b"HEAD /api/version HTTP/1.1\r\n%b\r\nHEAD / HTTP/1.1\r\n%b\r\n" % (HOST, HOST))
    assert re.fullmatch(rb"(HTTP/1.1 200 .*\r\n(.+\r\n)+\r\n){2}", answer)
    assert fake.requests.get(timeout=DEADLINE)[0] == "HEAD /api/version HTTP/1.1"


@pytest.mark.parametrize("path, name", [
    ("hello:latest", "hello:latest"), ("hello", "hello"), ("hf.co/a/b:Q4", "hf.co/a/b:Q4"),
    ("hf.co%2Fa%2Fb%3AQ4", "hf.co/a/b:Q4")])
def test_model_is_looked_up_by_its_id_and_a_missing_one_is_a_404_that_names_the_cure(start, path, name):
    server, fake = start(model_list("hello:latest", "hf.co/a/b:Q4"))
    assert call(server, "GET", "/v1/models/" + path).json() == {
        "id": name, "object": "model", "created": 1795385879, "owned_by": "library"}
    assert fake.requests.get(timeout=DEADLINE)[0] == "GET /v1/models HTTP/1.1"
    assert "`ollama pull x`" in assert_failed(call(server, "GET", "/v1/models/x"), 404)["message"]


@pytest.mark.parametrize("value, good", [
    *[(value, True) for value in ({}, {"data": None}, {"data": []})],
    *[({"data": data}, False) for data in ([None], [5], [[]], [{}], [{"id": 1}], {}, 5)],
], ids=json.dumps)
def test_list_of_models_may_be_empty_but_not_malformed(start, value, good):
    server, _ = start(json_answer(value))
    answer = call(server, "GET", "/v1/models")
    assert answer.json() == {"object": "list", "data": []} if good else assert_failed(
        answer, 502, "upstream_protocol")


def test_unknown_fields_are_named_in_a_header_that_they_cannot_break(start):
    server, _ = start(RECORDED["length"])
    answer = chat(server, **{"a\r\nX-Evil:1": 1, "ü\u2028": 2, "\ud83d": 3, "b" * 9999: 4, "none": None})
    ignored = answer.headers["X-Ignored-Fields"]
    assert ignored.startswith("a%0D%0AX-Evil%3A1, %C3%BC%E2%80%A8, %5Cud83d, bbb")  # half an emoji
    assert len(ignored) < 200 and "none" not in ignored and "X-Evil" not in answer.headers
    answer = chat(server, **{f"f{i}": 1 for i in range(1000)})
    assert answer.headers["X-Ignored-Fields"].endswith("f19, and 980 more")
    answer = chat(server, tools=[function()], tool_choice="required", response_format={"type": "json_object"})
    assert answer.headers["X-Ignored-Fields"] == "response_format"  # Ollama takes one schema


PLAIN, CODED = POST + HOST + LENGTH, b"Transfer-Encoding: chunked\r\n"
REFUSED = {
    400: [POST + HOST + headers for headers in (  # where does the body end?
        LENGTH + LENGTH, LENGTH + b"content-length: 0\r\n", LENGTH + CODED, CODED + CODED,
        LENGTH + b"Transfer-Encoding: identity\r\n", b"transfer-encoding: xchunked\r\n")]
    + [POST + HOST + b"Content-Length: %b\r\n" % text for text in (
        b"27, 27", b"", b"+27", b"-1", b"0x1b", b"1_0", b"2 7", b"27;", b"\xd9\xa2", b"1" * 30)]
    + [POST.replace(b"1.1", b"1.0") + HOST + CODED, b"GET /v1/models HTTP/1.1\r\n" + HOST + CODED]
    + [PLAIN + line + b"\r\n" for line in (  # where does a line end, where a name?
        b"X: a\n", b"X: a\nY: b", b"X: a\rY: b", b"X: a\r\n folded", b"X: \x00", b"X: \x1b[J", b"X: \x7f",
        b"no colon", b": empty", b"X Y: a", b"X : a", b"X\t: a", b"\xdc: a")]
    + [PLAIN.replace(HOST, new) for new in (b"", HOST * 2, b" " + HOST, HOST + b"Authorization: a\r\n" * 2)]
    + [b"GET /api/tags%b\r\n" % rest + HOST for rest in (
        b"", b"  HTTP/1.1", b" x HTTP/1.1", b"\tHTTP/1.1", b" http/1.1", b" HTTP/1", b" HTTP/+1.1",
        b" HTTP/1.1x", b"?\xe9 HTTP/1.1", b"?\x01 HTTP/1.1", b" HTTP/1.1\nX: a")]
    + [start + b" HTTP/1.1\r\n" + HOST for start in (
        b"\r\nGET /", b" GET /", b"GET  /", b"GET\t/", b"G(T /", b"GET http://localhost/", b"GET \\",
        b"GET *", b"GET x", b"GET ?", b"GET", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")],  # TLS
    404: [b"POST /v1/nosuch HTTP/1.1\r\n" + HOST + LENGTH],  # whose body must not become a request
    405: [b"DELETE /v1/models HTTP/1.1\r\n" + HOST + LENGTH],
    411: [POST + HOST, POST + HOST + LENGTH.replace(b"-", b"_")],
    413: [POST + HOST + b"Content-Length: 99999999999\r\n"],
    414: [b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\n" + HOST],
    431: [PLAIN + b"X: " + b"a" * 65536 + b"\r\n", PLAIN + b"".join(b"X-%d: a\r\n" % i for i in range(100))],
}


@pytest.mark.parametrize("status, head", [(status, head) for status in REFUSED for head in REFUSED[status]],
                         ids=lambda value: ascii(value)[-60:])
def test_ambiguous_request_is_refused_in_openais_form_and_the_connection_closed(start, log, status, head):
    server, fake = start()
    body = chunk(BODY) + END if CODED in head else BODY
    answer = raw(server, head + b"\r\n" + body + b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nConnection: close" in head and (b"\r\nAllow: GET\r\n" in head + b"\r\n") == (status == 405)
    assert sorted(json.loads(body)["error"]) == ["code", "message", "param", "type"]
    assert fake.requests.empty() and "Traceback" not in log.get(timeout=DEADLINE)


@pytest.mark.parametrize("old, new, kept", [
    (HOST + b"Content-Length: 41", b"host:localhost\r\ncontent-length:41 \t", True),
    (HOST, b"Host: [::1]:80\r\n", True),
    (HOST, HOST + b"X: \r\nX:\tb\r\nY: \xfc  \r\n", True),
    (b" HTTP", b"?a=%2F HTTP", True),
    (HOST, HOST + b"Connection: close\r\n", False),
    (HOST, HOST + b"Connection: x, Close\r\n", False),
    (HOST, HOST + b"Connection: keep-alive\r\nConnection: close\r\n", False),
    (b"1.1\r\n" + HOST, b"1.0\r\n", False),
    (b"1.1\r\n", b"1.0\r\nConnection: Keep-Alive\r\n", False),
    (b"1.1\r\n", b"1.0\r\nExpect: 100-continue\r\n", False),
])
def test_plain_request_is_answered_as_version_and_client_want_it(start, old, new, kept):
    server, _ = start(RECORDED["length"])
    answer = raw(server, posted(STREAMED).replace(old, new) * 2)
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"HTTP/1.1 ") == 1 + kept
    assert answer.endswith(b"data: [DONE]\n\n" if b"1.0" in new else b"data: [DONE]\n\n\r\n" + END)
    assert (b"\r\nTransfer-Encoding: chunked\r\n" in answer) == (b"1.0" not in new)


def test_random_request_is_answered_or_closed_and_the_next_one_is_served(start, log):
    rng, (server, _) = random.Random(1), start(RECORDED["length"])
    request = posted(b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"top_p":1}')
    for _ in range(300):
        answer = raw(server, mutated(rng, request))
        assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert "Hello from a" in chat(server).text()
    assert "Traceback" not in "".join(log.queue), "\n".join(log.queue)[-3000:]


def test_connection_is_kept_after_streams_whole_answers_and_refusals_until_a_request_is_garbage(start):
    server, _ = start(RECORDED["length"])
    answer = raw(server, b"".join(map(posted, (STREAMED, BODY, b"{}", BODY))) + b"GARBAGE\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"400", b"200", b"400"]


def test_refusal_reaches_a_client_that_is_still_sending(start):
    server, _ = start(api_key=(("", "sk-bob-01234567"),))
    for _ in range(5):
        assert call(server, "POST", "/v1/chat/completions", b"x" * (8 << 20)).status == 401


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The paths of a self-signed certificate for localhost and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
               "-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -out").split() + [cert, "-keyout", key]
    if not shutil.which("openssl") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("openssl can't make a certificate here")
    return cert, key


def test_tls_works_on_both_sides_if_the_certificate_is_good(start, looks, log, certificate, monkeypatch):
    tls, fake = start(RECORDED["hello"], tls_cert=certificate[0], tls_key=certificate[1])
    with Client(tls, path=None):  # never shakes hands, and holds up nobody
        server, _ = start(upstream=tls.url)
        assert_failed(chat(server), 502, "upstream_unreachable")
        poll(lambda: any("CERTIFICATE_VERIFY_FAILED" in line for line in log.queue))
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        server, _ = start(upstream=tls.url)
        assert chat(server).text() == chat(server, False).text() == HELLO
        fake.steps = [ndjson(*[says("x" * 999_999)] * 9, FINAL)]
        trust = ssl.create_default_context(cafile=certificate[0])
        big = http.client.HTTPSConnection("127.0.0.1", tls.server_port, context=trust)
        with contextlib.closing(big):
            big.request("POST", "/v1/chat/completions", b'{"model":"m","messages":[]}')
            assert len(Answer(big.getresponse()).text()) == 9 * 999_999
        fake.steps = [SAID, HOLD]
        with Client(server) as client:
            client.read_until(b"some")
        poll(lambda: sum("client hang-up" in line for line in log.queue) == 2)  # both have seen it
    assert "Traceback" not in "".join(log.queue)


@pytest.mark.parametrize("begin, status", [
    ("POST /v1/chat/completions HTTP/1.1", 401), ("GET / HTTP/1.1", 400), ("GET /healthz HTTP/1.1", 400),
    ("OPTIONS /healthz HTTP/1.1", 400), ("GET / HTTP/1.1\r\nX:" + " " * 60_000 + "\0", 400)],
    ids=lambda value: str(value)[:30])
def test_refused_head_is_answered_before_its_body_comes(start, begin, status):
    server, _ = start(api_key=(ALICE,))
    answer = raw(server, f"{begin}\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
                 "Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("odd", [
    "multipart/mixed; boundary*=idna''abc", "multipart/mixed; boundary*=a; boundary*0=b",
    'multipart/mixed; "' + ";" * 60_000, "multipart/mixed; boundary*" + "9" * 5000 + "=x"],
    ids=lambda value: value[:40])
def test_odd_content_type_passes_both_ways_or_is_the_fault_of_who_said_it(start, odd):
    for status in 200, 503:
        server, fake = start(f"HTTP/1.1 {status} x\r\nContent-Length: 2\r\nContent-Type: {odd[:99]};\r\n X: y"
                             "\r\nRetry-After: 1\r\n X: y\r\n\r\n{}".encode(), HOLD)
        answer = call(server, "POST", "/api/show", {}, {"Content-Type": odd})
        assert fake.requests.get(timeout=DEADLINE)[1]["Content-Type"] == odd
        assert answer.status in (status, 502) and "\n" not in "".join(answer.headers.values())
        assert fake.left.wait(DEADLINE)


@pytest.mark.parametrize("status", [204, 304])
def test_passed_status_without_a_body_leaves_the_connection_in_step(start, status):
    server, _ = start(b"HTTP/1.1 %d x\r\n\r\n" % status)
    answer = raw(server, 2 * (b"POST /api/show HTTP/1.1\r\n" + HOST + LENGTH + b"\r\n" + BODY))
    assert [head[:13] for head in answer.split(b"\r\n\r\n")] == [b"HTTP/1.1 %d " % status] * 2 + [b""]


def drip(client, data):
    """Send bytes one at a time, until the server answers or hangs up; return what it says."""
    for i in range(len(data)):
        if select.select([client.socket], [], [], 0.02)[0]:
            try:
                return client.read_until(b"\r\n0\r\n\r\n")
            except ConnectionError:  # closed with unread bytes, and so reset
                return b""
        client.socket.sendall(data[i:i + 1])
    raise AssertionError("the server has waited for all of it")


@pytest.mark.parametrize("limit, begin, answer", [
    ("CLIENT_SECONDS", b"", b""), ("CLIENT_SECONDS", b"POST /v1/chat", b""),
    ("CLIENT_SECONDS", POST + b"X: ", b"HTTP/1.1 408 "),
    ("BODY_SECONDS", POST + HOST + b"Content-Length: 99999\r\n\r\n", b"HTTP/1.1 408 ")],
    ids=["idle", "request line", "head", "body"])
def test_client_whose_time_is_up_gets_a_408_or_nothing_if_nothing_was_asked(
        start, log, monkeypatch, limit, begin, answer):
    monkeypatch.setattr(proxy_module, limit, 0.2)
    with Client(start()[0], "/healthz", "GET") as client:
        client.read_until(b"ok\n")
        client.socket.sendall(begin)
        said = drip(client, b"x" * 500) if begin else client.read_until(b"never")
        assert said[:13] == answer and "Traceback" not in "".join(log.queue)


def test_client_that_resets_instead_of_a_whole_request_is_no_fault_of_the_proxy(start, log):
    server, _ = start()
    for begin, end in (b"", b""), (POST, b""), (PLAIN + b"\r\n{", b""), (b"X\r\n\r\n", b"never"):
        with Client(server, "/healthz", "GET") as client:
            client.read_until(b"ok\n")
            client.socket.sendall(begin)
            client.read_until(end)
            client.leave("RST")
    poll(lambda: not server.connections)
    assert "Traceback" not in "".join(log.queue)


def test_client_is_cut_when_it_stops_reading_but_not_while_it_reads_slowly(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "CLIENT_SECONDS", 0.4)
    endless = Endless(chunk(says("x" * 3_000_000)))
    server, fake = start(HEAD, endless, size=1)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # connections inherit it
    with Client(server, path=None) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.ask()
        for _ in range(30):  # longer than a limit for the whole frame
            threading.Event().wait(0.02)
            assert client.socket.recv(4096)
        assert not fake.hung_up.is_set()
        assert fake.hung_up.wait(DEADLINE)
        assert endless.sent < 64 << 20  # what the sockets' buffers hold, and not all that was said
        poll(lambda: b"client_hangups_total 1\n" in call(server, "GET", "/metrics").body)


def test_one_connection_too_many_is_a_503_and_far_too_many_are_closed(start, monkeypatch):
    more = threading.Event()
    server, _ = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n", max_connections=2)
    with Client(server) as one, Client(server) as two:
        assert b"some" in one.read_until(b"some") and b"some" in two.read_until(b"some")
        answer = chat(server)
        assert_failed(answer, 503, "proxy_busy")
        assert answer.headers["Retry-After"] == "1" and answer.headers["Connection"] == "close"
        assert call(server, "GET", "/healthz").status == call(server, "GET", "/metrics").status == 200
        monkeypatch.setattr(proxy_module, "MAX_EXTRA", 0)
        with Client(server, "/healthz", "GET") as three, contextlib.suppress(ConnectionResetError):
            assert three.read_until(b"ok\n") == b""
        more.set()
        assert b"[DONE]" in one.read_until(b"[DONE]") and b"[DONE]" in two.read_until(b"[DONE]")


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
def test_drain_lets_answers_end_and_says_an_error_to_those_that_do_not(start, monkeypatch, in_time):
    monkeypatch.setattr(proxy_module, "DRAIN_SECONDS", DEADLINE if in_time else 0.1)
    more, results = threading.Event(), queue.Queue()
    server, fake = start(SAID, more if in_time else HOLD, chunk(FINAL) + b"0\r\n\r\n")
    with Client(server) as streaming, Client(server, stream=False) as whole:
        poll(lambda: fake.requests.qsize() == 2)
        streaming.read_until(b"some")
        threading.Thread(target=lambda: results.put(server.drain())).start()
        poll(lambda: not accepts(server.server_port))
        more.set()
        seen = streaming.read_until(b"never")  # to the end of the connection
        assert seen.endswith(b"\r\n0\r\n\r\n") and (b"data: [DONE]\n\n" in seen) == in_time
        assert (b'"code":"proxy_stopped"' in seen) == (not in_time)
        assert whole.read_until(b"}}").startswith(b"HTTP/1.1 %d " % (200 if in_time else 503))
        assert results.get(timeout=DEADLINE) == in_time and (in_time or fake.left.wait(DEADLINE))


def test_stream_that_is_never_silent_ends_with_the_drain(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "DRAIN_SECONDS", 0)
    monkeypatch.setattr(proxy_module, "TICK_SECONDS", DEADLINE)
    server, _ = start(HEAD, chunk(says("some")) * 50_000)
    with Client(server) as client:
        client.read_until(b"some")
        threading.Thread(target=server.drain).start()
        assert b'"code":"proxy_stopped"' in client.read_until(b"never")


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("form", [b"%x\r\n%b\r\n", b"%X\r\n%b\r\n", b"%08x\r\n%b\r\n"])
def test_body_in_chunks_is_read_and_the_next_one_on_the_connection_asked_for(start, form, size):
    server, fake = start(RECORDED["length"])
    body = ('{"model":"m","messages":[{"role":"user","content":"%s"}]}' % ("é🙂" * 50)).encode()
    with Client(server, path=None) as client:
        client.socket.sendall(POST + HOST + CODED + b"\r\n")
        for i in range(0, len(body), size):
            client.socket.sendall(form % (len(body[i:i + size]), body[i:i + size]))
        client.socket.sendall(END)
        client.ask("/healthz", "GET")
        assert client.read_until(b"ok\n").count(b"HTTP/1.1 200 ") == 2
        assert sent(fake)["messages"] == json.loads(body)["messages"]
        client.socket.sendall(POST + HOST + CODED + b"Expect: 100-continue\r\n\r\n")
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize("coding, body, status", [
    *[(b"chunked", size + b"\r\n{}\r\n" + END, 400) for size in (
        b"2;x", b"+2", b"-2", b"0x2", b"0_2", b"000000002", b" 2", b"2 ", b"", b"g", "２".encode(), b"1")],
    *[(b"chunked", b"2\r\n{}" + end, 400) for end in (
        END, b"\n" + END, b"\r\n0;\r\n\r\n", b"\r\n0\n\n", b"\r\n0\r\nX: y\r\n\r\n")],
    *[(b"chunked", (b"2\r\n{}\r\n" + END).replace(b"\r\n", end), 400) for end in (b"\n", b"\r")],
    *[(coding, chunk(b"{}") + END, 400) for coding in (
        b"gzip, chunked", b"chunked, chunked", b"chunked;q=1", b"", b"\x0bchunked")],
    *[(b"chunked", body, 413) for body in (b"65\r\n" + b"x" * 99, b"FFFFFFFF\r\n", chunk(b"x" * 60) * 2)]])
def test_malformed_chunks_are_refused_and_no_request_follows(start, monkeypatch, coding, body, status):
    monkeypatch.setattr(proxy_module, "MAX_BODY_BYTES", 100)
    server, fake = start()
    head = POST + HOST + b"Transfer-Encoding: %b\r\n\r\n" % coding
    answer = raw(server, head + body + b"GET / HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer and b'{"error":{' in answer and fake.requests.empty()


@pytest.mark.parametrize("coding, body", [(LENGTH, b""), (LENGTH, BODY[:-1]), *[(CODED, body) for body in (
    b"", b"2", b"2\r\n", b"2\r\n{", b"2\r\n{}\r\n", b"2\r\n{}\r\n0\r\n")]])
def test_body_that_stops_early_is_never_used(start, coding, body):
    server, fake = start(RECORDED["length"])
    answer = raw(server, b"POST /api/show HTTP/1.1\r\n" + HOST + coding + b"\r\n" + body)
    assert answer[:13] in (b"", b"HTTP/1.1 400 ") and fake.requests.empty()


@pytest.mark.parametrize("seconds, body", [
    (0.2, b"1\r\nx\r\n" * 2000), (0.2, b"ffff\r\n" + b"x" * 9999), (0, b"2706\r\n" + b"x" * 9999)],
    ids=["small chunks", "a large chunk", "all at once"])
def test_chunks_whose_time_is_up_are_a_408_whether_they_drip_or_are_there(start, monkeypatch, seconds, body):
    monkeypatch.setattr(proxy_module, "BODY_SECONDS", seconds)
    with Client(start()[0], path=None) as client:
        client.socket.sendall(POST + HOST + CODED + b"\r\n" + (b"" if seconds else body))
        assert drip(client, body).startswith(b"HTTP/1.1 408 ")


def test_http_1_0_answer_ends_its_connection_and_in_a_reset_if_it_was_cut(start):
    request = b"POST /api/chat HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
    answer = raw(start(RECORDED["hello"])[0], request)
    assert b"\r\nConnection: close\r\n" in answer and b"Transfer-Encoding" not in answer
    server, _ = start(SAID, HOLD, idle_timeout=0.1)
    with Client(server, path=None) as client, pytest.raises(ConnectionResetError):
        client.socket.sendall(request)
        client.read_until(b"never")


def trace(server, **fields):
    """What stands between the blank lines of a traced stream."""
    body = {"model": "m", "messages": [], "stream": True, **fields}
    return call(server, "POST", "/v1/chat/completions?trace=1", body).body.decode().split("\n\n")[:-1]


@pytest.mark.parametrize("size", [None, 1, 700])
@pytest.mark.parametrize("answer", [RECORDED["hello"], RECORDED["parallel"], HEAD + chunk(
    b'{"message":{"content":"x"},\r"data":1,\r"done":false}\n' + FINAL) + END], ids=["text", "calls", "CR"])
def test_trace_shows_the_request_and_each_line_before_the_frames_it_became(start, answer, size):
    server, fake = start(answer, size=size)
    traced, plain = trace(server, max_tokens=7), chat(server).chunks()
    request = fake.requests.get(timeout=DEADLINE)[2].decode()
    assert '"num_predict":7' in request and traced[0] == f": POST /api/chat {request}"
    lines = [block[2:].replace("\n: ", "\r") for block in traced[1:] if block[0] == ":"]
    assert lines == re.findall("(?m)^{[^\n]*$", answer.decode())
    frames = [json.loads(block[len("data: "):])["choices"] for block in traced[:-1] if block[0] == "d"]
    assert frames == [chunk["choices"] for chunk in plain] and traced[-1] == "data: [DONE]"
    assert re.fullmatch(":(:d+)+", "".join(block[0] for block in traced))


def test_trace_shows_a_request_that_is_sent_anew_and_an_error_before_its_frame(start):
    server, _ = start(RECORDED["die_mid"], answers=[[RECORDED["think_on_hello"]]])
    requests = [block for block in trace(server, reasoning_effort="high") if block.startswith(": POST ")]
    assert ['"think":"high"' in request for request in requests] == [True, False]
    assert [block[:10] for block in trace(server)[-2:]] == [': {"error"', 'data: {"er']


def test_trace_hides_what_a_hook_adds_and_changes_neither_whole_answers_nor_statuses(start, hooks):
    server, fake = start(RECORDED["hello"], hooks=hooks("def shape(route, body, caller): return body"))
    assert trace(server)[0].startswith(": {")
    path, body = "/v1/chat/completions?trace=1", {"model": "m", "messages": []}
    assert call(server, "POST", path, body).text() == HELLO
    fake.steps = [RECORDED["missing"]]
    assert_failed(call(server, "POST", path, {**body, "stream": True}), 404)
    assert_failed(call(start(api_key=[ALICE])[0], "POST", path, {**body, "stream": True}), 401)


# ---- 10. Demo ------------------------------------------------------------------------------------


def test_demo_lists_its_models_and_each_shows_one_thing(demo):
    models = call(demo, "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["demo-text", "demo-think", "demo-tool", "demo-error"]
    assert "你好" in chat(demo, model="demo-text").deltas()
    assert chat(demo, model="demo-think").deltas("reasoning")
    assert '"name": "get_weather"' in json.dumps(chat(demo, model="demo-tool").chunks())
    assert_failed(chat(demo, model="demo-error"), code="upstream_error")
    assert_failed(chat(demo, model="nosuch"), 404, "model_not_found")
    for name in "completions", "embeddings", "responses", "messages", "audio/transcriptions":
        assert_failed(call(demo, "POST", "/v1/" + name, {"model": "demo-text"}), 404)


# ---- 11. The page --------------------------------------------------------------------------------


def test_browser_gets_the_page_which_may_load_nothing_from_anywhere(start):
    server, fake = start(api_key=[ALICE])
    answer = call(server, "GET", "/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "connect-src 'self'" in policy
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|https?://""", page)
    assert call(server, "HEAD", "/", headers={"Accept": "text/html"}).body == b"" and fake.requests.empty()


# ---- 12. Run -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="signals are something else there")
@pytest.mark.parametrize("signals, statuses", [(1, [0]), (30, [0, 1])], ids=["one", "many"])
def test_signals_end_the_program(signals, statuses):
    with running("--listen", "127.0.0.1:0", "--demo") as process:
        assert "is listening on" in process.stderr.readline()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) in statuses


@contextlib.contextmanager
def running(*arguments, command=(sys.executable, str(PROGRAM)), **environ):
    """The program, or another one, as its own process."""
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith(("NDJSON_", "OLLAMA_"))}, **environ}
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            yield process
        finally:
            process.kill()


def mistake(*arguments, **environ):
    """The one line with which the program ends at once, with status 2."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(mock.patch.dict(os.environ, environ, clear=True))
        for target, name, new in (
                (sys, "argv", ["", *arguments]), (proxy_module, "serve", ProxyServer.server_close),
                (proxy_module, "say", lambda text: print(text, file=sys.stderr))):
            stack.enter_context(mock.patch.object(target, name, new))
        try:
            status = proxy_module.main()
        except SystemExit as error:
            status = error.code
    assert status == 2 and len(output.getvalue().splitlines()) == 1, output.getvalue()
    return output.getvalue()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("listen, shown", [
    ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), *[("[::]", "[::1]")] * socket.has_dualstack_ipv6()])
def test_program_says_an_address_that_works_and_ends_on_ctrl_c(listen, shown):
    with running("--demo", "--listen", listen + ":0", "--insecure") as process:
        url = parse_url(re.search(r"listening on (\S+)", process.stderr.readline())[1])
        assert url.netloc == f"{shown}:{url.port}" and "demo" in process.stderr.readline()
        assert call(mock.Mock(server_port=url.port), "GET", "/v1/models").status == 200
        assert f"{listen}:{url.port}" in mistake("--demo", "--listen", f"{listen}:{url.port}", "--insecure")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0 and "Traceback" not in process.stderr.read()


def test_program_without_ollama_warns_and_without_stderr_it_goes_on(hooks):
    hook = hooks("from ndjson_sse_proxy import ProxyError\ndef authenticate(_): raise ProxyError(429, 'x')")
    with running("--listen", "127.0.0.1:0", "--hooks", hook, OLLAMA_HOST="127.0.0.1:1") as process:
        first, second, third = [process.stderr.readline() for _ in range(3)]
        assert "upstream: http://127.0.0.1:1;" in second and "reach Ollama" in third and "--demo" in third
        process.stderr.close()
        server = mock.Mock(server_port=int(re.search(r":(\d+) ", first)[1]))
        assert call(server, "GET", "/metrics").status == 429  # the hook's ProxyError is the program's
        assert raw(server, (b"GET /healthz HTTP/1.1\r\n%b\r\n" % HOST) * 2).count(b"ok\n") == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_stderr_that_nobody_reads_stops_neither_answers_nor_the_end(start):
    _, fake = start(RECORDED["missing"])
    with running("--listen", "127.0.0.1:0", OLLAMA_HOST=fake.url, OLLAMA_API_KEY="key") as process:
        server = mock.Mock(server_port=int(re.search(r":(\d+) ", process.stderr.readline())[1]))
        with Client(server, path=None) as client:  # one connection, where a log that blocks stops all
            for _ in range(150):  # 285 KB: a line of the log names all the fields
                client.ask(**{f"{i:02d}" + "x" * 90: 1 for i in range(20)})
                assert b"404 Not Found" in client.read_until(b'"type":"not_found_error"}}')
            fake.steps = [SAID, HOLD]
            client.ask()
            client.read_until(b"data: ")
            assert fake.requests.get(timeout=DEADLINE)[1]["Authorization"] == "Bearer key"
            process.send_signal(signal.SIGTERM)
            poll(lambda: not accepts(server.server_port))
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 1  # draining would take longer


@pytest.mark.parametrize("arguments, text", [
    *[(arguments, arguments.split(" ")[0]) for arguments in (
        "--listen :65536", "--listen no!host", "--listen https://127.0.0.1:1", "--upstream http://user@box",
        "--upstream http://127.0.0.1:1/é", "--idle-timeout nan", "--api-key sk-tiny",
        "--alias x", "--option num_ctx=big", "--option nosuch=1", "--nosuch")],
    *[(flag + " /no/file", "/no/file") for flag in ("--api-key-file", "--tls-cert", "--tls-key", "--hooks")],
    ("--listen 192.0.2.1:0 --insecure", "can't start"), ("--listen 0.0.0.0:0", "--insecure"),
    ("--upstream 127.0.0.1:11435", "own address"), ("--upstream 127.0.0.1:11434/v1", "remove /v1"),
    ("--demo --upstream box", "--demo and --upstream"), ("--hooks /dev/null", "none of authenticate"),
    ("--api-key sk-0123456789 sk-9876543210", "has no flag"),
    ("NDJSON_SSE_PROXY_IDLE_TIMEOUT=soon", "soon"), ("NDJSON_SSE_PROXY_DEMO=perhaps", "perhaps"),
    ("NDJSON_SSE_PROXY_OPTION=num_ctx=1 nosuch=x", "nosuch"), ("NDJSON_SSE_PROXY_API_KEY= ", "--api-key"),
    ("--hooks ", "is empty"),
    ("NDJSON_SSE_PROXY_LISTNE=x", "--listne"), ("OLLAMA_HOST=a b", "--upstream"),
    ("OLLAMA_API_KEY=a\nb", "OLLAMA_API_KEY")])
def test_mistake_in_a_flag_or_variable_is_one_line_that_shows_no_key(arguments, text):
    name, _, value = arguments.partition("=")
    output = mistake(*arguments.split(" ")) if name[0] == "-" else mistake(**{name: value})
    assert text in output and "sk-" not in output


def test_flag_wins_over_environment_over_default_and_urls_are_read_as_ollama_does():
    environ = {"NDJSON_SSE_PROXY_IDLE_TIMEOUT": "5", "OLLAMA_HOST": "0.0.0.0", "NDJSON_SSE_PROXY_DEMO": "1",
               "NDJSON_SSE_PROXY_API_KEY": "sk-0123456789 bob:sk-9876543210", "NDJSON_SSE_PROXY_ALIAS": "a=b"}
    settings = read_settings(["--idle-timeout", "7", "--alias", "c=d"], environ)
    assert settings.idle_timeout == 7 and settings.demo is True and settings.alias == [("a", "b"), ("c", "d")]
    assert len(settings.api_key) == 2 and settings.upstream.geturl() == "http://0.0.0.0:11434"
    settings = read_settings([], {**environ, "NDJSON_SSE_PROXY_UPSTREAM": "box:1"})
    assert settings.idle_timeout == 5 and settings.upstream.geturl() == "http://box:1"
    urls = [parse_url(text).geturl() for text in ("", "http://box", "https://box/", "[::1]:5/ollama/")]
    assert urls == ["http://127.0.0.1:11434", "http://box:80", "https://box:443", "http://[::1]:5/ollama"]


# ---- Documents -----------------------------------------------------------------------------------


def test_doctests_run():
    failed, attempted = doctest.testmod(proxy_module)
    assert failed == 0 < attempted


def readme(pattern):
    """What this pattern finds in README."""
    return re.search("(?ms)" + pattern, (HERE / "README.md").read_text(encoding="utf-8"))[1]


def readme_rows(heading):
    """A table of README: each name in the first cell -> the second cell."""
    rows = re.findall(r"(?m)^\| (.*`.*?) \| (.*?) \|$", readme(f"^## {heading}\n(.*?)^## "))
    return {name: effect for names, effect in rows for name in re.findall("`(.*?)`", names)}


def accepts(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


def test_readme_idea_turns_lines_into_frames(start):
    (_, fake), port, body = start(RECORDED["hello"]), free_port(), b'{"model":"m","messages":[]}'
    source = readme("```python\n# idea.py\n(.*?)```").replace("11434", fake.url.rpartition(":")[2])
    with running(command=[sys.executable, "-c", source.replace("11436", str(port))]):
        poll(lambda: accepts(port))
        frames = call(mock.Mock(server_port=port), "POST", "/", body).body.decode().split("\n\n")
    assert fake.requests.get(timeout=DEADLINE)[::2] == ("POST /api/chat HTTP/1.1", body)
    lines = re.findall(r"(?m)^\{.*$", RECORDED["hello"].decode())
    assert frames == [*["data: " + line for line in lines], "data: [DONE]", ""]


def test_readme_hooks_limit_models_and_requests_and_note_usage(start, hooks, tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    source = readme("```python\n# hooks.py\n(.*?)```").replace("PER_MINUTE = 30", "PER_MINUTE = 2")
    server, _ = start(RECORDED["hello"], api_key=[ALICE, BOB], hooks=hooks(source))

    def ask(model, key=ALICE[1], path="/v1/chat/completions"):
        return call(server, "POST", path, {"model": model, "messages": []}, bearer(key))
    answers = [ask("other"), ask("demo-text"), ask("demo-think", path="/api/chat"), ask("demo-text")]
    assert [answer.status for answer in answers] == [403, 200, 200, 429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 61 and ask("demo-text", BOB[1]).status == 200

    def rows():  # the hook runs after the answer
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect("usage.db")) as db:
            return db.execute("select * from usage where caller = 'alice' order by model").fetchall()
    poll(lambda: rows() == [("alice", "demo-text", 9, 27), ("alice", "demo-think", 9, 27)])
    assert "Traceback" not in "\n".join(log.queue)


def test_readme_names_every_flag_field_and_route_and_says_what_is_ignored_or_refused(start, capsys):
    with pytest.raises(SystemExit):
        read_settings(["--help"], {})
    flags = [set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) for text in (
        capsys.readouterr().out, readme("^## Command line\n(.*?)^## "))]
    assert flags[0] == flags[1]

    def effect(field, value):
        with contextlib.suppress(ProxyError):
            base = {"model": "m", "messages": []}
            return "used" if to_ollama_chat({**base, field: value}) != to_ollama_chat(base) else "hint"
        return "400 "
    fields, routes = readme_rows("Fields"), readme_rows("Routes")
    assert set(fields) == set(proxy_module.CHAT_FIELDS) and set(routes) == set(proxy_module.ROUTES)
    for field, text in fields.items():
        found = {effect(field, value) for value in (
            7, "x", "low", "none", ["x"], [function()], [{"role": "user"}], {"x": 7}, {"type": "text"}, True)
            if (field, value) != ("n", True)}  # which is 1
        clear = {"hint"}, {"400 "}
        assert found == {text[:4]} if {text[:4]} in clear else found not in clear, field
    server, _ = start(RECORDED["version"])
    for path, text in routes.items():
        found = [call(server, method, path.replace("*", "x"), b"{}").status for method in ("POST", "DELETE")]
        assert (403 in found) == text.startswith("always 403"), path


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_readme_systemd_unit_is_valid(tmp_path):
    unit = tmp_path / "ndjson-sse-proxy.service"
    unit.write_text(readme(r"(^    \[Unit\].*?)^\S"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and unit.name.encode() not in done.stderr, done.stderr
    environ = dict(re.findall(r"Environment=(\w+)=(.*)", unit.read_text()))
    assert environ and read_settings([], environ)


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here")
def test_readme_nginx_passes_frames_one_by_one_and_hang_ups_on(start, tmp_path):
    (server, fake), port, more = start(), free_port(), threading.Event()
    config = readme(r"(^    upstream ollama_boxes.*?)^\S").replace("11435", str(server.server_port))
    config = re.sub("ssl_certificate.*", "", config).replace("443 ssl", f"127.0.0.1:{port}; access_log off")
    for kind in "client_body", "proxy", "fastcgi", "uwsgi", "scgi":
        config += f"{kind}_temp_path {tmp_path}/{kind};"
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; events {{}} http {{ {config} }}")
    with running(command=["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", "nginx.conf"]):
        poll(lambda: accepts(port))
        fake.steps = [SAID, more, chunk(FINAL) + END]
        with Client(mock.Mock(server_port=port)) as client:
            client.read_until(b"some")  # while the upstream waits for `more`
            more.set()
            assert b"data: [DONE]" in client.read_until(b"[DONE]")
            fake.steps = [HOLD]
            client.ask()
            poll(lambda: fake.requests.qsize() == 2)
        assert fake.left.wait(DEADLINE)


# ---- Compare: the same questions to Ollama's /v1 and to the proxy ------------------------------
# `python test_proxy.py compare` starts a proxy in front of an Ollama and asks both the questions of
# compare_table(). Nothing that it checks depends on the words that a model chooses.

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "London"]}}, "required": ["city"]}
FITS = re.compile(r'\s*\{\s*"city"\s*:\s*"(Paris|London)"[^{}]*\}\s*')


def ask_url(url, path="/v1/chat/completions", method="POST", read=Answer, headers=(), **fields):
    """Send a request; a field that is None is not sent. Raises ProxyError for an error, in short."""
    body = json.dumps({name: value for name, value in fields.items() if value is not None})
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(kind(url.hostname, url.port, timeout=600)) as connection:  # models load slowly
        connection.request(method, url.path + path, body if method == "POST" else None, dict(headers))
        with contextlib.closing(connection.getresponse()) as response:
            if response.status == 200:
                return read(response)
            error = Answer(response).json()["error"]
    error = {"code": error, "message": ""} if isinstance(error, str) else error  # Ollama's own API
    words = [f"{response.status} {error['code'] or error['param'] or ''}".strip()]
    words += [text for text in ("ollama pull", "num_ctx") if text in error["message"]]
    raise ProxyError(response.status, ", ".join(words))


def text_of(message):  # or of a delta, thoughts included, in either API
    return "".join(message.get(name) or "" for name in ("reasoning", "thinking", "content"))


def facts(answer):
    """What can be seen in a whole answer, by the names that compare_table() uses."""
    whole, ignored = answer.json(), answer.headers.get("X-Ignored-Fields")
    choice, tokens = whole["choices"][0], whole["usage"]["completion_tokens"]
    message, text, reason = choice["message"], text_of(choice["message"]), choice["finish_reason"]
    calls, logprobs = message.get("tool_calls") or [], (choice.get("logprobs") or {}).get("content")
    thoughts = [name for name in ("reasoning", "reasoning_content") if message.get(name)]
    called = ", ".join(call["function"]["name"] for call in calls)
    right = reason == "tool_calls" and len({call["id"] for call in calls}) == len(calls) and all(
        FITS.fullmatch(call["function"]["arguments"]) for call in calls)
    return {
        "text": text, "choices": f"200, {len(whole['choices'])} choice", "cut": "200, silently cut",
        "stop": "goes on" if re.search(r"\s", text) else "stops there",
        "length": f"{tokens} tokens, {reason}" if tokens <= 3 else "more than 3 tokens",
        "fields": (" and ".join(thoughts) or "200") + (f", ignored {ignored}" if ignored else ""),
        "logprobs": f"{len(logprobs[0]['top_logprobs'])} per token" if logprobs else "none",
        "schema": "fits" if FITS.fullmatch(message["content"] or "") else "does not fit",
        "calls": called if right else f"faulty: {called}" if calls else "no calls"}


def look_at_frames(answer, again):
    """The parts of a stream. The role belongs at the start and is shown only elsewhere."""
    seen, (*frames, end, _) = [], ("\n\n" + answer.body.decode()).split("\n\n")
    for chunk in (json.loads(frame[len("data: "):]) for frame in frames[1:]):
        choice, raw = (chunk.get("choices") or [{"delta": {}}])[0], "done" in chunk
        parts = {"role": choice["delta"].get("role"), "text": text_of(choice["delta"]),
                 "finish": choice.get("finish_reason"), "usage": chunk.get("usage"), "frames": raw}
        seen += [name for name, value in parts.items() if value and seen[-1:] != [name]]
    return ", ".join([*seen[seen[:1] == ["role"]:], end[len("data: "):] or "NDJSON"])


def look_at_sampling(answer, again):
    """Compare with /api/chat, which samples as the Modelfile says. again() asks the same side once more."""
    native = {"path": "/api/chat", "stream": False, "think": False, "options": {"seed": 7, "num_predict": 20}}
    one, other = (text_of(again(**native).json()["message"]) for _ in range(2))
    how = "same text as" if facts(answer)["text"] == facts(again())["text"] == one else "other text than"
    return f"{how} /api/chat" if one == other else "can't be repeated"


def look_at_hang_up(answer, again):
    again(stream=True, max_tokens=2000, read=http.client.HTTPResponse.readline)
    hung_up = time.monotonic()
    again()
    return "answers at once" if time.monotonic() - hung_up < 20 else "is busy"  # seconds, for one token


def look_at_context(answer, again):
    """The context that the model was loaded with, in tokens, or 0 if /api/ps does not say."""
    name, models = answer.json()["model"], again(path="/api/ps", method="GET").json()["models"]
    return sum(each.get("context_length", 0) for each in models if each["name"] in (name, name + ":latest"))


def compare_table(model, can, context):
    """Rows: the question, the request's fields (or why it is not asked), what to look at, and a pattern of
    what the proxy promises to show. {v1} is what Ollama's /v1 shows."""
    def user(text="Count from 1 to 2000.", **fields):
        return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 20,
                "temperature": 0, "reasoning_effort": "none" if "thinking" in can else None, **fields}
    tools = functools.partial(user, "What is the weather in Paris and in London?", max_tokens=300, tools=[
        {"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("weather", "time")])
    named = tools(tool_choice={"type": "function", "function": {"name": "time"}})
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    story = user("Tell me a story.", seed=7, temperature=None)
    stream = user(stream=True, stream_options={"include_usage": True})
    raw = user(path="/api/chat", headers={"Accept": "text/event-stream"}, options={"num_predict": 20})
    long = user("word " * context * 2) if 0 < context <= 32768 else "context too long"
    half = user(options={"num_ctx": context // 2}) if context else "context unknown"
    think = "(reasoning and reasoning_content|200)" if "thinking" in can else "200, ignored reasoning_effort"
    return [
        ("text, streamed", stream, look_at_frames, r"(text, )?finish, usage, \[DONE\]"),
        ("text, whole, stop=' '", user(stop=[" ", "\n"]), "stop", "stops there"),
        ("max_completion_tokens=3", user(max_completion_tokens=3), "length", "[0-3] tokens, .*"),
        ("seed twice, no temperature", story, look_at_sampling, "same text as /api/chat|can't be .*"),
        ("top_logprobs=2", user(logprobs=True, top_logprobs=2), "logprobs", "2 per token|{v1}"),
        ("reasoning_effort=high", user(reasoning_effort="high"), "fields", think),
        ("a JSON schema", user(max_tokens=300, response_format=schema), "schema", "fits|{v1}"),
        ("tool_choice=auto", tools(), "calls", "no calls|[wt].*|{v1}"),
        ("tool_choice=none", tools(tool_choice="none"), "calls", "no calls"),
        ("tool_choice=required", tools(tool_choice="required"), "calls", "weather|time"),
        ("tool_choice names time", named, "calls", "time"),
        ("parallel_tool_calls=false", tools(parallel_tool_calls=False), "calls", "no calls|(faulty: )?[^,]+"),
        ("n=2", user(n=2), "choices", "400 n"),
        ("a field named color", user(color="red"), "fields", "200, ignored color"),
        ("temperature is a string", user(temperature="0"), "fields", "400 temperature"),
        ("a missing model", user(model="missing"), "fields", "404 model_not_found, ollama pull"),
        ("a hang-up, then a question", user(max_tokens=1), look_at_hang_up, "answers at once"),
        ("/api/chat as event stream", raw, look_at_frames, r"frames, \[DONE\]"),
        ("more than the context holds", long, "cut", "400 context_length_exceeded, num_ctx"),
        (f"num_ctx={context // 2} (reloads)", half, look_at_context, str(context // 2))]


def compare_rows(urls, table, can):
    """Ask every question; yield what each side shows, and the verdict."""
    def see(url, fields, look):
        again = functools.partial(ask_url, url, **fields)
        try:
            answer = again()
            return str(look(answer, again)) if callable(look) else facts(answer)[look]
        except Exception as error:  # noqa: BLE001  answers can be wrong in any way
            return str(error) if isinstance(error, ProxyError) else f"failed: {error!r}"
    for number, (question, fields, look, promise) in enumerate(table, 1):
        print(f"{number}/{len(table)} {question}", file=sys.stderr, flush=True)
        why = fields if isinstance(fields, str) else "no tools" if {"tools"} & set(fields) - set(can) else ""
        v1, own = (f"skipped: {why}" if why else see(url, fields, look) for url in urls)
        held = re.fullmatch(promise.replace("{v1}", re.escape(v1)), own)
        verdict = "skipped" if why else "BROKEN" if not held else "same" if v1 == own else "differs"
        yield {"question": question, "v1": v1, "proxy": own, "verdict": verdict, "promise": promise}


def compare(argv):
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="test_proxy.py", description="Ask Ollama and the proxy the same.")
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("--upstream", default=os.environ.get("OLLAMA_HOST") or "127.0.0.1", metavar="URL")
    parser.add_argument("--model", metavar="NAME", help="(default: the first one that can chat)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    settings = make_settings(arguments.upstream)
    ask = functools.partial(ask_url, settings.upstream)
    try:
        version, tags = ask("/api/version", "GET").json()["version"], ask("/api/tags", "GET").json()
        names = [arguments.model] if arguments.model else [each["name"] for each in tags["models"]]
        model = next((name for name in names if "completion" in (
            can := ask("/api/show", model=name).json().get("capabilities", ["completion"]))), None)
        if not model:
            raise LookupError("no model that can chat; run `ollama pull NAME` on its machine")
        print(f"loading {model}", file=sys.stderr, flush=True)
        context = look_at_context(ask("/api/chat", model=model, stream=False), ask)
    except Exception as error:  # noqa: BLE001  there may be anything at that URL
        print(f"compare: can't ask Ollama at {settings.upstream.geturl()}: {error}", file=sys.stderr)
        return 2
    with mock.patch.object(proxy_module, "say"), ProxyServer(settings) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = settings.upstream, parse_url(f"127.0.0.1:{server.server_port}")
        rows = list(compare_rows(urls, compare_table(model, can, context), can))
        server.shutdown()
    verdicts, differ = [row["verdict"] for row in rows], sum(row["v1"] != row["proxy"] for row in rows)
    asked, broken = len(rows) - verdicts.count("skipped"), verdicts.count("BROKEN")
    result = {"ollama": version, "model": model, "asked": asked, "differ": differ, "held": asked - broken}
    if arguments.json:
        print(json.dumps({**result, "rows": rows}))
    else:
        layout = "| {:27.27} | {:27.27} | {:36.36} | {:7} |".format
        print(layout("The client sends", "Ollama's /v1", "This proxy", ""), "|---|---|---|---|", sep="\n")
        print(*(layout(*row.values()) for row in rows), sep="\n")
        print("Ollama {ollama}, {model}: {differ} of {asked} answers differ; {held} of {asked} promises held"
              .format(**result))
    return int(broken > 0)


class ScriptedOllama(FakeOllama):
    """An Ollama with a model that can't think. Its /v1 ignores what a real one's ignored."""

    names, can, context, loaded, paris = ["m:latest"], ["completion", "tools"], 4096, 0, {"city": "Paris"}
    steps = property(lambda self: self.script(*self.requests.get()), lambda self, steps: None)

    def script(self, line, headers, data):
        path, body = line.split()[1], json.loads(data or "{}")
        v1, options = path.startswith("/v1"), body.get("options", {})
        if v1:
            options = {"temperature": 1.0, **body, "num_predict": body["max_tokens"]}
        errors = {"404 model 'missing' not found": body.get("model") == "missing",
                  '400 "m" does not support thinking': body.get("think") or v1 and "reasoning_effort" in body,
                  "400 json: cannot unmarshal string": isinstance(options.get("temperature"), str),
                  "400 input length exceeds the context length": not body.get("truncate", 1) and (
                      len(data) > 6 * self.context)}
        status, _, error = next((text for text, found in errors.items() if found), "200 ").partition(" ")
        count, schema = options.get("num_predict", 20), str(body.get("response_format" if v1 else "format"))
        name = re.search("'const': '(.*?)'", schema)  # of the function, in a forced call
        text = f"{options.get('temperature', 0.8)},{options.get('seed')}{' says m' * ('stop' not in options)}"
        if "city" in schema:
            text = json.dumps({"name": name[1], "arguments": self.paris} if name else self.paris)
        places = [self.paris, {"city": "London"}] if "tools" in body else []
        message = {"role": "assistant", "content": text, "tool_calls": [{"id": where["city"], "function": {
            "name": "weather", "arguments": json.dumps(where) if v1 else where}} for where in places]}
        tokens = [{"token": "0", "logprob": 0, "top_logprobs": [{}, {}]}] if "logprobs" in body else []
        models = [{"name": name, "context_length": self.loaded} for name in self.names]
        self.loaded = options.get("num_ctx", self.context)
        if error:
            answers = [{"error": {"message": error, "code": None, "param": None} if v1 else error}]
        elif v1:
            choice = {"message": message, "delta": message, "logprobs": {"content": tokens}}
            choice["finish_reason"] = "tool_calls" if places else "stop"
            answers = [{"model": "m", "usage": {"completion_tokens": count}, "choices": [choice]}]
        elif path == "/api/chat":
            last = {"done": True, "done_reason": ["stop", "length"][count < 20], "eval_count": count}
            first = {"model": "m", "done": False, "message": message, "logprobs": tokens}
            answers = [{**first, **last}] if body.get("stream") is False else [first, {**last, "message": {}}]
        else:
            answers = [{"version": "0.0.0", "capabilities": self.can, "models": models, "done": True}]
        form = b"data: %b\n\ndata: [DONE]\n\n" if v1 and body.get("stream") else b"%b\n"
        first, *rest = [chunk(form % json.dumps(answer).encode()) for answer in answers]
        rest = [HOLD] if count == 2000 else [*rest, b"0\r\n\r\n"]
        return [HEAD.replace(b"200 OK", status.encode() + b" x"), first, *rest]


@pytest.mark.parametrize("ollama, settings, arguments, status, text", [
    ({}, {}, [], 0, "Ollama 0.0.0, m:latest: 14 of 20 answers differ; 20 of 20 promises held"),
    ({}, {"allow_truncation": True}, ["--json"], 1, '"asked": 20, "differ": 13, "held": 19, "rows": [{"qu'),
    ({"can": ["completion"], "context": 1 << 20}, {}, ["--model", "m"], 0, " of 14 answers differ; 14 of 14"),
    ({"can": ["embedding"]}, {}, [], 2, "no model that can chat"),
    ({}, {}, ["--model", "missing"], 2, "model 'missing' not found"),
    ({}, {}, ["--upstream", "127.0.0.1:1"], 2, "http://127.0.0.1:1: ")], ids=str)
def test_compare_status_says_if_promises_held(ollama, settings, arguments, status, text, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "make_settings", functools.partial(make_settings, **settings))
    with contextlib.closing(ScriptedOllama()) as fake:
        vars(fake).update(ollama)
        assert compare(["compare", "--upstream", fake.url, *arguments]) == status
    out, err = capsys.readouterr()
    assert text in (out if status < 2 else err)
    assert status < 2 or len(err.splitlines()) == 1 and not out


def test_compare_as_a_program_prints_the_table_in_readme():
    with contextlib.closing(ScriptedOllama()) as fake:
        table = subprocess.check_output([sys.executable, __file__, "compare", "--upstream", fake.url])
    assert set(table.decode().splitlines()[:-1]) <= set((HERE / "README.md").read_text("utf-8").splitlines())


if __name__ == "__main__":
    sys.exit(compare(sys.argv[1:]))
