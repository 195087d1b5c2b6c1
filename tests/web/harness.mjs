// Starts servers and a browser for the tests, and ends what it started.
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

export const root = fileURLToPath(new URL("../../", import.meta.url));
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

// Starts a program that prints its address as the first line that begins with http; resolves once it has.
export async function serve(program, options = []) {
  const child = spawn(program, options, { stdio: ["ignore", "pipe", "inherit"] });
  const gone = new Promise((resolve) => child.once("exit", resolve));
  const lines = createInterface({ input: child.stdout });
  const address = await new Promise((resolve, reject) => {
    lines.on("line", (line) => { if (line.startsWith("http")) resolve(line); });
    child.once("error", reject);
    child.once("exit", (status) => reject(new Error(`${program} ended with status ${status}`)));
  });
  const call = (path, init) => fetch(address + path, init);
  return {
    address, call, child, gone,
    release: (n) => call(`/standin/release?n=${n}`, { method: "POST" }),
    log: async () => (await call("/standin/log")).json(),
    async close() { child.kill("SIGKILL"); await gone; },
  };
}

export const standin = (...options) => serve(join(root, "target/web/standin"), options);
