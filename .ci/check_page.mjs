// The page at /, in a real browser, against --demo (argument 1); screenshots go to the folder $SHOTS, if given.
// Needs playwright-core; Chromium at $CHROMIUM or /usr/bin/chromium. The copied Python is run by $PYTHON
// (or python3) where it has the openai package, the copied JavaScript where node finds openai.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createServer } from "node:http";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { chromium } from "playwright-core";

const [base, shots] = [process.argv[2].replace(/\/$/, ""), process.env.SHOTS];
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update"] });
const NASTY = "It's \"two\" 'lines'\n$HOME `id` $(id) \\n \\\\ ${1} %s !! 🙂 \u4f60\u597d </script>\ttab";

// A page, and what went wrong on it. What the browser says of an HTTP status is no fault of the page.
async function open(options = {}) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, ...options });
  page.faults = [];
  page.on("console", (message) => {
    if (!/Failed to load resource.*(404|401)/.test(message.text())) page.faults.push(message.text());
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
async function send(page, model, pattern = /^(Done|Failed)/) {
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
for (const part of ["default-src 'none'", "script-src 'sha256-", "connect-src 'self'", "frame-ancestors 'none'"])
  assert.ok(policy.includes(part), policy);
assert.ok(!policy.includes("unsafe"), policy);
assert.equal((await (await fetch(base + "/")).text()).trim().split("\n").length, 1);
assert.match(await text(page, "#model"), /demo-text: plain text/);
await shot(page, "empty");

// The three columns and the text. A frame shows the line that it came from.
await send(page, "demo-text");
assert.match(await text(page, "#up"), /POST \/v1\/chat\/completions[^]*POST \/api\/chat {/);
assert.match(await text(page, "#text"), /^Hello! Every word[^]*\nThis newline did not break its frame\.$/);
assert.match(await text(page, "#status"), /Done \(stop\).*0\.\d+ s.*tokens\/s/);
assert.equal(await count(page, "#frames li"), await count(page, "#lines li") + 3);  // role, usage, [DONE]
for (const way of ["focus", "hover"]) {
  await page.locator("#frames li", { hasText: "NDJSON" })[way]();
  assert.match(await text(page, "#lines .lit"), /"content":" NDJSON"/);
  assert.equal(await count(page, ".lit"), 2);
}
assert.ok(await page.evaluate(() => {  // in view
  const [line, list] = [".lit", "#lines"].map((s) => document.querySelector(s).getBoundingClientRect());
  return line.top >= list.top && line.bottom <= list.bottom;
}));
await page.locator("#frames li").last().focus();
assert.match(await text(page, ".lit"), /the proxy's own\s+data: \[DONE\]/);

// Thinking is folded, a call is shown, errors are errors.
await send(page, "demo-think");
assert.equal(await page.locator("#thought").isVisible(), false);
await page.click("summary");
assert.match(await text(page, "#thought"), /^The question is open\./);
await send(page, "demo-tool");
assert.equal((await text(page, "#calls")).trim(), 'get_weather({"city":"Paris"})');
await send(page, "demo-error");
assert.match(await page.getByRole("alert").innerText(), /unexpected EOF/);
await page.evaluate(() => document.querySelector("#model").add(new Option("nosuch")));
await send(page, "nosuch");
assert.match(await page.getByRole("alert").innerText(), /^404: .*ollama pull nosuch/);
assert.equal(await count(page, "#frames li"), 0);

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
  return (await page.locator("#frames time").allTextContents()).map((label) => label.split(", ")[1]);
}
const frame = (delta, finish_reason = null) => "data: " + JSON.stringify({ id: "x", choices: [{ delta, finish_reason }] });
const beats = [": POST /api/chat {}", frame({ role: "assistant", content: "" }), frame({}), ': {"model":"m"}',
  frame({ content: "<img src=x onerror=alert(1)> 🙂" }), frame({})];
assert.deepEqual(await play(...beats, frame({}, "stop"), 'data: {"choices":[],"usage":{"completion_tokens":1}}', "data: [DONE]"),
  ["the proxy's own", "the proxy's own", "from line 1", "the proxy's own", "from line 1", "the proxy's own", "the proxy's own"]);
assert.equal(await text(page, "#text"), "<img src=x onerror=alert(1)> 🙂");
assert.equal((await play(...beats, 'data: {"error":{"message":"it was cut"}}')).pop(), "the proxy's own");
assert.equal(await page.getByRole("alert").innerText(), "it was cut");
await play(...beats);
assert.match(await page.getByRole("alert").innerText(), /without \[DONE\]/);
await page.evaluate(() => {  // thousands of frames
  for (let i = 0; i < 5000; i++)
    [`: {"model":"m","n":${i}}`, 'data: {"id":"x","choices":[{"delta":{"content":"y"}}]}'].forEach(receive);
});
assert.ok(await count(page, "#frames li") > 5000);

// Stop ends the stream, and the proxy notices. By keyboard: Tab reaches everything, Ctrl+Enter sends.
const before = await hangups();
await page.selectOption("#model", "demo-text");
await page.focus("#prompt");
await page.keyboard.press("Control+Enter");
await page.waitForFunction(() => document.querySelectorAll("#frames li").length > 2);
await page.getByRole("button", { name: "Stop" }).press("Enter");
await status(page, /^Stopped$/);
for (const end = Date.now() + 5000; await hangups() <= before;) assert.ok(Date.now() < end, "no hang-up was counted");
await send(page, "demo-think");
await page.focus("#model");
const reached = [];
for (let i = 0; i < 11; i++) {
  reached.push(await page.evaluate(() => {
    const { id, parentNode, textContent, tagName } = document.activeElement;
    return tagName === "LI" ? parentNode.id : tagName === "BUTTON" || tagName === "SUMMARY" ? textContent : id;
  }));
  await page.keyboard.press("Tab");
}
assert.deepEqual(reached, ["model", "key", "prompt", "Send", "Stop", "Copy as curl", "Copy as Python",
  "Copy as JavaScript", "up", "lines", "frames"]);
await page.focus("#frames li");
for (let i = 0; i < 3; i++) await page.keyboard.press("ArrowDown");
assert.match(await text(page, "#lines .lit"), /, line 3/);

// What is copied runs as pasted, and carries the prompt unharmed: a server in between takes it down.
let asked;
const between = createServer(async (request, response) => {
  let body = "";
  for await (const piece of request.setEncoding("utf8")) body += piece;
  asked = { body: JSON.parse(body), key: request.headers.authorization };
  const answer = await fetch(base + request.url, { method: "POST", body, headers: { authorization: asked.key } });
  response.writeHead(answer.status, { "content-type": answer.headers.get("content-type") });
  response.end(await answer.text());
}).listen(0, "127.0.0.1");
await new Promise((ready) => between.once("listening", ready));
const place = `http://127.0.0.1:${between.address().port}`, python = process.env.PYTHON || "python3";
const programs = { curl: ["bash", ".sh"], Python: [python, ".py"], JavaScript: [process.execPath, ".mjs"] };
const runs = (program, ...args) => new Promise((done) => execFile(program, args, (error, out, err) => done([out, err])));
const skipped = [];
if ((await runs(python, "-c", "import openai"))[1]) skipped.push("Python");
try { import.meta.resolve("openai"); } catch { skipped.push("JavaScript"); }
await page.context().grantPermissions(["clipboard-read"]);
await page.fill("#key", "sk-it's");
await page.locator("#key").blur();
await page.selectOption("#model", "demo-text");
await page.fill("#prompt", NASTY);
for (const [kind, [program, ending]] of Object.entries(programs)) {
  await page.click(`text=Copy as ${kind}`);
  await status(page, /^Copied$/);
  const code = await page.evaluate(() => navigator.clipboard.readText());
  assert.equal(code.trim(), (await page.inputValue("#code")).trim());
  const file = new URL(`copied-${process.pid}${ending}`, import.meta.url).pathname;  // here node finds openai
  writeFileSync(file, code.replaceAll(base, place));
  const [out, err] = skipped.includes(kind) ? [] : await runs(program, file);
  rmSync(file);
  if (skipped.includes(kind)) { console.log(`copied ${kind} was not run: no openai package`); continue; }
  assert.match(out, /Hello!/, err);
  assert.equal(asked.body.messages[0].content, NASTY, kind);
  assert.deepEqual([asked.key, asked.body.model, asked.body.stream], ["Bearer sk-it's", "demo-text", true]);
}
between.close();

// The key outlives a reload, in this tab alone; and where nothing can be copied, the code is selected.
await page.reload();
assert.equal(await page.inputValue("#key"), "sk-it's");
await page.evaluate(() => { document.execCommand = () => false; });
await page.click("text=Copy as curl");
assert.match(await text(page, "#status"), /Ctrl\+C/);
assert.match(await page.evaluate(() => getSelection().toString()), /^curl /);
assert.deepEqual(page.faults, []);

// To look at: both themes, wide and narrow, and nothing to scroll sideways.
for (const colorScheme of ["light", "dark"])
  for (const [name, viewport] of [["wide", { width: 1280, height: 900 }], ["narrow", { width: 390, height: 844 }]]) {
    page = await open({ colorScheme, viewport });
    for (const model of ["demo-text", "demo-think", "demo-tool", "demo-error"]) {
      await send(page, model);
      await page.locator("#frames li").nth(2).focus();
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "scrolls sideways");
      await shot(page, `${name}-${colorScheme}-${model}`);
    }
    assert.deepEqual(page.faults, []);
    await page.close();
  }
await browser.close();
console.log("the page: all as expected");
