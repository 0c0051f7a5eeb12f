"""A scripted Ollama for CI's clients, the benchmark and the soak.

    python .ci/ollama.py    # takes a free port; the first line on stderr says which

Scripted models stream word by word: demo-text, demo-think, demo-tool, demo-error and hello. A JSON
schema in `format`, the tools and a tool's result change what they say. Load models are named
KIND:FRAMES[:PER_SECOND]. They send bytes that were made beforehand, all from one thread, so that
this server is not the bottleneck.
"""
import asyncio
import functools
import json
import math
import random
import re
import socket
import struct
import sys
import time

PACE_SECONDS = 0.005  # between two words, so that they don't arrive together
RESET = object()  # a step that resets the connection


# ---- Scripted models ---------------------------------------------------------------------------


def words(text, key="content"):
    """Split a text into the messages of a stream, one word each."""
    return [{key: word} for word in re.findall(r"\s*\S+", text)]


def call(name, arguments):
    """Return a message that calls one tool."""
    return {"tool_calls": [{"function": {"index": 0, "name": name, "arguments": arguments}}]}


MODELS = {
    "demo-text": words("Hello! Every word here was a line of NDJSON and became a frame of SSE. "
                       "你好 🙂\nThis newline did not break its frame."),
    "demo-think": [*words("The question is open. The answer is known.", "thinking"),
                   *words("It is 42.")],
    "demo-tool": [call("get_weather", {"city": "Paris"})],
    "demo-error": [*words("This answer will not be"), {
        "error": "an error was encountered while running the model: unexpected EOF"}],
    "hello": [{"content": token} for token in (  # recorded from a real Ollama, token by token
        "Hello", " from", " a", " tiny", " model", ":", " ", "你", "好", " 🙂", " naï", "ve", ".",
        "\n", "Se", "cond", " line", ",", " with", " \"", "qu", "otes", "\".")],
}
MODIFIED = "2026-01-01T00:00:00Z"
LISTS = {
    "/api/tags": {"models": [{"name": name, "model": name, "modified_at": MODIFIED, "size": 0,
                              "digest": "", "details": {}} for name in MODELS]},
    "/api/ps": {"models": []},
    "/v1/models": {"object": "list", "data": [
        {"id": name, "object": "model", "created": 1767225600, "owned_by": "library"}
        for name in MODELS]},
}


def resolve(reference, root):
    """Return what a schema's "$ref" refers to."""
    for step in reference.split("/")[1:]:
        root = root[step.replace("~1", "/").replace("~0", "~")]
    return root


def sample(schema, root, depth=0):
    """Return a value that fits a JSON schema. Deep down, it takes the way out of a recursion."""
    deep, depth = depth > 9, depth + 1
    if "$ref" in schema:
        return sample(resolve(schema["$ref"], root), root, depth)
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return sample(schema[name][-1 if deep else 0], root, depth)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        return [sample(schema["items"], root, depth)] if "items" in schema and not deep else []
    values = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "null": None}
    if kind in values:
        return values[kind]
    return {name: sample(value, root, depth) for name, value in schema.get("properties", {}).items()
            if not deep or name in schema.get("required", [])}


def script(body):
    """Return the messages that the model streams and its done_reason."""
    name, schema, tools = body["model"], body.get("format"), body.get("tools")
    last = (body.get("messages") or [{}])[-1]
    said = MODELS[name]
    if schema and name != "demo-error":
        value = sample({} if schema == "json" else schema, schema)
        said = words(json.dumps(value, ensure_ascii=False))
    elif name == "demo-tool" and last.get("role") == "tool":
        said = words("The tool said: " + last["content"])
    elif name == "demo-tool" and tools:
        function = tools[0]["function"]
        parameters = function.get("parameters") or {}
        said = [call(function["name"], sample(parameters, parameters))]
    limit = (body.get("options") or {}).get("num_predict") or body.get("max_tokens") or 0
    return (said[:limit], "length") if 0 < limit < len(said) else (said, "stop")


# ---- Answers: an iterable of steps. Bytes are sent, a time is waited for, RESET resets. ---------


def chunk(data):
    """Return data as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def head(content_type):
    """Return the head of a chunked answer."""
    return (b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
            % content_type.encode())


LAST_CHUNK = b"0\r\n\r\n"
NDJSON_HEAD = head("application/x-ndjson")


def to_json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def whole(status, value):
    """Yield an answer with a Content-Length: JSON, or a plain text."""
    body, kind = to_json(value), "application/json; charset=utf-8"
    if isinstance(value, str):
        body, kind = value.encode(), "text/plain"
    yield (f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\n"
           f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def native_error(status, text):
    return whole(status, {"error": text})


def openai_error(status, text):
    kind = "not_found_error" if status == 404 else "api_error"
    return whole(status, {"error": {"message": text, "type": kind, "param": None, "code": None}})


def record(name, message, generate, **more):
    """Return one line of /api/chat or /api/generate."""
    if "error" in message:
        return to_json(message) + b"\n"
    said = {"message": {"role": "assistant", "content": "", **message}}
    if generate:
        said = {"response": message.get("content", ""), **message}
        said.pop("content", None)
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    stamp = f"{second}.{time.time_ns() % 10**9:09}Z"
    return to_json({"model": name, "created_at": stamp, **said, "done": False, **more}) + b"\n"


def native_stream(body, said, reason, generate):
    """Yield the steps of /api/chat or /api/generate: one record a chunk."""
    yield NDJSON_HEAD
    for message in said:
        yield chunk(record(body["model"], message, generate))
        yield time.monotonic() + PACE_SECONDS
    if "error" not in said[-1]:
        yield chunk(record(
            body["model"], {}, generate, done=True, done_reason=reason, total_duration=84676369,
            load_duration=841976, prompt_eval_count=9, prompt_eval_duration=3215000,
            eval_count=len(said), eval_duration=78378000))
    yield LAST_CHUNK


def completion(body, said, reason):
    """Yield the steps of /v1/completions. As in Ollama, a stream that fails just ends."""
    base = {"id": "cmpl-1", "object": "text_completion", "created": int(time.time()),
            "model": body["model"], "system_fingerprint": "fp_ollama"}
    usage = {"prompt_tokens": 9, "completion_tokens": len(said), "total_tokens": 9 + len(said)}
    failure = said[-1].get("error")

    def piece(text, reason=None):
        return {**base, "choices": [{"text": text, "index": 0, "finish_reason": reason}]}

    texts = [message["content"] for message in said if "content" in message]
    if not body.get("stream"):
        yield from (openai_error(500, failure) if failure else
                    whole(200, {**piece("".join(texts), reason), "usage": usage}))
        return
    yield head("text/event-stream")
    for text in texts:
        yield chunk(b"data: %b\n\n" % to_json(piece(text)))
        yield time.monotonic() + PACE_SECONDS
    if not failure:
        yield chunk(b"data: %b\n\n" % to_json(piece("", reason)))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield chunk(b"data: %b\n\n" % to_json({**base, "choices": [], "usage": usage}))
        yield chunk(b"data: [DONE]\n\n")
    yield LAST_CHUNK


# ---- Load models -------------------------------------------------------------------------------

LOAD_RECORD = (b'{"model":"m","created_at":"2026-11-22T22:21:53.400636945Z","message":'
               b'{"role":"assistant","content":"%b"},"done":%b}\n')
FINAL = (b'true,"done_reason":"stop","total_duration":1427445221,"prompt_eval_count":9,'
         b'"eval_count":23')
FINISHED = chunk(LOAD_RECORD % (b"", FINAL)) + LAST_CHUNK
BROKEN = {"cut": b"", "reset": RESET, "error": chunk(b'{"error":"it died"}\n') + LAST_CHUNK,
          "garbage": chunk(b"<html>\n") + LAST_CHUNK, "no_http": b"", "unfinished": LAST_CHUNK}
LOAD_MODEL = re.compile(rf"(burst|paced|silent|slow_start|{'|'.join(BROKEN)}):\d+(:\d+)?")


def frame(number):
    """Return a record that says its number, or the time in nanoseconds."""
    return chunk(LOAD_RECORD % (b"%019d" % number, b"false"))


@functools.lru_cache(maxsize=None)
def frames(count):
    return b"".join(map(frame, range(count)))


def play(model):
    """Yield the steps of a load model."""
    kind, count, rate = [*model.split(":"), "1"][:3]
    if kind in ("silent", "slow_start"):
        yield math.inf if kind == "silent" else time.monotonic() + 0.5
    yield b"\0 no HTTP\r\n\r\n" if kind == "no_http" else NDJSON_HEAD
    if kind == "paced":
        begin = time.monotonic() + random.random() / int(rate)  # or all would tick at once
        for i in range(int(count)):
            yield begin + i / int(rate)
            yield frame(time.monotonic_ns())
    else:
        yield frames(int(count))
    yield BROKEN.get(kind, FINISHED)


# ---- The server --------------------------------------------------------------------------------


def answer(method, path, data, others):
    """Return the steps that answer a request. `others` is the number of other connections."""
    if method == "GET" and path == "/api/version":
        return whole(200, {"version": "0.0.0", "open": others})
    if method == "GET" and path in LISTS:
        return whole(200, LISTS[path])
    if method != "POST" or path not in (
            "/api/chat", "/api/generate", "/api/show", "/v1/completions"):
        return whole(404, "404 page not found")
    fail = openai_error if path.startswith("/v1/") else native_error
    try:
        body = json.loads(data)
        name = body["model"]
        if path == "/api/chat" and LOAD_MODEL.fullmatch(name):
            return play(name)
        if name not in MODELS:
            return fail(404, f"model '{name}' not found")
        if path == "/api/show":
            return whole(200, {"modified_at": MODIFIED, "details": {}})
        said, reason = script(body)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        return fail(400, f"the scripted Ollama can't answer this: {error!r}")
    if path == "/v1/completions":
        return completion(body, said, reason)
    return native_stream(body, said, reason, path == "/api/generate")


def parse_request(data):
    """Return (method, path, body) once all of a request is there, and None before."""
    top, end, rest = data.partition(b"\r\n\r\n")
    line, _, headers = top.partition(b"\r\n")
    if not end:
        return None
    length = re.search(rb"^content-length: *(\d+)", headers, re.IGNORECASE | re.MULTILINE)
    body = rest if len(rest) >= int(length[1] if length else 0) else None
    if re.search(rb"^transfer-encoding: *chunked", headers, re.IGNORECASE | re.MULTILINE):
        body = join_chunks(rest)
    method, target = line.decode("latin-1").split(" ")[:2]
    return None if body is None else (method, target.partition("?")[0], body)


def join_chunks(data):
    """Return a chunked body without its chunk sizes, or None while its end is missing."""
    body = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16) if end else 0
        if not end or len(data) < size + 2:
            return None
        if not size:
            return body
        body, data = body + data[:size], data[size + 2:]


class Connection(asyncio.Protocol):
    """One request and the steps of its answer, then FIN."""

    open = 0  # connections that the other side has not closed

    def connection_made(self, transport):
        Connection.open += 1
        self.transport, self.request, self.steps = transport, b"", None

    def connection_lost(self, error):
        Connection.open -= 1
        self.steps = iter([math.inf])

    def data_received(self, data):
        self.request += data
        request = parse_request(self.request)
        if request and self.steps is None:
            self.steps = iter(answer(*request, Connection.open - 1))
            self.go_on()

    def go_on(self):
        """Take steps until one has to be waited for."""
        for step in self.steps:
            if isinstance(step, bytes):
                self.transport.write(step)
            elif step is RESET:
                linger = struct.pack("ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return self.transport.abort()
            else:
                if step < math.inf:
                    asyncio.get_running_loop().call_at(step, self.go_on)
                return None
        return self.transport.write_eof()


async def serve():
    """Serve on a free port until the process ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    print(f"listens on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
