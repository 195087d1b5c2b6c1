// A browser for the tests.
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const require = createRequire(new URL("../../target/web/", import.meta.url)); // run.sh installs the packages there
const { chromium } = require("playwright-core");
export const axePath = require.resolve("axe-core/axe.min.js");

// Without these, Chromium looks up hosts of its own at every start.
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-domain-reliability",
  "--disable-dev-shm-usage",
];

export async function launch() {
  const profile = await mkdtemp(join(tmpdir(), "phd-web-"));
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    args: FLAGS,
    env: { ...process.env, HOME: profile },
  });
  return {
    browser,
    async close() {
      await browser.close();
      await rm(profile, { recursive: true, force: true });
    },
  };
}

// Opens a server's page. However the test goes on: nothing is asked of another origin, and neither the script nor the policy
// complains, but for what is `expected`.
export async function openPage(t, chromium, server, { context = {}, prepare, expected = /(?!)/ } = {}) {
  const session = await chromium.browser.newContext({
    viewport: { width: 1200, height: 800 },
    reducedMotion: "reduce",
    ...context,
  });
  const page = await session.newPage();
  page.setDefaultTimeout(15_000);
  const complaints = [],
    requests = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (entry) => {
    if (entry.type() === "error" && !/Failed to load resource/.test(entry.text())) complaints.push(entry.text());
  });
  page.on("dialog", (dialog) => {
    complaints.push(`a dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  session.on("request", (request) => requests.push(request.url()));
  t.after(async () => {
    await session.close();
    assert.deepEqual(
      complaints.filter((text) => !expected.test(text)),
      [],
    );
    const elsewhere = requests.filter((url) => new URL(url).origin !== server.address && !url.startsWith("data:"));
    assert.deepEqual(elsewhere, [], "requests to other origins");
  });
  await prepare?.(page, server);
  await page.goto(server.address);
  return {
    session,
    page,
    ask: async (text) => {
      await page.fill("#message", text);
      await page.press("#message", "Enter");
    },
    answers: page.locator("article.answer"),
    finished: (text) => page.locator("article.answer[aria-busy=false] .body", { hasText: text }).last().waitFor(),
  };
}

// What the server says of its model has arrived.
export const ready = (page, name = "stand-in") => page.locator("#name", { hasText: name }).waitFor();
