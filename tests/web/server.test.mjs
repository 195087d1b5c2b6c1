// The page of the real server, with the small PHD model of this repository and a chat model.
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { after, before, test } from "node:test";
import { launch, openPage, ready } from "./harness.mjs";
import { chatModel, eventually, hasPhdServer, phdServer, tinyModel } from "./servers.mjs";

const skip = !hasPhdServer && "target/phd-server is not there";
const skipChat = skip || (!existsSync(chatModel) && `${chatModel} is not there`);

let chromium;
before(async () => {
  if (!skip) chromium = await launch();
});
after(async () => {
  await chromium?.close();
});

async function open(t, model, options, more) {
  const server = await phdServer(model, ...options);
  t.after(() => server.close());
  return {
    server,
    state: server.state,
    ...(await openPage(t, chromium, server, more)),
  };
}

test("a PHD model continues a text, and the picture shows its ring", { skip }, async (t) => {
  const { page, ask, finished, state } = await open(t, tinyModel, ["--ctx-size", "1024", "--parallel", "2"]);
  await ready(page, "kjv-phd-cswa-2-16-32");
  await page.locator("#welcome-name", { hasText: "Begin a text" }).waitFor();
  assert.equal(await page.textContent("#rule"), "K = 2 · W = 16 · C = 32");
  assert.equal(await page.textContent("#cache-sum"), "0 of 1,024 positions");
  await page.click("#open-settings");
  assert.equal(await page.getAttribute("#temperature", "placeholder"), "0.8");
  await page.fill("#n_predict", "100");
  await page.fill("#seed", "7");
  await page.click("text=Save");
  await ask("In the beginning");
  await finished("In the beginning");
  const first = await page.textContent("article.answer .body");
  assert.ok(first.length > 150, first);
  assert.match(await page.textContent(".stats"), /limit of tokens reached · 100 tokens/);

  // After the last token the ring holds what the rule says: the prompt's five tokens and 100 more, the last one not evaluated.
  const where = await page.textContent("#ring-where");
  const position = Number(/position ([\d,]+)/.exec(where)[1]);
  assert.equal(position, 104, where);
  const live = await page.locator("#ring rect.live").count();
  assert.equal(live, Math.min(16, ((position - 1) % 32) + 1));
  await page.locator("#cache-sum", { hasNotText: /^0 of/ }).waitFor();
  const { usage, memory, totals, model } = await state();
  assert.equal(usage.used + usage.retained + usage.free, 1024);
  assert.equal(totals.predicted_tokens, 100);
  assert.equal(model.copies, 2);
  assert.ok(memory.cache_bytes > 0 && memory.hidden_bytes > 0);

  await page.click("text=Regenerate");
  await eventually("again", async () => (await state()).totals.predicted_tokens === 200);
  await finished("In the beginning");
  assert.equal(await page.textContent("article.answer .body"), first, "the same seed, the same text");
  await page.click("button:text-is('Continue')");
  await eventually("more", async () => (await state()).totals.predicted_tokens === 300);
  await page.locator(".stats", { hasText: "from the cache" }).waitFor();
  assert.ok((await page.textContent("article.answer .body")).startsWith(first));
});

test("Stop and leaving end an answer at the server within a step", { skip }, async (t) => {
  // An answer without an end of its own, however long the browser takes.
  const options = ["--ctx-size", "512", "--parallel", "1", "--ignore-eos", "--context-shift"];
  const { page, ask, state } = await open(t, tinyModel, options);
  await ready(page, "kjv");
  for (const [i, stop] of [() => page.keyboard.press("Escape"), () => page.goto("about:blank")].entries()) {
    await ask("And it came to pass");
    await page
      .locator("article.answer[aria-busy=true] .body", { hasText: /pass[^]{20}/ })
      .last()
      .waitFor();
    await stop();
    const { totals } = await eventually("it is cancelled", async () => {
      const s = await state();
      return s.totals.cancelled === i + 1 && !s.slots[0].busy && s;
    });
    assert.ok(totals.predicted_tokens > 0);
    const later = (await state()).totals.predicted_tokens;
    assert.equal(later, totals.predicted_tokens, "no token after that");
  }
});

test("a chat model answers, and its next turn begins in the cache", { skip: skipChat }, async (t) => {
  const { page, ask, finished, state, answers } = await open(t, chatModel, ["--ctx-size", "1024", "--parallel", "2"]);
  await ready(page, "SmolLM2");
  await page.click("#open-settings");
  await page.fill("#temperature", "0");
  await page.fill("#n_predict", "40");
  await page.fill("#system", "You answer in one short sentence.");
  await page.click("text=Save");
  await ask("What is the capital of France?");
  await finished("Paris");
  await ask("And of Italy?");
  await finished("Rome");
  assert.match(await page.locator(".stats").last().textContent(), /of the prompt from the cache/);
  assert.equal(await page.textContent("#rule"), "K = 1");
  const { totals } = await state();
  assert.ok(totals.prefix_hits >= 1 && totals.prefix_tokens > 20, JSON.stringify(totals));
  await page.reload();
  await finished("Rome");
  assert.equal(await answers.count(), 2);

  await ask("x ".repeat(1200));
  await page
    .locator("article .error", { hasText: /too long: it has [0-9],[0-9]+ tokens, and the server takes 512/ })
    .waitFor();
});

test("a key, a full queue", { skip }, async (t) => {
  const { server, page, ask, finished } = await open(t, tinyModel, [
    "--api-key",
    "secret",
    "--parallel",
    "1",
    "--max-queue",
    "0",
    "--ctx-size",
    "1024",
    "--predict",
    "8",
  ]);
  await page.locator("#notice", { hasText: "asks for an API key" }).waitFor();
  await page.click("text=Enter the key");
  await page.keyboard.type("secret");
  await page.keyboard.press("Enter");
  await ready(page, "kjv");
  const abort = new AbortController();
  const headers = { Authorization: "Bearer secret" };
  const body = JSON.stringify({ prompt: "a", stream: true, n_predict: -1, ignore_eos: true });
  // The slot is kept busy until the page has been refused once.
  let refused = false;
  page.on("response", (response) => {
    if (response.status() === 429) refused = true;
  });
  const other = (async () => {
    while (!refused) {
      const response = await server.call("/completion", { method: "POST", headers, body, signal: abort.signal });
      for await (const _ of response.body) if (refused) break;
    }
  })();
  other.catch(() => {});
  await eventually(
    "the slot is busy",
    async () => (await (await server.call("/phd/state", { headers })).json()).slots[0].busy,
  );
  await ask("In the beginning");
  await Promise.race([page.locator(".pending", { hasText: "The server is busy" }).waitFor(), finished("In the beginning")]);
  await finished("In the beginning");
  abort.abort();
});
