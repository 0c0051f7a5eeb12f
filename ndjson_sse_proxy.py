r"""ndjson_sse_proxy: Ollama's NDJSON in, OpenAI-style SSE out.

    python ndjson_sse_proxy.py            # in front of the Ollama on this machine
    python ndjson_sse_proxy.py --demo     # without Ollama: scripted answers

Ollama streams an answer as NDJSON: one JSON object per line, in a chunked HTTP body.

    {"model":"m","message":{"role":"assistant","content":"Hello"},"done":false}\n
    {"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}\n

OpenAI-style clients read server-sent events (SSE), whose deltas add up to the message:

    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{"role":"assistant","content":""},...}]}\n\n
    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{"content":"Hello"},...}]}\n\n
    data: {"id":"chatcmpl-1",...,"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n
    data: [DONE]\n\n

How a request flows:

    client --HTTP--> ProxyHandler -- authenticate -- shape -- to_ollama_chat --HTTP--> Ollama
    client <--SSE--- Reply <-- ChatStream <-- records <-- readline() <--------NDJSON-- Ollama
                       '-- PatientReader: waits, sends heartbeats, notices hang-ups --'

Each connection has one thread, the only one that writes to its client. A translated stream ends
with a finish_reason and `[DONE]`, or with an error frame. A cut answer never looks complete.

Read from the top, but skip section 2 at first. Section 4 ends with the whole idea, `raw_frames`;
the rest is for real clients. To watch the proxy work, open http://127.0.0.1:11435/ in a browser.

It stores nothing, limits no rates, and fetches nothing but Ollama's answers. It asks Ollama twice
only for a model that can't think, and adds to a prompt only to force a tool call.
"""
from __future__ import annotations

import argparse
import collections
import errno
import hashlib
import http.client
import http.server
import io
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
import stat
import struct
import sys
import threading
import time
import traceback
import urllib.parse
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPMessage, HTTPResponse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import NoReturn

    Json = dict[str, Any]
    Headers = Iterable[tuple[str, str]]
    Convert = Callable[[Any, str], Any]  # (value, its name in the request) -> Ollama's value
    Field = tuple[str, str, Convert | None]

__version__ = "0.2.0"

# ---- 1. Limits ----
# Every buffer has a limit and every wait an end, so no client can take it all.

MAX_LINE_BYTES = 4 << 20  # a tool call may carry a whole file
MAX_BODY_BYTES = 32 << 20  # a long chat with pictures, or a whole answer
MAX_HEAD_BYTES = 64 << 10  # browsers send a few KiB
MAX_HEADERS = 100  # the same limit as http.client's
MAX_IGNORED_NAMES = 20  # in a header; some clients read 8 KiB at most
MAX_NAME = 100  # of a model or field, in a header or the log
MAX_EXTRA = 64  # connections over the limit that get a 503
TAIL_BYTES = 4096  # searched for token counts, which come last
SLICE_BYTES = 64 << 10  # each has its own timeout, so slow readers survive
CONNECT_SECONDS = 10.0  # to connect to Ollama, which is near
CLIENT_SECONDS = 60.0  # to send a head, or to take a slice
BODY_SECONDS = 300.0  # to send a body: 32 MiB at 1 Mbit/s
DRAIN_SECONDS = 30.0  # for requests to end after a signal
LINGER_SECONDS = 1.0  # to read a refusal before the connection closes
YOUNG_SECONDS = 2.0  # a younger file may change without a new timestamp
TICK_SECONDS = 0.25  # between two looks at a client


# ---- 2. Errors ----
# An SDK decides by the status whether to retry, and shows `message` to a person.

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               429: "rate_limit_error"}


class ClientGone(Exception):
    """The client has hung up or stopped reading."""

class ProxyError(Exception):
    """A refusal or failure that the client is told about.

    `param` is the request field at fault, `code` a word for programs, `detail` for the log only."""
    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: Headers = (), detail: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.detail = headers, detail
        if type(status) is not int or not 400 <= status <= 599:  # a hook's mistake
            raise ValueError(f"a ProxyError has a status from 400 to 599, not {status!r}")

    def body(self) -> bytes:
        """Return OpenAI's error object in JSON."""
        general = "invalid_request_error" if self.status < 500 else "server_error"
        return to_bytes({"error": {"message": self.message, "param": self.param, "code": self.code,
                                   "type": ERROR_TYPES.get(self.status, general)}})


def broken_upstream(what: str) -> ProxyError:
    """Return the error for an Ollama that breaks its protocol, or isn't one."""
    return ProxyError(502, f"Ollama sent something unexpected: {what}", code="upstream_protocol")


def busy(what: str) -> ProxyError:
    """Return the error for too many clients. SDKs try again in a second."""
    return ProxyError(503, f"the proxy has no {what} left", None, "proxy_busy",
                      [("Retry-After", "1")])


def cut_upstream(what: str) -> ProxyError:
    """Return the error for an answer that ended before it was complete."""
    return ProxyError(502, f"Ollama's answer was cut off: {what}", code="upstream_cut")


OVERFLOW = 400, "messages", "context_length_exceeded"
# Ollama's error texts, and the status, param, code and message they become: SDKs retry a 500, so a
# client's mistake must be a 400. {0} is the first group, {schema} the field with the JSON schema.
UPSTREAM_ERRORS = [
    (r"request \((\d+) tokens\) exceeds the available context size \((\d+) tokens\)", *OVERFLOW,
     ("This model's maximum context length is {1} tokens, but your messages have {0} tokens. "
      "Shorten them{cure}")),
    ("input length exceeds the context length|prompt is longer than the context length", *OVERFLOW,
     "This model's maximum context length is exceeded by your messages. Shorten them{cure}"),
    (r"^model ['\"](.+?)['\"] not found", 404, "model", "model_not_found",
     "model '{0}' not found; run `ollama pull {0}` on the Ollama machine"),
    (r'^option "(.+?)" must be of type', 400, "options.{0}", None, "{text}"),
    (r"^invalid format: |(?i:unsupported \$ref|json schema|resolving ref|parse grammar)", 400,
     "{schema}", None, "Ollama can't use the schema in '{schema}': {text}"),
    (r"^invalid input type", 400, "input", None,
     "'input' must be text, not tokens (with LangChain: check_embedding_ctx_length=False)"),
]


def upstream_error(value: Any, status: int = 502, wanted: Json | None = None) -> ProxyError:
    """Return what Ollama said about a failure (text, JSON in text, or an object) as a ProxyError.

    `wanted` comes from to_ollama_chat(), for advice that fits the request."""
    with suppress(ValueError, AttributeError):  # until it is a text
        for _ in range(5):
            value = parse_object(value) if isinstance(value, str) else value
            value = value.get("error") or value.get("message") or value
    text = (value if isinstance(value, str) else to_json(value)).strip()[:2000]
    words = {"num_ctx": 0, "schema": "response_format", **(wanted or {}), "text": text}
    for pattern, new_status, param, code, message in UPSTREAM_ERRORS:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            found = match.groups()
            useless = len(found) > 1 and words["num_ctx"] > int(found[1])
            words["cure"] = ": the model can't use a larger num_ctx." if useless else (
                ", or set options.num_ctx in the request or --option num_ctx=N on the proxy.")
            message, param = (part.format(*found, **words) for part in (message, param))
            return ProxyError(new_status, message, param, code)
    return ProxyError(status, text or "Ollama failed without a reason", code="upstream_error")


# ---- 3. NDJSON in: lines to records ----
# Only the record with "done": true completes an answer: HTTP can end well even after a cut.


def parse_object(data: bytes | str) -> Json:
    """Parse JSON that must be an object. Raises ValueError for anything else."""
    try:
        value = json.loads(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(value, dict):
        return value
    raise ValueError("it is not an object")


def member(record: Any, name: str, kind: type, needed: bool = False) -> Any:
    """Return a member of an object from Ollama, or an empty one. Another type is a 502."""
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is kind:  # not isinstance(): True is an int in Python
        return value
    if value is None and isinstance(record, dict) and not needed:
        return kind()
    raise broken_upstream(f"no {kind.__name__} {name!r} in {to_bytes(record)[:60]!r}")


def records(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Json]]:
    r"""Turn lines into (line, record) pairs. Raises ProxyError 502 for a bad, long or cut line.

    >>> list(records([b'{"a":1}\r\n', b'\n', b'{"b":2}']))  # the last newline may be missing
    [(b'{"a":1}', {'a': 1}), (b'{"b":2}', {'b': 2})]
    """
    for line in lines:
        if len(line) > MAX_LINE_BYTES:
            raise broken_upstream(f"a line longer than {MAX_LINE_BYTES} bytes")
        text = line.strip()
        try:
            if text:
                yield text, parse_object(text)
        except ValueError:  # UnicodeDecodeError is one, too
            if not line.endswith(b"\n"):
                raise cut_upstream(f"it ended inside a line, {text[:60]!r}") from None
            raise broken_upstream(f"a line that is not a JSON object, {text[:60]!r}") from None


# ---- 4. SSE out: values to frames ----
# A frame is one or more `data:` lines and a blank line. JSON needs one: its newlines are \n.

JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
# JSON and SSE allow these, but httpx's iter_lines() and others split there.
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def to_json(value: Any) -> str:
    """Return compact JSON. Raises ProxyError 400 if that is impossible."""
    try:
        text = JSON_ENCODER.encode(value)
        return text if text.isascii() else text.translate(LINE_ENDS)
    except (RecursionError, ValueError):
        raise ProxyError(400, "the JSON is nested too deeply, or has NaN or Infinity") from None


def to_bytes(value: Any) -> bytes:
    r"""Return JSON in UTF-8. Half an emoji (a lone surrogate) stays \ud83d: UTF-8 has no form."""
    return to_json(value).encode("utf-8", "backslashreplace")


def sse_event(data: Any, field: bytes = b"data: ") -> bytes:
    r"""Return one frame: bytes as they are, anything else as JSON.

    >>> sse_event({"a": 1}), sse_event(b"two\nlines")
    (b'data: {"a":1}\n\n', b'data: two\ndata: lines\n\n')
    """
    lines = (data if isinstance(data, bytes) else to_bytes(data)).splitlines()
    return b"".join(b"%b%b\n" % (field, line) for line in lines) + b"\n"


sse_comment = partial(sse_event, field=b": ")  # for people: every client skips it

SSE_DONE = sse_event(b"[DONE]")  # HTTP marks the end, too, but many libraries hide that


def raw_frames(lines: Iterable[bytes]) -> Iterator[bytes]:
    r"""The whole idea: each NDJSON line becomes one frame, then comes [DONE].

    After an error line the stream just ends. (See `watched` for how a cut is noticed.)

    >>> list(raw_frames([b'{"done":false}\n', b'{"done":true}\n']))
    [b'data: {"done":false}\n\n', b'data: {"done":true}\n\n', b'data: [DONE]\n\n']
    """
    for line, record in records(lines):
        yield sse_event(line)
        if "error" in record:
            return
    yield SSE_DONE


# ---- 5. Stream: Ollama's records to OpenAI's chunks ----
# A chunk is an envelope, the same throughout a stream, around one choice.


def choice(delta: Json, finish_reason: str | None = None) -> Json:
    """Return a chunk's only choice."""
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


OPENING = choice({"role": "assistant", "content": ""})  # comes first, once


class ChatStream:
    """Turns records of POST /api/chat into the choices of chat.completion.chunk objects.

    >>> stream = ChatStream("m", "chatcmpl-1", 1700000000)
    >>> [choice["delta"] for choice in stream.feed({"message": {"content": "Hi"}})]
    [{'role': 'assistant', 'content': ''}, {'content': 'Hi'}]
    """
    def __init__(self, model: str, stream_id: str, created: int,
                 wanted: Json | None = None) -> None:  # see to_ollama_chat()
        self._wanted, self._opened, self.done = wanted or {}, False, False
        self.tokens = 0, 0  # of prompt and answer, once it is done
        self.envelope = {"id": stream_id, "object": "chat.completion.chunk", "created": created,
                         "model": model, "system_fingerprint": "fp_ollama"}
        # All but the ]} at its end, serialised only once.
        self._head = b"data: " + to_bytes({**self.envelope, "choices": []})[:-2]
        self._call_ids: set[str] = set()  # sent so far
        self._text: list[str] = []  # of a forced call, so far

    def feed(self, record: Json) -> list[Json]:
        """Return the choices for a record. Raises ProxyError for an error, or a malformed one."""
        if "error" in record:  # {"error": "the model runner has died"}
            raise upstream_error(record["error"], wanted=self._wanted)
        self.done = member(record, "done", bool)
        deltas = list(self._deltas(member(record, "message", dict, needed=not self.done)))
        reason = self._finish(record, deltas) if self.done else None
        choices = [] if self._opened else [OPENING]
        self._opened = True
        if record.get("logprobs"):
            tokens = [{"top_logprobs": member(token, "top_logprobs", list), "bytes": None, **token}
                      for token in member(record, "logprobs", list)]
            choices.append({**choice(deltas.pop(0) if deltas else {"content": ""}),
                            "logprobs": {"refusal": None, "content": tokens}})
        choices += map(choice, deltas)
        return choices + [choice({}, reason)] if reason else choices

    def heartbeat(self) -> bytes:
        """Return a frame for a silence: a chunk, as some clients fail on comments."""
        opened, self._opened = self._opened, True
        return self.frame(choice({}) if opened else OPENING)

    def frame(self, choice: Json) -> bytes:
        """Return the frame for one choice."""
        return b"%b%b]}\n\n" % (self._head, to_bytes(choice))

    def with_usage(self, choices: list[Json]) -> Json:
        """Return an object with these choices and the token counts."""
        usage = {"prompt_tokens": self.tokens[0], "completion_tokens": self.tokens[1],
                 "total_tokens": sum(self.tokens)}
        return {**self.envelope, "choices": choices, "usage": usage}

    def _deltas(self, message: Json) -> Iterator[Json]:
        """Yield a delta for each part of a message: many clients read only one part."""
        thinking, content = member(message, "thinking", str), member(message, "content", str)
        if thinking:  # some clients read the one name, some the other
            yield {"reasoning": thinking, "reasoning_content": thinking}
        if content and "forced" in self._wanted:
            self._text.append(content)
        elif content:
            yield {"content": content}
        for call in member(message, "tool_calls", list):
            function, call_id = member(call, "function", dict, needed=True), member(call, "id", str)
            if len(self._call_ids) < self._wanted.get("max_calls", 1 << 30):
                yield self._tool_call(function, call_id)

    def _tool_call(self, function: Json, call_id: str = "") -> Json:
        """Return a whole call. Ollama's may lack an id, or all say index 0."""
        name, index = member(function, "name", str, needed=True), len(self._call_ids)
        arguments = to_json(member(function, "arguments", dict))
        if not call_id or call_id in self._call_ids:
            call_id = f"call_{self.envelope['id']}_{index}"
        self._call_ids.add(call_id)
        return {"tool_calls": [{"index": index, "id": call_id, "type": "function",
                                "function": {"name": name, "arguments": arguments}}]}

    def _finish(self, record: Json, deltas: list[Json]) -> str:
        """Return the finish_reason; note the tokens; add a forced call."""
        # There is no prompt_eval_count if the whole prompt was cached.
        self.tokens = member(record, "prompt_eval_count", int), member(record, "eval_count", int)
        if not all(0 <= count < 10 ** 9 for count in self.tokens):
            raise broken_upstream(f"an odd token count in {to_bytes(record)[:60]!r}")
        text, reason = "".join(self._text), record.get("done_reason")
        if text.strip():  # `format` made the model write {"name": ..., "arguments": ...}
            try:
                deltas.append(self._tool_call(parse_object(text)))
            except ValueError:  # cut: it stays text
                deltas.append({"content": text})
                reason = "length"
        # Old versions give none; chats without messages give load or unload.
        return "length" if reason == "length" else "tool_calls" if self._call_ids else "stop"


def translate(lines: Iterable[bytes], stream: ChatStream) -> Iterator[Json]:
    """Turn lines into choices, until the record that says done."""
    for _, record in records(lines):
        yield from stream.feed(record)
        if stream.done:
            return
    raise cut_upstream('it ended before the record with "done": true')


def whole_answer(stream: ChatStream, choices: Iterable[Json]) -> Json:
    """Return the chat.completion that choices add up to."""
    parts: dict[str, list[Any]] = {}
    for part in choices:
        added = {**part["delta"], "logprobs": part.get("logprobs", {}).get("content", [])}
        for name, value in added.items():
            parts.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    logprobs, calls = parts.pop("logprobs"), parts.pop("tool_calls", [])
    message: Json = {name: "".join(texts) for name, texts in parts.items()}
    if calls:
        message.update(content=message["content"] or None, tool_calls=calls)
    whole: Json = {"index": 0, "message": message, "finish_reason": part["finish_reason"]}
    if logprobs:
        whole["logprobs"] = {"refusal": None, "content": logprobs}
    return {**stream.with_usage([whole]), "object": "chat.completion"}


# ---- 6. Request: OpenAI's body to Ollama's ----
# The tables are the specification. A later row wins over an earlier one with the same place.

JSON_TYPES: dict[str, Any] = {"any": object, "string": str, "integer": int, "number": (int, float),
                              "boolean": bool, "object": dict, "array": list}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "developer": "system"}
EFFORTS = {"none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high",
           "xhigh": "max", "max": "max"}  # Ollama has fewer steps
IMAGE_URL = re.compile("data:image/(?:png|jpe?g|webp|gif);base64,([A-Za-z0-9+/]+={0,2})")


def expect(value: Any, types: str, param: str) -> Any:
    """Return the value if it has one of the JSON types ("integer or string"), else raise a 400."""
    for name in types.split(" or "):  # True is an int, too
        if isinstance(value, JSON_TYPES[name]) and (
                not isinstance(value, bool) or name in ("boolean", "any")):
            return value
    raise ProxyError(400, f"'{param}' must be of type {types}", param)


def required(source: Json, name: str, types: str, where: str = "") -> Any:
    """Return a member that must be there. `where` is the object's place, such as "tools[0]."."""
    if source.get(name) in (None, ""):
        raise ProxyError(400, f"'{where}{name}' is missing or empty", where + name)
    return expect(source[name], types, where + name)


def each(items: list[Any], param: str) -> Iterator[tuple[str, Json]]:
    """Yield the objects of an array, each after its place: ("tools[0].", {...})."""
    for i, item in enumerate(items):
        yield f"{param}[{i}].", expect(item, "object", f"{param}[{i}]")


def one_of(choices: Json, value: Any, param: str) -> Any:
    """Look the value up; a 400 lists the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ProxyError(400, f"'{param}' must be one of: {', '.join(choices)}", param)
    return choices[value]


def refused(why: str, *harmless: Any) -> Field:
    """Return a row for a field that is a 400, unless it is empty, false or harmless."""
    def convert(value: Any, param: str) -> None:
        if value and value not in harmless:
            raise ProxyError(400, f"'{param}' is not supported: {why}", param)
    return "any", "", convert


HINT: Field = ("any", "", lambda value, param: None)  # has no effect on a local model


def to_format(value: Json, param: str) -> Any:
    """Turn response_format into Ollama's format: "" for text, "json", or a JSON schema."""
    kind = required(value, "type", "string", param + ".")
    native = one_of({"text": "", "json_object": "json", "json_schema": {}}, kind, param + ".type")
    if kind == "json_schema":
        wrapper = required(value, kind, "object", param + ".")
        native = required(wrapper, "schema", "object", f"{param}.{kind}.")
        if '"$ref":"#"' in to_json(native):
            native = move_schemas([native], {"$ref": "#/$defs/0"})
    return native


def to_function_name(tool: Json, where: str) -> str:
    """Return the name in {"type": "function", "function": {"name": ...}}."""
    one_of({"function": 1}, required(tool, "type", "string", where), where + "type")
    function = required(tool, "function", "object", where)
    if function.get("parameters") is not None:
        expect(function["parameters"], "object", where + "function.parameters")
    return str(required(function, "name", "string", where + "function."))


def to_content(content: Any, param: str) -> Json:
    """Turn a string or an array of parts into the text and images of one message."""
    texts, images = [content] if isinstance(content, str) else [], []
    for where, item in () if texts else each(content, param):
        kind = required(item, "type", "string", where)
        if kind in ("text", "refusal"):
            texts.append(expect(item.get(kind), "string", where + kind))
        elif kind == "image_url":
            url = required(item, kind, "object or string", where)
            if isinstance(url, dict):
                url = required(url, "url", "string", where + "image_url.")
            match = IMAGE_URL.fullmatch(url)
            if not match or len(match[1]) % 4:
                raise ProxyError(400, f"'{where}{kind}' must be a data: URL of a png, jpeg, webp "
                                 "or gif in base64; the proxy never fetches images", where + kind)
            images.append(match[1])
        else:
            raise ProxyError(400, f"'{where}type' must be text or image_url, not {kind[:40]}",
                             where + "type")
    return {"content": "".join(texts), **({"images": images} if images else {})}


def to_native_calls(calls: list[Any], param: str) -> list[Json]:
    """Convert tool calls: Ollama's arguments are an object, not a string."""
    native: list[Json] = []
    for where, call in each(calls, param):
        name = to_function_name({"type": "function", **call}, where)
        arguments = call["function"].get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_object(arguments)
            except ValueError:  # a model wrote them; Ollama refuses all but objects
                arguments = {}
        native.append({"id": expect(call.get("id"), "string", where + "id"), "function": {
            "index": len(native), "name": name,
            "arguments": expect(arguments, "object", where + "function.arguments")}})
    return native


MESSAGE_FIELDS: dict[str, Field] = {
    # OpenAI's name: JSON type, place in Ollama's object, conversion
    "role": ("string", "role", partial(one_of, ROLES)),
    "content": ("string or array", "*", to_content),
    **dict.fromkeys(("reasoning", "reasoning_content"), ("string", "thinking", None)),
    "tool_calls": ("array", "tool_calls", to_native_calls),
    "tool_call_id": ("string", "tool_call_id", None),
    "name": HINT,
    "function_call": refused("use tool_calls"),
}

# Ollama's options: members of `options`, or fields of their own (extra_body).
OPTIONS = {
    **dict.fromkeys(("num_predict", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread",
                     "repeat_last_n", "top_k", "min_p", "typical_p", "repeat_penalty", "use_mmap"),
                    "any"),
    **dict.fromkeys(("temperature", "top_p", "presence_penalty", "frequency_penalty"), "number"),
    "num_ctx": "integer", "seed": "integer", "stop": "string or array"}

CHAT_FIELDS: dict[str, Field] = {
    **{name: (types, name, None) for name, types in {
        "model": "string", "messages": "array", "tools": "array", "options": "object",
        "keep_alive": "string or number", "think": "boolean or string",
        "format": "string or object", "truncate": "boolean", "shift": "boolean",
        "logprobs": "boolean", "top_logprobs": "integer"}.items()},
    **{name: (types, f"options.{name}", None) for name, types in OPTIONS.items()},
    "max_tokens": ("integer", "options.num_predict", None),
    "max_completion_tokens": ("integer", "options.num_predict", None),
    "response_format": ("object", "format", to_format),
    # What the client wants of the answer; Ollama doesn't get these:
    "stream": ("boolean", "wanted.stream", None),
    "stream_options": ("object", "wanted.usage", lambda value, param: expect(
        value.get("include_usage") or False, "boolean", param + ".include_usage")),
    "reasoning": ("object", "wanted.effort", lambda value, param:
                  None if value.get("effort") is None else
                  one_of(EFFORTS, value["effort"], param + ".effort")),
    "reasoning_effort": ("string", "wanted.effort", partial(one_of, EFFORTS)),
    "tool_choice": ("string or object", "wanted.tool_choice", None),
    "parallel_tool_calls": ("boolean", "wanted.max_calls", lambda v, param: None if v else 1),
    **dict.fromkeys((
        "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "prediction", "verbosity", "service_tier"), HINT),
    "n": refused("Ollama gives one answer per request; send more requests", 1),
    **dict.fromkeys(("logit_bias", "store", "moderation", "web_search_options", "audio",
                     "modalities"), refused("neither the proxy nor Ollama can do it", ["text"])),
    **dict.fromkeys(("functions", "function_call"), refused("use tools and tool_choice")),
}


def map_fields(table: dict[str, Field], source: Json, target: Json, where: str = "") -> list[str]:
    """Put each field of `source` where its row says; return the names that have no row.

    A place is a name, `group.name`, or * for a conversion that returns several."""
    for name, (types, place, convert) in table.items():
        value = source.get(name)
        if value is not None:  # a null counts as not sent, as in OpenAI's API
            expect(value, types, where + name)
            value = convert(value, where + name) if convert else value
            group, _, key = place.rpartition(".")
            if place == "*":
                target.update(value)
            elif value is not None:
                (target[group] if group else target)[key] = value
    return [(where + name)[:MAX_NAME] for name, value in source.items()
            if name not in table and value is not None]


def to_native_messages(messages: list[Any], ignored: list[str]) -> list[Json]:
    """Convert messages one for one, in the same order."""
    native: list[Json] = []
    called: dict[str, str] = {}  # call's id -> its function
    for where, message in each(messages, "messages"):
        required(message, "role", "string", where)
        new: Json = {"content": ""}
        ignored += map_fields(MESSAGE_FIELDS, message, new, where)
        called.update({call["id"]: call["function"]["name"] for call in new.get("tool_calls", ())})
        name = called.get(new.get("tool_call_id", ""), message.get("name"))
        if new["role"] == "tool" and name:
            new["tool_name"] = expect(name, "string", where + "name")
        native.append(new)
    return native


def move_schemas(schemas: list[Any], whole: Json) -> Json:
    """Return `whole` with the schemas under $defs. References to their root ("#") move along:
    Ollama can't follow one to the root of all."""
    return {**whole, "$defs": {str(i): json.loads(to_json(schema).replace(
        '"$ref":"#', f'"$ref":"#/$defs/{i}')) for i, schema in enumerate(schemas)}}


def choose_tools(native: Json, mode: Any, wanted: Json) -> None:
    """Obey tool_choice: leave out the tools, or force a call of one or any of them.

    When forced, even a model without tools writes {"name", "arguments"}; ChatStream makes that a
    call."""
    tools = native.pop("tools", [])
    functions = {to_function_name(tool, where): tool["function"]
                 for where, tool in each(tools, "tools")}
    if isinstance(mode, dict):
        name, mode = to_function_name(mode, "tool_choice."), "required"
        functions = {name: functions[name]} if name in functions else {}
    one_of({"none": 0, "auto": 0, "required": 0}, mode, "tool_choice")
    if mode == "none":
        wanted["max_calls"] = 0  # some call tools anyway
    elif mode == "auto":
        native.update({"tools": tools} if tools else {})
    elif functions:
        calls = [{"type": "object", "required": ["name", "arguments"], "properties": {
            "name": {"const": name}, "arguments": {"$ref": f"#/$defs/{i}"}}}
            for i, name in enumerate(functions)]
        native["format"] = move_schemas(
            [function.get("parameters") or {"type": "object", "properties": {}}
             for function in functions.values()], {"anyOf": calls} if calls[1:] else calls[0])
        native["messages"].append({"role": "system", "content": "\n".join([
            'Call one of these functions: answer with {"name": ..., "arguments": ...}, as JSON.',
            *map(to_json, functions.values())])})
        wanted.update(forced=True, schema="tools")
    else:
        raise ProxyError(400, "'tool_choice' forces a call that 'tools' lacks", "tool_choice")


def to_ollama_chat(body: Json, truncate: bool = False) -> tuple[Json, Json, list[str]]:
    """Translate the body of POST /v1/chat/completions. Raises ProxyError 400 naming the field.

    Returns the body for POST /api/chat; what the client wants of the answer (stream, usage, effort,
    max_calls, forced, schema, num_ctx: each if it applies); and the fields that had no effect."""
    required(body, "model", "string")
    required(body, "messages", "array")
    # Ollama silently cuts a long prompt unless `truncate` is false. Never add `shift`: a value that
    # differs from the loaded model's makes Ollama reload it.
    native: Json = {"options": {}, "wanted": {}, "stream": True, "truncate": truncate}
    try:
        ignored = map_fields(CHAT_FIELDS, body, native)
        wanted = native.pop("wanted")
        native["messages"] = to_native_messages(native["messages"], ignored)
        field = wanted["schema"] = "format" if body.get("format") else "response_format"
        schema = native.get("format")
        choose_tools(native, wanted.pop("tool_choice", "auto"), wanted)
    except RecursionError:
        raise ProxyError(400, "the body is nested too deeply") from None
    if schema and "forced" in wanted:  # only one schema can be obeyed
        ignored.append(field)
    if "effort" in wanted:
        native["think"] = wanted["effort"]
    if isinstance(native["options"].get("stop"), str):
        native["options"]["stop"] = [native["options"]["stop"]]  # Ollama takes only arrays
    num_ctx = native["options"].get("num_ctx")
    wanted["num_ctx"] = num_ctx if isinstance(num_ctx, int) else 0
    return native, wanted, ignored


# ---- 7. Waiting for Ollama ----
# A request's thread waits in one place, PatientReader, from which http.client reads the answer.
# Before a wait it sends what it has. After a tick of silence it may send a heartbeat, or raise,
# which closes the connection to Ollama; then Ollama stops.

NDJSON, SSE = "application/x-ndjson", "text/event-stream"


class PatientReader(io.RawIOBase):
    """The raw side of the buffered reader that http.client reads from.

    `patience` (Reply or ProxyHandler) is told before() a wait, after each tick of silence(), and
    when the connection is lost(), which returns what to raise."""
    def __init__(self, sock: socket.socket, original: io.IOBase, patience: Any) -> None:
        # http.client may close its socket early; it stays open as long as the original file.
        self._sock, self._original, self._patience = sock, original, patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes, with the socket's timeout as the tick."""
        self._patience.before()
        while True:
            try:
                return self._sock.recv_into(buffer)
            except socket.timeout:
                self._patience.silence()
            except OSError as error:
                raise self._patience.lost(error) from error

    def close(self) -> None:
        """Close the socket, too. Ollama sees that and stops."""
        self._original.close()
        super().close()


def ask(step: Callable[..., Any], *arguments: Any) -> Any:
    """Call http.client; what it raises for a bad answer becomes a ProxyError."""
    try:
        return step(*arguments)
    except (http.client.RemoteDisconnected, http.client.IncompleteRead) as error:
        raise cut_upstream(str(error)) from error
    except (http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError,
            OverflowError) as error:  # from odd headers and chunks
        raise broken_upstream(f"{type(error).__name__} {error}"[:200]) from error


def body_lines(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the lines of a body; http.client removes the chunked coding."""
    return iter(partial(ask, response.readline, MAX_LINE_BYTES + 1), b"")


def read_object(response: HTTPResponse, wanted: Json | None = None) -> Json:
    """Read a JSON answer. Raises Ollama's refusal as a ProxyError."""
    body = ask(response.read, MAX_BODY_BYTES)
    try:
        value = parse_object(body)
        if response.status == 200:
            return value
        error = upstream_error(value, max(response.status, 400), wanted)
    except ValueError:  # "404 page not found", a redirect, or another program's HTML
        error = broken_upstream(f"status {response.status}, {body[:60]!r}. Is that an Ollama?")
    error.headers = [("Retry-After", response.getheader("Retry-After", ""))]
    raise error


# What to connect to: 0.0.0.0 means all addresses.
REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Upstream:
    """An Ollama at a URL."""
    def __init__(self, url: urllib.parse.SplitResult, api_key: str = "") -> None:
        self.url, host = url, str(url.hostname)
        make: Any = http.client.HTTPConnection
        if url.scheme == "https":  # one context for all: it takes long to make
            tls = ssl.create_default_context()
            make = partial(http.client.HTTPSConnection, context=tls)
        host = REACHABLE.get(host, host)
        self._connection = partial(make, host, url.port, timeout=CONNECT_SECONDS)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @contextmanager
    def request(self, patience: Any, method: str, path: str, body: bytes | None = None,
                headers: Json | None = None) -> Iterator[HTTPResponse]:
        """Send a request; yield the response once its head is there, which can take minutes."""
        def patient_response(sock: socket.socket, *args: Any, **kwargs: Any) -> Any:
            response = HTTPResponse(sock, *args, **kwargs)
            raw = response.fp.detach()
            response.fp = io.BufferedReader(PatientReader(sock, raw, patience))
            return response

        with closing(self.connect()) as connection:
            connection.response_class = patient_response  # type: ignore[assignment]
            fields = {"Content-Type": "application/json", **(headers or {}), **self._headers,
                      "Connection": "close"}
            with suppress(OSError):  # Ollama may refuse a body before all of it is sent
                connection.request(method, self.url.path + path, body, fields)
            connection.sock.settimeout(TICK_SECONDS)
            with closing(ask(connection.getresponse)) as response:
                if response.status < 200 or response.length is None and not response.chunked:
                    raise broken_upstream(f"status {response.status} without a length")
                yield response

    def connect(self) -> http.client.HTTPConnection:
        """Return an open connection. Raises ProxyError 502 or 503."""
        try:
            connection: http.client.HTTPConnection = self._connection()
            connection.connect()
        except (OSError, UnicodeError) as error:  # UnicodeError: the host can't be a name
            if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS):
                raise busy("file descriptors") from error
            raise ProxyError(502, "can't reach Ollama; is it running (`ollama serve`), and is the "
                             "proxy's --upstream right?", code="upstream_unreachable",
                             detail=f"{self.url.geturl()}: {error}") from error
        connection.sock.settimeout(CLIENT_SECONDS)
        return connection


SSE_END = re.compile(rb"data: \[DONE\]|event: (message_stop|response\.(completed|incomplete)|"
                     rb"(?P<error>response\.failed|error))")
TOKEN_COUNT = re.compile(rb'"(?:(prompt_eval_count|input_tokens|prompt_tokens)|'
                         rb'eval_count|output_tokens|completion_tokens)": ?(\d{1,9})[,}\s]')


def end_mark(kind: str, line: bytes) -> str:
    """Return "done" or "error" for a line that ends a stream, else ""."""
    end = SSE_END.fullmatch(line) if kind == SSE else None
    if end:
        return "error" if end["error"] else "done"
    if kind == NDJSON and (b"true" in line or b'"error"' in line):  # parsing is slow
        with suppress(ValueError):
            record = parse_object(line)
            return "error" if "error" in record else "done" if record.get("done") is True else ""
    return ""


def watched(response: HTTPResponse, record: Json, started: float, lines: bool) -> Iterator[bytes]:
    """Yield an answer as it arrives, or its lines; note its tokens. A cut is a 502.

    When its model runner dies, Ollama ends some streams as if they were complete. So look for the
    end mark, in whole lines: a text may contain anything that looks like one."""
    kind = response.headers.get_content_type() if response.status == 200 else ""
    rest, piece, mark, ended = bytearray(), b"", "", kind not in (NDJSON, SSE)

    def see(line: bytes) -> None:
        nonlocal mark, ended
        for count in TOKEN_COUNT.finditer(line[-TAIL_BYTES:]):
            record["prompt_tokens" if count[1] else "completion_tokens"] = int(count[2])
        mark = mark or end_mark(kind, line)
        if mark == "error":
            record.update(end="error", error="upstream_error")
        ended |= bool(mark) and (kind == NDJSON or not line)  # a blank line ends an event

    pieces = iter(partial(ask, response.read1, SLICE_BYTES), b"")
    for piece in body_lines(response) if lines else pieces:
        rest += piece
        if kind not in (NDJSON, SSE):
            rest = rest[-TAIL_BYTES:]
        elif record["first_token_seconds"] is None:
            record["first_token_seconds"] = round(time.monotonic() - started, 4)
        if b"\n" in piece:
            *whole, rest = rest.split(b"\n")
            for line in whole:
                see(bytes(line.rstrip(b"\r")))
        elif len(rest) > MAX_BODY_BYTES:
            raise broken_upstream(f"a line longer than {MAX_BODY_BYTES} bytes")
        yield piece
    if rest:  # a last line without a newline
        see(bytes(rest))
    if not ended or response.length or not piece and response.headers["Transfer-Encoding"]:
        raise cut_upstream("it ended too early")


# ---- 8. Authenticate, shape, observe ----
# Three classes, each with a method of the same name and signature as its hook. A hook replaces
# authenticate(), runs before shape() and after observe().


def say(text: str) -> None:
    """Write a line to stderr. If nobody reads it there, it is dropped: answers must go on."""
    data = (text + "\n").encode("ascii", "backslashreplace")
    size = getattr(select, "PIPE_BUF", len(data))  # fits if select() says so; not on Windows
    with suppress(OSError, ValueError, AttributeError):  # a program without a console
        file = sys.stderr.fileno()
        while data and (os.name == "nt" or select.select([], [file], [], 0)[1]):
            data = data[os.write(file, data[:size]):]


def say_traceback() -> None:
    """Log the current exception, each line indented: it may quote what a client sent."""
    for line in ["error, by the proxy or by a hook:", *traceback.format_exc().splitlines()]:
        say("    " + re.sub("[^ -~]", "?", line))


def load_hooks(path: str | None) -> Json:
    """Return the hooks in a Python file. Many threads will call them at the same time."""
    # For `from ndjson_sse_proxy import ProxyError` in that file.
    sys.modules.setdefault("ndjson_sse_proxy", sys.modules[__name__])
    names = runpy.run_path(path, run_name="ndjson_sse_proxy_hooks") if path else {}
    hooks = {name: names[name] for name in names if name in ("authenticate", "shape", "observe")}
    if path and not hooks:  # a misspelt name must not leave the door open
        raise ValueError(f"{path} defines none of authenticate, shape and observe")
    return hooks


Mistake = argparse.ArgumentTypeError  # other errors make argparse print the value, maybe a key


def parse_key(line: str) -> tuple[str, str]:
    """Split [NAME:]KEY; return (name, key)."""
    name, _, key = line.strip().rpartition(":")
    if not re.fullmatch(r"[\w.@-]{0,40}", name) or not re.fullmatch("[!-~]{8,200}", key):
        raise Mistake("a key must be [NAME:]KEY; KEY has 8 to 200 visible ASCII characters; "
                      "a comment needs its own line")
    return name or "key", key


# Ollama's rules for an API without keys.
LOCAL_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\d.]+|[\w-]+|[\w.-]*\.(localhost|local|internal))"
                        r"(:\d+)?", re.ASCII)
LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
                          r"|(app|file|tauri|vscode-webview)://.*")


class Gate:
    """Decides which web pages and callers get in. Re-reads the key file when it changes."""
    def __init__(self, settings: argparse.Namespace, hook: Callable[[Any], Any] | None) -> None:
        self.hook, self._path, self._given = hook, settings.api_key_file, list(settings.api_key)
        self.has_keys = bool(self._path or self._given)
        self._store([])
        self._lock, self._warning = threading.Lock(), ""
        self._stamp: object = None  # of the file when it was read
        if self._path:
            self._read_file(starting=True)

    def check_site(self, headers: HTTPMessage) -> list[tuple[str, str]]:
        """Return the CORS headers. Raises ProxyError 403 if a foreign web page may be calling.

        With keys any page may try: a foreign page has none. Otherwise Host and Origin must be
        local; a page can point its own name at 127.0.0.1 (DNS rebinding)."""
        origin, host = headers.get("Origin", ""), headers.get("Host", "localhost").lower()
        any_page = self.has_keys and not self.hook
        local = LOCAL_HOST.fullmatch(host) or host.split(":")[0] == socket.gethostname().lower()
        if not (any_page or local and (not origin or origin.partition("://")[2] == host
                                       or LOCAL_ORIGIN.fullmatch(origin))):
            foreign = f"Origin {origin[:200]}" if local else f"Host {host[:200]}"
            raise ProxyError(403, f"{foreign} is not local; set keys to allow any", code="foreign")
        return [("Access-Control-Allow-Origin", "*" if any_page else origin), ("Vary", "Origin"),
                ("Access-Control-Expose-Headers", "x-request-id, retry-after, x-ignored-fields")
                ] if origin else []

    def authenticate(self, headers: HTTPMessage) -> str | None:
        """Return the caller's name, or None if nobody needs a key. Raises ProxyError 401."""
        if not self.hook and not self.has_keys:
            return None
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")  # Anthropic's clients
        why = "the API key is missing or wrong"
        try:
            caller = self.hook(headers) if self.hook else self._owner(key.strip())
            if isinstance(caller, str):  # and not None: a hook may lack a `return`
                return caller
        except PermissionError as error:
            if error.errno is not None:  # the system's; a hook's own has no number
                raise
            why = str(error)
        raise ProxyError(401, why, None, "invalid_api_key", [("WWW-Authenticate", "Bearer")])

    def _owner(self, key: str) -> str | None:
        with self._lock:  # or a slow thread could store an old version last
            try:
                if self._path:
                    self._read_file()
                self._warning = ""
            except (OSError, ValueError) as error:
                if self._warning != str(error):
                    say(f"warning: the previous keys stay valid: {error}")
                self._warning = str(error)
        return self.owners.get(hashlib.sha256(key.encode("latin-1")).digest())

    def _read_file(self, starting: bool = False) -> None:
        """Read the file if it has changed. Raises OSError or ValueError."""
        status, keys, number = os.stat(self._path), [], 1
        stamp = status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
        if stamp == self._stamp:
            return
        if not stat.S_ISREG(status.st_mode):  # a FIFO would block
            raise ValueError(f"{self._path} is not a regular file")
        young = abs(time.time() - status.st_mtime) < YOUNG_SECONDS
        with open(self._path, encoding="utf-8-sig") as file:  # Windows editors add a BOM
            self._stamp = None if young else stamp  # a coarse clock hides a second change
            try:
                for number, line in enumerate(file, 1):
                    if line.strip() and not line.lstrip().startswith("#"):
                        keys.append(parse_key(line))
            except (ValueError, Mistake) as error:
                raise ValueError(f"{self._path}, line {number}: {error}") from None
        if not keys and (starting or young):
            raise ValueError(f"{self._path} has no keys; perhaps it is still being written")
        self._store(keys)

    def _store(self, keys: list[tuple[str, str]]) -> None:
        # By SHA-256: the time of a look-up says nothing about the keys.
        self.owners = {hashlib.sha256(key.encode()).digest(): name
                       for name, key in self._given + keys}


IGNORES = re.compile("/v1/(?!chat)")  # Ollama's own /v1 routes take no options


class Shaper:
    """Changes requests: the hook first, then aliases and defaults."""
    def __init__(self, settings: argparse.Namespace, hook: Callable[..., Any] | None) -> None:
        self.hook, self.aliases, self._options = hook, dict(settings.alias), dict(settings.option)
        self._defaults = {"options": self._options} if settings.option else {}
        if settings.keep_alive is not None:
            self._defaults["keep_alive"] = settings.keep_alive

    def changes(self, route: str) -> bool:
        """Return whether requests to this route may change, and so must be read."""
        return bool(self.hook or self.aliases or self._defaults and not IGNORES.match(route))

    def shape(self, route: str, body: Json, caller: str | None) -> Json:
        """Return the body to use. A hook may raise ProxyError to refuse."""
        if self.hook:
            changed = self.hook(route, body, caller)
            body = body if changed is None else changed
        model, options = body.get("model"), body.get("options") or {}
        if isinstance(model, str) and model in self.aliases:
            body = {**body, "model": self.aliases[model]}
        if self._defaults and not IGNORES.match(route):
            body = {**self._defaults, **{k: v for k, v in body.items() if v is not None}}
            if isinstance(options, dict):
                body["options"] = {**self._options, **options}
        return body


# What the log line and the hook tell.
RECORD_NAMES = (
    "time", "id", "client", "caller", "method", "route", "model", "status", "prompt_tokens",
    "completion_tokens", "first_token_seconds", "seconds", "end", "error", "detail", "ignored")


class Observer:
    """Logs each request as one line of JSON and counts it for Prometheus."""
    def __init__(self, hook: Callable[[Json], Any] | None) -> None:
        self._hook, self._lock = hook, threading.Lock()
        # No label holds what clients send, or they could invent many.
        self.counts: collections.Counter[str] = collections.Counter(
            active_requests=0, client_hangups_total=0)

    def count(self, amounts: Mapping[str, Any]) -> None:
        """Add to metrics; names may have labels."""
        with self._lock:
            self.counts.update(amounts)

    def observe(self, record: Json) -> None:
        """Count and log a request that has ended, then call the hook."""
        source, _, kind = (record["error"] or "").partition("_")
        self.count({
            'requests_total{{route="{route}",status="{status}"}}'.format(**record): 1,
            'tokens_total{kind="prompt"}': record["prompt_tokens"] or 0,
            'tokens_total{kind="completion"}': record["completion_tokens"] or 0,
            "client_hangups_total": record["end"] == "client hang-up",
            "first_token_seconds_sum": record["first_token_seconds"] or 0,
            "first_token_seconds_count": record["first_token_seconds"] is not None,
            "request_seconds_sum": record["seconds"], "request_seconds_count": 1,
            **({f'upstream_errors_total{{kind="{kind}"}}': 1} if source == "upstream" else {})})
        say(json.dumps({name: value for name, value in record.items() if value not in (None, [])}))
        if self._hook:
            try:
                self._hook(dict(record))
            except BaseException:  # noqa: BLE001  someone else's code, after the answer
                say_traceback()

    def metrics(self) -> str:
        """Return the metrics in Prometheus' text format."""
        with self._lock:
            return "".join(f"ndjson_sse_proxy_{name} {value:.15g}\n"
                           for name, value in sorted(self.counts.items()))


# ---- 9. Downstream: the HTTP server ----

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
HEADER = b"(?:(" + TOKEN + rb"+):([\t -~\x80-\xff]*)\r\n)"
HEAD = re.compile(b"(" + TOKEN + rb"{1,40}) (/[!-~]*) (HTTP/1\.[01])\r\n" + HEADER + rb"*\r\n")
ONCE_ONLY = ("host", "content-length", "transfer-encoding", "content-type", "authorization",
             "x-api-key", "origin")


def read_head(first: bytes, readline: Callable[..., bytes]) -> tuple[str, str, str, HTTPMessage]:
    """Read the rest of a request's head, strictly: (method, target, version, headers).

    http.server accepts two lengths, folded lines, a bare CR and more, which a proxy in front may
    read in another way (request smuggling). So anything ambiguous is a 400."""
    head = line = first
    while line not in (b"\r\n", b"\n", b""):
        if len(head) > MAX_HEAD_BYTES or head.count(b"\n") > MAX_HEADERS + 1:
            raise ProxyError(414 if line is first else 431, "the request's head is too large")
        line = readline(MAX_HEAD_BYTES)
        head += line
    match, headers = HEAD.fullmatch(head), HTTPMessage()
    if not match:
        raise ProxyError(400, "the request's head is malformed")
    method, target, version = (match[i].decode() for i in (1, 2, 3))
    for field, value in re.findall(HEADER, head[match.end(3):]):
        name = field.decode()
        if name in headers and name.lower() in ONCE_ONLY:
            raise ProxyError(400, f"the header {name} appears twice")
        headers[name] = value.strip().decode("latin-1")
    if version == "HTTP/1.1" and "Host" not in headers:
        raise ProxyError(400, "the Host header is missing")
    length, coding = headers.get("Content-Length", "0"), headers.get("Transfer-Encoding")
    if not re.fullmatch("[0-9]{1,18}", length) or coding is not None and (
            coding.lower() != "chunked" or "Content-Length" in headers or version == "HTTP/1.0"):
        raise ProxyError(400, "it is unclear where the body ends")
    return method, target, version, headers


def read_body(request: Exchange, reader: io.BufferedIOBase) -> bytes:
    """Read a body, by its length or in chunks without extensions and trailers."""
    headers, length = request.headers, request.headers.get("Content-Length")
    chunked, left, body = "Transfer-Encoding" in headers, int(length or 0), bytearray()
    end = b"\r\n" if chunked else b""
    if request.method != "POST" and (chunked or left):  # "/" needs no key
        raise ProxyError(400, f"a {request.method} request has no body here")
    if request.method == "POST" and length is None and not chunked:
        raise ProxyError(411, "the request needs a Content-Length or chunked coding")
    if (left <= MAX_BODY_BYTES and request.version == "HTTP/1.1"
            and headers.get("Expect", "").lower() == "100-continue"):
        request.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    while True:
        if chunked:
            line = reader.readline(10)
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}\r\n", line):
                raise ProxyError(400, f"not a chunk size: {line[:60]!r}") if line else ClientGone()
            left = int(line, 16)
        if len(body) + left > MAX_BODY_BYTES:
            raise ProxyError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        data = reader.read(left + len(end))
        if len(data) < left + len(end):
            raise ClientGone
        if data[left:] != end:
            raise ProxyError(400, "a chunk does not end where its size says")
        body += data[:left]
        if not chunked or not left:
            return bytes(body)


def has_hung_up(client: socket.socket) -> bool:
    """Return at once whether the client has closed its side."""
    try:
        if hasattr(select, "POLLRDHUP"):  # works under TLS, too, and behind unread bytes
            poll = select.poll()
            poll.register(client, select.POLLRDHUP)
            return bool(poll.poll(0))
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            # SSLSocket's own recv() can't peek. Unread bytes are the next request.
            return bool(selector.select(0)) and not socket.socket.recv(client, 1, socket.MSG_PEEK)
    except ConnectionError:
        return True


class Reply:
    """The answer to one request, and its log record.

    Data leaves in one write before a wait for Ollama. The head leaves with the first of it, so that
    an early failure has its own status."""
    version, method = "HTTP/1.0", ""  # until they are known
    close = True  # the connection, after this answer
    cors: Headers = ()
    _heartbeat: Callable[[], bytes] | None = None  # for frames

    def __init__(self, server: ProxyServer, connection: socket.socket) -> None:
        self.server, self.connection = server, connection
        self.started = self._sent_at = time.monotonic()
        self.record: Json = {**dict.fromkeys(RECORD_NAMES), "end": "done", "route": "none",
                             "id": "req_" + os.urandom(12).hex()}
        self.pending: list[bytes] = []  # frames or pieces of the body

    def before(self) -> None:
        """Send what is pending before a wait."""
        self.flush()
        now = time.monotonic()
        self._deadline = now + (self.server.settings.idle_timeout or float("inf"))
        if self.server.stopping or now - self._sent_at > TICK_SECONDS:
            self.silence()  # while Ollama talks, but there is nothing to send yet

    def silence(self) -> None:
        """Send a heartbeat if one is due. Raises ClientGone, and ProxyError 503 or 504."""
        if has_hung_up(self.connection):
            raise ClientGone
        if self.server.stopping:
            raise ProxyError(503, "the proxy stopped before the end", code="proxy_stopped")
        if time.monotonic() > self._deadline:
            raise ProxyError(504, "Ollama was silent for --idle-timeout", code="upstream_timeout")
        seconds = self.server.settings.heartbeat or float("inf")
        if self._heartbeat and time.monotonic() - self._sent_at >= seconds:
            self.pending.append(self._heartbeat())
            self.flush()

    def lost(self, error: OSError) -> Exception:
        """Return the error for a broken connection to Ollama."""
        return cut_upstream(type(error).__name__)

    def start(self, status: int, content_type: str, length: int | None = None,
              headers: Headers = (), heartbeat: Callable[[], bytes] | None = None) -> None:
        """Set the head. Without a length the body is chunked, or ends with the connection."""
        self._head = status, content_type, length, headers
        self._chunked, self._heartbeat = length is None and self.version == "HTTP/1.1", heartbeat
        self.pending.clear()

    def flush(self, last: bool = False) -> None:
        """Send what is pending; `last` ends the body."""
        if not self.pending and not last:
            return
        data = b"".join(self.pending)
        self.pending.clear()
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._chunked and last:
            data += b"0\r\n\r\n"
        if self.method == "HEAD":
            data = b""
        if self.record["status"] is None:
            data = self._head_bytes() + data
            self.record["status"] = self._head[0]
        self.write(data)
        self._sent_at = time.monotonic()

    def write(self, data: bytes) -> None:
        """Write bytes. Raises ClientGone."""
        # With a timeout, each send() would poll first, so only a slow reader gets one, for each
        # slice: sendall() counts it for all of the bytes.
        view = memoryview(data)
        try:
            while view:
                try:
                    view = view[self.connection.send(view[:SLICE_BYTES]):]
                except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    self.connection.settimeout(CLIENT_SECONDS)
                    view = view[self.connection.send(view[:SLICE_BYTES]):]
                    self.connection.settimeout(0)
        except OSError as error:
            raise ClientGone from error

    def send(self, status: int, body: bytes, content_type: str = "application/json; charset=utf-8",
             headers: Headers = ()) -> None:
        """Send a whole answer."""
        self.start(status, content_type, len(body), headers)
        self.pending.append(body)
        self.flush(last=True)

    def fail(self, error: ProxyError) -> None:
        """Note an error and report it in the way left: a status, a frame, or a cut."""
        self.record.update(error=str(error.code or f"status_{error.status}"), detail=error.detail,
                           end="upstream cut" if error.code == "upstream_cut" else "error")
        if self.record["status"] is None:
            self.send(error.status, error.body() + b"\n", headers=error.headers)
        elif self._heartbeat:  # the frames before the error were good
            self.pending.append(sse_event(error.body()))
            self.flush(last=True)
        else:  # the bytes are Ollama's, so add none; a missing end shows the cut
            self.flush()
            self.close = True
            if self.version == "HTTP/1.0":  # where a plain close is a good end: reset
                option = socket.SO_LINGER, struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, *option)

    def _head_bytes(self) -> bytes:
        status, content_type, length, headers = self._head
        ignored = urllib.parse.quote(", ".join(self.record["ignored"] or []), "[], ",
                                     errors="backslashreplace")[:4000]
        pairs = [
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Content-Type", content_type),
            ("X-Request-Id", self.record["id"]), ("X-Content-Type-Options", "nosniff"),
            ("Transfer-Encoding", "chunked" if self._chunked else ""),
            ("Content-Length", "" if length is None else str(length)),
            ("Connection", "close" if self.close else ""),
            ("Cache-Control", "no-cache" if self._heartbeat else ""),
            ("X-Accel-Buffering", "no" if self._heartbeat else ""),  # nginx would buffer frames
            ("X-Ignored-Fields", ignored), *self.cors, *headers]
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}",
                 *(f"{name}: {value}" for name, value in pairs if value), "", ""]
        # Ollama's or a hook's may contain line ends.
        return "\r\n".join(re.sub("[\0-\x1f]+", " ", line) for line in lines).encode("latin-1")


FRAMES = "text/event-stream; charset=utf-8"
PASSED_HEADERS = ("Content-Type", "Content-Encoding", "Accept", "anthropic-version",
                  "anthropic-beta")


class Exchange(Reply):
    """One request and its answer: a method for each route."""
    server: ProxyServer
    headers: HTTPMessage
    body, unread, route, model_id = b"", True, "none", ""

    def admit(self, target: str) -> Callable[[Exchange], None]:
        """Return the route, if Host, Origin and key are right, or raise ProxyError."""
        method, headers, gate = self.method, self.headers, self.server.gate
        path, mark, query = target.partition("?")
        for key in ROUTES:
            rest = path[len(key) - 1:] if key[-1] == "*" and path.startswith(key[:-1]) else ""
            if path == key or rest:
                self.route, self.model_id = key, urllib.parse.unquote(rest)
        self.query, (scheme, _, own) = mark + query, self.server.url.partition("://")
        # What an SDK needs, under the name this client used.
        self.base_url = f"{scheme}://{headers.get('Host', own)}/v1"
        self.record.update(method=method, route=self.route)
        self.cors = gate.check_site(headers)
        if method == "OPTIONS" and "Origin" in headers:
            return Exchange.preflight
        if path not in ("/", "/healthz"):
            self.record["caller"] = gate.authenticate(headers)
        methods = ROUTES.get(self.route, {})
        route = methods.get("GET" if method == "HEAD" else method)
        if route:
            return route
        if method in methods:
            raise ProxyError(403, f"{method} {self.route} changes Ollama; run it on the Ollama "
                             "machine", code="admin_route")
        if methods:
            allowed = ", ".join(methods)
            raise ProxyError(405, f"use {allowed} {self.route}", headers=[("Allow", allowed)])
        raise ProxyError(404, f"no route {method} {path[:200]}; OpenAI clients' base URL is "
                         f"{self.base_url}, Anthropic's the same without /v1", code="no_route")

    def root(self) -> None:
        """GET /: the page for browsers, a line of text for others (such as `ollama`)."""
        if "text/html" in self.headers.get("Accept", ""):
            return self.send(200, PAGE.encode(), "text/html; charset=utf-8", PAGE_HEADERS)
        self.send_text(f"ndjson_sse_proxy {__version__}: base_url is {self.base_url}\n")

    def send_text(self, text: str) -> None:
        """GET /healthz and /metrics: send plain text."""
        self.send(200, text.encode(), "text/plain; charset=utf-8")

    def preflight(self) -> None:
        """OPTIONS: what a browser asks before it lets a page call the proxy."""
        wanted = self.headers.get("Access-Control-Request-Headers", "")
        self.send(200, b"", headers=[("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
                                     ("Access-Control-Allow-Headers", wanted)])

    def models(self) -> None:
        """GET /v1/models and /v1/models/{id}, which may have slashes: Ollama's list and aliases."""
        with self.server.upstream.request(self, "GET", "/v1/models") as response:
            models: list[Json] = member(read_object(response), "data", list)
        ids = [member(model, "id", str, needed=True) for model in models]
        models += [{**model, "id": name} for name, target in self.server.shaper.aliases.items()
                   for model, own in zip(models, ids) if own in (target, target + ":latest")]
        found: list[Json] = [{**model, "id": self.model_id} for model in models
                             if model["id"] in (self.model_id, self.model_id + ":latest")]
        if self.model_id and not found:
            raise upstream_error(f"model '{self.model_id[:600]}' not found")
        self.send(200, to_bytes(found[0] if found else {"object": "list", "data": models}))

    def chat(self) -> None:
        """POST /v1/chat/completions, translated."""
        body = self.read_json()
        native, wanted, ignored = to_ollama_chat(
            self.shape(body), self.server.settings.allow_truncation)
        if len(ignored) > MAX_IGNORED_NAMES:
            ignored[MAX_IGNORED_NAMES:] = [f"and {len(ignored) - MAX_IGNORED_NAMES} more"]
        self.record["ignored"] = ignored
        stream = ChatStream(str(body.get("model")), "chatcmpl-" + os.urandom(9).hex(),
                            int(time.time()), wanted)
        if wanted.get("stream"):
            self.start(200, FRAMES, heartbeat=stream.heartbeat)
        try:
            self.answer_chat(stream, native, wanted)
        except ProxyError as error:
            # Agents ask for thinking even if the model can't.
            if "does not support thinking" not in error.message or "effort" not in wanted:
                raise
            del wanted["effort"], native["think"]
            ignored.append("reasoning_effort")
            self.answer_chat(stream, native, wanted)

    def answer_chat(self, stream: ChatStream, native: Json, wanted: Json) -> None:
        """Send a translated request and translate the answer, streamed or whole."""
        streamed, data = wanted.get("stream"), to_bytes(native)
        traced = bool(streamed and "trace=1" in self.query[1:].split("&"))
        if traced and not self.server.shaper.hook:  # its additions are private
            self.pending.append(sse_comment(b"POST /api/chat " + data))
        with self.server.upstream.request(self, "POST", "/api/chat", data) as response:
            if response.status != 200:
                read_object(response, wanted)  # raises the refusal
            most = float("inf") if streamed and "forced" not in wanted else MAX_BODY_BYTES
            lines = self.seen(body_lines(response), most, traced)
            choices = translate(lines, stream)
            if not streamed:
                self.send(200, to_bytes(whole_answer(stream, choices)))
            else:
                for part in choices:
                    self.pending.append(stream.frame(part))
                if wanted.get("usage"):
                    self.pending.append(sse_event(stream.with_usage([])))
                self.pending.append(SSE_DONE)
                self.flush(last=True)
        self.record["prompt_tokens"], self.record["completion_tokens"] = stream.tokens

    def seen(self, lines: Iterable[bytes], left: float, traced: bool) -> Iterator[bytes]:
        """Yield the same lines, `left` bytes at most; send each as a comment, too, if `traced`."""
        for line in lines:
            if self.record["first_token_seconds"] is None:
                self.record["first_token_seconds"] = round(time.monotonic() - self.started, 4)
            left -= len(line)
            if left < 0:
                raise broken_upstream("an answer too long to collect")
            if traced and line.strip():
                self.pending.append(sse_comment(line.strip()))
            yield line

    def passthrough(self) -> None:
        """Ollama's own formats, byte for byte, or on request each line as a frame."""
        headers = {name: self.headers[name] for name in PASSED_HEADERS if name in self.headers}
        body = self.shaped_body() if self.method == "POST" else None
        framed = SSE in self.headers.get("Accept", "") and self.route.startswith("/api/")
        if framed:
            self.start(200, FRAMES, heartbeat=lambda: sse_comment(b"heartbeat"))
        path = self.route + self.query
        with self.server.upstream.request(self, self.method, path, body, headers) as response:
            if response.status >= 300 and (framed or self.route.startswith("/v1/")):
                read_object(response)  # raises the refusal, in OpenAI's form
            if response.status >= 400:
                self.record.update(end="error", error=f"status_{response.status}")
            pieces = watched(response, self.record, self.started, lines=framed)
            if framed:
                pieces = raw_frames(pieces)
            else:
                self.start(response.status, response.getheader("Content-Type", ""),
                           response.length,
                           [("Retry-After", response.getheader("Retry-After", ""))])
            for piece in pieces:
                self.pending.append(piece)
            self.flush(last=True)

    def read_json(self) -> Json:
        """Return the body as an object. Raises ProxyError 400 or 415."""
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise ProxyError(415, "send the body without Content-Encoding: the proxy must read it")
        try:
            return parse_object(self.body)
        except ValueError as error:
            raise ProxyError(400, f"the body is not a JSON object: {error}") from None

    def shape(self, body: Json) -> Json:
        """Return the body after hook, aliases and defaults; note the model."""
        if isinstance(body.get("model"), str):
            self.record["model"] = body["model"][:MAX_NAME]
        return self.server.shaper.shape(self.route, body, self.record["caller"])

    def shaped_body(self) -> bytes:
        """Return the body for a route that is passed through."""
        if self.route == "/v1/audio/transcriptions":  # not JSON; a hook sees {}
            self.shape({})
        elif self.server.shaper.changes(self.route):
            body = self.read_json()
            for name in body:  # Ollama reads "Model" as "model", and a hook would not see it
                if not re.fullmatch("[a-z0-9_]+", name):
                    raise ProxyError(400, f"the name {name[:60]!r} is not in lower case", name[:60])
            return to_bytes(self.shape(body))  # one name may be there twice
        else:
            with suppress(ValueError):
                self.shape(parse_object(self.body))  # for the log
        return self.body


# Path, method, and what serves it. None: it would change Ollama. A * is the rest of the path.
ROUTES: dict[str, dict[str, Callable[[Exchange], None] | None]] = {
    "/": {"GET": Exchange.root},
    "/healthz": {"GET": lambda exchange: exchange.send_text("ok\n")},
    "/metrics": {"GET": lambda exchange: exchange.send_text(exchange.server.observer.metrics())},
    "/v1/chat/completions": {"POST": Exchange.chat},
    **{path: {"GET": Exchange.models} for path in ("/v1/models", "/v1/models/*")},
    **{path: {"POST": Exchange.passthrough} for path in (
        "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
        "/v1/audio/transcriptions", "/api/chat", "/api/generate", "/api/embed", "/api/embeddings",
        "/api/show")},
    **{path: {"GET": Exchange.passthrough} for path in (
        "/api/tags", "/api/ps", "/api/version", "/api/status")},
    **{path: {"POST": None} for path in ("/api/pull", "/api/push", "/api/create", "/api/copy")},
    "/api/delete": {"DELETE": None},
    "/api/blobs/*": {"POST": None, "HEAD": None},
}


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """One client connection, in its own thread."""
    server: ProxyServer
    disable_nagle_algorithm = True  # a frame leaves at once
    timeout, rbufsize = CLIENT_SECONDS, 0

    def setup(self) -> None:
        """Prepare the connection; do the TLS handshake."""
        self.excess = len(self.server.connections) > self.server.settings.max_connections
        super().setup()
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.do_handshake()
        reader = PatientReader(self.connection, self.rfile, self)
        self.rfile = io.BufferedReader(reader, 2048)  # small, for many clients

    def before(self) -> None:
        """Wait for bytes until a deadline, or slow clients could hold threads."""
        left = self.deadline - time.monotonic()
        if left <= 0:  # recv() doesn't time out while there are bytes
            self.silence()
        self.connection.settimeout(left)

    def silence(self) -> None:
        raise ProxyError(408, "the request did not arrive in time")

    def lost(self, error: OSError) -> Exception:
        return ClientGone()

    def handle_one_request(self) -> None:
        """Read a request, answer it, log it."""
        self.deadline = time.monotonic() + CLIENT_SECONDS
        try:
            first = self.rfile.readline(MAX_HEAD_BYTES + 1)
        except (ClientGone, ProxyError):
            first = b""
        if not first:
            self.close_connection = True
            return
        self.exchange = exchange = Exchange(self.server, self.connection)
        self.server.observer.count({"active_requests": 1})
        try:
            try:
                self.answer(first)
            except ProxyError as error:
                exchange.fail(error)
        except ClientGone:
            exchange.record["end"], exchange.close = "client hang-up", True
        except BaseException:  # noqa: BLE001  this thread's boundary: nothing may pass unseen
            say_traceback()
            exchange.close = True
            with suppress(ClientGone):
                exchange.fail(ProxyError(500, "internal error; the proxy's log has the details"))
        exchange.record.update(
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), client=self.client_address[0],
            seconds=round(time.monotonic() - exchange.started, 4),
            status=exchange.record["status"] or 499)  # nginx's number for a hang-up
        self.server.observer.observe(exchange.record)
        self.server.observer.count({"active_requests": -1})
        self.close_connection = exchange.close or self.server.draining
        if exchange.unread and exchange.record["end"] == "error":
            self.linger()

    def answer(self, first: bytes) -> None:
        """Read the request, check it, and run its route."""
        exchange = self.exchange
        try:
            head = read_head(first, self.rfile.readline)
            exchange.method, target, exchange.version, exchange.headers = head
            route = exchange.admit(target)
            if self.excess and exchange.route not in ("/healthz", "/metrics"):
                raise busy("connections")
            self.deadline = time.monotonic() + BODY_SECONDS
            exchange.body = read_body(exchange, self.rfile)
        finally:
            self.connection.settimeout(0)  # for writing
        exchange.unread = False  # so another request may follow
        exchange.close = (exchange.version == "HTTP/1.0" or self.excess or self.server.draining or
                          "close" in ",".join(exchange.headers.get_all("Connection", [])).lower())
        route(exchange)

    def linger(self) -> None:
        """Read on for a moment: closing with unread bytes sends a reset."""
        self.deadline = time.monotonic() + LINGER_SECONDS
        with suppress(OSError, ClientGone, ProxyError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read(SLICE_BYTES):
                pass


class ProxyServer(http.server.ThreadingHTTPServer):
    """The proxy. It accepts connections as soon as it exists; serve_forever() answers them."""
    daemon_threads = True  # a stream that never ends must not keep the process alive
    request_queue_size = 128  # the default of 5 refuses a burst of clients
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port
    observer: Observer

    def __init__(self, settings: argparse.Namespace, upstream_key: str = "") -> None:
        self.settings, self.hooks = settings, load_hooks(settings.hooks)
        self.gate = Gate(settings, self.hooks.get("authenticate"))
        self.shaper = Shaper(settings, self.hooks.get("shape"))
        self.observer = Observer(self.hooks.get("observe"))
        self.upstream = Upstream(settings.upstream, upstream_key)
        self.draining = self.stopping = False  # no new connections; no more answers
        self.connections: set[Any] = set()  # whose add() and discard() need no lock
        host = str(settings.listen.hostname)
        if not (self.gate.has_keys or self.gate.hook or settings.insecure
                or re.fullmatch(r"localhost|127(\.\d+){3}|::1", host)):
            raise ValueError(f"anyone who can reach {host} could use your Ollama; set "
                             "--api-key-file, or allow it with --insecure")
        self._tls: ssl.SSLContext | None = None
        if settings.tls_cert or settings.tls_key:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            try:
                self._tls.load_cert_chain(settings.tls_cert or "", settings.tls_key)
            except OSError as error:  # which names no file
                files = f"--tls-cert {settings.tls_cert} --tls-key {settings.tls_key}"
                raise ValueError(f"{files}: {error}") from None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, settings.listen.port or 0), ProxyHandler)
        shown = REACHABLE.get(host, host)
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"{'https' if self._tls else 'http'}://{shown}:{self.server_port}"

    def server_bind(self) -> None:
        """Skip HTTPServer's look-up of its own name, which hangs on a machine without DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its own thread does the TLS handshake."""
        connection, address = super().get_request()
        if self._tls:
            connection = self._tls.wrap_socket(connection, True, do_handshake_on_connect=False)
        self.connections.add(connection)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Close connections far over the limit. Some over it still get a 503."""
        return bool(len(self.connections) <= self.settings.max_connections + MAX_EXTRA)

    def shutdown_request(self, request: Any) -> None:
        """End a connection. The base class sends a FIN first, which would hide a reset."""
        self.close_request(request)
        self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what goes wrong before a request, but not clients that leave."""
        if not isinstance(sys.exc_info()[1], OSError):
            say_traceback()

    def drain(self) -> bool:
        """Let requests end, for DRAIN_SECONDS at most; return whether all answers were complete."""
        self.draining = True
        self.shutdown()
        self.server_close()
        whole, counts = False, self.observer.counts
        for seconds in DRAIN_SECONDS, LINGER_SECONDS:
            deadline = time.monotonic() + seconds
            while counts["active_requests"] and time.monotonic() < deadline:
                time.sleep(0.02)
            whole = whole or not counts["active_requests"] and not self.stopping
            self.stopping = True
        return whole


# ---- 10. Demo: a scripted Ollama ----
# For a first look without Ollama, over a real socket.

DEMO_MODELS: dict[str, list[Json]] = {  # each shows one thing: its messages
    "demo-text": [{"content": word} for word in re.findall(r"\s*\S+", (
        "Hello! Every word here was a line of NDJSON and became a frame of SSE. 你好 🙂\n"
        "This newline did not break its frame."))],
    "demo-think": [{"thinking": "The question is open."}, {"content": "It is"},
                   {"content": " 42."}],
    "demo-tool": [{"tool_calls": [
        {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]}],
    "demo-error": [{"content": "This answer"}, {"content": " will not"}, {"content": " be"},
                   {"error": "an error was encountered while running the model: unexpected EOF"}],
}


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """Answers in chunks, as Ollama does, a record at a time."""
    protocol_version = "HTTP/1.1"
    pace = 0.03  # seconds between two records: slow enough to watch

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        model = json.loads(body).get("model") if self.path == "/api/chat" else None
        answer: list[Json] = [{"error": f"model '{model}' not found"}]
        if self.path not in ("/api/chat", "/v1/models"):
            answer = [{"error": f"the demo has no {self.path}"}]
        elif self.command == "GET":
            answer = [{"object": "list", "data": [{"id": name, "object": "model"}
                                                  for name in DEMO_MODELS]}]
        elif model in DEMO_MODELS:
            answer = [part if "error" in part else {"model": model, "message": {
                "role": "assistant", "content": "", **part}, "done": False}
                for part in DEMO_MODELS[model]]
            if "error" not in answer[-1]:
                answer.append({"model": model, "done": True, "done_reason": "stop",
                               "prompt_eval_count": 9, "eval_count": len(answer)})
        self.send_response(404 if "error" in answer[0] else 200)
        self.send_header("Content-Type", NDJSON if answer[1:] else "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in [*(to_bytes(record) + b"\n" for record in answer), b""]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            time.sleep(self.pace if answer[1:] else 0)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the proxy logs."""


def start_demo() -> str:
    """Start the scripted Ollama on a free port; return its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DemoHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


# ---- 11. The page: what a browser gets at / ----
# It asks for a trace (?trace=1): comments with the request sent to Ollama and, before its frames,
# each line of NDJSON.

PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>ndjson_sse_proxy</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark } * { box-sizing: border-box; margin: 0; overflow-wrap: anywhere }
body { padding: 1rem; font: 15px/1.5 system-ui, sans-serif } h1, h2 { font-size: 17px }
.row { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0 } section { background: #8881 }
.row > :not(button) { flex: 1 1 18rem; min-width: 0 } .row > .wide { flex: 2 1 37rem }
input, select, textarea { width: 100% } input, select, textarea, button, section { font: inherit;
  padding: .4rem .8rem; border: 1px solid #8886; border-radius: 6px } #end { color: #c33 }
p, code { white-space: pre-wrap } section + section { margin-top: .6rem } code > * > span,
summary > div { display: inline-block } code, i::before { font: 13px/1.5 monospace }
code, code::before, #rows summary { display: block } code::before { content: attr(title) }
summary > div { width: max(50%, min(100%, 18rem)); padding: .2rem .6rem; vertical-align: top }
#rows { max-height: 34rem; overflow: auto } summary:hover, summary:focus { background: #fc04 }
details:not([open]) i { font-size: 0 } details:not([open]) i::before { content: "…" }
</style>
<h1>Ollama's NDJSON in, OpenAI-style SSE out</h1>
<form class="row" id="form"><label>Model <select id="model"></select></label>
  <label>API key, if any <input id="key" type="password" autocomplete="off"></label>
  <label class="wide">Prompt <textarea id="prompt">Why is the sky blue?</textarea></label>
  <button id="send" title="Ctrl+Enter">Send</button> <button>Stop</button></form>
<p id="status" role="status"></p><p id="demo" hidden>Demo: these answers are scripted.</p>
<div class="row"><div><section><h2>As a chat UI shows it</h2>
    <details hidden><summary>Thinking</summary><p id="reasoning"></p></details>
    <p id="content"></p><code id="calls"></code><p id="end"></p></section>
  <section><h2>Request sent to Ollama</h2><div id="up"></div></section></div>
  <section class="wide"><p>Point at a row to light up a line and its frames; click it for more.</p>
    <div class="row"><h2>NDJSON from Ollama</h2><h2>SSE frames sent to you</h2></div>
    <div id="rows"></div></section></div>
<template id="row"><details><summary><div></div><div></div></summary></details></template>
<script>
const $ = (id) => document.getElementById(id), q = JSON.stringify, rows = $("rows");
const show = (status) => { $("status").textContent = status };
let run = {};
async function ask(path, body, signal) {
  const headers = {"Content-Type": "application/json", Authorization: `Bearer ${$("key").value}`};
  const method = body ? "POST" : "GET";
  const response = await fetch("v1/" + path, {method, headers, body, signal});
  if (response.ok) return response;
  if (response.status === 401) $("key").focus();
  const {error} = await response.json().catch(() => ({}));
  throw Error(`${response.status}: ${error?.message ?? response.statusText}`);
}
async function listModels() {
  const {data} = await (await ask("models")).json();
  $("model").replaceChildren(...data.map(({id}) => new Option(id)));
  $("demo").hidden = !data.some(({id}) => id.startsWith("demo-"));
  if (!data.length) throw Error("Ollama has no models yet; run `ollama pull NAME` on its machine");
  show("Ready");
}
async function send() {
  run.stopper?.abort();
  const own = run = {start: performance.now(), stopper: new AbortController()};
  for (const old of document.querySelectorAll("section [id]")) old.replaceChildren();
  show("Waiting for Ollama");
  try {
    if (!$("model").value) await listModels();
    const body = q({model: $("model").value, stream: true, stream_options: {include_usage: true},
      messages: [{role: "user", content: $("prompt").value}]});
    const response = await ask("chat/completions?trace=1", body, own.stopper.signal);
    const reader = response.body.getReader(), decoder = new TextDecoder();
    for (let rest = "", read; !(read = await reader.read()).done;) {  // a read may end anywhere
      const blocks = (rest + decoder.decode(read.value, {stream: true})).split("\n\n");
      rest = blocks.pop();
      blocks.forEach(receive);
      if (!rows.matches(":hover, :focus-within")) rows.scrollTop = rows.scrollHeight;
    }
    if (!run.whole) throw Error("the stream ended without [DONE]");
    show(`Done (${run.reason}): ${run.completion_tokens} tokens`);
  } catch ({name, message}) {
    if (run !== own) return;  // another one began
    show(name === "AbortError" ? "stopped" : `${run.row ? "cut off" : "failed"}: ${message}`);
    $("end").textContent = `(${$("status").textContent})`;
  }
}
function receive(block) {  // a comment (": ...") or a frame ("data: ...")
  const text = block.replace(/^(data)?: /, "");
  if (block.startsWith(": POST ")) return addCode($("up"), "", text);
  if (block[0] === ":") return addCode((run.row = addRow()).firstChild, "", run.line = text);
  run.whole = text === "[DONE]";
  const {choices = [], usage, error} = run.whole ? {} : JSON.parse(text);
  const {delta = {}, finish_reason: reason} = choices[0] ?? {};
  // The proxy adds heartbeats (empty deltas), usage, [DONE], and errors that no line told.
  const row = (error ? /^{"error"/.test(run.line) : reason || q(delta) !== "{}") && run.row;
  addCode((row || addRow()).lastChild, row ? "" : "added by the proxy", block);
  if (error) throw Error(error.message);
  Object.assign(run, usage, reason && {reason});
  for (const part of ["reasoning", "content"]) $(part).append(delta[part] ?? "");
  $("reasoning").parentNode.hidden = !$("reasoning").textContent;
  delta.tool_calls?.forEach(({function: f}) => $("calls").append(`${f.name}(${f.arguments})\n`));
}
const addRow = () => rows.appendChild($("row").content.firstChild.cloneNode(true)).firstChild;
function addCode(cell, label, text) {  // a closed row hides <i>
  const code = cell.appendChild(document.createElement("code"));
  code.title = `${((performance.now() - run.start) / 1000).toFixed(3)} s ${label}`;
  text.split(/("(?:id|model)":.*?,)(?="(?:choices|message)":)/).forEach((part, i) => {
    const to = code.appendChild(document.createElement(i === 1 ? "i" : "span"));
    for (const piece of part.match(/[^,{]*[,{]?/g))
      to.appendChild(document.createElement("span")).textContent = piece;
  });
}
const list = () => listModels().catch(({message}) => show(`failed: ${message}`));
$("prompt").onkeydown = (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) send() };
$("form").onsubmit = ({submitter: {id}}) => { id ? send() : run.stopper?.abort(); return false };
list($("key").onchange = list);
</script>
"""


PAGE_HEADERS = [("Content-Security-Policy", (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'")),
    ("Cache-Control", "no-cache"), ("Vary", "Accept")]


# ---- 12. Run: command line, signals ----


def parse_url(text: str, port: int = 11434) -> urllib.parse.SplitResult:
    """Read HOST, HOST:PORT or a URL the way Ollama reads $OLLAMA_HOST."""
    match = re.fullmatch(r"(?:(https?)://)?(\[[0-9a-f:.]+\]|[\w.-]*)(?::(\d{1,9}))?(/[!$->@-~]*)?",
                         text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise Mistake("it is neither HOST:PORT nor http://HOST:PORT")
    scheme, host, own_port, path = match.groups("")
    if int(own_port or 0) > 65535:
        raise Mistake(f"the port {own_port} is above 65535")
    if path.rstrip("/").endswith("/v1"):
        raise Mistake(f"remove /v1 from {text!r}: the proxy uses Ollama's native API")
    if scheme:
        port = 443 if scheme.lower() == "https" else 80
    return urllib.parse.urlsplit(
        f"{scheme or 'http'}://{host or '127.0.0.1'}:{own_port or port}{path.rstrip('/')}")


def parse_pair(text: str) -> tuple[str, str]:
    """Read NAME=VALUE."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise Mistake(f"{text!r} is not NAME=VALUE")
    return name, value


def parse_option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE for one of Ollama's options; the value is JSON."""
    name, value = parse_pair(text)
    if name not in OPTIONS:
        raise Mistake(f"unknown option {name!r}")
    try:
        return name, [value] if name == "stop" else json.loads(value)
    except ValueError:
        raise Mistake(f"{value!r} is not a value for {name}") from None


def parse_number(text: str) -> int:
    """Read a whole number."""
    if not re.fullmatch("[0-9]{1,7}", text):
        raise Mistake(f"{text!r} is not a whole number")
    return int(text)


# Flag: default ([] makes it repeatable, False a switch), reader, name of its value, help.
FLAGS: dict[str, tuple[Any, Callable[[str], Any], str, str]] = {
    "listen": ("127.0.0.1:11435", lambda text: parse_url(text.replace("/", " "), 11435),
               "HOST:PORT", "where clients connect; port 0 picks a free one"),
    "upstream": ("127.0.0.1:11434", parse_url, "URL", "where Ollama is; or set $OLLAMA_HOST"),
    "demo": (False, bool, "", "scripted answers, without Ollama"),
    "api-key": ([], parse_key, "[NAME:]KEY", "key for callers; the list of processes may show it"),
    "api-key-file": (None, str, "FILE", "file with keys for callers, one per line"),
    "insecure": (False, bool, "", "allow other machines without keys"),
    "tls-cert": (None, str, "FILE", "serve HTTPS with this certificate (PEM)"),
    "tls-key": (None, str, "FILE", "its private key, if in a separate file"),
    "alias": ([], parse_pair, "NAME=MODEL", "another name for a model"),
    "option": ([], parse_option, "NAME=VALUE", "default for an Ollama option (num_ctx=16384)"),
    "keep-alive": (None, lambda text: int(text) if text.lstrip("-").isdigit() else text,
                   "DURATION", "default for how long models stay loaded (5m; -1: forever)"),
    "allow-truncation": (False, bool, "", "let Ollama silently cut prompts that are too long"),
    "hooks": (None, str, "FILE", "Python with authenticate(), shape() or observe()"),
    "heartbeat": ("10", parse_number, "SECONDS", "silence before a heartbeat; 0: none"),
    "idle-timeout": ("600", parse_number, "SECONDS", "Ollama's silence before an error; 0: none"),
    "max-connections": ("512", parse_number, "N", "connections at a time; others get a 503"),
}


class CommandLine(argparse.ArgumentParser):
    """argparse, with a mistake in one line."""
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ndjson_sse_proxy: {message.replace('argument --', '--')} (try --help)\n")


def read_settings(argv: list[str], environ: Mapping[str, str]) -> argparse.Namespace:
    """Return the settings. On a mistake, exit with status 2; the message never shows a key."""
    line = CommandLine(
        prog="ndjson_sse_proxy.py", allow_abbrev=False,
        description="Ollama's NDJSON in, OpenAI-style SSE out.",
        epilog="Each flag has a matching environment variable: NDJSON_SSE_PROXY_LISTEN, "
        "NDJSON_SSE_PROXY_DEMO=1 and so on; the flag wins. The proxy sends $OLLAMA_API_KEY to "
        "Ollama as its key.")
    line.add_argument("--version", action="version", version=f"ndjson_sse_proxy {__version__}")
    for flag, (default, read, metavar, text) in FLAGS.items():
        kind: Json = {"action": "store_true"} if default is False else {
            "type": read, "metavar": metavar, "action": "append" if default == [] else "store"}
        text += "; repeatable" if default == [] else f" (default: {default})" if default else ""
        line.add_argument("--" + flag, default=default, help=text, **kind)
    variables = ["--upstream=" + environ["OLLAMA_HOST"]] if environ.get("OLLAMA_HOST") else []
    for name, text in environ.items():  # a variable is like a flag in front of the others
        if name.startswith("NDJSON_SSE_PROXY_"):
            flag = name[len("NDJSON_SSE_PROXY_"):].lower().replace("_", "-")
            default = FLAGS.get(flag, [""])[0]
            if default is not False:
                parts = text.split() or [""] if default == [] else [text]
                variables += [f"--{flag}={part}" for part in parts]
            elif text != "0":
                variables.append("--" + flag if text == "1" else f"--{flag}={text}")
    found, rest = line.parse_known_args(variables + argv)
    if rest:  # not shown whole: it may be a key
        line.error("unknown flag " + re.split("[^a-z-]", rest[0])[0] if rest[0][:2] == "--" else
                   "an argument has no flag")
    if "" in vars(found).values():  # perhaps an unset variable of the shell
        line.error("the value of a flag is empty")
    if found.demo and any(text.startswith("--upstream") for text in argv):
        line.error("--demo and --upstream can't be combined")
    return found


def allow_descriptors(settings: argparse.Namespace) -> None:
    """Raise the system's limit of open files, or lower --max-connections to fit it."""
    with suppress(ImportError):  # Windows has no such limit
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * (settings.max_connections + MAX_EXTRA) + 50  # a stream takes two
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if 0 <= soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            settings.max_connections = max(1, (most - 50) // 2 - MAX_EXTRA)
            say(f"warning: --max-connections is {settings.max_connections} because this system "
                f"allows only {most} open files (ulimit -n)")


def main() -> int:
    """Serve until Ctrl-C or SIGTERM. Return the exit status: 0 if no answer had to be cut."""
    settings = read_settings(sys.argv[1:], os.environ)
    upstream_key = os.environ.get("OLLAMA_API_KEY", "")
    if settings.demo:
        settings.upstream = parse_url(start_demo())
    here, there = (re.sub(r"^(127\.[\d.]+|0\.0\.0\.0|\[::1?\])", "localhost", url.netloc)
                   for url in (settings.listen, settings.upstream))
    try:
        if not re.fullmatch("[!-~]*", upstream_key):
            raise ValueError("$OLLAMA_API_KEY can't go into a header")
        if here == there:
            raise ValueError(f"--upstream {settings.upstream.netloc} is the proxy's own address")
        allow_descriptors(settings)
        return serve(ProxyServer(settings, upstream_key))
    except (OSError, ValueError) as error:
        say(f"ndjson_sse_proxy: can't start on {settings.listen.netloc}: {error}")
        return 2


def announce(server: ProxyServer) -> None:
    """Say how the proxy is set up, and if Ollama answers."""
    settings, gate, count = server.settings, server.gate, len(server.gate.owners)
    say(f"ndjson_sse_proxy {__version__} is listening on {server.url} (open it in a browser); "
        f"base_url: {server.url}/v1")
    callers = ("anyone whom the hook accepts" if gate.hook else
               f"anyone with a key ({count} key{'s' * (count != 1)})" if gate.has_keys else
               "anyone who can reach it" if settings.insecure else "anyone on this machine")
    say(f"upstream: {'demo' if settings.demo else settings.upstream.geturl()}; callers: {callers}; "
        f"hooks: {', '.join(server.hooks) or 'none'}")
    if "num_ctx" in dict(settings.option):
        say("note: Ollama's own /v1 routes ignore num_ctx; set OLLAMA_CONTEXT_LENGTH for Ollama")
    try:  # a wrong URL should show before the first client comes
        server.upstream.connect().close()
    except ProxyError as error:
        say(f"warning: {error.message} ({error.detail}); or try --demo, without Ollama")


def serve(server: ProxyServer) -> int:
    """Serve until a signal, then let requests end. A second signal ends them at once."""
    signals: list[int] = []  # not an Event: a handler may interrupt its lock's owner

    def note(number: int, frame: Any) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(1)  # whatever is blocked

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    announce(server)
    while not signals:
        time.sleep(0.1)
    count = server.observer.counts["active_requests"]
    if count:
        say(f"stopping: waiting up to {DRAIN_SECONDS:g} s for {count} request{'s' * (count != 1)}; "
            "press Ctrl-C again to stop now")
    whole = server.drain()
    say("stopped" if whole else "stopped; some answers were cut off")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
