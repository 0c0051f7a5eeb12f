"""The openai SDK against --demo (argument 1) and against recordings of a real Ollama (argument 2)."""
import sys

import openai

demo = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Hi"}]

assert [m.id for m in demo.models.list()][0] == "demo-text"

whole = demo.chat.completions.create(model="demo-text", messages=messages)
assert whole.choices[0].message.content.startswith("Hello!"), whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

chunks = list(demo.chat.completions.create(
    model="demo-text", messages=messages, stream=True, stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == whole.choices[0].message.content, text
assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "stop"

traced = demo.chat.completions.create(  # comments are skipped
    model="demo-text", messages=messages, stream=True, extra_query={"trace": "1"})
assert "".join(c.choices[0].delta.content or "" for c in traced) == text

cut = demo.chat.completions.create(model="demo-text", messages=messages, max_completion_tokens=2)
assert cut.choices[0].finish_reason == "length"

thought = demo.chat.completions.create(model="demo-think", messages=messages)
assert thought.choices[0].message.reasoning, thought

with demo.chat.completions.stream(model="demo-tool", messages=messages) as stream:
    final = stream.get_final_completion()
call = final.choices[0].message.tool_calls[0]
assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Paris"}')
answer = demo.chat.completions.create(model="demo-tool", messages=[
    *messages, final.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}])
assert answer.choices[0].message.content == "The tool said: sunny"

seen = []
try:
    for chunk in demo.chat.completions.create(model="demo-error", messages=messages, stream=True):
        seen.append(chunk)
    raise SystemExit("the error in the middle of the stream was not raised")
except openai.APIError as error:
    assert "unexpected EOF" in error.message and len(seen) > 2, error
try:
    demo.chat.completions.create(model="nosuch", messages=messages)
    raise SystemExit("a missing model was not refused")
except openai.NotFoundError as error:
    assert error.code == "model_not_found" and "ollama pull nosuch" in error.message, error

real = openai.OpenAI(base_url=sys.argv[2] + "/v1", api_key="none", max_retries=0)
for stream in False, True:
    answer = real.chat.completions.create(model="hello", messages=messages, stream=stream)
    text = ("".join(c.choices[0].delta.content or "" for c in answer) if stream
            else answer.choices[0].message.content)
    assert text == 'Hello from a tiny model: 你好 🙂 naïve.\nSecond line, with "quotes".', text
print("openai", openai.__version__, "for Python: all as expected")
