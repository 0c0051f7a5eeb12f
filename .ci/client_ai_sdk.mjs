// The AI SDK (ai, @ai-sdk/openai-compatible) against --demo (argument 1).
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "proxy", baseURL: process.argv[2] + "/v1", apiKey: "none",
  includeUsage: true, supportsStructuredOutputs: true,
});

const text = streamText({ model: provider("demo-text"), prompt: "Hi" });
let said = "";
for await (const part of text.textStream) said += part;
assert.match(said, /^Hello!/);
assert.equal(await text.finishReason, "stop");
assert.ok((await text.usage).outputTokens > 5);

const thought = await generateText({ model: provider("demo-think"), prompt: "Hi" });
assert.match(thought.reasoningText, /answer is known/);

const weather = tool({
  description: "The weather in a city", inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});
const called = await generateText({
  model: provider("demo-tool"), prompt: "How is it?", tools: { weather }, stopWhen: stepCountIs(3) });
assert.equal(called.text, "The tool said: sunny in text");

const { object } = await generateObject({
  model: provider("demo-text"), prompt: "Which?",
  schema: z.object({ name: z.enum(["red", "blue"]), strength: z.number().int() }) });
assert.deepEqual(object, { name: "red", strength: 1 });

const errors = [];
const failing = streamText({ model: provider("demo-error"), prompt: "Hi", maxRetries: 0,
  onError: ({ error }) => errors.push(error) });
for await (const _ of failing.textStream);
assert.match(JSON.stringify(errors) + errors.map(String), /unexpected EOF/);

await assert.rejects(generateText({ model: provider("nosuch"), prompt: "Hi", maxRetries: 0 }),
  (error) => error.statusCode === 404 && /ollama pull nosuch/.test(error.message));
console.log("AI SDK: all as expected");
