// The openai package of npm against --demo (argument 1).
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const create = (model, more) => client.chat.completions.create({ model, messages, ...more });

const whole = await create("demo-text");
assert.match(whole.choices[0].message.content, /^Hello!/);

let text = "", reason;
for await (const chunk of await create("demo-text", { stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  reason = chunk.choices[0].finish_reason;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(reason, "stop");

const final = await client.chat.completions.stream({ model: "demo-tool", messages }).finalChatCompletion();
const call = final.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "get_weather");
assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });

let seen = 0;
await assert.rejects(async () => {
  for await (const chunk of await create("demo-error", { stream: true })) seen += chunk ? 1 : 0;
}, (error) => error instanceof OpenAI.APIError && /unexpected EOF/.test(error.message));
assert.ok(seen > 2);

await assert.rejects(create("nosuch"), (error) => error.status === 404 && error.code === "model_not_found");
console.log("openai of npm: all as expected");
