r"""ndjson_sse_proxy: Ollama's NDJSON in, the SSE that OpenAI clients read out.

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
    client <--SSE-- EventStream <- chunk_framer <- ChatStream <- NdjsonDecoder <- pieces() <- NDJSON
                         ^                                                           |
                         '------------- Watchdog: heartbeats out, hang-ups in -------'

To see it happen, open http://127.0.0.1:11435/ in a browser, or add ?trace=1 to the path: then
each line of NDJSON stands, as a comment, before the frames that it became.

The middle (sections 3 to 6) never sees a socket, a clock or a random number, so you can read it,
test it and paste it elsewhere on its own (with the imports, MAX_LINE_BYTES and section 2 for its
errors). A translated stream ends in exactly one of two ways: a finish_reason and `[DONE]`, or an
error frame. An answer that was cut is never passed off as a whole one.

What it does not do: no caching, no retries, no limit of requests, no prompts of its own.

To learn streaming read sections 3, 4, 6; then 5 (the fields of a request), 8 (hang-ups and
heartbeats), 9 and 10 (HTTP, up and down), 7 (who may call, what is sent on, what happened). 1 and 2
hold limits and errors, 11 the demo, 12 the page, 13 the command line.
"""
from __future__ import annotations

import argparse
import base64
import calendar
import contextlib
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import json
import os
import re
import runpy
import select
import selectors
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import traceback
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # names for annotations, which are read and checked but never run
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from typing import NoReturn

    Json = dict[str, Any]
    Convert = Callable[[Any, str], Any]  # (value, its name in the request) -> Ollama's value
    Field = tuple[str, str, Convert | None]

__version__ = "0.1.0"

# ---- 1. Limits and settings: each number with its reason; one frozen object, handed down -------
# Every buffer has a cap and every wait has an end: else one client, or one broken upstream, could
# take all of the memory or all of the threads.

READ_BYTES = 16 * 1024  # in one read of what is thrown away
MAX_LINE_BYTES = 4 << 20  # a tool call may carry a whole file; a line that never ends may not grow
MAX_BODY_BYTES = 32 << 20  # a long conversation with a few pictures in it; also a whole answer
MAX_ERROR_BYTES = 64 * 1024  # of an upstream's error page; nobody reads more
MAX_HEAD_BYTES = 64 * 1024  # request line and headers; browsers send a few KiB
MAX_HEADERS = 100  # as many as http.client would take
SMALL_BYTES = 4096  # fit into any socket that is ready for more
MAX_IGNORED_NAMES = 20  # in X-Ignored-Fields: clients stop reading headers somewhere above 8 KiB
MAX_KEY_FILE_BYTES = 1 << 20  # more keys than a household or a firm has
MAX_MODEL_NAME = 600  # Ollama takes no longer ones; each frame has it, heartbeats too
MAX_NAME = 100  # characters of a model's or a field's name in the log and the metrics
MAX_EXTRA = 64  # connections beyond --max-connections that are told so; more are just closed
CONNECT_SECONDS = 10.0  # Ollama is near; whoever takes longer to accept is not there
CLIENT_SECONDS = 60.0  # for a client to idle and send a head, in total; or to read a byte
BODY_SECONDS = 300.0  # for all of a body: 32 MiB at 1 Mbit/s
LINGER_SECONDS = 1.0  # wait this long for a client to read a refusal before the socket goes
TICK_SECONDS = 0.25  # between two looks at all clients: who hangs up frees the model in a second
PAUSE_SECONDS = 0.5  # until the next try, if there was no descriptor or thread for a connection


class Config(NamedTuple):
    """Every setting; FLAGS in section 13 says what each is for."""

    listen: urllib.parse.SplitResult = urllib.parse.urlsplit("http://127.0.0.1:11435")
    upstream: urllib.parse.SplitResult = urllib.parse.urlsplit("http://127.0.0.1:11434")
    demo: bool = False
    api_key: tuple[tuple[str, str], ...] = ()
    api_key_file: str = ""
    insecure: bool = False
    allowed_host: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    allow_admin: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    alias: tuple[tuple[str, str], ...] = ()
    option: tuple[tuple[str, Any], ...] = ()
    keep_alive: str | float | None = None
    allow_truncation: bool = False
    hooks: str = ""
    log: str = "text"
    heartbeat: float = 10.0
    idle_timeout: float = 600.0
    drain_timeout: float = 30.0
    max_connections: int = 512
    max_body: int = MAX_BODY_BYTES
    reuse_port: bool = False


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


CURE = ("Shorten the messages, or ask for a longer context: options.num_ctx in the request, or "
        "--option num_ctx=N for the proxy, which with --allow-truncation would have them cut "
        "silently.")

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
        match = re.search(pattern, text, re.DOTALL)
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
            value = value.get("error") or value.get("message")
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


def finite_number(text: str) -> float:
    """json's hook for numbers: NaN, 1e999 and thousands of digits can be read, but not sent on."""
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(f"{text[:20]} is no number in JSON, or too large")
    return int(text) if text.lstrip("-").isdigit() else value


strict_decoder = functools.partial(json.JSONDecoder, parse_constant=finite_number,
                                   parse_float=finite_number, parse_int=finite_number)
PLAIN_JSON = strict_decoder()


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
    r"""Bytes in, records out: one JSON object a line. Touches no socket.

    >>> decoder = NdjsonDecoder()
    >>> list(decoder.feed(b'{"a": 1}\n{"b"'))      # the second line is not whole yet
    [(b'{"a": 1}', {'a': 1})]
    >>> list(decoder.feed(b': 2}\n'))
    [(b'{"b": 2}', {'b': 2})]
    """

    def __init__(self, max_line: int = MAX_LINE_BYTES) -> None:
        self._rest = bytearray()  # what has come and is not a record yet
        self._searched = 0  # so much of it holds no newline
        self._max_line = max_line

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Json]]:
        """Take `data`; yield (line, record) for each line that is whole now, but for blank ones.

        The records before a bad line come out before its error does. Raises ProxyError 502 for a
        line that is no JSON object, or longer than `max_line` bytes.
        """
        self._rest += data
        return self._lines()

    def close(self) -> Iterator[tuple[bytes, Json]]:
        """The input has ended: yield its last line, if that lacked only the newline.

        Raises ProxyError 502 if the end came in the middle of a line.
        """
        line, self._rest = bytes(self._rest).strip(), bytearray()
        if line:
            try:
                yield line, self._record(line)
            except ProxyError:
                raise cut_upstream(f"it ended inside a line, {show(line)}") from None

    def _lines(self) -> Iterator[tuple[bytes, Json]]:
        while True:
            end = self._rest.find(b"\n", self._searched)
            self._searched = len(self._rest)
            if (self._searched if end < 0 else end) > self._max_line:
                raise broken_upstream(f"a line of more than {self._max_line} bytes")
            if end < 0:
                return
            line = bytes(self._rest[:end]).strip()
            del self._rest[:end + 1]
            self._searched = 0
            if line:
                yield line, self._record(line)

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
    r"""Compact JSON on one line, whatever the reader takes for a line end.

    >>> print("two\nlines")
    two
    lines
    >>> print(to_json({"text": "two\nlines"}))
    {"text":"two\nlines"}
    """
    text = JSON_ENCODER.encode(value)
    if not text.isascii():
        for char, escape in UNICODE_LINE_ENDS.items():
            text = text.replace(char, escape)
    return text


def to_bytes(value: Any) -> bytes:
    r"""JSON in UTF-8. Half an emoji (a lone surrogate), which UTF-8 can't carry, stays \ud83d."""
    return to_json(value).encode("utf-8", "backslashreplace")


def data_lines(data: bytes) -> list[bytes]:
    """The lines of some data, in which none but real line ends are left."""
    if not data.isascii():
        for char, escape in UNICODE_LINE_ENDS.items():
            data = data.replace(char.encode(), escape.encode())
    return data.splitlines()


def sse_event(data: Any) -> bytes:
    r"""One frame: bytes as they are, anything else as JSON.

    >>> sse_event({"a": 1}), sse_event(b"two\nlines")
    (b'data: {"a":1}\n\n', b'data: two\ndata: lines\n\n')
    """
    data = data if isinstance(data, bytes) else to_bytes(data)
    return b"".join(b"data: %b\n" % line for line in data_lines(data)) + b"\n"


def sse_comment(data: bytes) -> bytes:
    r"""Lines that every client skips: for people who watch the stream.

    >>> sse_comment(b'{"a":1}')
    b': {"a":1}\n\n'
    """
    return b"".join(b": %b\n" % line for line in data_lines(data)) + b"\n"


# Not JSON, and no part of SSE: OpenAI's own sign that nothing was lost. HTTP has an end, too, but
# many a library and proxy hides whether it was there; so it is said again, in the data.
SSE_DONE = sse_event(b"[DONE]")


# ---- 5. Request: OpenAI's body to Ollama's -----------------------------------------------------
# The tables are the specification: to map another field, add a row (an option of Ollama's: a name
# in OPTIONS); to refuse one, a row with refused("why"). Rows are read from top to
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
        if name == "any" or (isinstance(value, JSON_TYPES[name])
                             and isinstance(value, bool) == (name == "boolean")):
            return value
    raise ProxyError(400, f"'{param}' must be of type {types}", param)


def required(source: Json, name: str, types: str, where: str) -> Any:
    """A member that must be there, of one of the types."""
    if source.get(name) is None:
        raise ProxyError(400, f"'{where}.{name}' is missing", f"{where}.{name}")
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


def refused(why: str, *harmless: Any) -> Field:
    """A row for what can't be honoured: a 400, unless the value is empty, false or harmless."""
    def convert(value: Any, param: str) -> None:
        if value and value not in harmless:
            raise ProxyError(400, f"'{param}' is not supported: {why}", param)
    return "any", "", convert


HINT: Field = ("any", "", lambda value, param: None)  # without effect on a local model

RESPONSE_FORMATS = {"text": "", "json_object": "json", "json_schema": "schema"}
ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
ROLES["developer"] = "system"
EFFORTS = {"none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high",
           "xhigh": "max", "max": "max"}  # Ollama has fewer steps


def to_strings(value: Any, param: str) -> list[str]:
    """A string or an array of strings, as an array."""
    items = value if isinstance(value, list) else [value]
    return [expect(item, "string", f"{param}[{i}]") for i, item in enumerate(items)]


def to_prompt(value: Any, param: str) -> str:
    """The prompt of /v1/completions: a string, or an array with just one."""
    prompts = to_strings(value, param)
    if len(prompts) != 1:
        raise ProxyError(400, f"'{param}' must be one string, in a request of its own", param)
    return prompts[0]


def to_count(value: int, param: str) -> int:
    """How many choices; OpenAI's own limit."""
    if not 1 <= value <= 128:
        raise ProxyError(400, f"'{param}' must be from 1 to 128", param)
    return value


def to_effort(value: Json, param: str) -> Any:
    """reasoning.effort, the newer way to say reasoning_effort."""
    effort = value.get("effort")
    return None if effort is None else one_of(EFFORTS)(expect(effort, "string", f"{param}.effort"),
                                                       f"{param}.effort")


def to_format(value: Json, param: str) -> Any:
    """response_format to Ollama's format: "" for plain text, "json", or a JSON schema."""
    native = one_of(RESPONSE_FORMATS)(required(value, "type", "string", param), f"{param}.type")
    if native != "schema":
        return native
    return required(required(value, "json_schema", "object", param), "schema", "object",
                f"{param}.json_schema")


def to_usage_wish(value: Json, param: str) -> bool:
    """stream_options to whether a usage chunk is wanted."""
    wish = value.get("include_usage")
    return wish is not None and bool(expect(wish, "boolean", f"{param}.include_usage"))


def to_function_name(tool: Json, where: str) -> str:
    """The name in {"type": "function", "function": {"name": ...}}; Ollama has no other tools."""
    one_of({"function": True})(required(tool, "type", "string", where), f"{where}.type")
    function = required(tool, "function", "object", where)
    name = required(function, "name", "string", f"{where}.function")
    if not name:
        raise ProxyError(400, f"'{where}.function.name' is empty", f"{where}.function.name")
    return str(name)


def to_tools(tools: list[Any], param: str) -> list[Any]:
    """Tools go up as they are, checked: the formats are the same."""
    for where, tool in each(tools, param):
        to_function_name(tool, where)
        schema = tool["function"].get("parameters", {})
        expect(schema, "object", f"{where}.function.parameters")
        expect(schema.get("$defs", {}), "object", f"{where}.function.parameters.$defs")
    return tools


def to_image(url: str, param: str) -> str:
    """The base64 in a data: URL. Nothing is ever fetched: whose network would that be?"""
    match = re.fullmatch(r"data:image/(?:png|jpe?g|webp|gif);base64,(.*)", url, re.DOTALL)
    if not match:
        raise ProxyError(400, f"'{param}' must be a data:image/...;base64 URL of a png, jpeg, webp "
                         "or gif; nothing is fetched", param)
    return to_base64(match[1], param)


def to_base64(data: str, param: str) -> str:
    """The same text, checked."""
    try:
        base64.b64decode(data, validate=True)
    except ValueError:
        raise ProxyError(400, f"'{param}' is not valid base64", param) from None
    return data


def to_content(content: Any, param: str) -> Json:
    """A message's content: a string, or parts, whose texts and images become one message's.

    One message a part, as Ollama's own /v1 does it, would change what the model sees.
    """
    texts, images = [content] if isinstance(content, str) else [], []
    for where, item in each([] if isinstance(content, str) else content, param):
        kind = required(item, "type", "string", where)
        if kind in ("text", "refusal"):
            texts.append(required(item, kind, "string", where))
        elif kind == "image_url":
            url = required(item, kind, "object or string", where)
            if isinstance(url, dict):
                url = required(url, "url", "string", f"{where}.{kind}")
            images.append(to_image(url, f"{where}.{kind}"))
        elif kind == "input_audio":  # which Ollama takes among the images, for models that hear
            audio = required(item, kind, "object", where)
            images.append(to_base64(required(audio, "data", "string", f"{where}.{kind}"), where))
        else:
            raise ProxyError(400, f"'{where}.type' must be text, image_url or input_audio, not "
                             f"{kind[:40]}", f"{where}.type")
    return {"content": "".join(texts), **({"images": images} if images else {})}


def to_native_calls(calls: list[Any], param: str) -> list[Json]:
    """Earlier tool calls: OpenAI has the arguments as a text of JSON, Ollama as an object.

    Arguments that nobody can parse (a model wrote them) become {}; Ollama would refuse the chat.
    """
    native: list[Json] = []
    for where, call in each(calls, param):
        name = to_function_name({"type": "function", **call}, where)
        arguments = call["function"].get("arguments", {})
        expect(arguments, "string or object", f"{where}.function.arguments")
        if isinstance(arguments, str):
            try:
                arguments = parse_object(arguments)
            except ValueError:
                arguments = {}
        native.append({"id": required(call, "id", "string", where), "function": {
            "index": len(native), "name": name, "arguments": arguments}})
    return native


MESSAGE_FIELDS: dict[str, Field] = {
    # OpenAI's name     JSON type           Ollama's place  conversion
    "role":              ("string",          "role",         one_of(ROLES)),
    "content":           ("string or array", "*",            to_content),
    "reasoning":         ("string",          "thinking",     None),
    "reasoning_content": ("string",          "thinking",     None),
    "tool_calls":        ("array",           "tool_calls",   to_native_calls),
    "tool_call_id":      ("string",          "tool_call_id", None),
    "name":              HINT,
    "annotations":       HINT,
    "function_call":     refused("use tool_calls"),
    "audio":             refused("there is no earlier audio to refer to"),
}

# Ollama's options and their types: members of `options`, or fields of their own (extra_body).
OPTIONS = {**dict.fromkeys((
    "num_ctx", "num_predict", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread",
    "repeat_last_n", "top_k", "seed"), "integer"), **dict.fromkeys((
        "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
        "frequency_penalty"), "number"), "use_mmap": "boolean", "stop": "string or array"}


def to_options(options: Json, param: str) -> Json:
    """Ollama's options; those that are known are checked, the others may be newer than this."""
    return {name: expect(value, OPTIONS.get(name, "any"), f"{param}.{name}")
            for name, value in options.items() if value is not None}


COMMON_FIELDS: dict[str, Field] = {
    # OpenAI's name           JSON type            Ollama's place          conversion
    "model":                 ("string",            "model",                None),
    "options":               ("object",            "options",              to_options),
    **{name: (types, f"options.{name}", to_strings if name == "stop" else None)
       for name, types in OPTIONS.items()},
    "max_tokens":            ("integer",           "options.num_predict",  None),
    "keep_alive":            ("string or number",  "keep_alive",           None),
    "think":                 ("boolean or string", "think",                None),
    "format":                ("string or object",  "format",               None),
    "truncate":              ("boolean",           "truncate",             None),
    "shift":                 ("boolean",           "shift",                None),
    # What the answer shall be like; these stay here:
    "stream":                ("boolean",           "reply.stream",         None),
    "stream_options":        ("object",            "reply.include_usage",  to_usage_wish),
    "n":                     ("integer",           "reply.n",              to_count),
    "logit_bias":            refused("Ollama has no biases"),
    "user":                  HINT,
}

CHAT_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    "messages":              ("array",             "messages",             None),
    "max_completion_tokens": ("integer",           "options.num_predict",  None),
    "logprobs":              ("boolean",           "logprobs",             None),
    "top_logprobs":          ("integer",           "top_logprobs",         None),
    "reasoning":             ("object",            "reply.effort",         to_effort),
    "reasoning_effort":      ("string",            "reply.effort",         one_of(EFFORTS)),
    "response_format":       ("object",            "format",               to_format),
    "tools":                 ("array",             "tools",                to_tools),
    "tool_choice":           ("string or object",  "reply.tool_choice",    None),
    "parallel_tool_calls":   ("boolean", "reply.max_calls", lambda v, p: None if v else 1),
    **dict.fromkeys((
        "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "prediction", "verbosity", "service_tier"), HINT),
    "store":                 refused("nothing is stored"),
    "audio":                 refused("Ollama answers with text"),
    "modalities":            refused("Ollama answers with text", ["text"]),
    "moderation":            refused("there is no moderation"),
    "web_search_options":    refused("nothing is searched"),
    "functions":             refused("use tools"),
    "function_call":         refused("use tool_choice"),
}

COMPLETION_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    "prompt":                ("string or array",   "prompt",               to_prompt),
    "suffix":                ("string",            "suffix",               None),
    "logprobs":              ("integer",           "*", lambda v, p: {"logprobs": True,
                                                                      "top_logprobs": v}),
    "echo":                  refused("the prompt is not repeated"),
    "best_of":               refused("there is one try for each choice", 1),
}


def map_fields(table: dict[str, Field], source: Json, target: Json, where: str = "") -> list[str]:
    """Put each field of `source` where its row says; return the names that have no row.

    A place is a name, `group.name`, or * for a conversion that gives several. A conversion that
    gives None puts nothing. A field that is null counts as not sent, as OpenAI has it.

    >>> target = {"options": {}}
    >>> map_fields(CHAT_FIELDS, {"seed": 1, "top_p": None, "color": "red"}, target), target
    (['color'], {'options': {'seed': 1}})
    """
    for name, (types, place, convert) in table.items():
        value = source.get(name)
        if value is not None:
            expect(value, types, where + name)
            value = convert(value, where + name) if convert else value
            group, _, key = place.rpartition(".")
            if place == "*":
                target.update(value)
            elif value is not None:
                (target[group] if group else target)[key] = value
    return [where + name for name in source if name not in table and source[name] is not None]


def to_native_messages(messages: list[Any], ignored: list[str]) -> list[Json]:
    """OpenAI's messages to Ollama's: as many, in the same order."""
    native: list[Json] = []
    called: dict[str, str] = {}  # the id of each tool call so far, and the function's name
    for where, message in each(messages, "messages"):
        required(message, "role", "string", where)
        native.append({"content": ""})
        ignored += map_fields(MESSAGE_FIELDS, message, native[-1], where + ".")
        for call in native[-1].get("tool_calls", ()):
            called[call["id"]] = call["function"]["name"]
        name = called.get(native[-1].get("tool_call_id", ""), message.get("name"))
        if native[-1]["role"] == "tool" and name:
            native[-1]["tool_name"] = expect(name, "string", where + ".name")
    return native


def choose_tools(native: Json, choice: Any, reply: Json) -> None:
    """tool_choice: which of the tools go up, or which function's call is forced."""
    tools = native.pop("tools", [])
    names, mode = [tool["function"]["name"] for tool in tools], choice
    if isinstance(choice, dict):
        mode, where = "required", "tool_choice.allowed_tools"
        if choice.get("type") == "allowed_tools":
            allowed = required(choice, "allowed_tools", "object", "tool_choice")
            mode = required(allowed, "mode", "string", where)
            wanted = each(required(allowed, "tools", "array", where), f"{where}.tools")
            chosen = {to_function_name(tool, place) for place, tool in wanted}
        else:
            chosen = {to_function_name(choice, "tool_choice")}
        if not chosen <= set(names):
            raise ProxyError(400, "'tool_choice' has a name that is not in 'tools'", "tool_choice")
        tools = [tool for tool, name in zip(tools, names) if name in chosen]
    mode = one_of({name: name for name in ("none", "auto", "required")})(mode, "tool_choice")
    if mode == "required":
        if not tools:
            raise ProxyError(400, "'tool_choice' wants a call, but leaves no tools", "tool_choice")
        force_call(native, {tool["function"]["name"]: tool["function"] for tool in tools}, reply)
    elif mode == "none":
        reply["max_calls"] = 0  # some models call tools that they have only read about
    elif tools:
        native["tools"] = tools


def move_references(schema: Any, root: str) -> Any:
    """A JSON schema for another place: what it says of its own root ("#") it says of `root`.

    >>> move_references({"items": {"$ref": "#/$defs/T"}}, "#/$defs/0")
    {'items': {'$ref': '#/$defs/0/$defs/T'}}
    """
    if isinstance(schema, list):
        return [move_references(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: root + value[1:] if name == "$ref" and isinstance(value, str) and value[:1] == "#"
            else value if name in ("const", "enum", "default", "examples")
            else move_references(value, root) for name, value in schema.items()}


def force_call(native: Json, functions: Json, reply: Json) -> None:
    """Make the model call one of the functions, which Ollama itself can't be asked for.

    No tools go up (so it works with models that know none). Instead `format` lets the model write
    nothing but the arguments, or {"name", "arguments"} where there are several functions, and a
    last line tells it what to do. ChatStream makes the text a call again.
    """
    schemas, definitions, single = [], {}, len(functions) == 1
    for i, (name, function) in enumerate(functions.items()):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        if not single:
            if '"$ref":"#' in to_json(schema):  # which counts from the root of what is sent
                definitions[str(i)] = move_references(schema, f"#/$defs/{i}")
                schema = {"$ref": f"#/$defs/{i}"}
            schema = {"type": "object", "required": ["name", "arguments"],
                      "properties": {"name": {"const": name}, "arguments": schema}}
        schemas.append(schema)
    several = {"anyOf": schemas, **({"$defs": definitions} if definitions else {})}
    native["format"] = schemas[0] if single else several
    native["messages"].append({"role": "system", "content": (
        "Call this function: answer with its arguments, as JSON." if single else
        'Call one of these functions: answer with {"name": ..., "arguments": ...}, as JSON.')
        + "".join("\n" + to_json(function) for function in functions.values())})
    reply["forced"] = next(iter(functions)) if single else ""


class NativeRequest(NamedTuple):
    """A request as it goes up, and what was asked of the answer."""

    path: str
    body: Json
    reply: Json  # stream, include_usage, n, effort, max_calls, forced: each if sent
    ignored: list[str]  # fields that nothing was done with


def to_native(table: dict[str, Field], path: str, body: Json, truncate: bool) -> NativeRequest:
    """What both translated routes have in common. Raises ProxyError 400 with the field's name.

    Ollama is always asked to stream: a whole answer is put together from the pieces, so that
    both have one way to fail. By itself Ollama cuts a prompt that does not fit without a word;
    truncate: false makes that an error. `shift` is not sent by itself: one that differs from the
    loaded model's makes Ollama load the model anew.
    """
    for name in ("model", "messages" if "messages" in table else "prompt"):
        if body.get(name) is None or name == "model" and body[name] == "":
            raise ProxyError(400, f"'{name}' is missing", name)
    native: Json = {"options": {}, "reply": {}, "stream": True, "truncate": truncate}
    ignored = map_fields(table, body, native)
    reply = native.pop("reply")
    if "effort" in reply:
        native["think"] = reply["effort"]
    return NativeRequest(path, native, reply, ignored)


def to_ollama_chat(body: Json, truncate: bool = False) -> NativeRequest:
    """The body of POST /v1/chat/completions to that of POST /api/chat."""
    request = to_native(CHAT_FIELDS, "/api/chat", body, truncate)
    request.body["messages"] = to_native_messages(request.body["messages"], request.ignored)
    choose_tools(request.body, request.reply.pop("tool_choice", "auto"), request.reply)
    return request


def to_ollama_generate(body: Json, truncate: bool = False) -> NativeRequest:
    """The body of POST /v1/completions to that of POST /api/generate."""
    return to_native(COMPLETION_FIELDS, "/api/generate", body, truncate)


# ---- 6. Stream: Ollama's records to OpenAI's chunks --------------------------------------------
# A chunk is an envelope, the same all through a stream, around one choice with its delta. A state
# machine makes the choices. A record after DONE or FAILED is a breach of protocol; an end of the
# input in any state but DONE is a cut.
#
#     START --record--> STREAMING --record with "done": true--> DONE
#     START or STREAMING --record with "error", or none that makes sense--> FAILED

START, STREAMING, DONE, FAILED = "START", "STREAMING", "DONE", "FAILED"


class ChatStream:
    """Records of POST /api/chat in, the choices of chat.completion.chunk objects out.

    `index` is this choice's number among n; `reply` is what was asked of the answer
    (NativeRequest.reply).

    >>> stream = ChatStream("m", "chatcmpl-1", 1700000000)
    >>> for choice in stream.feed({"message": {"content": "Hi"}, "done": False}):
    ...     print(choice["delta"])
    {'role': 'assistant', 'content': ''}
    {'content': 'Hi'}
    >>> for choice in stream.feed({"done": True, "done_reason": "stop"}):
    ...     print(choice)
    {'index': 0, 'delta': {}, 'finish_reason': 'stop'}
    """

    kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, model: str, stream_id: str, created: int, reply: Json | None = None,
                 index: int = 0) -> None:
        self.state = START
        self.tokens = 0, 0  # of the prompt and of the answer, known once it is DONE
        self.envelope = {"id": stream_id, "object": self.kind, "created": created, "model": model,
                         "system_fingerprint": "fp_ollama"}
        self.index, reply = index, reply or {}
        self._opened = False  # has the role been said?
        # None: no call is forced; a name: of that function; "": of one of several
        self._forced = reply.get("forced")
        self._max_calls = reply.get("max_calls", 1 << 30)
        self._call_ids: set[str] = set()  # of the tool calls sent so far
        self._text: list[str] = []  # of a forced call, until it is whole

    def feed(self, record: Json) -> list[Json]:
        """One record to its choices. Raises ProxyError for an error record or a malformed one."""
        before, self.state = self.state, FAILED  # until this record has turned out well
        if before in (DONE, FAILED):
            raise broken_upstream(f"a record after the stream was {before}")
        if "error" in record:  # {"error": "the model runner has died"}
            raise upstream_error(record["error"])
        done = member(record, "done", bool)
        deltas = list(self._deltas(record))
        reason = self._finish(record, deltas) if done else None
        logprobs = self._logprobs(record) if record.get("logprobs") else None
        self.state = DONE if done else STREAMING
        choices = self._opening()
        if logprobs:
            deltas = deltas or [{"content": ""}]
            choices.append(self._choice(deltas.pop(0), logprobs=logprobs))
        choices += [self._choice(delta) for delta in deltas]
        return choices + ([self._choice({}, reason)] if reason else [])

    def heartbeat(self) -> list[Json]:
        """What to send while Ollama is silent: an empty delta, so that nobody gives up.

        Not an SSE comment: LangChain gives up after 120 s without a chunk, and Continue takes a
        comment for the end of the stream.
        """
        return self._opening() + [self._choice({})]

    def close(self) -> None:
        """The input has ended: was the answer whole? Raises ProxyError 502 if it was not."""
        if self.state != DONE:
            raise cut_upstream("it ended before the record that says done")

    def _opening(self) -> list[Json]:
        """The role, before everything else and only once."""
        opened, self._opened = self._opened, True
        return [] if opened else [self._choice({"role": "assistant", "content": ""})]

    def _choice(self, delta: Json, finish_reason: str | None = None,
                logprobs: Json | None = None) -> Json:
        choice: Json = {"index": self.index, "delta": delta, "finish_reason": finish_reason}
        if logprobs:
            choice["logprobs"] = logprobs
        return choice

    def _deltas(self, record: Json) -> Iterator[Json]:
        """The parts of a record, a delta each: many clients look at one part of a delta only."""
        message = self._message(record)
        thinking = "thinking" in message and member(message, "thinking", str)
        content = member(message, "content", str)
        if thinking:  # not OpenAI's: some clients read the one name, some the other
            yield {"reasoning": thinking, "reasoning_content": thinking}
        if content and self._forced is not None:
            self._text.append(content)
        elif content:
            yield {"content": content}
        for call in member(message, "tool_calls", list) if "tool_calls" in message else ():
            function = member(call, "function", dict, needed=True)
            if len(self._call_ids) < self._max_calls:
                arguments = function.get("arguments")  # a text already, from some that copy Ollama
                arguments = arguments if isinstance(arguments, str) else member(
                    function, "arguments", dict)
                yield self._tool_call(member(function, "name", str, needed=True), arguments,
                                      member(call, "id", str))

    def _message(self, record: Json) -> Any:
        return member(record, "message", dict, needed=not record.get("done"))

    def _logprobs(self, record: Json) -> Json:
        """OpenAI's form, in which top_logprobs is always there."""
        return {"refusal": None, "content": [
            {"top_logprobs": member(token, "top_logprobs", list), "bytes": None, **token}
            for token in member(record, "logprobs", list)]}

    def _tool_call(self, name: str, arguments: Any, call_id: str = "") -> Json:
        """A call, whole. Ollama's may lack an id, or all say index 0; so they are numbered here."""
        index = len(self._call_ids)
        if not call_id or call_id in self._call_ids:
            call_id = f"call_{self.envelope['id']}_{self.index}_{index}"
        self._call_ids.add(call_id)
        text = arguments if isinstance(arguments, str) else to_json(arguments)
        return {"tool_calls": [{"index": index, "id": call_id, "type": "function",
                                "function": {"name": name, "arguments": text}}]}

    def _finish(self, record: Json, deltas: list[Json]) -> str:
        """The finish_reason. Counts the tokens, and adds the delta of a forced call."""
        # prompt_eval_count is left out when the whole prompt was cached.
        self.tokens = member(record, "prompt_eval_count", int), member(record, "eval_count", int)
        text = "".join(self._text)
        whole = True
        if text.strip():
            delta, whole = self._forced_call(text)
            deltas.append(delta)
        # No reason (from old Ollamas), load and unload (for no messages) are all a "stop".
        if record.get("done_reason") == "length" or not whole:
            return "length"
        return "tool_calls" if self._call_ids else "stop"

    def _forced_call(self, text: str) -> tuple[Json, bool]:
        """The text that `format` made the model write, as a call, and whether that is whole.

        One that was cut gives the arguments as far as they came; without a name it stays text.
        """
        try:
            call = parse_object(text)
            if self._forced:
                call = {"name": self._forced, "arguments": call}
            return self._tool_call(member(call, "name", str, needed=True),
                                   member(call, "arguments", dict)), True
        except ValueError:
            start = re.match(r'\s*\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"arguments"\s*:\s*', text)
            if self._forced:
                return self._tool_call(self._forced, text), False
            return (self._tool_call(start[1], text[start.end():]) if start
                    else {"content": text}), False


class TextStream(ChatStream):
    """The same for POST /v1/completions: records of /api/generate to text_completion chunks."""

    kind = "text_completion"
    id_prefix = "cmpl-"

    def _opening(self) -> list[Json]:
        return []

    def _choice(self, delta: Json, finish_reason: str | None = None,
                logprobs: Json | None = None) -> Json:
        choice = super()._choice(delta, finish_reason, logprobs)
        text = choice.pop("delta").pop("content", "")  # what is left of a delta is reasoning
        choice.update(delta, text=text, logprobs=logprobs)
        return choice

    def _message(self, record: Json) -> Any:
        return {"content": member(record, "response", str, needed=not record.get("done")),
                "thinking": record.get("thinking")}

    def _logprobs(self, record: Json) -> Json:
        """The old form: parallel arrays."""
        tokens = member(record, "logprobs", list)
        return {"tokens": [member(t, "token", str) for t in tokens],
                "token_logprobs": [t.get("logprob") for t in tokens],
                "top_logprobs": [{member(top, "token", str): top.get("logprob")
                                  for top in member(t, "top_logprobs", list)} for t in tokens]}


def count_tokens(streams: list[ChatStream]) -> tuple[int, int]:
    """The tokens of all prompts and all answers."""
    return sum(s.tokens[0] for s in streams), sum(s.tokens[1] for s in streams)


def with_usage(streams: list[ChatStream], choices: list[Json]) -> Json:
    """A chunk with the tokens of all choices: the last one of a stream, if it is wanted."""
    prompt, completion = count_tokens(streams)
    return {**streams[0].envelope, "choices": choices, "usage": {
        "prompt_tokens": prompt, "completion_tokens": completion,
        "total_tokens": prompt + completion}}


def member(record: Any, name: str, kind: type, needed: bool = False) -> Any:
    """A member of an upstream's object; its type's empty value if it is null or not there.

    Raises ProxyError 502 for another type, or if it is needed and not there.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, kind):
        return value
    if value is None and isinstance(record, dict) and not needed:
        return kind()
    raise broken_upstream(f"no {kind.__name__} {name!r} in {show(to_bytes(record))}")


def add_up(total: Json, more: Json) -> Json:
    """Add a choice of a chunk to the choice of the whole answer: texts and arrays grow."""
    for name, value in more.items():
        if isinstance(value, dict):
            total[name] = add_up(total.get(name) or {}, value)
        elif isinstance(value, (str, list)) and total.get(name):
            grown = total.pop(name)  # out of the dict, so that CPython may extend it in place
            grown += value
            total[name] = grown
        elif value is not None or name not in total:
            total[name] = value
    return total


def fold_choices(choices: Iterable[Json]) -> list[Json]:
    """The choices of a whole answer: those of a stream's chunks, added up by their index.

    >>> stream = ChatStream("m", "chatcmpl-1", 1700000000)
    >>> records = [{"message": {"content": "H"}}, {"message": {"content": "i"}, "done": True}]
    >>> fold_choices(choice for record in records for choice in stream.feed(record))
    [{'index': 0, 'message': {'role': 'assistant', 'content': 'Hi'}, 'finish_reason': 'stop'}]
    """
    folded: dict[int, Json] = {}
    for choice in choices:
        choice = {{"delta": "message"}.get(name, name): choice[name] for name in choice}
        add_up(folded.setdefault(choice["index"], {}), choice)
    for choice in folded.values():
        message = choice.get("message", {})
        for call in message.get("tool_calls", ()):
            del call["index"]  # the order in the array says it
        if "tool_calls" in message:
            message["content"] = message["content"] or None
    return list(folded.values())


def whole_answer(streams: list[ChatStream], choices: Iterable[Json]) -> Json:
    """A chat.completion, which is what its stream adds up to."""
    folded = fold_choices(choices)  # and with that, the streams have counted their tokens
    return {**with_usage(streams, folded), "object": streams[0].kind.replace(".chunk", "")}


def chunk_framer(envelope: Json) -> Callable[[Json], bytes]:
    r"""A function that makes the frame of a choice. The envelope is serialised only here.

    >>> chunk_framer({"id": "chatcmpl-1"})({"index": 0, "delta": {}})
    b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{}}]}\n\n'
    """
    head = b"data: " + to_bytes({**envelope, "choices": []})[:-2]  # all but the ]} at its end
    return lambda choice: b"%b%b]}\n\n" % (head, to_bytes(choice))


# The three together. The record that says done makes an answer whole; what comes after it is not
# read. If the body ends before it, that is a cut, however clean HTTP's own end was.


def read_records(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, Json]]:
    """All lines of a body, each with its record."""
    decoder = NdjsonDecoder()
    for piece in pieces:
        yield from decoder.feed(piece)
    yield from decoder.close()


def translate(pieces: Iterable[bytes], stream: ChatStream,
              trace: Callable[[bytes], None] | None = None) -> Iterator[Json]:
    """Bytes to records to choices, until the record that says done; what follows it is not read.

    `trace` gets each line before its choices come.
    """
    for line, record in read_records(pieces):
        if trace:
            trace(line)
        yield from stream.feed(record)
        if stream.state == DONE:
            return
    stream.close()


def raw_frames(pieces: Iterable[bytes], needs_done: bool) -> Iterator[bytes]:
    """The lesson's smallest form: each NDJSON line, unchanged, is one frame; then [DONE].

    After a line that is an error the stream just ends. Raises ProxyError 502 if no line says done
    where one must (/api/chat and /api/generate).
    """
    for line, record in read_records(pieces):
        yield sse_event(line)
        if "error" in record:
            return
        if needs_done and member(record, "done", bool):
            break
    else:
        if needs_done:
            raise cut_upstream("it ended before the record that says done")
    yield SSE_DONE


# ---- 7. Authenticate, shape, observe: what the proxy is for, each with its hook ----------------
# Who may call; what is sent on; what happened. Here is what needs no connection; the three places
# that use it are ProxyHandler.authenticate(), shape() and observe(), and each has a hook.


def parse_key(line: str) -> tuple[str, str]:
    """[NAME:]KEY to its name and key.

    >>> parse_key("alice:sk-0123456789"), parse_key("sk-0123456789")
    (('alice', 'sk-0123456789'), ('', 'sk-0123456789'))
    """
    name, _, key = line.strip().rpartition(":")
    if not re.fullmatch(r"[\w.@-]{0,40}", name) or not re.fullmatch("[!-~]{8,200}", key):
        raise ValueError("a key must be [NAME:]KEY, the key of 8 to 200 visible ASCII characters; "
                         "no blanks, and comments on lines of their own")
    return name, key


class Keys:
    """Who may call: keys from the command line, and from a file that is read anew if it changes."""

    def __init__(self, given: Iterable[tuple[str, str]], path: str) -> None:
        self._given, self._path = list(given), path
        self._stamp: object = "never read"  # of the file as it was read last
        self._digests: list[tuple[str, bytes]] = []
        self._load()

    def __bool__(self) -> bool:
        """Are keys asked for? Also when the file has none left: then nobody may call."""
        return bool(self._given or self._path)

    def __len__(self) -> int:
        return len(self._digests)

    def caller(self, presented: str) -> str | None:
        """The name of a key's owner, or None. Takes the same time for each wrong key."""
        try:
            self._load()
        except (OSError, ValueError) as error:
            say(f"warning: the old keys stay in force: {error}")
        digest = hashlib.sha256(presented.encode("utf-8", "replace")).digest()
        owners = [name for name, known in self._digests if hmac.compare_digest(digest, known)]
        return owners[0] if owners else None

    def _load(self) -> None:
        """Read the file, if it has changed. On OSError or ValueError, raised once for each change,
        the old keys stay."""
        stamp, size = None, 0
        with contextlib.suppress(OSError):  # of a file that is gone open() complains, below
            status = os.stat(self._path)
            stamp, size = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino), status.st_size
        if (stamp, size) == self._stamp:
            return
        self._stamp = stamp, size
        if size > MAX_KEY_FILE_BYTES:
            raise ValueError(f"{self._path} is larger than {MAX_KEY_FILE_BYTES} bytes")
        keys = list(self._given) + (self._read() if self._path else [])
        self._digests = [(name or f"key-{i}", hashlib.sha256(key.encode()).digest())
                         for i, (name, key) in enumerate(keys, 1)]

    def _read(self) -> list[tuple[str, str]]:
        keys, number = [], 0
        try:
            with open(self._path, encoding="utf-8-sig") as file:  # a BOM, from Windows' editors
                for number, line in enumerate(file, 1):
                    if line.strip() and not line.lstrip().startswith("#"):
                        keys.append(parse_key(line))
        except ValueError as error:
            raise ValueError(f"{self._path}, line {number}: {error}") from None
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._stamp = "never read"  # no descriptors, say: to be tried again
            raise
        return keys


def load_hooks(path: str) -> dict[str, Callable[..., Any]]:
    """The functions of --hooks FILE.py: authenticate(headers), shape(route, body, caller) and
    observe(record), each if it is there. They will be called from many threads at once."""
    # So that a hook's `from ndjson_sse_proxy import ProxyError` finds this program, running.
    sys.modules.setdefault("ndjson_sse_proxy", sys.modules[__name__])
    names = runpy.run_path(path, run_name="ndjson_sse_proxy_hooks") if path else {}
    hooks: dict[str, Callable[..., Any]] = {
        name: names[name] for name in ("authenticate", "shape", "observe") if name in names}
    if path and not hooks:  # a slip in a name must not leave the door open
        raise ValueError(f"{path} defines neither authenticate nor shape nor observe")
    return hooks


BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # up to a cold model's load
METRICS = {  # name after ndjson_sse_proxy_: type, help
    "requests_total": ("counter", "Requests, by route and status."),
    "active_requests": ("gauge", "Requests under way."),
    "tokens_total": ("counter", "Tokens that Ollama counted, by model and kind."),
    "client_hangups_total": ("counter", "Clients that left before the end of their answer."),
    "upstream_errors_total": ("counter", "Failures of the upstream, by kind."),
    "first_token_seconds": ("histogram", "Time to the first token."),
    "request_seconds": ("histogram", "Time to the end of the answer."),
}
MAX_MODEL_LABELS = 100  # so many models have a label of their own; the others share "other"


class Metrics:
    """Counters and histograms in Prometheus' text format. Labels come from sets that can't grow
    at a client's will: the routes, the statuses, and models that Ollama has answered for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = {name: {} for name in METRICS}
        self._models: set[str] = set()
        self.add("active_requests", 0)
        self.add("client_hangups_total", 0)

    def add(self, name: str, amount: float = 1, **labels: Any) -> None:
        """Count something, or change a gauge."""
        quoted = {label: re.sub(r'(["\\])', r"\\\1", str(value)).replace("\n", r"\n")
                  for label, value in labels.items()}
        key = ",".join(f'{label}="{value}"' for label, value in quoted.items())
        with self._lock:
            self._values[name][key] = self._values[name].get(key, 0) + amount

    def time(self, name: str, seconds: float) -> None:
        """Put a time into a histogram, whose buckets each count what is not above them."""
        with self._lock:
            values = self._values[name]
            for limit in (*BUCKETS, float("inf")):
                label = f'_bucket{{le="{"+Inf" if limit > BUCKETS[-1] else limit}"}}'
                values[label] = values.get(label, 0) + (seconds <= limit)
            values["_sum"] = values.get("_sum", 0) + seconds
            values["_count"] = values.get("_count", 0) + 1

    def model(self, name: str) -> str:
        """The label for a model."""
        with self._lock:
            if name and len(self._models) < MAX_MODEL_LABELS:
                self._models.add(name)
            return name if name in self._models else "other"

    def text(self) -> str:
        """The page for Prometheus."""
        lines = []
        with self._lock:
            for name, (kind, text) in METRICS.items():
                name_there = f"ndjson_sse_proxy_{name}"
                lines += [f"# HELP {name_there} {text}", f"# TYPE {name_there} {kind}"]
                for key, value in self._values[name].items():
                    key = key if kind == "histogram" else "{" + key + "}" if key else ""
                    lines.append(f"{name_there}{key} {value:.15g}")
        return "\n".join(lines) + "\n"

    def record(self, record: Json) -> None:
        """Count a request that has ended; the record is that of ProxyHandler.observe()."""
        self.add("requests_total", route=record["route"], status=record["status"])
        if record["end"] == "client hang-up":
            self.add("client_hangups_total")
        if str(record["error"]).startswith("upstream_"):
            self.add("upstream_errors_total", kind=record["error"][len("upstream_"):])
        if record["completion_tokens"] is not None:
            model = self.model(record["model"])
            self.add("tokens_total", record["prompt_tokens"] or 0, model=model, kind="prompt")
            self.add("tokens_total", record["completion_tokens"], model=model, kind="completion")
        if record["first_token_seconds"] is not None:
            self.time("first_token_seconds", record["first_token_seconds"])
        self.time("request_seconds", record["seconds"])


# What is known of a request, in the order of the log line. To log more, add a name here and set it
# in ProxyHandler.observe().
RECORD_NAMES = (
    "time", "id", "client", "caller", "method", "route", "model", "status", "prompt_tokens",
    "completion_tokens", "first_token_seconds", "seconds", "tokens_per_second", "end", "error",
    "ignored")


def log_line(record: Json) -> str:
    """A record for people: what is there, and nothing a terminal would obey.

    >>> log_line({"time": "T", "end": "done", "status": 200, "model": "m", "caller": None})
    'T end=done status=200 model=m'
    """
    parts = [record["time"]]
    for name, value in record.items():
        if name != "time" and value not in (None, []):
            text = str(value)
            parts.append(f"{name}={text if re.fullmatch(PLAIN_WORD, text) else ascii_json(value)}")
    return " ".join(parts)


PLAIN_WORD = r"""[!#-<>-~]+"""  # no blank, quote or =, by which one value could pass for several


def ascii_json(value: Any) -> str:
    """JSON in visible ASCII: a terminal obeys control characters, and more than C0 are."""
    return json.dumps(value).replace("\x7f", "\\u007f")


# ---- 8. Watchdog: one thread that looks after all requests -------------------------------------
# While Ollama is silent (a model loads, others are before us in its queue) the thread of a request
# sleeps in recv() and sees nothing of its client. So another thread looks at all of them every
# TICK_SECONDS: a client that has hung up is noticed, one that waits long gets a heartbeat, and a
# silence that is too long has an end. It frees a sleeping thread by shutdown() on the upstream's
# socket: recv() returns, and Ollama, whose connection is gone, stops working.


def has_hung_up(client: socket.socket) -> bool:
    """Has the client closed its side, by FIN or RST? Does not wait, and reads nothing.

    One that has closed only its sending side looks the same, and counts as gone.
    """
    try:
        if hasattr(select, "POLLRDHUP"):  # tells it under TLS, and behind bytes not read yet, too
            poll = select.poll()
            poll.register(client, select.POLLRDHUP)
            return bool(poll.poll(0))
        # SSLSocket's own recv() can't peek. Bytes are the next request, pipelined.
        return (is_ready(client, selectors.EVENT_READ)
                and not socket.socket.recv(client, 1, socket.MSG_PEEK))
    except ConnectionError:
        return True
    except (OSError, ValueError):  # closed by its own thread just now
        return False


def is_ready(client: socket.socket, event: int, seconds: float = 0) -> bool:
    """Can the socket be read, or written to, without waiting; or at least within this time?"""
    # Not select(): it knows no descriptors above 1023, but where there is nothing else.
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        selector.register(client, event)
        return bool(selector.select(seconds))


class Watch:
    """A request under way, and the two sockets it holds on to."""

    def __init__(self, client: socket.socket | None = None,
                 idle_timeout: float = float("inf")) -> None:
        self.client = client
        self.beat: Callable[[], None] | None = None  # called at each look, for heartbeats
        self.silent_since: float | None = None  # time.monotonic(), while it waits for Ollama
        self._idle_timeout = idle_timeout
        self._reason: Exception | None = None
        self._upstream: socket.socket | None = None
        self._lock = threading.Lock()

    def attach(self, upstream: socket.socket) -> None:
        """The connection that the request waits for from now on. Raises what end() was given."""
        with self._lock:
            self._upstream = upstream
        self.check()

    def end(self, reason: Exception) -> None:
        """Let the request's thread stop waiting, and check() raise the reason there."""
        with self._lock, contextlib.suppress(OSError):  # closed by its own thread just now
            self._reason = self._reason or reason
            if self._upstream:
                # SSLSocket's own shutdown() drops the TLS layer: the thread would read ciphertext.
                socket.socket.shutdown(self._upstream, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise what end() was given, if it was called."""
        if self._reason:
            raise self._reason

    def look(self) -> None:
        """What the watchdog does."""
        silent_since = self.silent_since  # which the request's thread may change meanwhile
        if silent_since is None:  # it is at work; if the client is gone, it will see that itself
            return
        if self.client and has_hung_up(self.client):
            self.end(ConnectionAbortedError("the client hung up"))
        elif time.monotonic() - silent_since > self._idle_timeout:
            self.end(ProxyError(504, f"Ollama was silent for {self._idle_timeout:g} s "
                                "(--idle-timeout)", code="upstream_timeout"))
        elif self.beat:
            self.beat()


class Watchdog(threading.Thread):
    """The thread that looks at all requests, until stop()."""

    def __init__(self, idle_timeout: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.tick, self._idle_timeout = TICK_SECONDS, idle_timeout
        self._watches: set[Watch] = set()
        self._over = threading.Event()

    def __len__(self) -> int:
        return len(self._watches)

    def run(self) -> None:
        while not self._over.wait(self.tick):
            for watch in self._watches.copy():  # one step to the interpreter; the set may change
                try:
                    watch.look()
                except Exception:  # noqa: BLE001  the thread's boundary: the others are looked at
                    say(traceback.format_exc())

    def stop(self) -> None:
        """End the thread."""
        self._over.set()

    @contextlib.contextmanager
    def watching(self, client: socket.socket) -> Iterator[Watch]:
        """Look at a request, as long as the block runs."""
        watch = Watch(client, self._idle_timeout)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def end_all(self, reason: Exception) -> None:
        """End all requests that are under way."""
        for watch in self._watches.copy():
            watch.end(reason)


# ---- 9. Upstream: the only section that touches http.client ------------------------------------
# HTTP says in three ways where a body ends: by chunks, by a length, or by the end of the
# connection. The last can't be told from a cut; so it is good that Ollama uses the first, and that
# its last record says done.


class Upstream:
    """An Ollama at a URL. Every failure to talk with it comes out as a ProxyError."""

    def __init__(self, config: Config, via: str, api_key: str = "") -> None:
        self.url = config.upstream
        # A server's 0.0.0.0 (all addresses, often in $OLLAMA_HOST) is no place to go to.
        host = self.url.hostname or ""
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._tls = ssl.create_default_context() if self.url.scheme == "https" else None
        self._headers = {"Connection": "close", "Via": f"1.1 {via}"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def request(self, watch: Watch, method: str, path: str, body: bytes | None = None,
                headers: Json | None = None) -> UpstreamAnswer:
        """Send one request and wait for the status line: minutes, while a model loads.

        Each request has a connection of its own: closing it is how Ollama is told to stop.
        Raises ProxyError 502 if there is no Ollama, and what ends the watch: 504 after a silence.
        """
        with contextlib.ExitStack() as stack:  # closes all, unless nothing went wrong
            with self.reading(watch):
                connection = (http.client.HTTPSConnection(self._host, self.url.port,
                                                          context=self._tls)
                              if self._tls else
                              http.client.HTTPConnection(self._host, self.url.port))
                stack.callback(connection.close)
                self._connect(connection, watch)
                watch.silent_since = time.monotonic()
                # Whoever refuses a large body may do so, and hang up, before all of it is sent.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, self.url.path + path, body, {
                        "Content-Type": "application/json", **(headers or {}), **self._headers})
                response = connection.getresponse()
                stack.callback(response.close)
                answer = UpstreamAnswer(self, watch, connection, response)
            stack.pop_all()
        return answer

    def _connect(self, connection: http.client.HTTPConnection, watch: Watch) -> None:
        """Connect, so that the watch can end it even within the TLS handshake."""
        try:
            sock = connection.sock = socket.create_connection(
                (self._host, connection.port), CONNECT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = connection.sock = self._tls.wrap_socket(
                    sock, server_hostname=self._host, do_handshake_on_connect=False)
            watch.attach(sock)
            if isinstance(sock, ssl.SSLSocket):
                watch.silent_since = time.monotonic()
                sock.do_handshake()
        except (OSError, UnicodeError) as error:  # UnicodeError: the host can't be a name
            watch.check()
            raise ProxyError(
                502, f"Ollama can't be reached at {self.url.geturl()} ({error}). Is it running "
                "there (ollama serve)? Give its place as --upstream URL, or do without it: --demo",
                code="upstream_unreachable") from error
        # No time limit of its own: that costs a poll() for each recv(), and the watchdog has one.
        sock.settimeout(None)

    @contextlib.contextmanager
    def reading(self, watch: Watch) -> Iterator[None]:
        """What http.client and sockets raise in here comes out as a ProxyError; or, if it was the
        watchdog that cut the connection, as the reason for that."""
        try:
            yield
        except OSError as error:
            watch.check()
            raise cut_upstream(type(error).__name__) from error
        except (http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            # odd headers, which the parser for mail takes apart
            watch.check()
            raise broken_upstream(f"{type(error).__name__} {error}") from error
        finally:
            watch.silent_since = None
        watch.check()

    def json(self, watch: Watch, method: str, path: str, body: Json | None = None) -> Json:
        """A short exchange: the JSON object that Ollama answers. Raises ProxyError."""
        data = None if body is None else to_bytes(body)
        with contextlib.closing(self.request(watch, method, path, data)) as answer:
            answer.raise_for_status()
            try:
                return parse_object(answer.read(MAX_BODY_BYTES))
            except ValueError:
                raise broken_upstream(f"{path} answered with no JSON object") from None


class ChunkDecoder:
    r"""HTTP's chunked coding off a body: bytes in, split anywhere, bytes out.

    A chunk is its size in hexadecimal, CRLF, so many bytes, CRLF; one of size 0 ends the body.
    http.client gives one chunk a read, so one line at a time, however many have come; and it takes
    sizes such as -5 or 2_0.

    >>> decoder = ChunkDecoder()
    >>> decoder.feed(b"3\r\nabc\r\n1"), decoder.feed(b"\r\nd\r\n0\r\n\r\n"), decoder.ended
    (b'abc', b'd', True)
    """

    FIRST_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;[^\r\n]*)?\r\n")
    NEXT_SIZE = re.compile(rb"\r\n" + FIRST_SIZE.pattern)

    def __init__(self) -> None:
        self.ended = False
        self.fault: ProxyError | None = None  # behind the bytes that have been returned
        self._rest = b""  # of a size's line that is not whole
        self._left = 0  # bytes of the chunk that are still to come
        self._size = self.FIRST_SIZE

    def feed(self, data: bytes) -> bytes:
        """Take bytes, return those of the body; what is no chunk makes a `fault`."""
        data, at, pieces = self._rest + data, 0, []
        while not self.ended:
            pieces.append(data[at:at + self._left])
            at += len(pieces[-1])
            self._left -= len(pieces[-1])
            line = None if self._left else self._size.match(data, at)
            if not line:
                break
            at = line.end()
            self._left = int(line[1], 16)
            self.ended = not self._left
            self._size = self.NEXT_SIZE
        self._rest = data[at:]
        if not self.ended and (b"\n" in self._rest[2:] or len(self._rest) > MAX_ERROR_BYTES):
            self.fault = broken_upstream(f"a chunk without a size, {show(self._rest)}")
        return b"".join(pieces)


class UpstreamAnswer:
    """An answer whose status line and headers are there; the body comes piece by piece."""

    def __init__(self, upstream: Upstream, watch: Watch, connection: http.client.HTTPConnection,
                 response: http.client.HTTPResponse) -> None:
        self._upstream, self._watch = upstream, watch
        self._connection, self._response = connection, response
        self.status = response.status
        # "chunked" and "0" here stand for a header that is not there: both are fine.
        encoding = response.getheader("Transfer-Encoding", "chunked")
        length = response.getheader("Content-Length", "0")
        if (self.status < 200 or encoding.lower() != "chunked"
                or not re.fullmatch("[0-9]{1,18}", length)):
            raise broken_upstream(f"status {self.status}, Transfer-Encoding {encoding[:60]}, "
                                  f"Content-Length {length[:60]}")
        content_type = response.getheader("Content-Type", "application/octet-stream")
        self.content_type = re.sub("[^ -~]+", " ", content_type)  # a folded line, for one
        retry = response.getheader("Retry-After", "")
        self.headers = [("Retry-After", retry)] if retry.isalnum() else []
        # None: chunked, or as long as the connection lasts
        self.length = None if response.length is None else int(length)

    def close(self) -> None:
        """Hang up. If Ollama was still at work for this request, it stops."""
        self._response.close()
        self._connection.close()

    def pieces(self) -> Iterator[bytes]:
        """The body, as it arrives: all that has come at once. Raises ProxyError if it is cut."""
        chunks = ChunkDecoder() if self._response.chunked else None
        left = self._response.length  # 0 for an answer to HEAD, whatever it promises
        with self._upstream.reading(self._watch):
            while left != 0 and not (chunks and chunks.ended):
                self._watch.silent_since = time.monotonic()
                # peek() waits for the next bytes, in the reader's own buffer, and read1() takes all
                # of them. (read1(n) alone would set n bytes aside for as long as it waits.)
                data = self._response.fp.read1(len(self._response.fp.peek()[:left]))
                self._watch.silent_since = None
                if not data and (chunks or left):
                    self._watch.check()
                    raise cut_upstream("it ended before " + (
                        f"{left} promised bytes" if left else "the chunk that ends it"))
                if not data:
                    return
                left = left and left - len(data)
                data = chunks.feed(data) if chunks else data
                if data:
                    yield data
                if chunks and chunks.fault:
                    raise chunks.fault

    def read(self, limit: int) -> bytes:
        """The whole body, or as soon as there are `limit` bytes, those."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) >= limit:
                break
        return bytes(body)

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
        error = upstream_error(value, self.status if self.status >= 400 else 502)
        error.headers = self.headers
        raise error


# ---- 10. Downstream: the HTTP server that clients talk to --------------------------------------
# First the stream of events, which two threads write to; then the reading of requests; then the
# handler: verbs, who may come in, routes, shape and observe, helpers; then the routes and servers.


class EventStream:
    """An answer in SSE. Frames gather here, and leave in one write before the proxy waits.

    The status waits for the first frame (or heartbeat), so that a failure before it has a status
    of its own; after it, a failure is a frame.
    The lock is free only while the request's thread waits for Ollama: so a heartbeat, which comes
    from the watchdog's thread, falls between two pieces of the answer and never into one.
    """

    def __init__(self, handler: ProxyHandler, ignored: list[str] | tuple[()] = ()) -> None:
        self._handler, self._ignored = handler, ignored
        self._gathered: list[bytes] = []
        self._begun = False  # is there a frame, not comments alone?
        self._lock = threading.Lock()
        self._lock.acquire()
        self._sent_at = time.monotonic()
        # What a heartbeat is. On /api/* a comment: a frame there is a record of Ollama's.
        self.heartbeat: Callable[[], list[bytes]] = lambda: [sse_comment(b"heartbeat")]

    def comment(self, data: bytes) -> None:
        """Something for people who watch; it leaves with the next frame."""
        self._gathered.append(sse_comment(data))

    def add(self, frame: bytes) -> None:
        """A frame; it leaves at the latest when there is nothing else to do."""
        self._gathered.append(frame)
        self._begun = True

    def wait_for(self, step: Callable[[], Any]) -> Any:
        """Do what may take long, with all frames sent; heartbeats may come meanwhile."""
        self.flush()
        self._lock.release()
        try:
            return step()
        finally:
            self._lock.acquire()

    def pieces(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces, until there are no more, each waited for as above."""
        return iter(functools.partial(self.wait_for, functools.partial(next, pieces, b"")), b"")

    def flush(self) -> None:
        """Send what has gathered. Raises OSError if the client is gone."""
        if not self._begun or not self._gathered:
            return
        if not self._handler.head_sent:
            self._handler.start(200, "text/event-stream; charset=utf-8", headers=[
                ("Cache-Control", "no-cache"),
                ("X-Accel-Buffering", "no"),  # nginx would hold the frames back
                *ignored_header(self._ignored)])
        self._handler.write(b"".join(self._gathered))
        self._gathered.clear()
        self._sent_at = time.monotonic()

    def beat(self) -> None:
        """A heartbeat, if the last frame was long ago. Does not wait for the client: what is sent
        is small, and a socket that takes a byte takes so many."""
        seconds, connection = self._handler.server.config.heartbeat, self._handler.connection
        if (not seconds or time.monotonic() - self._sent_at < seconds
                or not self._lock.acquire(blocking=False)):
            return
        large: list[bytes] = []
        try:
            if is_ready(connection, selectors.EVENT_WRITE):
                if sum(map(len, self._gathered)) > SMALL_BYTES:  # a long request's trace: later
                    large, self._gathered = self._gathered, []
                for frame in self.heartbeat():
                    self.add(frame)
                self.flush()
        except OSError:  # the client is gone, or has read half a frame: nothing may follow
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        finally:
            self._gathered += large
            self._lock.release()


def unique_members(pairs: list[tuple[str, Any]]) -> Json:
    """json's hook for objects: of two members with one name, which was meant?"""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return dict(pairs)


CLIENT_JSON = strict_decoder(object_pairs_hook=unique_members)


TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
REQUEST_LINE = re.compile(b"(" + TOKEN + rb"{1,40}) (/[!-~]*) (HTTP/\d{1,3}\.\d{1,3})\r\n")
HEADER_LINE = re.compile(b"(" + TOKEN + rb"+):([\t -~\x80-\xff]*)\r\n")
ONCE_ONLY = ("host", "content-length", "transfer-encoding", "content-type", "authorization",
             "x-api-key", "origin")


def read_head(first: bytes, readline: Callable[[int], bytes]
              ) -> tuple[str, str, str, http.client.HTTPMessage]:
    """The method, path, version and headers of a request whose first line is there.

    http.server takes two lengths, a length of +2, folded lines, a bare CR and more; a proxy in
    front of this one may read the same bytes otherwise, and what is one request there would be two
    here (request smuggling). So whatever is not plainly right is refused. Raises ProxyError.
    """
    request = REQUEST_LINE.fullmatch(first)
    if not request:
        raise ProxyError(400, "the request line is not METHOD /path HTTP/1.1")
    method, path, version = (part.decode() for part in request.groups())
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise ProxyError(505, "the version of HTTP must be 1.0 or 1.1")
    headers = http.client.HTTPMessage()
    left = MAX_HEAD_BYTES
    while True:
        line = readline(left)
        left -= len(line)
        if left <= 0 or len(headers) > MAX_HEADERS:
            raise ProxyError(431, "too many headers, or too long ones")
        if line == b"\r\n":
            break
        header = HEADER_LINE.fullmatch(line)
        if not header:
            raise ProxyError(400, f"no header line: {show(line)}")
        name = header[1].decode()
        if name in headers and name.lower() in ONCE_ONLY:
            raise ProxyError(400, f"the header {name} is there twice")
        headers[name] = header[2].strip().decode("latin-1")
    if not re.fullmatch("[0-9]{1,18}", headers.get("Content-Length", "0")):
        raise ProxyError(400, "the Content-Length is no number")
    if "Transfer-Encoding" in headers:
        raise ProxyError(400 if "Content-Length" in headers else 411,
                         "chunked bodies are not read; send a Content-Length instead")
    if version == "HTTP/1.1" and "Host" not in headers:
        raise ProxyError(400, "the Host header is missing")
    return method, path, version, headers


class ClientIO(io.RawIOBase):
    """A client's bytes, in both directions, with time limits for what http.server waits for.

    To read: until `deadline`, in total; a limit for each recv() would let a client drip. To write:
    `patience` seconds without progress; sendall()'s own limit is for all of the bytes.
    Raises socket.timeout, which is an OSError.
    """

    def __init__(self, connection: socket.socket, patience: float) -> None:
        self._connection, self._patience = connection, patience
        self.deadline = time.monotonic() + patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("the client's time is up")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)

    def write(self, data: Any) -> int:
        """All of the data; in one send, as a rule."""
        size = len(data)
        if self._connection.gettimeout() != 0:
            self._connection.settimeout(0)
        while data:
            try:
                data = data[self._connection.send(data):]
            except (BlockingIOError, ssl.SSLWantWriteError):
                if not is_ready(self._connection, selectors.EVENT_WRITE, self._patience):
                    raise socket.timeout("the client does not read") from None
        return size


class JsonHandler(http.server.BaseHTTPRequestHandler):
    """What http.server lacks: a strict reading of the head, and helpers to write with."""

    protocol_version = "HTTP/1.1"  # keep-alive and chunked bodies; the default is 1.0
    disable_nagle_algorithm = True  # a frame leaves at once, not when the last one is confirmed
    request_version = "HTTP/1.0"  # until a request has said its own
    requestline = ""  # for the base class's log, which says nothing here
    timeout = CLIENT_SECONDS  # the default waits for ever
    body_timeout = BODY_SECONDS
    max_body = MAX_BODY_BYTES
    raw_requestline: bytes
    head_sent = chunked = False  # too late for a status? is the body's length unknown?

    def setup(self) -> None:
        """The base class's, and the TLS handshake, under the connection's time limit."""
        super().setup()
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.do_handshake()
        self.rfile.close()
        self.client = ClientIO(self.connection, self.timeout)
        self.wfile = self.client  # type: ignore[assignment]  # typeshed's is narrower than need be
        self.rfile = io.BufferedReader(self.client, 2048)  # a head; thousands of clients have one

    def handle_one_request(self) -> None:
        """The base class's; the next request's head must be there in time."""
        self.client.deadline = time.monotonic() + self.timeout
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Instead of the base class's: read the head strictly. (The base class hands it to the
        parser for mail, which is slow, or fails in strange ways, on an odd Content-Type.)"""
        self.started = time.monotonic()  # not before: the client may have idled
        try:
            self.command, self.path, self.request_version, self.headers = read_head(
                self.raw_requestline, self.rfile.readline)
        except ProxyError as error:
            self.refuse(error)
            return False
        except socket.timeout:
            self.refuse(ProxyError(408, f"the head did not come within {self.timeout:g} s"))
            return False
        wish = ",".join(self.headers.get_all("Connection", [])).lower()
        self.close_connection = "close" in wish or (
            self.request_version == "HTTP/1.0" and "keep-alive" not in wish)
        return True

    def refuse(self, error: ProxyError) -> None:
        """Answer a request that is none; where the next one would begin is anybody's guess."""
        self.close_connection = True
        self.fail(error)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's own refusals (too long a line, an unknown method), in OpenAI's form."""
        self.refuse(ProxyError(code, message or self.responses[code][0]))

    def fail(self, error: ProxyError) -> None:
        """Answer with the error."""
        self.send_json(error.status, error.body(), error.headers)

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
        """A part of the body, in one send if the client reads."""
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

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the base class's lines are not needed beside those of observe()."""

    def read_body(self) -> bytes:
        """The request's body. Raises ProxyError 400, 411 or 413; then it has not been read."""
        length_text = self.headers.get("Content-Length")
        if length_text is None and self.command == "POST":
            raise ProxyError(411, "the body needs a Content-Length")
        length = int(length_text or 0)
        if length > self.max_body:
            raise ProxyError(413, f"the body is larger than {self.max_body} bytes (--max-body)")
        if length and self.command in ("GET", "HEAD", "OPTIONS"):
            raise ProxyError(400, f"a {self.command} request has no body here")
        if (self.headers.get("Expect", "").lower() == "100-continue"
                and self.request_version == "HTTP/1.1"):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.client.deadline = time.monotonic() + self.body_timeout
        try:
            body = self.rfile.read(length)
        except socket.timeout:
            raise ProxyError(
                408, f"the body did not come within {self.body_timeout:g} s") from None
        if len(body) < length:
            raise ConnectionAbortedError("the client went away within its request")
        return body


# The pages that Ollama itself lets in: of this machine, and of programs with pages inside.
LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
                          r"|(app|file|tauri|vscode-webview|vscode-file)://.*")


class ProxyHandler(JsonHandler):
    """One connection of a client, in its own thread; one method a route (see ROUTES)."""

    server: ProxyServer
    watch: Watch
    events: EventStream | None  # if the answer is one, which can carry an error

    # --- verbs ---

    def setup(self) -> None:
        """The base class's. One connection too many only stays to be told so."""
        self.max_body = self.server.config.max_body
        self.excess = self.server.connections > self.server.config.max_connections
        if self.excess:
            self.timeout = LINGER_SECONDS  # type: ignore[misc]  # typeshed's says class only
        super().setup()

    def handle_one_request(self) -> None:
        """The base class's, with nothing left over from the request before on this connection."""
        self.head_sent = self.chunked = False
        self.events = None
        self.command = self.origin = ""
        self.started = time.monotonic()  # parse_request() knows better, unless the line is too long
        self.record: Json = dict.fromkeys(RECORD_NAMES)
        self.record.update(id="req_" + os.urandom(12).hex(), route="none")
        super().handle_one_request()

    def refuse(self, error: ProxyError) -> None:
        """The same, and count it as a request."""
        super().refuse(error)
        self.observe()
        self.linger()

    def dispatch(self) -> None:
        """Run the route's method, under the eyes of the watchdog."""
        self.server.metrics.add("active_requests")
        with self.server.watchdog.watching(self.connection) as self.watch:
            self.run_route()
            self.close_connection = self.close_connection or self.server.draining
            self.server.metrics.add("active_requests", -1)
            self.observe()
        self.linger()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = dispatch

    def run_route(self) -> None:
        """What goes wrong in a route is said once, or ends the connection.

        A client that hangs up makes the next write to it fail, or the watchdog ends the wait for
        Ollama; on the way out of the route the upstream's connection is closed, and Ollama stops.
        """
        keep_alive, self.close_connection = not self.close_connection, True
        try:
            route = self.admit()
            self.body = self.read_body()
            # All that was sent is read, so more may follow.
            self.close_connection = not keep_alive or self.excess or self.server.draining
            route(self)
            if (self.record["status"] or 0) >= 400:  # Ollama refused, in words passed through
                self.record.update(end="error", error=f"status_{self.record['status']}")
            self.record["end"] = self.record["end"] or "done"
        except ProxyError as error:
            self.fail(error)
        except RecursionError:  # writing JSON needs a little more of the stack than reading it
            self.fail(ProxyError(400, "nested too deeply"))
        except OSError:  # upstream's are ProxyErrors; so the client is gone, and nobody to tell
            self.record["end"] = self.record["end"] or "client hang-up"
            self.close_connection = True
        except Exception:  # noqa: BLE001  the thread's boundary: our own fault must not be silent
            say(traceback.format_exc())
            self.fail(ProxyError(500, "internal error of the proxy; its log says more"))

    # --- who may come in, and where to ---

    def admit(self) -> Callable[[ProxyHandler], None]:
        """The method for this request, if its Host, its Origin and its key are right."""
        self.record["method"] = self.command
        path, _, query = self.path.partition("?")
        self.record["route"], self.rest = match_route(path)
        self.target = self.record["route"].replace("*", self.rest) + ("?" + query if query else "")
        self.trace = "trace=1" in query.split("&")
        self.check_host()
        self.check_origin()
        if self.command == "OPTIONS" and self.origin:
            return ProxyHandler.preflight
        if path not in ("/", "/healthz"):
            self.record["caller"] = self.authenticate()
        if (self.excess or self.server.draining) and path not in ("/healthz", "/metrics"):
            raise ProxyError(
                503, "the proxy is shutting down" if self.server.draining else
                "the proxy has no connection to spare", code="proxy_busy",
                headers=[("Retry-After", "1")])
        if self.server.via in ",".join(self.headers.get_all("Via", [])):
            raise ProxyError(508, "the upstream of the proxy is the proxy itself: name Ollama's "
                             "place with --upstream URL", code="upstream_loop")
        return self.find_route(path)

    def check_host(self) -> None:
        """A page of another site can make its own name mean 127.0.0.1 (DNS rebinding) and so talk
        to us as to its own server; but then its name stands in the Host header."""
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?",
                             self.headers.get("Host", "-"), re.ASCII)
        if not match:
            raise ProxyError(400, "the Host header is no host")
        host = match[1].strip("[]").lower()
        own = self.connection.getsockname()[0].replace("::ffff:", "")  # IPv4, to a socket of IPv6
        known = ("localhost", "127.0.0.1", "::1", "-", own, self.server.config.listen.hostname,
                 *self.server.config.allowed_host)
        if host not in known and not host.endswith(".localhost"):
            raise ProxyError(403, f"the Host {host} is not known; --allowed-host {host} allows it",
                             code="host_not_allowed")

    def check_origin(self) -> None:
        """Browsers let any page send simple POSTs anywhere; the page's site is in Origin."""
        origin, allowed = self.headers.get("Origin"), self.server.config.cors_origin
        if origin is None:
            return
        own = origin.partition("://")[2] == self.headers.get("Host")
        if not (own or LOCAL_ORIGIN.fullmatch(origin) or origin in allowed or "*" in allowed):
            raise ProxyError(403, f"pages of this origin may not call; --cors-origin "
                             f"{origin[:200]} lets them", code="origin_not_allowed")
        self.origin = origin

    def authenticate(self) -> str | None:
        """The caller's name. Raises ProxyError 401."""
        if "authenticate" in self.server.hooks:
            caller = self.hook("authenticate", self.headers)
            if not isinstance(caller, str):  # a forgotten `return` must not let everybody in
                raise TypeError(f"authenticate() returned {caller!r}, which is no caller's name")
            return caller
        if not self.server.keys:
            return None
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = self.headers.get("x-api-key", "")
        caller = self.server.keys.caller(key.strip())
        if caller is None:
            raise ProxyError(401, "the API key is missing or wrong", code="invalid_api_key",
                             headers=[("WWW-Authenticate", "Bearer")])
        return caller

    def find_route(self, path: str) -> Callable[[ProxyHandler], None]:
        """The method for this path. Raises ProxyError 403, 404 or 405, with a hint."""
        known = self.record["route"]
        methods = ROUTES.get(known, {})
        route = methods.get(self.command, methods.get("GET") if self.command == "HEAD" else None)
        if self.command in methods and self.server.config.allow_admin:
            route = route or ProxyHandler.passthrough
        if route:
            return route
        if self.command in methods:
            raise ProxyError(403, f"{self.command} {known} changes what Ollama has; only with "
                             "--allow-admin is it let through", code="admin_route")
        if methods:
            allow = ", ".join(methods)
            raise ProxyError(405, f"{known} takes {allow} only", headers=[("Allow", allow)])
        hint = "; leave out the slash at its end" if path.rstrip("/") in ROUTES else ""
        if any(key.startswith("/v1/") and path.endswith(key[3:]) for key in ROUTES):
            hint = f"; base_url should be {self.base_url()}"
        if path == "/v1/v1/messages":  # Anthropic's clients put the first one there themselves
            hint = f"; the base URL should be {self.base_url()[:-len('/v1')]} here"
        raise ProxyError(404, f"no route {self.command} {path[:200]}{hint}", code="no_route")

    # --- routes ---

    def root(self) -> None:
        """GET and HEAD /: the page for a browser; for the rest, as the `ollama` program that asks
        whether anybody is there, a line of text."""
        if "text/html" in self.headers.get("Accept", ""):
            return self.send_text(PAGE, "text/html; charset=utf-8", PAGE_HEADERS)
        self.send_text(f"ndjson_sse_proxy {__version__}: base_url is {self.base_url()}\n")

    def preflight(self) -> None:
        """OPTIONS: what a browser asks before it lets a page send more than a simple request."""
        methods = "GET, POST, OPTIONS" + ", DELETE" * self.server.config.allow_admin
        self.start(200, "text/plain", 0, [
            ("Access-Control-Allow-Methods", methods), ("Access-Control-Max-Age", "600"),
            ("Access-Control-Allow-Headers", ", ".join(CORS_HEADERS))])

    def healthz(self) -> None:
        """GET /healthz: the proxy is alive."""
        self.send_text("ok\n")

    def readyz(self) -> None:
        """GET /readyz: Ollama answers, and in which version. 503 if it does not."""
        try:
            version = self.upstream_json("GET", "/api/version").get("version")
        except ProxyError as error:
            raise ProxyError(503, error.message, code=error.code) from error
        self.send_json(200, {"ready": True, "ollama": version})

    def upstream_json(self, method: str, path: str, body: Json | None = None) -> Json:
        """What Ollama answers to a short question."""
        return self.server.upstream.json(self.watch, method, path, body)

    def metrics(self) -> None:
        """GET /metrics."""
        self.send_text(self.server.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")

    def chat(self) -> None:
        """POST /v1/chat/completions."""
        self.translated(to_ollama_chat, ChatStream)

    def completions(self) -> None:
        """POST /v1/completions."""
        self.translated(to_ollama_generate, TextStream)

    def translated(self, to_request: Callable[[Json, bool], NativeRequest],
                   kind: type[ChatStream]) -> None:
        """A request translated up, its answer translated down, streamed or whole."""
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise ProxyError(415, "a body with a Content-Encoding is not read; send it plain")
        try:
            body = parse_object(self.body, CLIENT_JSON)
        except ValueError as error:
            raise ProxyError(400, f"the body can't be read as a JSON object: {error}") from None
        body = self.shape(body)
        request = to_request(body, self.server.config.allow_truncation)
        self.record["ignored"] = request.ignored  # to which more may come
        stream_id, created = kind.id_prefix + os.urandom(9).hex(), int(time.time())
        streams = [kind(str(self.model_name), stream_id, created, request.reply, index)
                   for index in range(request.reply.get("n", 1))]
        if request.reply.get("stream"):
            self.send_stream(request, streams)
        else:
            answer = whole_answer(streams, self.choices(request, streams))
            self.send_json(200, answer, ignored_header(request.ignored))

    def send_stream(self, request: NativeRequest, streams: list[ChatStream]) -> None:
        """A translated answer, streamed."""
        events = self.start_events(request.ignored)
        frame = chunk_framer(streams[0].envelope)
        # The stream that is under way says what to send while Ollama is silent.
        events.heartbeat = lambda: list(map(frame, next(
            (s for s in streams if s.state != DONE), streams[-1]).heartbeat()))
        with contextlib.closing(self.choices(request, streams)) as choices:
            for choice in choices:
                events.add(frame(choice))
        if request.reply.get("include_usage"):
            events.add(sse_event(with_usage(streams, [])))
        events.add(SSE_DONE)
        self.finish_events()

    def choices(self, request: NativeRequest,
                streams: list[ChatStream]) -> Generator[Json, None, None]:
        """All that Ollama answers: one native request for each choice, one after another."""
        trace = self.events.comment if self.events and self.trace else None
        for stream in streams:
            with contextlib.closing(self.ask(request, stream.index)) as answer:
                pieces = self.waited(answer.pieces())
                if not self.events or "forced" in request.reply:  # the whole of it is kept
                    pieces = at_most(MAX_BODY_BYTES // len(streams), pieces)
                for choice in translate(pieces, stream, trace):
                    if self.record["first_token_seconds"] is None:
                        self.record["first_token_seconds"] = self.elapsed()
                    yield choice
            self.record["prompt_tokens"], self.record["completion_tokens"] = count_tokens(streams)

    def ask(self, request: NativeRequest, index: int) -> UpstreamAnswer:
        """Ollama's answer for one choice. Raises ProxyError if it refuses."""
        body = request.body
        if index and body["options"].get("seed", -1) >= 0:  # or all choices would be the same
            body = {**body, "options": {**body["options"], "seed": body["options"]["seed"] + index}}
        answer = self.request_upstream("POST", request.path, to_bytes(body))
        try:
            answer.raise_for_status()
            return answer
        except (ProxyError, OSError) as error:  # OSError: the client has hung up
            answer.close()
            # Agents send reasoning_effort to every model; one that can't think shall answer, too.
            if "does not support thinking" not in str(error) or "effort" not in request.reply:
                raise
        del request.reply["effort"], request.body["think"]
        request.ignored.append("reasoning_effort")
        return self.ask(request, index)

    def request_upstream(self, method: str, path: str, body: bytes | None,
                         headers: Json | None = None) -> UpstreamAnswer:
        """Send a request to Ollama and wait for its answer's head."""
        def send() -> UpstreamAnswer:
            return self.server.upstream.request(self.watch, method, path, body, headers)
        if not self.events:
            return send()
        if self.trace:
            self.events.comment(f"{method} {path} ".encode() + (body or b""))
        answer: UpstreamAnswer = self.events.wait_for(send)
        return answer

    def waited(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces of an answer; if it goes out as events, with heartbeats between them."""
        return self.events.pieces(pieces) if self.events else pieces

    def embeddings(self) -> None:
        """POST /v1/embeddings: passed through, but for arrays of tokens, which Ollama refuses."""
        with contextlib.suppress(ValueError):
            texts = parse_object(self.body).get("input")
            if isinstance(texts, list) and any(not isinstance(text, str) for text in texts):
                raise ProxyError(400, "'input' must be text; Ollama takes no tokens (with LangChain"
                                 ": OpenAIEmbeddings(check_embedding_ctx_length=False))", "input")
        self.passthrough()

    def passthrough(self) -> None:
        """Ollama's own formats, byte for byte, or on request each line of NDJSON as a frame."""
        headers = {name: self.headers[name] for name in PASSED_HEADERS if name in self.headers}
        body = self.shape_native() if self.body or self.command == "POST" else None
        if "text/event-stream" in self.headers.get("Accept", "") and self.target[:5] == "/api/":
            self.start_events()
        with contextlib.closing(self.request_upstream(
                self.command, self.target, body, headers)) as answer:
            if self.events and answer.status == 200:
                for frame in raw_frames(self.counted(answer), self.needs_done()):
                    self.events.add(frame)
                return self.finish_events()
            if self.head_sent:  # by a heartbeat
                answer.raise_for_status()
            self.events = None
            self.start(answer.status, answer.content_type, answer.length, answer.headers)
            for piece in self.counted(answer):
                self.write(piece)
            self.finish_body()

    def needs_done(self) -> bool:
        """Must an answer of this route of Ollama's have a record that says done?"""
        return self.record["route"] in ("/api/chat", "/api/generate")

    def counted(self, answer: UpstreamAnswer) -> Iterator[bytes]:
        """The pieces of an answer that is passed through; the counts at its end are noted."""
        if answer.status != 200:
            yield from answer.pieces()
            return
        tail, first = b"", 0.0
        try:
            for piece in self.waited(answer.pieces()):
                first = first or self.elapsed()
                tail = (tail + piece)[-TAIL_BYTES:]
                yield piece
            if self.needs_done() and not re.search(rb'"done": ?true', tail):
                self.record.update(end="upstream cut", error="upstream_cut")
        finally:  # raw_frames() reads no further than the record that says done
            if re.search(rb'(^|\n)\{"error":', tail):
                self.record.update(end="error", error="upstream_error")
            for name, pattern in TOKEN_COUNTS.items():
                found = pattern.findall(tail)
                if found:
                    self.record[name] = int(found[-1])
                    self.record["first_token_seconds"] = first

    def models(self) -> None:
        """GET /v1/models: /api/tags in OpenAI's form, with what Ollama knows beyond it."""
        tags = self.upstream_json("GET", "/api/tags")
        models = [to_openai_model(tag) for tag in member(tags, "models", list)]
        models += [{**model, "id": name} for name, target in self.server.aliases.items()
                   for model in models if model["id"] in (target, target + ":latest")]
        self.send_json(200, {"object": "list", "data": models})

    def model(self) -> None:
        """GET /v1/models/{id}: one of them, from /api/show. The id may contain slashes."""
        shown = self.upstream_json("POST", "/api/show", {
            "model": self.server.aliases.get(self.rest, self.rest)})
        info = member(shown, "model_info", dict)
        length = info.get(f"{info.get('general.architecture')}.context_length")
        self.send_json(200, to_openai_model({
            **shown, "name": self.rest, **({"context_length": length} if length else {})}))

    # --- shape and observe ---

    def hook(self, name: str, *arguments: Any) -> Any:
        """What a hook returns. An OSError, an exit or an endless recursion in it is its own fault,
        and must not pass for one of the client; but PermissionError("text"), without an errno, is
        its refusal."""
        try:
            return self.server.hooks[name](*arguments)
        except (OSError, SystemExit, RecursionError) as error:
            if isinstance(error, PermissionError) and error.errno is None:
                raise ProxyError(401, str(error) or "not allowed", code="invalid_api_key",
                                 headers=[("WWW-Authenticate", "Bearer")]) from None
            raise RuntimeError(f"the hook {name} failed") from error

    def shape(self, body: Json) -> Json:
        """What the client sent, as the hook, the aliases and the defaults will have it. Answers
        and the log go by the name of the model that the client used."""
        self.model_name = body.get("model")
        if isinstance(self.model_name, str):
            if len(self.model_name) > MAX_MODEL_NAME:
                raise ProxyError(400, "'model' is too long", "model")
            self.record["model"] = self.model_name[:MAX_NAME]
        if "shape" in self.server.hooks:
            changed = self.hook("shape", self.record["route"], body, self.record["caller"])
            body = body if changed is None else changed
        config = self.server.config
        model, options = body.get("model"), body.get("options") or {}
        if isinstance(model, str) and model in self.server.aliases:
            body = {**body, "model": self.server.aliases[model]}
        if self.record["route"] in TAKE_OPTIONS and isinstance(options, dict):
            if config.option:
                body = {**body, "options": {**dict(config.option), **options}}
            if config.keep_alive is not None and body.get("keep_alive") is None:
                body = {**body, "keep_alive": config.keep_alive}
        return body

    def shape_native(self) -> bytes:
        """The body of a route that is passed through: the same bytes, unless it is to be changed.
        Audio and blobs are not looked into; the hook sees {} and may refuse them."""
        if self.record["route"] in ("/v1/audio/transcriptions", "/api/blobs/*") or not self.body:
            self.shape({})
            return self.body
        config = self.server.config
        shaped = (config.alias or config.option or config.keep_alive is not None
                  or "shape" in self.server.hooks)
        try:
            body = parse_object(self.body, CLIENT_JSON)
        except ValueError as error:
            if shaped:
                raise ProxyError(400, f"the body must be a JSON object: {error}") from None
            return self.body
        if not shaped:
            self.shape(body)  # for the log
            return self.body
        for name in body:  # Ollama takes "Model" for "model", and would so past the hook's eyes
            if not re.fullmatch("[a-z0-9_]+", name):
                raise ProxyError(400, f"the name {name[:60]!r} is not in small letters", name[:60])
        before, after = to_bytes(body), to_bytes(self.shape(body))
        return self.body if after == before else after

    def elapsed(self) -> float:
        """Seconds since the request began."""
        return round(time.monotonic() - self.started, 4)

    def observe(self) -> None:
        """The request has ended: a line in the log, numbers in the metrics, a call of the hook."""
        record = self.record
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record["seconds"] = self.elapsed()
        record["client"] = self.client_address[0]
        ignored = (record["ignored"] or [])[:MAX_IGNORED_NAMES]
        record["ignored"] = [name[:MAX_NAME] for name in ignored]
        record["status"] = record["status"] or 499  # nginx's number for a client that did not wait
        rest = record["seconds"] - (record["first_token_seconds"] or 0)
        if record["completion_tokens"] and rest > 0:
            record["tokens_per_second"] = round(record["completion_tokens"] / rest, 1)
        self.server.metrics.record(record)
        say(ascii_json(record) if self.server.config.log == "json" else log_line(record))
        if "observe" in self.server.hooks:
            try:
                self.hook("observe", dict(record))
            except Exception:  # noqa: BLE001  a stranger's code, after the answer: log it and go on
                say(traceback.format_exc())

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Called with the status line; the line for the log comes at the end."""
        self.record["status"] = int(code)

    # --- helpers ---

    def base_url(self) -> str:
        """What an SDK is to be given, by the name that this client knows us by."""
        own = urllib.parse.urlsplit(self.server.url)
        return f"{own.scheme}://{self.headers.get('Host', own.netloc)}/v1"

    def send_text(self, text: str, content_type: str = "text/plain; charset=utf-8",
                  headers: Iterable[tuple[str, str]] = ()) -> None:
        """A whole answer of text."""
        body = text.encode("utf-8", "backslashreplace")
        self.start(200, content_type, len(body), headers)
        self.write(body)

    def start_events(self, ignored: list[str] | tuple[()] = ()) -> EventStream:
        """From now on the answer is an SSE stream, with heartbeats."""
        self.events = EventStream(self, ignored)
        self.watch.beat = self.events.beat
        return self.events

    def finish_events(self) -> None:
        """The end of a stream, whose last frame is there."""
        assert self.events
        self.events.flush()
        self.record["end"] = self.record["end"] or "done"  # a client may leave: it has everything
        self.finish_body()

    def fail(self, error: ProxyError) -> None:
        """Say what went wrong in the one way that is still open: a status, a frame, or a cut."""
        self.record["error"] = error.code or f"status_{error.status}"
        self.record["end"] = "upstream cut" if error.code == "upstream_cut" else "error"
        try:
            if self.events:  # what came before the error was good
                self.events.flush()
            if not self.head_sent:
                super().fail(error)
            elif self.events:
                self.events.add(sse_event(error.body()))
                self.events.flush()
                self.finish_body()
            else:  # a body in Ollama's own format: only a missing end tells that it is not whole
                self.close_connection = True
        except OSError:
            self.close_connection = True  # the client is gone

    def linger(self) -> None:
        """After a refusal read on for a moment: closing a socket that has unread bytes resets the
        connection, and the client would see that instead of our refusal."""
        if self.close_connection and self.record["end"] == "error":
            with contextlib.suppress(OSError):  # the client is gone already
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(LINGER_SECONDS)
                deadline = time.monotonic() + LINGER_SECONDS
                while time.monotonic() < deadline and self.connection.recv(READ_BYTES):
                    pass

    def version_string(self) -> str:
        """The Server header, without the version of Python."""
        return f"ndjson_sse_proxy/{__version__}"

    def end_headers(self) -> None:
        """Every answer has an id to find it by in the log, and says whether a page may read it.
        None but the page is one: what an upstream says is HTML shall not run as ours."""
        self.send_header("X-Request-Id", self.record["id"])
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.record["route"] != "/":
            self.send_header("Content-Security-Policy", "default-src 'none'; sandbox")
        if self.origin:
            self.send_header("Access-Control-Allow-Origin", self.origin)
            self.send_header("Access-Control-Expose-Headers",
                             "x-request-id, retry-after, x-ignored-fields")
            self.send_header("Vary", "Origin")
        super().end_headers()


CORS_HEADERS = (
    "authorization", "content-type", "accept", "user-agent", "x-api-key", "anthropic-version",
    "anthropic-beta", "openai-organization", "openai-project", *(f"x-stainless-{name}" for name in (
        "arch", "helper-method", "lang", "os", "package-version", "retry-count", "runtime",
        "runtime-version", "timeout")))
TAIL_BYTES = 4096  # of a passed-through answer; the counts of tokens are at its end
TOKEN_COUNTS = {
    "prompt_tokens": re.compile(rb'"(?:prompt_eval_count|input_tokens|prompt_tokens)": ?(\d{1,9})'),
    "completion_tokens": re.compile(
        rb'"(?:eval_count|output_tokens|completion_tokens)": ?(\d{1,9})')}
TAKE_OPTIONS = ("/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate",
                "/api/embed", "/api/embeddings")
PASSED_HEADERS = (
    "Content-Type", "Content-Encoding", "Accept", "anthropic-version", "anthropic-beta")

# Path, method, what serves it; None: it would change what Ollama has. Whatever is not here is a
# 404 and never forwarded.
ROUTES: dict[str, dict[str, Callable[[ProxyHandler], None] | None]] = {
    "/": {"GET": ProxyHandler.root},
    "/healthz": {"GET": ProxyHandler.healthz},
    "/readyz": {"GET": ProxyHandler.readyz},
    "/metrics": {"GET": ProxyHandler.metrics},
    "/v1/chat/completions": {"POST": ProxyHandler.chat},
    "/v1/completions": {"POST": ProxyHandler.completions},
    "/v1/models": {"GET": ProxyHandler.models},
    "/v1/models/*": {"GET": ProxyHandler.model},
    "/v1/embeddings": {"POST": ProxyHandler.embeddings},
    **{path: {"POST": ProxyHandler.passthrough} for path in (
        "/v1/responses", "/v1/messages", "/v1/audio/transcriptions", "/api/chat", "/api/generate",
        "/api/embed", "/api/embeddings", "/api/show")},
    **{path: {"GET": ProxyHandler.passthrough} for path in (
        "/api/tags", "/api/ps", "/api/version", "/api/status")},
    **{path: {"POST": None} for path in (
        "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/me", "/api/signout",
        "/api/experimental/*")},
    "/api/delete": {"DELETE": None},
    "/api/blobs/*": {"POST": None, "HEAD": None},
}


def match_route(path: str) -> tuple[str, str]:
    """The row of ROUTES for a path, or "none", and what its * stands for.

    A path is decoded once and must then be the row's, to the letter. A * is one plain name, so
    that no dots or slashes get up to Ollama; but the id of a model, which goes up in a body, may
    be anything.
    """
    decoded, coded_slash = urllib.parse.unquote(path), "%2f" in path.lower()
    for key in ROUTES:
        rest = decoded[len(key) - 1:] if key.endswith("/*") and decoded.startswith(key[:-1]) else ""
        if key == "/v1/models/*" and rest:
            return key, rest
        if not coded_slash and (decoded == key or re.fullmatch(r"[\w:-]+", rest, re.ASCII)):
            return key, rest
    return "none", ""


def at_most(limit: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same pieces. Raises ProxyError 502 if they are too many bytes to be kept."""
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise broken_upstream("an answer too long to be kept whole; stream it")
        yield piece


def ignored_header(names: list[str] | tuple[()]) -> list[tuple[str, str]]:
    """X-Ignored-Fields: the client's own words, made safe for a header."""
    shown = [urllib.parse.quote(name[:60], "[]", errors="backslashreplace")[:100]
             for name in names[:MAX_IGNORED_NAMES]]
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
    tls: ssl.SSLContext | None = None
    connections = 0  # open now, those between two requests included
    connection_limit = 1 << 30  # beyond it they are closed as soon as they come
    reuse_port = False
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def __init__(self, host: str, port: int, handler: type[JsonHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        super().__init__((host, port), handler)
        host = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if self.tls else 'http'}://{host}:{self.server_port}"

    def get_request(self) -> tuple[Any, Any]:
        """A new connection; its TLS handshake waits for the connection's own thread."""
        try:
            connection, address = super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.pause(error)
            raise  # to the base class, which goes on
        if self.tls:
            connection = self.tls.wrap_socket(connection, True, do_handshake_on_connect=False)
        with self._lock:
            self.connections += 1
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection, however it comes about."""
        if isinstance(request, ssl.SSLSocket):  # TLS has a goodbye of its own
            with contextlib.suppress(OSError, ValueError):  # it is not waited for
                request.settimeout(0)
                request.unwrap()
        super().shutdown_request(request)
        with self._lock:
            self.connections -= 1

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Is there to be a thread for it?"""
        return self.connections <= self.connection_limit

    def pause(self, error: Exception) -> None:
        """Wait: the next try now would fail, too, and the one after, as fast as they can."""
        say(f"warning: no new connections for a moment: {error}")
        time.sleep(PAUSE_SECONDS)

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of its own name, which hangs on a box without a DNS."""
        if self.reuse_port:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no event; anything else is ours and must be seen."""
        error = sys.exc_info()[1]
        if isinstance(error, ssl.SSLError):
            say(f"warning: no TLS with {client_address[0]}: {error}")
        elif isinstance(error, RuntimeError) and "start new thread" in str(error):
            self.pause(error)
        elif not isinstance(error, OSError):
            super().handle_error(request, client_address)


class ProxyServer(Server):
    """The proxy; it listens as soon as it is made."""

    def __init__(self, config: Config, upstream_key: str = "") -> None:
        self.config = config
        self.via = "ndjson_sse_proxy-" + os.urandom(6).hex()  # to know our own requests by
        self.upstream = Upstream(config, self.via, upstream_key)
        self.keys, self.hooks = Keys(config.api_key, config.api_key_file), load_hooks(config.hooks)
        self.aliases, self.metrics = dict(config.alias), Metrics()
        self.watchdog, self.draining = Watchdog(config.idle_timeout), False
        self.connection_limit = config.max_connections + MAX_EXTRA
        self.reuse_port = config.reuse_port
        host, guarded = str(config.listen.hostname), bool(self.keys) or "authenticate" in self.hooks
        if not guarded and not config.insecure and not is_loopback(host):
            raise ValueError(f"anybody who reaches {host} could use your Ollama; ask for keys with "
                             "--api-key-file FILE, or let everybody in with --insecure")
        if config.allow_admin and not guarded:
            raise ValueError("--allow-admin needs keys (--api-key-file FILE)")
        if config.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("--reuse-port: this system has no such thing")
        if config.tls_cert or config.tls_key:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.minimum_version = ssl.TLSVersion.TLSv1_2
            try:
                self.tls.load_cert_chain(config.tls_cert, config.tls_key or None)
            except OSError as error:
                key = f" --tls-key {config.tls_key}" if config.tls_key else ""
                raise ValueError(f"--tls-cert {config.tls_cert}{key}: {error}") from None
        super().__init__(host, config.listen.port or 0, ProxyHandler)
        self.watchdog.start()

    def drain(self, impatient: Callable[[], bool] = lambda: False) -> bool:
        """Stop accepting, and wait until the requests that are under way have ended, or time is up,
        or somebody is impatient. Were all answers whole?"""
        self.draining = True
        self.shutdown()
        self.server_close()
        self._wait_for_requests(self.config.drain_timeout, impatient)
        whole = not self.watchdog
        self.watchdog.end_all(ProxyError(503, "the proxy was stopped before the answer was whole",
                                         code="proxy_stopped"))
        self._wait_for_requests(LINGER_SECONDS, lambda: False)  # which are saying so
        self.watchdog.stop()
        return whole

    def _wait_for_requests(self, seconds: float, impatient: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while self.watchdog and not impatient() and time.monotonic() < deadline:
            time.sleep(0.02)


def is_loopback(host: str) -> bool:
    """Can only this machine reach a server that listens there?"""
    return all(ipaddress.ip_address(str(found[4][0]).partition("%")[0]).is_loopback
               for found in socket.getaddrinfo(host, None))


# ---- 11. Demo: a scripted Ollama, spoken to over a real socket like any other ------------------
# For a first look without an Ollama, and for the clients in CI: each model shows one thing.


def words(text: str, key: str = "content") -> list[Json]:
    """A text as the messages of a stream, one word each.

    >>> words("Hello there")
    [{'content': 'Hello'}, {'content': ' there'}]
    """
    return [{key: word} for word in re.findall(r"\s*\S+", text)]


def sample(schema: Any, root: Any) -> Any:
    """A value that fits a JSON schema, as a model under `format` would write one.

    >>> sample({"type": "object", "properties": {"n": {"enum": [3]}, "s": {"type": "string"}}}, {})
    {'n': 3, 's': 'text'}
    """
    if "$ref" in schema:
        found: Any = root
        for step in schema["$ref"].split("/")[1:]:
            found = found[step]
        return sample(found, root)
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return sample(schema[name][0], root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    values: Json = {
        "string": "text", "integer": 1, "number": 1.5, "boolean": True, "null": None,
        "array": [sample(schema["items"], root)] if "items" in schema else []}
    kind = schema.get("type")
    return values.get(kind[0] if isinstance(kind, list) else str(kind), {
        name: sample(value, root) for name, value in schema.get("properties", {}).items()})


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
        """/api/tags, /api/ps and /api/version."""
        answers: dict[str, Json] = {"/api/ps": {"models": []}, "/api/version": {
            "version": "0.0.0-demo"}, "/api/tags": {
            "models": [{"name": name, "model": name, "modified_at": "2026-01-01T00:00:00Z",
                        "description": text} for name, (text, _) in DEMO_MODELS.items()]}}
        known = self.path in answers
        self.send_json(200 if known else 404, answers.get(self.path, {"error": "not in the demo"}))

    def do_POST(self) -> None:
        """/api/chat, /api/generate and /api/show."""
        try:
            body = parse_object(self.read_body())
        except ValueError as error:
            return self.send_json(400, {"error": str(error)})
        name, messages = str(body.get("model")), body.get("messages") or [{}]
        if self.path not in ("/api/chat", "/api/generate", "/api/show"):
            return self.send_json(404, {"error": f"{self.path} is not in the demo"})
        if name not in DEMO_MODELS:
            return self.send_json(404, {"error": f"model '{name}' not found"})
        if self.path == "/api/show":
            return self.send_json(200, {"modified_at": "2026-01-01T00:00:00Z", "details": {}})
        try:
            script = self.script(name, messages, body)
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            return self.send_json(400, {"error": f"too odd for the demo: {error!r}"})
        limit = (body.get("options") or {}).get("num_predict")
        said = script[:limit] if isinstance(limit, int) and limit > 0 else script
        self.start(200, "application/x-ndjson")
        for message in said:
            self.say(name, message)
            if "error" in message:
                return self.finish_body()
            time.sleep(self.server.pace)
        self.say(name, {}, done=True, done_reason="stop" if said == script else "length",
                 prompt_eval_count=9, eval_count=len(said))
        return self.finish_body()

    def script(self, name: str, messages: list[Json], body: Json) -> list[Json]:
        """What the model says; a schema, a tool, or a tool's result changes that."""
        schema, tools = body.get("format"), body.get("tools")
        if schema and name != "demo-error":
            return words(to_json(sample({} if schema == "json" else schema, schema)))
        if name == "demo-tool" and messages[-1].get("role") == "tool":
            return words(f"The tool said: {messages[-1]['content']}")
        if name == "demo-tool" and tools:
            function = tools[0]["function"]
            arguments = sample(function.get("parameters") or {}, function.get("parameters"))
            return [{"tool_calls": [{"function": {
                "index": 0, "name": function["name"], "arguments": arguments}}]}]
        return DEMO_MODELS[name][1]

    def say(self, name: str, message: Json, **more: Any) -> None:
        """One record, in the form of the route that was asked."""
        said: Json = {"message": {"role": "assistant", "content": "", **message}}
        if self.path == "/api/generate":
            said = {"response": message.get("content", "")}
        head = {"model": name, "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        record = message if "error" in message else {**head, **said, "done": False, **more}
        self.write(to_bytes(record) + b"\n")


class DemoOllama(Server):
    """The scripted Ollama, on a free port of the loopback address, in a thread of its own."""

    def __init__(self, pace: float = 0.03) -> None:
        self.pace = pace  # seconds between two records: slow enough to see the stream
        super().__init__("127.0.0.1", 0, DemoHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


# ---- 12. The page: what a browser gets at / ----------------------------------------------------
# It asks for a trace (?trace=1), in which each line of Ollama's stands, as a comment, before the
# frames that it became, and shows the two side by side. receive() is an SSE parser to read.

PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>ndjson_sse_proxy</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
* { color-scheme: light dark; box-sizing: border-box; margin: 0; overflow-wrap: anywhere }
body { max-width: 100rem; margin: auto; padding: 1rem; font: 15px/1.5 system-ui, sans-serif;
  background: light-dark(#f4f5f7, #14171a); color: light-dark(#1c2126, #e4e7ea) }
form, div { display: flex; flex-wrap: wrap; gap: .7rem; margin: .7rem 0 }
label, div > section { flex: 1 1 18rem; min-width: 0 } label:has(textarea) { flex-basis: 100% }
input, select, textarea { display: block; width: 100% } h1, h2 { font-size: 16px }
input, select, textarea, button, section { padding: .4rem .8rem; font: inherit; font-size: 15px;
  background: light-dark(#fff, #1d2125); border: 1px solid #8886; border-radius: 6px }
label, summary, time, small, code::after { color: light-dark(#5a6570, #9aa4ae); font-size: 13px }
#send { color: light-dark(#fff, #14171a); background: light-dark(#0b62a8, #7cc0f8) }
#error { color: light-dark(#a8200d, #ff9a8a); border-left: 3px solid; padding-left: .7rem }
#error:empty, #code:placeholder-shown, details:has(:empty) { display: none }
ol { position: relative; overflow: auto; max-height: 23rem; min-height: min(23rem, 30vw);
  list-style: none; padding: 0 }
li { padding: .3rem; content-visibility: auto; contain-intrinsic-size: auto 4rem }
.lit { background: light-dark(#fff0b3, #4d4314) } time, code { display: block }
code, #code { font: 12.5px/1.45 monospace; word-break: break-all } p, code { white-space: pre-wrap }
#lines code::after { content: "\\n" } #frames code::after { content: "\\n\\n" }
</style>
<h1>ndjson_sse_proxy</h1><small>Ollama's NDJSON in, the SSE that OpenAI clients read out</small>
<form><label>Model <select id="model"></select></label>
  <label>API key, if any (this tab only) <input id="key" type="password" autocomplete="off"></label>
  <label>Prompt <textarea id="prompt" rows="2">Why does a blank line end a frame?</textarea></label>
  <button id="send" title="Ctrl+Enter">Send</button> <button>Stop</button>
  <button>Copy as curl</button> <button>Copy as Python</button> <button>Copy as JavaScript</button>
</form><textarea id="code" rows="6" readonly placeholder=" " aria-label="Code to copy"></textarea>
<p id="error" role="alert"></p><p id="status" role="status"></p>
<div><section><h2>What went up</h2><ol id="up"></ol></section>
  <section><h2>Ollama's lines: NDJSON</h2><ol id="lines"></ol></section>
  <section><h2>The frames they became: SSE</h2><ol id="frames"></ol></section></div>
<section><h2>As a chat shows it</h2><details><summary>Thinking</summary><p id="thought"></p>
  </details><p id="text"></p><code id="calls"></code></section>
<template id="row"><li><time></time><code></code></li></template>
<script>
const $ = (id) => document.getElementById(id), q = JSON.stringify;
const base = new URL("v1", location).href, key = () => $("key").value || "none";
const question = () => ({model: $("model").value, stream: true,
  messages: [{role: "user", content: $("prompt").value}]});
const say = (text, error = "") => [$("status").textContent, $("error").textContent] = [text, error];
const follow = () => document.querySelector("ol:hover, ol:focus-within")  // is somebody reading?
  || document.querySelectorAll("ol").forEach((list) => list.scrollTop = list.scrollHeight);
const seconds = () => (performance.now() - run.start) / 1000;
let run;  // the stream under way, or the last one
async function ask(path, options) {  // throws what the proxy said, if it said no
  const headers = {"Content-Type": "application/json", Authorization: `Bearer ${key()}`};
  const response = await fetch(base + path, {...options, headers});
  if (response.ok) return response;
  const {error} = await response.json().catch(() => ({}));
  throw Error(`${response.status}: ${error?.message ?? response.statusText}`);
}
async function send() {
  run?.stopper.abort();
  const own = run = {start: performance.now(), no: 0, stopper: new AbortController()};
  const body = q({...question(), stream_options: {include_usage: true}});
  for (const id of ["thought", "text", "calls", "up", "lines", "frames"]) $(id).textContent = "";
  say("Waiting for the first token");
  addRow("up", "this page to the proxy", `POST /v1/chat/completions?trace=1 ${body}`);
  try {
    const options = {method: "POST", body, signal: run.stopper.signal};
    const response = await ask("/chat/completions?trace=1", options);
    const reader = response.body.getReader(), decoder = new TextDecoder();
    // Bytes come cut anywhere: what follows the last blank line waits in `rest` for its own. If
    // that never comes, it was cut off and is no block. (Lines may end in \r\n, but not here.)
    for (let rest = "", read; !(read = await reader.read()).done;) {
      const blocks = (rest + decoder.decode(read.value, {stream: true})).split("\n\n");
      rest = blocks.pop();
      blocks.forEach(receive), follow();
    }
    if (!run.whole) throw Error("The stream ended without [DONE]: this may not be all of it.");
    const {first = seconds(), completion_tokens: n, reason} = run, rate = n / (seconds() - first);
    say(`Done (${reason}): first token ${first.toFixed(3)} s, ${n} at ${rate.toFixed(1)} tokens/s`);
  } catch ({name, message}) {
    if (run === own) say(...name === "AbortError" ? ["Stopped"] : ["Failed", message]), follow();
  }
}
// A block is a frame ("data: ...") or, with ?trace=1, a comment (": ..."), which SDKs skip: the
// request as it went up, and each line of NDJSON right before the frames that it became.
function receive(block) {
  const text = block.split("\n").map((line) => line.replace(/^(data)?: ?/, "")).join("\n");
  if (block.startsWith(": POST ")) return addRow("up", "the proxy to Ollama", text);
  if (block[0] === ":") return addRow("lines", `line ${++run.no}`, run.line = text, run.group = []);
  const chunk = text === "[DONE]" ? {whole: true} : JSON.parse(text), {error, usage} = chunk;
  const {delta = {}, finish_reason: reason} = chunk.choices?.[0] ?? {};
  // The proxy's own are heartbeats (empty deltas), usage, [DONE], and errors that no line told.
  const group = (error ? /^{"error"/.test(run.line) : reason || q(delta) !== "{}") && run.group;
  addRow("frames", group ? `from line ${run.no}` : "the proxy's own", block, group);
  if (error) throw Error(error.message);
  if (delta.content || delta.reasoning || delta.tool_calls) run.first ??= seconds();
  $("thought").append(delta.reasoning ?? ""); $("text").append(delta.content ?? "");
  for (const {function: call} of delta.tool_calls ?? [])
    $("calls").append(`${call.name}(${call.arguments})\n`);
  Object.assign(run, usage, reason && {reason}, {whole: chunk.whole});
}
function addRow(id, label, text, group) {  // a group is a line and its frames
  const list = $(id), row = $("row").content.firstChild.cloneNode(true);
  const envelope = list.firstChild ? /"(id|model)":.*?,(?="(choices|message)":)/ : /$^/;
  row.firstChild.textContent = `${seconds().toFixed(3)} s, ${label}`;
  row.lastChild.textContent = text.replace(envelope, "…");  // focus shows all; so does the first
  row.tabIndex = list.firstChild ? -1 : 0;  // Tab stops once in a list; from there arrow keys
  row.onmousemove = (e) => { if (e.movementX || e.movementY) light(row) };  // not if rows move
  row.onfocus = () => { light(row); row.lastChild.textContent = text };
  row.onkeydown = ({key}) =>
    ({ArrowDown: row.nextSibling, ArrowUp: row.previousSibling})[key]?.focus();
  (row.group = group || []).push(row);
  list.append(row);
}
function light(row) {
  for (const other of document.querySelectorAll(".lit")) other.classList.remove("lit");
  for (const one of row.group) {
    one.classList.add("lit");
    if (one.parentNode !== row.parentNode) one.parentNode.scrollTop = one.offsetTop - 150;
  }
}
function copy(kind) {  // a string in JSON is one in Python and in JavaScript, too
  const {model, messages} = question(), shell = (s) => `'${s.replaceAll("'", "'\\''")}'`;
  $("code").value = {curl: `curl -sSN ${shell(base + "/chat/completions")} -H ${
    shell("Authorization: Bearer " + key())} -d ${shell(q(question()))}`,
  Python: `from openai import OpenAI  # pip install openai
client = OpenAI(base_url=${q(base)}, api_key=${q(key())})
for chunk in client.chat.completions.create(
        model=${q(model)}, messages=${q(messages)}, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)`,
  JavaScript: `import OpenAI from "openai";  // npm install openai; save this as chat.mjs
const client = new OpenAI({baseURL: ${q(base)}, apiKey: ${q(key())}});
for await (const chunk of await client.chat.completions.create(${q(question())}))
  process.stdout.write(chunk.choices[0].delta.content ?? "");`}[kind] + "\n";
  $("code").select();  // navigator.clipboard is for HTTPS only
  say(document.execCommand("copy") ? "Copied" : "Ctrl+C copies the code");
}
async function showModels() {
  try {
    const {data} = await (await ask("/models")).json();
    const option = ({id, description: text}) => new Option(text ? `${id}: ${text}` : id, id);
    $("model").replaceChildren(...data.map(option));
    say(data.length ? "Ready" : "Ollama has no model yet; where it runs: ollama pull NAME");
  } catch ({message}) { say("No list of models", message) }
}
$("prompt").onkeydown = (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) send() };
document.forms[0].onsubmit = ({submitter: {textContent: name}}) => {
  ({Send: send, Stop: () => run?.stopper.abort()}[name] ?? copy)(name.split(" ").pop());
  return false;  // stay on this page
};
$("key").value = sessionStorage.apiKey ?? "";
$("key").onchange = () => { sessionStorage.apiKey = $("key").value; showModels() };
showModels();
</script>
"""


def hash_of(tag: str) -> str:
    """What the Content-Security-Policy calls the page's own <script> or <style>."""
    inside = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


PAGE_HEADERS = [  # nothing but what is in the page runs, and it talks with nobody but the proxy
    ("Content-Security-Policy", "; ".join([
        "default-src 'none'", "script-src " + hash_of("script"), "style-src " + hash_of("style"),
        "img-src data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'", "require-trusted-types-for 'script'", "trusted-types 'none'"])),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"), ("Vary", "Accept")]


# ---- 13. Run: command line, signals ------------------------------------------------------------
# FLAGS is the specification, from which flags, environment and --help are made. A signal only
# leaves a note; the main thread finds it, stops accepting and lets running answers end.


def parse_url(text: str, port: int = 11434) -> urllib.parse.SplitResult:
    """HOST, HOST:PORT or a URL, read as Ollama reads $OLLAMA_HOST; `port` is the default one.

    >>> parse_url("192.0.2.7").geturl(), parse_url("https://box/ollama").geturl()
    ('http://192.0.2.7:11434', 'https://box:443/ollama')
    """
    match = re.fullmatch(
        r"(?:(https?)://)?(\[[0-9a-f:.]+\]|[\w.-]*)(?::(\d{1,5}))?(/[!\"$->@-~]*)?",
        text.strip(), re.ASCII | re.IGNORECASE)
    if not match or int(match[3] or 0) > 65535:
        raise ValueError(f"{text!r} is neither HOST:PORT nor http://HOST:PORT")
    scheme, host, own_port, path = match.groups("")
    if path.rstrip("/").endswith("/v1"):
        raise ValueError(f"{text!r} should be without /v1: the native API is used")
    if scheme:
        port = 443 if scheme.lower() == "https" else 80
    return urllib.parse.urlsplit(
        f"{scheme or 'http'}://{host or '127.0.0.1'}:{own_port or port}{path.rstrip('/')}")


def parse_listen(text: str) -> urllib.parse.SplitResult:
    """HOST:PORT, or either of them, to listen on."""
    if "/" in text:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return parse_url(":" + text if text.isdigit() else text, 11435)


def parse_option(text: str) -> tuple[str, Any]:
    """KEY=VALUE for one of Ollama's options, of its type.

    >>> parse_option("num_ctx=16384"), parse_option("stop=###")
    (('num_ctx', 16384), ('stop', ['###']))
    """
    name, _, value = text.partition("=")
    if name == "stop":
        return name, [value]
    try:
        return name, expect(PLAIN_JSON.decode(value), OPTIONS[name], name)
    except KeyError:
        raise ValueError(f"{name!r} is none of Ollama's options") from None
    except (ValueError, ProxyError):
        raise ValueError(f"{text!r}: {name} is of type {OPTIONS[name]}") from None


def matching(pattern: str, meaning: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader for texts that match a pattern."""
    def read(text: str) -> Any:
        if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
            raise ValueError(f"{text!r} is not {meaning}")
        return convert(text)
    return read


SWITCH = matching("1|true|yes|on|0|false|no|off", "1 or 0",
                  lambda text: text.lower() in ("1", "true", "yes", "on"))
NUMBER = r"\d{1,7}(\.\d{1,9})?"
SECONDS_OR_0 = matching(NUMBER, "a number of seconds", float)
COUNT = matching(r"0*[1-9]\d{0,11}", "a whole number above 0", int)
# Each field of Config: its reader (which raises ValueError), what its value is called, what it is
# for. This makes the flag --its-name, its twin in the environment NDJSON_SSE_PROXY_ITS_NAME, and
# their line in --help.
FLAGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "listen": (parse_listen, "HOST:PORT", "where clients connect; with port 0, any free one"),
    "upstream": (parse_url, "URL", "where Ollama is; without it $OLLAMA_HOST, if that is set"),
    "demo": (SWITCH, "", "answer from a scripted Ollama inside the process"),
    "api_key": (parse_key, "[NAME:]KEY", "who may call (the process list shows it)"),
    "api_key_file": (str, "FILE", "who may call, a line each; read anew if it changes"),
    "insecure": (SWITCH, "", "listen on other addresses than loopback without keys"),
    "allowed_host": (matching(r"[\w.-]+|[0-9a-f:]+", "a name or an address alone", str.lower),
                     "HOST", "a further name or address that clients may use for this server"),
    "cors_origin": (matching(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", "like https://chat.example", str),
                    "ORIGIN", "a site whose pages may call, besides localhost; *: any"),
    "allow_admin": (SWITCH, "", "let pull, push, create, copy and delete through"),
    "tls_cert": (str, "FILE", "serve HTTPS with this certificate (PEM)"),
    "tls_key": (str, "FILE", "its private key, if that is not in the same file"),
    "alias": (matching("[^=]+=.+", "NAME=MODEL", lambda text: tuple(text.split("=", 1))),
              "NAME=MODEL", "a further name for a model"),
    "option": (parse_option, "KEY=VALUE", "default for one of Ollama's options (num_ctx=16384)"),
    "keep_alive": (matching(r"-?\d{1,9}|-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+",
                            "a duration such as 300, 5m or 1h30m",
                            lambda text: text if text[-1].isalpha() else int(text)),
                   "DURATION", "default for how long models stay loaded"),
    "allow_truncation": (SWITCH, "", "let Ollama cut a prompt that does not fit, silently"),
    "hooks": (str, "FILE.py", "Python with authenticate(), shape() or observe()"),
    "log": (matching("text|json", "text or json", str.lower), "text|json", "form of the log"),
    "heartbeat": (SECONDS_OR_0, "SECONDS", "of silence after which a stream gets one; 0: never"),
    "idle_timeout": (matching(r"(?=.*[1-9])" + NUMBER, "a number of seconds above 0", float),
                     "SECONDS", "longest silence of Ollama, loading included"),
    "drain_timeout": (SECONDS_OR_0, "SECONDS", "how long streams may go on after a signal to stop"),
    "max_connections": (COUNT, "N", "open at once; more get a 503"),
    "max_body": (COUNT, "BYTES", "of a request; more is a 413"),
    "reuse_port": (SWITCH, "", "several processes on one port (Linux)"),
}


class CommandLine(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ndjson_sse_proxy: {message} (flags and their environment twins: --help)\n")


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
        kind: Json = {"metavar": metavar, "action": "append" if default == () else "store"}
        if reader is SWITCH:
            kind = {"action": "store_const", "const": "1"}
        if default:
            text += f" (default: {getattr(default, 'netloc', default)})"
        parser.add_argument("--" + name.replace("_", "-"), **kind,
                            help=text + "; repeatable" * (default == ()))
    values: Json = {}
    arguments, prefix = vars(parser.parse_args(argv)), "NDJSON_SSE_PROXY_"
    for variable in environ:
        if variable.startswith(prefix) and variable[len(prefix):] not in map(str.upper, FLAGS):
            parser.error(f"the environment's {variable} is none of the settings")
    for name, given in arguments.items():
        variable = prefix + name.upper()
        default, reader = Config._field_defaults[name], FLAGS[name][0]
        if name == "upstream" and not environ.get(variable):
            variable = "OLLAMA_HOST"
        twin = environ.get(variable, "")
        where = f"the environment's {variable}" if given is None else f"--{name.replace('_', '-')}"
        try:
            if given == "" or twin.isspace():  # a variable that was lost? not to be passed over
                raise ValueError("is empty")
            if default == ():  # a list of flags, or a twin with values between blanks
                values[name] = tuple(map(reader, given or twin.split()))
            elif given or twin:
                values[name] = reader(given or twin)
        except ValueError as error:
            parser.error(f"{where}: {error}")
    return Config(**values)


def say(text: str) -> None:
    """A line for whoever started the program; in one write, for threads."""
    # Nobody reads stderr any more; or it is None, for a program without a console: serve on.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def say_if_unreachable(upstream: Upstream) -> None:
    """Ask Ollama for its version, so that a wrong URL shows before the first client comes."""
    try:
        upstream.json(Watch(), "GET", "/api/version")
    except ProxyError as error:
        say(f"warning: {error.message}")


def allow_descriptors(count: int) -> None:
    """Let the process have so many, if it may: a stream takes two, systems give 256 to 1024."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count:
            most = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit status: 0 if no answer had to be cut."""
    config = read_config(argv, os.environ)
    if config.demo:
        config = config._replace(upstream=parse_url(DemoOllama().url))
    where, upstream_key = config.listen.netloc, os.environ.get("OLLAMA_API_KEY", "")
    try:
        if not re.fullmatch("[!-~]*", upstream_key):
            raise ValueError("$OLLAMA_API_KEY has characters that a header can't carry")
        if config.upstream.netloc == where:
            raise ValueError(f"it would ask itself on {where}; where is Ollama? --upstream URL")
        server = ProxyServer(config, upstream_key)
    except OSError as error:  # of a file, if it names one, else of the port
        what = error.filename or f"can't listen on {where} (another place: --listen HOST:PORT)"
        say(f"ndjson_sse_proxy: {what}: {error.strerror or error}")
        return 2
    except ValueError as error:
        say(f"ndjson_sse_proxy: {error}")
        return 2
    allow_descriptors(2 * (config.max_connections + MAX_EXTRA) + 50)
    return serve(server)


def serve(server: ProxyServer) -> int:
    """Serve until a signal comes; then let running requests end. A second signal ends them."""
    signals: list[int] = []  # no Event: its lock is not for a handler, which may run within it
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: signals.append(number))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = server.config
    say(f"ndjson_sse_proxy {__version__} listens on {server.url} (a page for browsers; base_url: "
        f"{server.url}/v1)")
    callers = ("whom the hook lets in" if "authenticate" in server.hooks else
               f"who has a key (of {len(server.keys)})" if server.keys else "anyone")
    upstream = "its own demo" if config.demo else config.upstream.geturl()
    hooks = ", ".join(server.hooks) or "none"
    say(f"and sends to {upstream}; who may call: {callers}; hooks: {hooks}")
    threading.Thread(target=say_if_unreachable, args=[server.upstream], daemon=True).start()
    while not signals:
        time.sleep(0.1)
    if server.watchdog:
        say(f"stopping in {config.drain_timeout:g} s or when all requests have ended (now "
            f"{len(server.watchdog)}); at once on another signal")
    whole = server.drain(lambda: len(signals) > 1)
    say("stopped" if whole else "stopped; answers were cut")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
