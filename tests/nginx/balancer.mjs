// Starts Debian's nginx with examples/nginx/nginx.conf, and talks through it.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { eventually, root } from "../web/servers.mjs";

const nginx = process.env.NGINX ?? "/usr/sbin/nginx";

async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

// Starts nginx with the example's configuration: nothing but ports, paths and, where a test is about something else, the
// limit of requests is changed.
export async function balance(t, replicas, { limit = false } = {}) {
  const folder = mkdtempSync(join(tmpdir(), "phd-nginx-"));
  const [port, tlsPort] = [await freePort(), await freePort()];
  let config = readFileSync(join(root, "examples/nginx/nginx.conf"), "utf8");
  const change = (from, to, times) => {
    assert.equal(config.split(from).length - 1, times, `${from} in nginx.conf`);
    config = config.replaceAll(from, to);
  };
  change("listen 8080;", `listen 127.0.0.1:${port};`, 1);
  change("listen 8443 ssl", `listen 127.0.0.1:${tlsPort} ssl`, 1);
  change("/var/log/nginx/access.log", join(folder, "access.log"), 1);
  change("/etc/nginx/tls/", `${folder}/`, 2);
  replicas.forEach(({ port }, i) => change(`127.0.0.1:808${i + 1} `, `127.0.0.1:${port} `, 3));
  if (!limit) change("rate=20r/s", "rate=100000r/s", 1);
  writeFileSync(join(folder, "nginx.conf"), config);
  execFileSync(
    "openssl",
    [
      "req",
      "-x509",
      "-newkey",
      "ec",
      "-pkeyopt",
      "ec_paramgen_curve:prime256v1",
      "-nodes",
      "-days",
      "2",
      "-subj",
      "/CN=localhost",
      "-keyout",
      join(folder, "server.key"),
      "-out",
      join(folder, "server.crt"),
    ],
    { stdio: "ignore" },
  );
  const args = [
    "-p",
    folder,
    "-c",
    join(folder, "nginx.conf"),
    "-e",
    join(folder, "error.log"),
    "-g",
    `pid ${folder}/nginx.pid; daemon off;`,
  ];
  const verdict = execFileSync("sh", ["-c", 'exec "$0" -t "$@" 2>&1', nginx, ...args], { encoding: "utf8" });
  assert.doesNotMatch(verdict, /\[(warn|emerg)\]/);
  const child = spawn(nginx, args, { stdio: "inherit" });
  const gone = new Promise((resolve) => child.once("exit", resolve));
  t.after(async () => {
    child.kill("SIGTERM");
    await gone;
    rmSync(folder, { recursive: true, force: true });
  });
  await eventually(
    "nginx listens",
    () =>
      new Promise((resolve) => {
        const socket = connect(port, "127.0.0.1", () => {
          socket.destroy();
          resolve(true);
        }).on("error", () => resolve(false));
      }),
  );
  return {
    port,
    tlsPort,
    child,
    address: `http://127.0.0.1:${port}`,
    // Which replicas each request of a session was passed to, as indices.
    async passed(session, n = 1) {
      const lines = await eventually(`${n} lines in the log`, () => {
        const lines = readFileSync(join(folder, "access.log"), "utf8")
          .split("\n")
          .slice(0, -1)
          .map(JSON.parse)
          .filter((line) => line.session === session);
        return lines.length >= n && lines;
      });
      return lines.map((line) =>
        line.replica.split(/[,:] /).map((address) => replicas.findIndex(({ port }) => address.endsWith(`:${port}`))),
      );
    },
  };
}

// A streamed completion that is read event by event.
export function stream(address, prompt, session, more = {}) {
  const abort = new AbortController();
  const begun = fetch(`${address}/completion`, {
    method: "POST",
    signal: abort.signal,
    headers: session ? { "X-Session-Id": session } : {},
    body: JSON.stringify({ prompt, stream: true, ...more }),
  });
  begun.catch(() => {});
  let reader = null,
    rest = "";
  const decoder = new TextDecoder();
  const next = async () => {
    // the next event; null at the end
    reader ??= (await begun).body.getReader();
    while (!rest.includes("\n\n")) {
      const { done, value } = await reader.read();
      if (done) return null;
      rest += decoder.decode(value, { stream: true });
    }
    const [event, ...others] = rest.split("\n\n");
    rest = others.join("\n\n");
    return event.startsWith("data: {") ? JSON.parse(event.slice(6)) : next();
  };
  return {
    begun,
    next,
    abort: () => abort.abort(),
    async text() {
      let text = "";
      for (let event; (event = await next());) text += event.content ?? "";
      return text;
    },
  };
}

export const ask = async (address, prompt, session) => {
  const answer = stream(address, prompt, session);
  const { status } = await answer.begun;
  return {
    status,
    text: status === 200 ? await answer.text() : await (await answer.begun).text(),
    headers: (await answer.begun).headers,
  };
};
