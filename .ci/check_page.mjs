// The page at /, in a real browser, against --demo (argument 1); screenshots go to the folder $SHOTS, if given.
// Needs playwright-core; Chromium at $CHROMIUM or /usr/bin/chromium.
import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const [base, shots] = [process.argv[2].replace(/\/$/, ""), process.env.SHOTS];
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update"] });

// A page, and what went wrong on it. What the browser says of an HTTP status is no fault of the page.
async function open(options = {}) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, ...options });
  page.faults = [];
  page.on("console", (message) => {
    if (!/Failed to load resource.*(404|401|502)/.test(message.text())) page.faults.push(message.text());
  });
  page.on("pageerror", (error) => page.faults.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(base + "/") && request.url() !== "data:,") page.faults.push(request.url());
  });
  page.response = await page.goto(base + "/");
  await page.waitForFunction(() => document.querySelector("#model").options.length);
  return page;
}
const text = (page, selector) => page.locator(selector).innerText();
const count = (page, selector) => page.locator(selector).count();
const status = (page, pattern) => page.waitForFunction((source) =>
  new RegExp(source).test(document.querySelector("#status").textContent), pattern.source, { timeout: 10000 });
async function send(page, model, pattern = /^(Done|failed|cut off)/) {
  await page.selectOption("#model", model);
  await page.click("#send");
  await status(page, pattern);
}
async function shot(page, name) {
  if (shots) await page.screenshot({ path: `${shots}/${name}.png`, fullPage: true });
}
async function hangups() {
  const metrics = await (await fetch(base + "/metrics")).text();
  return Number(/^ndjson_sse_proxy_client_hangups_total (\d+)/m.exec(metrics)?.[1] ?? 0);
}
if (shots) mkdirSync(shots, { recursive: true });

// It loads; its policy allows nothing foreign; others than browsers get one line of text.
let page = await open();
const policy = page.response.headers()["content-security-policy"];
for (const part of ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"])
  assert.ok(policy.includes(part), policy);
assert.equal((await (await fetch(base + "/")).text()).trim().split("\n").length, 1);
assert.deepEqual((await text(page, "#model")).split("\n"), ["demo-text", "demo-think", "demo-tool", "demo-error"]);
assert.equal(await text(page, "#demo"), "Demo: these answers are scripted.");
assert.match(await text(page, "body"), /Point at a row to light up a line and its frames/);
const html = await (await fetch(base + "/", { headers: { accept: "text/html" } })).text();
assert.equal(html.match(/light-dark\(|:has\(|[{;}]\s*&|content-visibility|\(\?<[=!]/), null);  // not known in 2022
await shot(page, "empty");

// The three columns and the text. A line lights up with its frames, and they stand side by side.
const lit = () => page.evaluate(() => [...document.querySelectorAll("#rows summary")].filter((row) =>
  getComputedStyle(row).backgroundColor !== "rgba(0, 0, 0, 0)").map((row) => row.innerText));
const row = (content) => page.locator("#rows summary", { hasText: content });
const left = () => page.evaluate(() => {  // to scroll
  const list = document.querySelector("#rows");
  return list.scrollHeight - list.scrollTop - list.clientHeight;
});
await send(page, "demo-text");
assert.ok(Math.abs(await left()) <= 1 && await page.evaluate(() => document.querySelector("#rows").scrollTop > 0));
assert.match(await text(page, "#up"), /POST \/api\/chat {/);
assert.match(await text(page, "#content"), /^Hello! Every word[^]*\nThis newline did not break its frame\.$/);
assert.match(await text(page, "#status"), /Done \(stop\): 24 tokens/);
assert.equal(await count(page, "#rows div:last-child > code"), await count(page, "#rows div:first-child > code") + 3);  // role, usage, [DONE]
for (const way of ["focus", "hover"]) {
  await row(" NDJSON")[way]();
  const [shown, ...others] = await lit();
  assert.match(shown, /"content":" NDJSON"}[^]*data: [^]*"content":" NDJSON"}/);
  assert.deepEqual(others, []);
  await page.evaluate(() => document.activeElement.blur());
}
assert.match(await page.locator("#rows code").last().getAttribute("title"), /added by the proxy/);

// A click opens a row and another closes it; so does Enter. Lines break after "," and "{" only.
for (const way of ["click", "Enter"])
  for (const open of [true, false]) {
    await (way === "click" ? row(" NDJSON").click() : row(" NDJSON").press("Enter"));
    assert.equal(await page.locator("#rows details[open]").count(), open ? 1 : 0);
    assert.equal((await row(" NDJSON").locator("i").last().evaluate((i) => getComputedStyle(i).fontSize)) !== "0px", open);
    if (open) assert.deepEqual(await page.evaluate(badBreaks), []);
  }
function badBreaks() {
  const bad = [];
  for (const code of document.querySelectorAll("#rows code, #up code")) {
    const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT), range = document.createRange();
    for (let node, before = "", top; (node = walker.nextNode());) {
      if (getComputedStyle(node.parentNode).fontSize === "0px") { before = ","; continue; }
      for (let i = 0; i < node.length; i++) {
        range.setStart(node, i);
        range.setEnd(node, i + 1);
        const box = range.getBoundingClientRect();
        if (top !== undefined && box.top > top + 8 && !/[,{ ]/.test(before)) bad.push(code.textContent);
        [before, top] = [node.data[i], box.top];
      }
    }
  }
  return bad;
}

// Thinking is folded, a call is shown, errors are errors.
await send(page, "demo-think");
assert.equal(await page.locator("#reasoning").isVisible(), false);
await page.getByText("Thinking", { exact: true }).click();
assert.match(await text(page, "#reasoning"), /^The question is open\./);
await send(page, "demo-tool");
assert.equal((await text(page, "#calls")).trim(), 'get_weather({"city":"Paris"})');
await send(page, "demo-error");
assert.match(await text(page, "#end"), /^\(cut off: .*unexpected EOF\)$/);
await page.evaluate(() => document.querySelector("#model").add(new Option("nosuch")));
await send(page, "nosuch");
assert.match(await text(page, "#status"), /^failed: .*ollama pull nosuch/);
assert.equal(await count(page, "#rows code"), 1);

// Streams as the demo has none: heartbeats before the first line, an error that no line told, a cut. They come
// in pieces of three bytes, so that frames and even characters are cut.
async function play(...blocks) {
  await page.evaluate((body) => {
    const bytes = new TextEncoder().encode(body), real = window.fetch;
    window.fetch = async () => {
      window.fetch = real;
      return new Response(new ReadableStream({ start(stream) {
        for (let i = 0; i < bytes.length; i += 3) stream.enqueue(bytes.slice(i, i + 3));
        stream.close();
      } }));
    };
  }, blocks.map((block) => block + "\n\n").join(""));
  await send(page, "demo-text");
  return page.locator("#rows summary").evaluateAll((rows) =>
    rows.map((row) => [...row.children].map((cell) => cell.children.length).join(" ")));  // lines, frames
}
const frame = (delta, finish_reason = null) => "data: " + JSON.stringify({ id: "x", choices: [{ delta, finish_reason }] });
const beats = [": POST /api/chat {}", frame({ role: "assistant", content: "" }), frame({}), ': {"model":"m"}',
  frame({ content: "<img src=x onerror=alert(1)> 🙂" }), frame({})];
assert.deepEqual(await play(...beats, frame({}, "stop"), 'data: {"choices":[],"usage":{"completion_tokens":1}}', "data: [DONE]"),
  ["0 1", "0 1", "1 2", "0 1", "0 1", "0 1"]);
assert.equal(await text(page, "#content"), "<img src=x onerror=alert(1)> 🙂");
assert.equal((await play(...beats, 'data: {"error":{"message":"it was cut"}}')).pop(), "0 1");
assert.equal(await text(page, "#end"), "(cut off: it was cut)");
await play(...beats.slice(1));  // a shape hook hides the request to Ollama
assert.equal(await text(page, "#up"), "");
assert.match(await text(page, "#end"), /cut off: .*without \[DONE\]/);
await page.evaluate(() => {  // thousands of frames
  for (let i = 0; i < 5000; i++)
    [`: {"model":"m","n":${i}}`, 'data: {"id":"x","choices":[{"delta":{"content":"y"}}]}'].forEach(receive);
});
assert.ok(await count(page, "#rows code") > 10000);

// Stop ends the stream, and the proxy notices. By keyboard: Tab reaches everything, Ctrl+Enter sends.
const before = await hangups();
await page.selectOption("#model", "demo-text");
await page.focus("#prompt");
await page.keyboard.press("Control+Enter");
await page.waitForFunction(() => document.querySelectorAll("#rows code").length > 4);
await page.getByRole("button", { name: "Stop" }).press("Enter");
await status(page, /^stopped$/);
assert.equal(await text(page, "#end"), "(stopped)");
for (const end = Date.now() + 5000; await hangups() <= before;) assert.ok(Date.now() < end, "no hang-up was counted");
await send(page, "demo-think");
await page.focus("#model");
const reached = [];
for (let i = 0; i < 8; i++) {
  reached.push(await page.evaluate(() => {
    const { id, parentNode, textContent, tagName } = document.activeElement;
    return id || (parentNode.parentNode.id === "rows" ? "row" : textContent);
  }));
  await page.keyboard.press("Tab");
}
assert.deepEqual(reached, ["model", "key", "prompt", "send", "Stop", "Thinking", "row", "row"]);
assert.deepEqual(page.faults, []);

// Ollama starts after the page, without a model at first; then Send needs no reload. A 401 asks for the key.
page = await browser.newPage();
const answers = [[502, { error: { message: "Ollama is down" } }], [502, { error: { message: "Ollama is down" } }],
  [200, { data: [] }], [401, { error: { message: "no such key" } }]];
await page.route("**/v1/models", (route) => {
  const [status, json] = answers.shift() ?? [];
  return status ? route.fulfill({ status, json }) : route.continue();
});
await page.goto(base + "/");
await status(page, /Ollama is down/);
for (const said of [/502: Ollama is down/, /ollama pull NAME/, /401: no such key/]) {
  await page.click("#send");
  await status(page, said);
}
assert.equal(await page.evaluate(() => document.activeElement.id), "key");
await page.click("#send");
await status(page, /^Done/);
assert.match(await text(page, "#content"), /^Hello!/);

// To look at: both themes, wide and narrow, and nothing to scroll sideways.
for (const colorScheme of ["light", "dark"])
  for (const [name, viewport] of [["wide", { width: 1280, height: 900 }], ["narrow", { width: 390, height: 844 }]]) {
    page = await open({ colorScheme, viewport });
    for (const model of ["demo-text", "demo-think", "demo-tool", "demo-error"]) {
      await send(page, model);
      await page.locator("#rows summary").nth(1).focus();
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "scrolls sideways");
      if (name === "narrow") {
        const [chat, panel] = await Promise.all(["#content", "#up"].map((s) => page.locator(s).evaluate((e) =>
          e.parentNode.getBoundingClientRect().bottom)));
        assert.ok(chat < panel, "the chat comes first");
      }
      await shot(page, `${name}-${colorScheme}-${model}`);
    }
    assert.deepEqual(page.faults, []);
    await page.close();
  }
await browser.close();
console.log("the page: all as expected");
