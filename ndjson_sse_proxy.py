"""ndjson_sse_proxy: Ollama's NDJSON in, the SSE that OpenAI clients read out.

    python ndjson_sse_proxy.py            # in front of the Ollama on this machine
    python ndjson_sse_proxy.py --demo     # nothing installed: a scripted Ollama answers

Ollama streams an answer as NDJSON: one JSON object a line, in a chunked HTTP body.

    {"model":"m","message":{"role":"assistant","content":"Hel"},"done":false}\n
    {"model":"m","message":{"role":"assistant","content":"lo"},"done":false}\n
    {"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}\n

OpenAI's clients read server-sent events (SSE): frames of `data:` lines, each frame ended by
a blank line. The `delta`s add up to the message.

    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{"role":"assistant","content":""},...}]}\n\n
    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{"content":"Hel"},...}]}\n\n
    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{"content":"lo"},...}]}\n\n
    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n
    data: [DONE]\n\n

The way of the data:

    client --HTTP--> ProxyHandler -- to_ollama_chat --> Upstream --HTTP--> Ollama
    client <--SSE--- ProxyHandler <- sse_event <- ChatStream <- NdjsonDecoder <- read1() <- NDJSON

The middle (sections 3 to 6) never sees a socket, a clock or a random number, so you can read
it, test it and paste it elsewhere on its own (with section 2 for its errors). A stream ends in
exactly one of two ways: a finish_reason and `[DONE]`, or an error frame. An answer that was cut
is never passed off as a whole one.

What it does not do: no TLS, no authentication (it listens on this machine only, unless told
otherwise), no caching, no retries, no prompts of its own.

To learn streaming read sections 3, 4, 6; then 5 (the fields of a request) and 8 and 10 (HTTP).
"""
from __future__ import annotations

import argparse
import calendar
import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # names for annotations, which are read and checked but never run
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import NoReturn

    Json = dict[str, Any]
    Convert = Callable[[Any, str], Any]  # (value, its name in the request) -> Ollama's value
    Field = tuple[str, str, Convert | None]

__version__ = "0.1.0"

# ---- 1. Limits and settings: each number with its reason; one frozen object, handed down -------

READ_BYTES = 64 * 1024  # at most this much in one read: several times what a model says at once
MAX_LINE_BYTES = 4 << 20  # a tool call may carry a whole file; a line that never ends may not grow
MAX_BODY_BYTES = 32 << 20  # a long conversation with a few pictures in it
MAX_ERROR_BYTES = 64 * 1024  # of an upstream's error page; nobody reads more
MAX_IGNORED_NAMES = 20  # in X-Ignored-Fields: clients stop reading headers somewhere above 8 KiB
CONNECT_SECONDS = 10.0  # Ollama is near; whoever takes longer to accept is not there
CLIENT_SECONDS = 60.0  # a client's silence, within a request or between two, and its unread data
LINGER_SECONDS = 1.0  # wait this long for a client to read a refusal before the socket goes


class Config(NamedTuple):
    """Every setting; FLAGS in section 13 says what each is for."""

    listen: urllib.parse.SplitResult = urllib.parse.urlsplit("http://127.0.0.1:11435")
    upstream: urllib.parse.SplitResult = urllib.parse.urlsplit("http://127.0.0.1:11434")
    demo: bool = False
    allow_truncation: bool = False
    idle_timeout: float = 600.0


# ---- 2. Errors: each knows its HTTP status and shows itself as OpenAI's error object -----------
# An SDK decides by the status whether to retry and which exception to raise, and shows
# `message` to a person. So the status must be right and the message must name the cure.

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               429: "rate_limit_error"}


class ProxyError(Exception):
    """An answer that says no.

    status: the HTTP status, if it can still be sent. param: the request's field at fault.
    code: OpenAI's word for a program to look at, or ours for the way an upstream failed.
    """

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def body(self) -> Json:
        """OpenAI's error object.

        >>> ProxyError(404, "no such model", code="model_not_found").body()["error"]["type"]
        'not_found_error'
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": ERROR_TYPES.get(self.status, kind),
                          "param": self.param, "code": self.code}}


def broken_upstream(what: str) -> ProxyError:
    """Ollama (or what answers in its place) did not speak its protocol."""
    return ProxyError(502, f"The upstream broke its protocol: {what}", code="upstream_protocol")


def cut_upstream(what: str) -> ProxyError:
    """The upstream went away before it said that it was done."""
    return ProxyError(502, f"The upstream's answer was cut: {what}", code="upstream_cut")


CURE = ("Shorten the messages, ask for a longer context (options.num_ctx in the request), or start "
        "the proxy with --allow-truncation to have them cut silently.")

# Ollama's texts and what becomes of them: status, param, code, message; {0} is the pattern's first
# group, and an empty message passes Ollama's own on. Some mistakes of the client come from Ollama
# as a 500, which SDKs would retry: here they are 400s.
UPSTREAM_ERRORS = [
    (r"request \((\d+) tokens\) exceeds the available context size \((\d+) tokens\)",
     400, "messages", "context_length_exceeded", "This model's maximum context length is {1} "
     "tokens. However, your messages resulted in {0} tokens. " + CURE),
    (r"input length exceeds the context length|prompt is longer than the context length",
     400, "messages", "context_length_exceeded", "This model's maximum context length is exceeded "
     "by your messages (Ollama gave no figures). " + CURE),
    (r"^model ['\"](.+?)['\"] not found", 404, "model", "model_not_found",
     "model '{0}' not found. Where Ollama runs: ollama pull {0}"),
    (r'^option "(.+?)" must be of type', 400, "options.{0}", None, ""),
    (r"^invalid format: ", 400, "response_format", None, ""),
    (r"^invalid think value: |does not support thinking", 400, "think", None, ""),
    (r"^time: .*invalid duration", 400, "keep_alive", None, ""),
    (r"does not support tools", 400, "tools", None, ""),
]


def upstream_error(value: Any, status: int = 502) -> ProxyError:
    """What Ollama said of its failure (a text, JSON in a text, or an object), under its status.

    >>> error = upstream_error("model 'llama3' not found", 404)
    >>> error.status, error.code, error.message
    (404, 'model_not_found', "model 'llama3' not found. Where Ollama runs: ollama pull llama3")
    """
    text = unwrap_error(value)
    for pattern, new_status, param, code, message in UPSTREAM_ERRORS:
        match = re.search(pattern, text)
        if match:
            message = message.format(*match.groups()) if message else text
            return ProxyError(new_status, message, param.format(*match.groups()), code)
    return ProxyError(status, text, code="upstream_error")


def unwrap_error(value: Any) -> str:
    r"""The sentence inside Ollama's error, however often it was wrapped.

    >>> unwrap_error({"error": "{\"error\":{\"code\":400,\"message\":\"too long\"}}"})
    'too long'
    """
    for _ in range(5):
        if isinstance(value, dict) and ("error" in value or "message" in value):
            value = value.get("error", value.get("message"))
        elif isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = parse_object(value)
            except ValueError:
                break
    text = value if isinstance(value, str) else to_json(value)
    return text.strip()[:2000] or "the upstream failed without a word"


# ---- 3. NDJSON in: bytes, split anywhere, to records -------------------------------------------
# TCP is a stream of bytes without borders: one read may end inside a line, even inside a UTF-8
# character. So bytes are kept until a newline has come, and only whole lines are decoded.


def refuse_constant(name: str) -> Any:
    """json's hook for NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    """json's hook for floats: 1e999 would become an infinity, which could not be sent on."""
    value = float(text)
    return value if abs(value) != float("inf") else refuse_constant(text)


PLAIN_JSON = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite)


def parse_object(data: bytes | str, decoder: json.JSONDecoder = PLAIN_JSON) -> Json:
    """Strict JSON whose outermost value is an object; raises ValueError for anything else."""
    try:
        value = decoder.decode(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if isinstance(value, dict):
        return value
    raise ValueError("not an object")


class NdjsonDecoder:
    """Bytes in, records out: one JSON object a line. Touches no socket.

    >>> decoder = NdjsonDecoder()
    >>> list(decoder.feed(b'{"a": 1}' + b'\\n{"b"'))      # the second line is not whole yet
    [(b'{"a": 1}', {'a': 1})]
    >>> list(decoder.feed(b': 2}' + b'\\n'))
    [(b'{"b": 2}', {'b': 2})]
    """

    def __init__(self, max_line: int = MAX_LINE_BYTES) -> None:
        self._rest = bytearray()  # of a line whose end has not come
        self._max_line = max_line

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Json]]:
        """Yield (line, record) for each line that `data` completes; blank lines are skipped.

        A generator, so that the records before a bad line come out before its error does.
        Raises ProxyError 502 for a line that is no JSON object, or longer than `max_line` bytes.
        """
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._append(end)
            line, self._rest = bytes(self._rest).strip(), bytearray()
            if line:
                yield line, self._record(line)
        self._append(rest)

    def close(self) -> Iterator[tuple[bytes, Json]]:
        """The input has ended: yield its last line, if that lacked only the newline.

        Raises ProxyError 502 if the end came in the middle of a line.
        """
        line = bytes(self._rest).strip()
        if line:
            try:
                yield line, self._record(line)
            except ProxyError:
                raise cut_upstream(f"it ended inside a line, {show(line)}") from None

    def _append(self, data: bytes) -> None:
        self._rest += data
        if len(self._rest) > self._max_line:
            raise broken_upstream(f"a line of more than {self._max_line} bytes")

    def _record(self, line: bytes) -> Json:
        try:
            return parse_object(line)
        except ValueError:  # UnicodeDecodeError and JSONDecodeError are ValueErrors, too
            raise broken_upstream(f"a line that is no JSON object, {show(line)}") from None


def show(data: bytes) -> str:
    """The start of some bytes, for a message."""
    return ascii(data[:60].decode("utf-8", "replace")) + ("..." if len(data) > 60 else "")


# ---- 4. SSE out: a value to a frame ------------------------------------------------------------
# A frame is one or more `data:` lines; the blank line after them tells the reader that the frame
# is whole. A newline in the text would end it too early. JSON writes newlines as \n, so it can't
# happen there; other data of several lines becomes several `data:` lines, which readers join.

JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
# Legal in JSON and SSE, but line ends to clients that use a text's splitlines() (httpx's
# iter_lines() does), so they go out escaped. JSON itself escapes all other line ends.
UNICODE_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def to_json(value: Any) -> str:
    """Compact JSON on one line, whatever the reader takes for a line end.

    >>> print(to_json({"text": "two\\nlines"}))
    {"text":"two\\nlines"}
    """
    text = JSON_ENCODER.encode(value)
    if not text.isascii():
        for char, escape in UNICODE_LINE_ENDS.items():
            text = text.replace(char, escape)
    return text


def to_bytes(value: Any) -> bytes:
    r"""JSON in UTF-8. Half an emoji (a lone surrogate), which UTF-8 can't carry, stays \ud83d."""
    return to_json(value).encode("utf-8", "backslashreplace")


def sse_event(data: Any) -> bytes:
    r"""One frame: bytes as they are, anything else as JSON.

    >>> sse_event({"a": 1}), sse_event(b"two\nlines")
    (b'data: {"a":1}\n\n', b'data: two\ndata: lines\n\n')
    """
    text = data if isinstance(data, bytes) else to_bytes(data)
    return b"".join(b"data: %b\n" % line for line in text.splitlines()) + b"\n"


# Not JSON, and no part of SSE: OpenAI's own sign that nothing was lost. Without it the client
# could not tell a whole stream from one whose connection was cut between two frames.
SSE_DONE = sse_event(b"[DONE]")


# ---- 5. Request: OpenAI's body to Ollama's -----------------------------------------------------
# The tables are the specification: to map another field, add a row. Rows are read from top to
# bottom and a later row overwrites what an earlier one put in the same place, so the order of
# the rows is the order of precedence.

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "object": (dict,), "array": (list,)}


def expect(value: Any, types: str, param: str) -> Any:
    """The value, if it is of one of the JSON types ("string or array"); else a 400 naming it.

    >>> expect("high", "integer or string", "effort")
    'high'
    """
    for name in types.split(" or "):  # to Python, but not to JSON, True is an int
        if isinstance(value, JSON_TYPES[name]) and isinstance(value, bool) == (name == "boolean"):
            return value
    raise ProxyError(400, f"'{param}' must be of type {types}", param)


def part(source: Json, name: str, types: str, where: str) -> Any:
    """A member that must be there, of one of the types."""
    return expect(source.get(name), types, f"{where}.{name}")


def each(items: list[Any], param: str) -> Iterator[tuple[str, Json]]:
    """The objects of an array, each with its name in the request: ("tools[0]", {...})."""
    for i, item in enumerate(items):
        yield f"{param}[{i}]", expect(item, "object", f"{param}[{i}]")


def one_of(choices: Json) -> Convert:
    """A conversion that looks the value up; a 400 lists the choices."""
    def convert(value: Any, param: str) -> Any:
        if value not in choices:
            raise ProxyError(400, f"'{param}' must be one of: {', '.join(choices)}", param)
        return choices[value]
    return convert


RESPONSE_FORMATS = {"text": None, "json_object": "json", "json_schema": "schema"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
         "tool": "tool"}
EFFORTS = {"none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high",
           "xhigh": "max", "max": "max"}  # Ollama has fewer steps


def to_strings(value: Any, param: str) -> list[str]:
    """A string or an array of strings, as an array."""
    items = value if isinstance(value, list) else [value]
    return [expect(item, "string", f"{param}[{i}]") for i, item in enumerate(items)]


def to_format(value: Json, param: str) -> Any:
    """response_format to Ollama's format: None for plain text, "json", or a JSON schema."""
    native = one_of(RESPONSE_FORMATS)(part(value, "type", "string", param), f"{param}.type")
    if native != "schema":
        return native
    return part(part(value, "json_schema", "object", param), "schema", "object",
                f"{param}.json_schema")


def to_usage_wish(value: Json, param: str) -> bool:
    """stream_options to whether a usage chunk is wanted."""
    return "include_usage" in value and bool(part(value, "include_usage", "boolean", param))


def to_tools(tools: list[Any], param: str) -> list[Any]:
    """Tools go up as they are, checked: the formats are the same, but Ollama has functions only."""
    for where, tool in each(tools, param):
        one_of({"function": True})(part(tool, "type", "string", where), f"{where}.type")
        part(part(tool, "function", "object", where), "name", "string", f"{where}.function")
    return tools


def to_text(content: Any, param: str) -> str:
    """A message's content: a string, or parts that are joined into one message.

    One message a part, as Ollama's own /v1 does it, would change what the model sees.
    """
    if isinstance(content, str):
        return content
    texts = []
    for where, item in each(content, param):
        one_of({"text": True})(part(item, "type", "string", where), f"{where}.type")
        texts.append(part(item, "text", "string", where))
    return "".join(texts)


def to_native_calls(calls: list[Any], param: str) -> list[Json]:
    """Earlier tool calls: OpenAI has the arguments as a text of JSON, Ollama as an object.

    Arguments that nobody can parse (a model wrote them) become {}; Ollama would refuse the chat.
    """
    native: list[Json] = []
    for where, call in each(calls, param):
        function = part(call, "function", "object", where)
        arguments = part(function, "arguments", "string or object", f"{where}.function")
        if isinstance(arguments, str):
            try:
                arguments = parse_object(arguments)
            except ValueError:
                arguments = {}
        native.append({"id": part(call, "id", "string", where), "function": {
            "index": len(native), "name": part(function, "name", "string", f"{where}.function"),
            "arguments": arguments}})
    return native


MESSAGE_FIELDS: dict[str, Field] = {
    # OpenAI's name     JSON type           Ollama's place  conversion
    "role":              ("string",          "role",         one_of(ROLES)),
    "content":           ("string or array", "content",      to_text),
    "reasoning":         ("string",          "thinking",     None),
    "reasoning_content": ("string",          "thinking",     None),
    "tool_calls":        ("array",           "tool_calls",   to_native_calls),
    "tool_call_id":      ("string",          "tool_call_id", None),
}

CHAT_FIELDS: dict[str, Field] = {
    # OpenAI's name           JSON type            Ollama's place               conversion
    "model":                 ("string",            "model",                     None),
    "messages":              ("array",             "messages",                  None),
    "tools":                 ("array",             "tools",                     to_tools),
    # Ollama's own, which the SDKs send through extra_body:
    "options":               ("object",            "options",                   lambda v, p: {**v}),
    "keep_alive":            ("string or number",  "keep_alive",                None),
    "think":                 ("boolean or string", "think",                     None),
    "truncate":              ("boolean",           "truncate",                  None),
    # OpenAI's win over those, and the new name of the limit over the old one:
    "max_tokens":            ("integer",           "options.num_predict",       None),
    "max_completion_tokens": ("integer",           "options.num_predict",       None),
    "temperature":           ("number",            "options.temperature",       None),
    "top_p":                 ("number",            "options.top_p",             None),
    "seed":                  ("integer",           "options.seed",              None),
    "stop":                  ("string or array",   "options.stop",              to_strings),
    "presence_penalty":      ("number",            "options.presence_penalty",  None),
    "frequency_penalty":     ("number",            "options.frequency_penalty", None),
    "reasoning_effort":      ("string",            "think",                     one_of(EFFORTS)),
    "response_format":       ("object",            "format",                    to_format),
    # What the answer shall be like; these stay here:
    "stream":                ("boolean",           "reply.stream",              None),
    "stream_options":        ("object",            "reply.include_usage",       to_usage_wish),
}


def map_fields(table: dict[str, Field], source: Json, target: Json, where: str = "") -> list[str]:
    """Put each field of `source` where its row says; return the names that have no row.

    A field that is null counts as not sent, as OpenAI has it.

    >>> target = {"options": {}}
    >>> map_fields(CHAT_FIELDS, {"seed": 1, "top_p": None, "color": "red"}, target), target
    (['color'], {'options': {'seed': 1}})
    """
    for name, (types, place, convert) in table.items():
        value = source.get(name)
        if value is not None:
            expect(value, types, where + name)
            group, _, key = place.rpartition(".")
            (target[group] if group else target)[key] = (
                convert(value, where + name) if convert else value)
    return [where + name for name in source if name not in table and source[name] is not None]


def to_native_messages(messages: list[Any], ignored: list[str]) -> list[Json]:
    """OpenAI's messages to Ollama's: as many, in the same order."""
    native: list[Json] = []
    called: dict[str, str] = {}  # the id of each tool call so far, and the function's name
    for where, message in each(messages, "messages"):
        part(message, "role", "string", where)
        native.append({"content": ""})
        ignored += map_fields(MESSAGE_FIELDS, message, native[-1], where + ".")
        for call in native[-1].get("tool_calls", ()):
            called[call["id"]] = call["function"]["name"]
        if native[-1].get("tool_call_id") in called:
            native[-1]["tool_name"] = called[native[-1]["tool_call_id"]]
    return native


class ChatRequest(NamedTuple):
    """A chat as it goes up, and what was asked of the answer."""

    body: Json  # for POST /api/chat
    reply: Json  # stream, include_usage: bool, if sent
    ignored: list[str]  # fields that nothing was done with


def to_ollama_chat(body: Json, allow_truncation: bool = False) -> ChatRequest:
    """OpenAI's chat request to Ollama's. Raises ProxyError 400 with the field's name.

    Ollama is always asked to stream: a whole answer is put together from the pieces, so that
    both have one way to fail. By itself Ollama cuts a prompt that does not fit without a word;
    truncate: false makes that an error. `shift` is never sent: one that differs from the loaded
    model's makes Ollama load the model anew.
    """
    for name in ("model", "messages"):
        if body.get(name) in (None, ""):
            raise ProxyError(400, f"'{name}' is missing", name)
    native: Json = {"options": {}, "reply": {}, "stream": True, "truncate": allow_truncation}
    ignored = map_fields(CHAT_FIELDS, body, native)
    native["messages"] = to_native_messages(native["messages"], ignored)
    return ChatRequest(native, native.pop("reply"), ignored)


# ---- 6. Stream: Ollama's records to OpenAI's chunks --------------------------------------------
# A state machine: which events are legal in which state, and where they lead. What is not in
# the table is a breach of protocol; an end of the input in any state but DONE is a cut.

START, STREAMING, DONE, FAILED = "START", "STREAMING", "DONE", "FAILED"

TRANSITIONS: dict[str, dict[str, str]] = {
    START: {"record": STREAMING, "done": DONE, "error": FAILED},
    STREAMING: {"record": STREAMING, "done": DONE, "error": FAILED},
    DONE: {},
    FAILED: {},
}


class ChatStream:
    """Records of POST /api/chat in, chat.completion.chunk dicts out; one object a stream.

    >>> stream = ChatStream("m", "chatcmpl-1", 1700000000)
    >>> for chunk in stream.feed({"message": {"content": "Hi"}, "done": False}):
    ...     print(chunk["choices"][0]["delta"])
    {'role': 'assistant', 'content': ''}
    {'content': 'Hi'}
    >>> for chunk in stream.feed({"done": True, "done_reason": "stop"}):
    ...     print(chunk["choices"][0])
    {'index': 0, 'delta': {}, 'finish_reason': 'stop'}
    """

    def __init__(self, model: str, stream_id: str, created: int, usage: bool = False) -> None:
        self.state = START
        self._envelope = {"id": stream_id, "object": "chat.completion.chunk", "created": created,
                          "model": model, "system_fingerprint": "fp_ollama"}
        self._usage = usage  # end with a chunk that counts the tokens?
        self._call_ids: list[str] = []  # of the tool calls sent so far

    def feed(self, record: Json) -> Iterator[Json]:
        """One record to its chunks. Raises ProxyError for an error record or a malformed one."""
        event = "error" if "error" in record else "done" if record.get("done") else "record"
        if event not in TRANSITIONS[self.state]:
            raise broken_upstream(f"a record after the stream was {self.state}")
        before, self.state = self.state, FAILED  # until this record has turned out well
        if event == "error":  # {"error": "the model runner has died"}
            raise upstream_error(record["error"])
        deltas = list(self._deltas(record))
        ending = list(self._ending(record)) if event == "done" else []
        self.state = TRANSITIONS[before][event]
        if before == START:
            yield self._chunk({"role": "assistant", "content": ""})
        for delta in deltas:
            yield self._chunk(delta)
        yield from ending

    def close(self) -> None:
        """The input has ended: was the answer whole? Raises ProxyError 502 if it was not."""
        if self.state != DONE:
            raise cut_upstream("it ended before the record that says done")

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**self._envelope, "choices": [choice]}

    def _deltas(self, record: Json) -> Iterator[Json]:
        """The parts of a record, a delta each: many clients look at one part of a delta only."""
        message = member(record, "message", dict, needed=not record.get("done"))
        thinking = member(message, "thinking", str)
        if thinking:  # not OpenAI's: some clients read the one name, some the other
            yield {"reasoning": thinking, "reasoning_content": thinking}
        if member(message, "content", str):
            yield {"content": message["content"]}
        for call in member(message, "tool_calls", list):
            yield {"tool_calls": [self._tool_call(call)]}

    def _tool_call(self, call: Any) -> Json:
        """Ollama's calls may lack an id, or all say index 0; so they are numbered here."""
        function = member(call, "function", dict, needed=True)
        index, call_id = len(self._call_ids), member(call, "id", str)
        if not call_id or call_id in self._call_ids:
            call_id = f"call_{self._envelope['id']}_{index}"
        self._call_ids.append(call_id)
        arguments = function.get("arguments") or {}
        return {"index": index, "id": call_id, "type": "function", "function": {
            "name": member(function, "name", str, needed=True),
            "arguments": arguments if isinstance(arguments, str) else to_json(arguments)}}

    def _ending(self, record: Json) -> Iterator[Json]:
        """The finish_reason, exactly once; then the usage, if it is wanted."""
        # Old Ollamas give no reason; load and unload answer a chat without messages.
        reason = "length" if record.get("done_reason") == "length" else "stop"
        if reason == "stop" and self._call_ids:
            reason = "tool_calls"
        yield self._chunk({}, reason)
        if self._usage:  # prompt_eval_count is left out when the whole prompt was cached
            prompt = member(record, "prompt_eval_count", int)
            completion = member(record, "eval_count", int)
            yield {**self._envelope, "choices": [], "usage": {
                "prompt_tokens": prompt, "completion_tokens": completion,
                "total_tokens": prompt + completion}}


def member(record: Any, name: str, kind: type, needed: bool = False) -> Any:
    """A member of an upstream's object; its type's empty value if it is null or not there.

    Raises ProxyError 502 for another type, or if it is needed and not there.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if value is None and isinstance(record, dict) and not needed:
        return kind()
    if not isinstance(value, kind):
        raise broken_upstream(f"no {kind.__name__} {name!r} in {show(to_bytes(record))}")
    return value


def fold_chunks(chunks: Iterable[Json]) -> Json:
    """A whole answer (chat.completion): the deltas of a stream, added up.

    >>> stream = ChatStream("m", "chatcmpl-1", 1700000000)
    >>> records = [{"message": {"content": "H"}}, {"message": {"content": "i"}, "done": True}]
    >>> fold_chunks(c for r in records for c in stream.feed(r))["choices"][0]["message"]
    {'role': 'assistant', 'content': 'Hi'}
    """
    answer: Json = {}
    message: Json = {}
    finish_reason = None
    for chunk in chunks:
        answer.update(chunk, object="chat.completion")
        for choice in chunk["choices"]:
            for name, value in choice["delta"].items():
                message[name] = message[name] + value if name in message else value
            finish_reason = choice["finish_reason"]
    for call in message.get("tool_calls", ()):
        del call["index"]  # the order in the array says it
        message["content"] = message["content"] or None
    answer["choices"] = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return answer


# ---- 8. Upstream: the only section that touches http.client ------------------------------------


class Upstream:
    """An Ollama at a URL. Every failure to talk with it comes out as a ProxyError."""

    def __init__(self, config: Config, api_key: str = "") -> None:
        self.url, self.idle_timeout = config.upstream, config.idle_timeout
        # A server's 0.0.0.0 (all addresses, often in $OLLAMA_HOST) is no place to go to.
        host = self.url.hostname or ""
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._headers = {"Connection": "close", "Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def request(self, method: str, path: str, body: bytes | None = None) -> UpstreamAnswer:
        """Send one request and wait for the status line: minutes, while a model loads.

        Each request has a connection of its own: closing it is how Ollama is told to stop.
        Raises ProxyError 502 if there is no Ollama, 504 after idle_timeout seconds of silence.
        """
        connection = self._connect()
        try:
            with self.reading():
                connection.request(method, self.url.path + path, body, self._headers)
                return UpstreamAnswer(self, connection, connection.getresponse())
        except ProxyError:
            connection.close()
            raise

    def _connect(self) -> http.client.HTTPConnection:
        kind = (http.client.HTTPSConnection if self.url.scheme == "https"
                else http.client.HTTPConnection)
        connection = kind(self._host, self.url.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:  # UnicodeError: the host can't be a name
            connection.close()
            raise ProxyError(
                502, f"Ollama can't be reached at {self.url.geturl()} ({error}). Is it running "
                "there (ollama serve)? Give its place as --upstream URL, or do without it: --demo",
                code="upstream_unreachable") from error
        connection.sock.settimeout(self.idle_timeout)
        return connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What http.client and sockets raise in here comes out as a ProxyError."""
        try:
            yield
        except socket.timeout as error:
            raise ProxyError(504, f"Ollama was silent for {self.idle_timeout:g} s (--idle-timeout)",
                             code="upstream_timeout") from error
        except (OSError, http.client.IncompleteRead) as error:
            raise cut_upstream(type(error).__name__) from error
        except http.client.HTTPException as error:
            raise broken_upstream(f"{type(error).__name__} {error}") from error

    def json(self, method: str, path: str) -> Json:
        """A short exchange: the JSON object that Ollama answers. Raises ProxyError."""
        with contextlib.closing(self.request(method, path)) as answer:
            answer.raise_for_status()
            try:
                return parse_object(answer.read(MAX_BODY_BYTES))
            except ValueError:
                raise broken_upstream(f"{path} answered with no JSON object") from None


class UpstreamAnswer:
    """An answer whose status line and headers are there; the body comes piece by piece."""

    def __init__(self, upstream: Upstream, connection: http.client.HTTPConnection,
                 response: http.client.HTTPResponse) -> None:
        self._upstream, self._connection, self._response = upstream, connection, response
        self.status = response.status
        self.content_type = response.getheader("Content-Type") or "application/octet-stream"

    def close(self) -> None:
        """Hang up. If Ollama was still at work for this request, it stops."""
        self._response.close()
        self._connection.close()

    def pieces(self) -> Iterator[bytes]:
        """The body, as it arrives. Raises ProxyError if it ends too early.

        With read1(), because readline() and iteration report a clean end of file when the
        upstream dies between two chunks, or sends a chunk size that is none; read1() raises.
        """
        piece = b"-"
        while piece:
            with self._upstream.reading():
                piece = self._response.read1(READ_BYTES)
            if piece:
                yield piece
        if self._response.length:  # Content-Length promised so many bytes more
            raise cut_upstream(f"{self._response.length} bytes are missing")

    def read(self, limit: int) -> bytes:
        """The whole body, or as soon as there are `limit` bytes, those."""
        body = b""
        for piece in self.pieces():
            body += piece
            if len(body) >= limit:
                break
        return body

    def raise_for_status(self) -> None:
        """Ollama's refusals as ours. They are {"error":"text"} under a status of 400 or more."""
        if self.status == 200:
            return
        body = self.read(MAX_ERROR_BYTES)
        try:
            value = parse_object(body)
        except ValueError:  # 404 page not found; a redirect; some proxy's HTML
            what = f"status {self.status}, {show(body)}. Is that an Ollama?"
            raise broken_upstream(what) from None
        raise upstream_error(value, self.status if self.status >= 400 else 502)


# ---- 10. Downstream: the HTTP server that clients talk to --------------------------------------


def read_records(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, Json]]:
    """All lines of a body, each with its record."""
    decoder = NdjsonDecoder()
    for piece in pieces:
        yield from decoder.feed(piece)
    yield from decoder.close()


def translate(pieces: Iterable[bytes], stream: ChatStream) -> Iterator[Json]:
    """Bytes to records to chunks, until the record that says done."""
    for _, record in read_records(pieces):
        yield from stream.feed(record)
        if stream.state == DONE:
            return
    stream.close()


def chunk_frames(chunks: Iterable[Json]) -> Iterator[bytes]:
    """Chunks to frames; [DONE] only if no error came before the end."""
    yield from map(sse_event, chunks)
    yield SSE_DONE


def raw_frames(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lesson's smallest form: each NDJSON line, unchanged, is one frame; then [DONE].

    After a line that is an error the stream just ends. Raises ProxyError 502 if none says done.
    """
    for line, record in read_records(pieces):
        yield sse_event(line)
        if "error" in record:
            return
        if record.get("done"):
            yield SSE_DONE
            return
    raise cut_upstream("it ended before the record that says done")


def unique_members(pairs: list[tuple[str, Any]]) -> Json:
    """json's hook for objects: of two members with one name, which was meant?"""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return dict(pairs)


CLIENT_JSON = json.JSONDecoder(object_pairs_hook=unique_members, parse_constant=refuse_constant,
                               parse_float=finite)


class JsonHandler(http.server.BaseHTTPRequestHandler):
    """What http.server lacks for streaming JSON: settings first, then helpers to write with."""

    protocol_version = "HTTP/1.1"  # keep-alive and chunked bodies; the default is 1.0
    disable_nagle_algorithm = True  # a frame leaves at once, not when the last one is confirmed
    default_request_version = "HTTP/1.0"  # the default, 0.9, would answer without a status
    timeout = CLIENT_SECONDS  # the default waits for ever
    head_sent = chunked = False  # too late for a status? is the body's length unknown?

    def start(self, status: int, content_type: str, length: int | None = None,
              headers: Iterable[tuple[str, str]] = ()) -> None:
        """Status line and headers; without a length the body is chunked, or ends the connection."""
        self.head_sent = True
        self.chunked = length is None and self.request_version != "HTTP/1.0"
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if length is not None:
            self.send_header("Content-Length", str(length))
        elif self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        """A part of the body, in one send."""
        if self.command != "HEAD":
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def finish_body(self) -> None:
        """The end of a chunked body. One that ends without it was cut, and clients notice."""
        if self.chunked:
            self.write(b"")

    def send_json(self, status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        """A whole answer."""
        body = to_bytes(value) + b"\n"
        self.start(status, "application/json; charset=utf-8", len(body), headers)
        self.write(body)

    def read_body(self) -> bytes:
        """The request's body. Raises ProxyError 400, 411 or 413; then it has not been read."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths and self.command == "POST":
            raise ProxyError(411, "the body needs a Content-Length (chunked bodies are not read)")
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", "".join(lengths) or "0"):
            raise ProxyError(400, "Content-Length must be given once, and be a number")
        length = int("".join(lengths) or "0")
        if length > MAX_BODY_BYTES:
            raise ProxyError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the client went away within its request")
        return body


class ProxyHandler(JsonHandler):
    """One connection of a client, in its own thread; one method a route (see ROUTES)."""

    server: ProxyServer
    sending_events = False  # is the body an SSE stream, which can carry an error?

    # --- verbs ---

    def dispatch(self) -> None:
        """Run the route's method. What goes wrong in it is said once, or ends the connection."""
        self.head_sent = self.chunked = self.sending_events = False
        keep_alive, self.close_connection = not self.close_connection, True
        try:
            route = self.find_route()
            self.body = self.read_body()
            self.close_connection = not keep_alive  # all that was sent is read: more may follow
            route(self)
        except ProxyError as error:
            self.fail(error)
        except OSError:  # upstream's are ProxyErrors; so the client is gone, and nobody to tell
            self.close_connection = True
        except Exception:  # noqa: BLE001  the thread's boundary: our own fault must not be silent
            traceback.print_exc()
            self.fail(ProxyError(500, "internal error of the proxy; its log says more"))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = dispatch

    def find_route(self) -> Callable[[ProxyHandler], None]:
        """The method for this request. Raises ProxyError 404 or 405, with a hint."""
        path = self.path.partition("?")[0]
        methods = ROUTES.get(path, {})
        method = "GET" if self.command == "HEAD" else self.command
        if method in methods:
            return methods[method]
        if methods:
            allow = ", ".join(methods)
            raise ProxyError(405, f"{path} takes {allow} only", headers=[("Allow", allow)])
        hint = f"; base_url should be {self.server.url}/v1" if "/v1" + path in ROUTES else ""
        raise ProxyError(404, f"no route {self.command} {path[:200]}{hint}", code="no_route")

    # --- routes ---

    def chat(self) -> None:
        """POST /v1/chat/completions: translated both ways, streamed or whole."""
        try:
            body = parse_object(self.body, CLIENT_JSON)
        except ValueError as error:
            raise ProxyError(400, f"the body must be a JSON object: {error}") from None
        request = to_ollama_chat(body, self.server.config.allow_truncation)
        streamed = request.reply.get("stream", False)
        stream = ChatStream(body["model"], "chatcmpl-" + os.urandom(10).hex(), int(time.time()),
                            usage=request.reply.get("include_usage", not streamed))
        headers = ignored_header(request.ignored)
        with self.ask("/api/chat", to_bytes(request.body)) as answer:
            answer.raise_for_status()
            chunks = translate(answer.pieces(), stream)
            if streamed:
                self.send_events(chunk_frames(chunks), headers)
            else:
                self.send_json(200, fold_chunks(chunks), headers)

    def passthrough(self) -> None:
        """POST /api/...: Ollama's own format, byte for byte, or on request each line as a frame."""
        with self.ask(self.path, self.body) as answer:
            if answer.status == 200 and "text/event-stream" in self.headers.get("Accept", ""):
                self.send_events(raw_frames(answer.pieces()))
            else:
                self.start(answer.status, answer.content_type)
                for piece in answer.pieces():
                    self.write(piece)
                self.finish_body()

    def models(self) -> None:
        """GET /v1/models: /api/tags in OpenAI's form, with what Ollama knows beyond it."""
        tags = self.server.upstream.json("GET", "/api/tags")
        models = [to_openai_model(tag) for tag in member(tags, "models", list)]
        self.send_json(200, {"object": "list", "data": models})

    # --- helpers ---

    def ask(self, path: str, body: bytes) -> contextlib.closing[UpstreamAnswer]:
        """The upstream's answer; leaving the `with` block, for whatever reason, hangs up."""
        return contextlib.closing(self.server.upstream.request("POST", path, body))

    def send_events(self, frames: Iterable[bytes], headers: Iterable[tuple[str, str]] = ()) -> None:
        """Frames as they come. The status waits for the first one, so that a failure before it
        still has a status of its own."""
        for frame in frames:
            if not self.head_sent:
                self.sending_events = True
                self.start(200, "text/event-stream; charset=utf-8", headers=[
                    ("Cache-Control", "no-cache"),
                    ("X-Accel-Buffering", "no"),  # nginx would hold the frames back
                    *headers])
            self.write(frame)
        self.finish_body()

    def fail(self, error: ProxyError) -> None:
        """Say what went wrong in the one way that is still open: a status, a frame, or a cut."""
        try:
            if not self.head_sent:
                self.send_json(error.status, error.body(), error.headers)
                if self.close_connection:
                    self.linger()
            elif self.sending_events:
                self.write(sse_event(error.body()))
                self.finish_body()
            else:  # a body in Ollama's own format: only a missing end tells that it is not whole
                self.close_connection = True
        except OSError:
            self.close_connection = True  # the client is gone

    def linger(self) -> None:
        """Read on for a moment: closing a socket that has unread bytes resets the connection, and
        the client would see that instead of our refusal."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and self.connection.recv(READ_BYTES):
            pass

    def version_string(self) -> str:
        """The Server header, without the version of Python."""
        return f"ndjson_sse_proxy/{__version__}"

    def end_headers(self) -> None:
        """Every answer has an id to find it by."""
        self.send_header("X-Request-Id", "req_" + os.urandom(12).hex())
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's own refusals (a request line that is none, ...), in OpenAI's form."""
        self.close_connection = True
        self.fail(ProxyError(code, message or http.client.responses.get(code, "")))

    def log_message(self, format: str, *args: Any) -> None:
        """A line on stderr, with control characters escaped: a terminal would obey them."""
        text = (format % args).encode("unicode_escape").decode("ascii")
        say(f"{time.strftime('%H:%M:%S')} {self.address_string()} {text}")


ROUTES: dict[str, dict[str, Callable[[ProxyHandler], None]]] = {
    "/v1/chat/completions": {"POST": ProxyHandler.chat},
    "/v1/models": {"GET": ProxyHandler.models},
    "/api/chat": {"POST": ProxyHandler.passthrough},
    "/api/generate": {"POST": ProxyHandler.passthrough},
}


def ignored_header(names: list[str]) -> list[tuple[str, str]]:
    """X-Ignored-Fields: the client's own words, made safe for a header."""
    shown = [urllib.parse.quote(name[:60], safe="[]") for name in names[:MAX_IGNORED_NAMES]]
    if len(names) > len(shown):
        shown.append(f"and {len(names) - len(shown)} more")
    return [("X-Ignored-Fields", ", ".join(shown))] if shown else []


def to_openai_model(tag: Json) -> Json:
    """An entry of /api/tags as one of /v1/models."""
    try:  # 2026-11-22T22:18:01, then fractions and a zone that differ from model to model
        modified = time.strptime(member(tag, "modified_at", str)[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        modified = time.gmtime(0)
    extra = {**member(tag, "details", dict), **tag}
    return {"id": member(tag, "name", str), "object": "model", "created": calendar.timegm(modified),
            "owned_by": "library", **{name: extra[name] for name in (
                "context_length", "capabilities", "description") if name in extra}}


class Server(http.server.ThreadingHTTPServer):
    """http.server's threading server, with the defaults that a streaming server needs."""

    daemon_threads = True  # a stream that never ends must not keep the process alive
    request_queue_size = 128  # the default of 5 refuses a burst of clients
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def __init__(self, host: str, port: int, handler: type[JsonHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)
        port = self.server_port  # which the system chose, if it was 0
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of its own name, which hangs on a box without a DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no event; anything else is ours and must be seen."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class ProxyServer(Server):
    """The proxy; it listens as soon as it is made."""

    def __init__(self, config: Config, upstream_key: str = "") -> None:
        self.config = config
        self.upstream = Upstream(config, upstream_key)
        super().__init__(str(config.listen.hostname), config.listen.port or 0, ProxyHandler)


# ---- 11. Demo: a scripted Ollama, spoken to over a real socket like any other ------------------


def words(text: str, key: str = "content") -> list[Json]:
    """A text as the messages of a stream, one word each.

    >>> words("Hello there")
    [{'content': 'Hello'}, {'content': ' there'}]
    """
    return [{key: word} for word in re.findall(r"\s*\S+", text)]


# A model's name, what it shows, and the messages (or the error) that it streams.
DEMO_MODELS: dict[str, tuple[str, list[Json]]] = {
    "demo-text": ("plain text, a word a record", words(
        "Hello! Every word here was a line of NDJSON and became a frame of SSE. 你好 🙂\n"
        "This newline did not break its frame.")),
    "demo-think": ("thinking first, then the answer", words(
        "The question is open. The answer is known.", "thinking") + words("It is 42.")),
    "demo-tool": ("a tool call; once its result is among the messages, text", [{"tool_calls": [
        {"function": {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}}]}]),
    "demo-error": ("an error in the middle of the stream", words("This answer will not be") + [
        {"error": "an error was encountered while running the model: unexpected EOF"}]),
}


class DemoHandler(JsonHandler):
    """Ollama's API, as far as the proxy asks for it."""

    server: DemoOllama

    def do_GET(self) -> None:
        """/api/tags and /api/version."""
        answers: dict[str, Json] = {"/api/version": {"version": "0.0.0-demo"}, "/api/tags": {
            "models": [{"name": name, "model": name, "modified_at": "2026-01-01T00:00:00Z",
                        "description": text} for name, (text, _) in DEMO_MODELS.items()]}}
        known = self.path in answers
        self.send_json(200 if known else 404, answers.get(self.path, {"error": "not in the demo"}))

    def do_POST(self) -> None:
        """/api/chat and /api/generate."""
        body = parse_object(self.read_body())
        name, messages = body.get("model"), body.get("messages") or [{}]
        if name not in DEMO_MODELS:
            return self.send_json(404, {"error": f"model '{name}' not found"})
        script = DEMO_MODELS[name][1]
        if name == "demo-tool" and messages[-1].get("role") == "tool":
            script = words(f"The tool said: {messages[-1]['content']}")
        limit = (body.get("options") or {}).get("num_predict", -1)
        said = script[:limit] if limit > 0 else script
        self.start(200, "application/x-ndjson")
        for message in said:
            self.say(name, message)
            if "error" in message:
                return self.finish_body()
            time.sleep(self.server.pace)
        self.say(name, {}, done=True, done_reason="stop" if said == script else "length",
                 prompt_eval_count=9, eval_count=len(said))
        return self.finish_body()

    def say(self, name: str, message: Json, **more: Any) -> None:
        """One record, in the form of the route that was asked."""
        said: Json = {"message": {"role": "assistant", "content": "", **message}}
        if self.path == "/api/generate":
            said = {"response": message.get("content", "")}
        head = {"model": name, "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        record = message if "error" in message else {**head, **said, "done": False, **more}
        self.write(to_bytes(record) + b"\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the proxy's own line about the same request is enough."""


class DemoOllama(Server):
    """The scripted Ollama, on a free port of the loopback address, in a thread of its own."""

    def __init__(self, pace: float = 0.03) -> None:
        self.pace = pace  # seconds between two records: slow enough to see the stream
        super().__init__("127.0.0.1", 0, DemoHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


# ---- 13. Run: command line, signals ------------------------------------------------------------


def parse_url(text: str, port: int = 11434) -> urllib.parse.SplitResult:
    """HOST, HOST:PORT or a URL, read as Ollama reads $OLLAMA_HOST; `port` is the default one.

    >>> parse_url("192.0.2.7").geturl(), parse_url("https://box/ollama").geturl()
    ('http://192.0.2.7:11434', 'https://box:443/ollama')
    """
    match = re.fullmatch(r"(?:(https?)://)?(\[[0-9a-f:.]+\]|[\w.-]*)(?::(\d{1,5}))?(/[^\s?#]*)?",
                         text.strip(), re.ASCII | re.IGNORECASE)
    if not match or int(match[3] or 0) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor http://HOST:PORT")
    scheme, host, own_port, path = match.groups("")
    if scheme:
        port = 443 if scheme.lower() == "https" else 80
    return urllib.parse.urlsplit(
        f"{scheme or 'http'}://{host or '127.0.0.1'}:{own_port or port}{path.rstrip('/')}")


def parse_listen(text: str) -> urllib.parse.SplitResult:
    """HOST:PORT to listen on."""
    if "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return parse_url(text, 11435)


def parse_seconds(text: str) -> float:
    """A number of seconds above 0, and no more than a socket's timeout can take."""
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return float(text)


def parse_switch(text: str) -> bool:
    """What a switch is set to in the environment."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")
    return text == "1"


# Each field of Config: its reader, what its value is called, what it is for. This makes the flag
# --its-name, its twin in the environment NDJSON_SSE_PROXY_ITS_NAME, and their line in --help.
FLAGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "listen": (parse_listen, "HOST:PORT", "where clients connect; with port 0, any free one"),
    "upstream": (parse_url, "URL", "where Ollama is; without it $OLLAMA_HOST, if that is set"),
    "demo": (parse_switch, "", "answer from a scripted Ollama inside the process"),
    "allow_truncation": (parse_switch, "", "let Ollama cut a prompt that does not fit, silently"),
    "idle_timeout": (parse_seconds, "SECONDS", "longest silence of Ollama, loading included"),
}


class CommandLine(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ndjson_sse_proxy: {message} (see --help)\n")


def read_config(argv: list[str] | None, environ: Mapping[str, str]) -> Config:
    """Config from flags, else environment, else defaults. Exits with status 2 on a mistake."""
    parser = CommandLine(
        prog="ndjson_sse_proxy.py", allow_abbrev=False,
        description="Ollama's NDJSON in, the SSE that OpenAI clients read out.",
        epilog="Each flag has a twin in the environment: NDJSON_SSE_PROXY_LISTEN, "
        "NDJSON_SSE_PROXY_DEMO=1 and so on; the flag wins. $OLLAMA_API_KEY goes to the upstream "
        "as its bearer.")
    parser.add_argument("--version", action="version", version=f"ndjson_sse_proxy {__version__}")
    for name, (reader, metavar, text) in FLAGS.items():
        default = Config._field_defaults[name]
        twin = environ.get("NDJSON_SSE_PROXY_" + name.upper())
        if name == "upstream":
            twin = twin or environ.get("OLLAMA_HOST")
        more: Json = {"metavar": metavar}
        if reader is parse_switch:
            more = {"nargs": "?", "const": True, "metavar": "1"}
        else:
            text += f" (default: {default if metavar == 'SECONDS' else default.geturl()})"
        parser.add_argument("--" + name.replace("_", "-"), type=reader, default=twin or default,
                            help=text, **more)
    return Config(**vars(parser.parse_args(argv)))


def say(text: str) -> None:
    """A line for whoever started the program; in one write, for threads."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_if_unreachable(upstream: Upstream) -> None:
    """Ask Ollama for its version, so that a wrong URL shows before the first client comes."""
    try:
        upstream.json("GET", "/api/version")
    except ProxyError as error:
        say(f"warning: {error.message}")


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit status."""
    config = read_config(argv, os.environ)
    if config.demo:
        config = config._replace(upstream=parse_url(DemoOllama().url))
    try:
        if config.upstream.netloc == config.listen.netloc:
            raise OSError("the upstream is the same address; say where Ollama is with --upstream")
        server = ProxyServer(config, os.environ.get("OLLAMA_API_KEY", ""))
    except (OSError, UnicodeError) as error:
        say(f"ndjson_sse_proxy: can't listen on {config.listen.netloc}: {error}")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: KeyboardInterrupt
    say(f"ndjson_sse_proxy {__version__} listens on {server.url} (base_url: {server.url}/v1)")
    say(f"and sends to {'its own demo' if config.demo else config.upstream.geturl()}")
    threading.Thread(target=say_if_unreachable, args=[server.upstream], daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
