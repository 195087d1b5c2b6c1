// A browser for the tests.
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const require = createRequire(new URL("../../target/web/", import.meta.url)); // run.sh installs the packages there
const { chromium } = require("playwright-core");
export const axePath = require.resolve("axe-core/axe.min.js");

// Without these, Chromium looks up hosts of its own at every start.
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--disable-domain-reliability", "--disable-dev-shm-usage",
];

export async function launch() {
  const profile = await mkdtemp(join(tmpdir(), "phd-web-"));
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: FLAGS, env: { ...process.env, HOME: profile },
  });
  return { browser, async close() { await browser.close(); await rm(profile, { recursive: true, force: true }); } };
}
