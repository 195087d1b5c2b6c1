// nginx before three stand-ins, whose tokens come when the test says so.
import assert from "node:assert/strict";
import { request } from "node:http";
import { request as secureRequest } from "node:https";
import { connect } from "node:net";
import { test } from "node:test";
import { eventually, standin } from "../web/servers.mjs";
import { ask, balance, stream } from "./balancer.mjs";

async function three(t, ...options) {
  const replicas = await Promise.all([0, 1, 2].map((i) => standin("-name", `replica ${i}`, ...options)));
  t.after(() => Promise.all(replicas.map((replica) => replica.close())));
  return replicas;
}

const at = (replicas, session, balancer) => balancer.passed(session).then(([path]) => replicas[path.at(-1)]);

test("streams are passed on event by event", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const answer = stream(balancer.address, "@gate @count 3", "a");
  const home = await eventually("it has arrived", async () => {
    for (const replica of replicas) if ((await replica.log()).length > 0) return replica;
    return null;
  });
  for (let i = 1; i <= 3; i++) {
    await home.release(1); // the next one is not released before this one has come through
    assert.equal((await answer.next()).content, `${i} `);
  }
  assert.equal((await answer.next()).stop, true);
  assert.equal(await answer.next(), null);
});

test("a session stays with its replica, others go where there is least to do", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const homes = new Set();
  for (let i = 0; i < 24; i++) {
    for (let turn = 0; turn < 3; turn++) assert.equal((await ask(balancer.address, "@say yes", `session ${i}`)).status, 200);
    const paths = await balancer.passed(`session ${i}`, 3);
    assert.equal(new Set(paths.flat()).size, 1, `session ${i}: ${JSON.stringify(paths)}`);
    homes.add(paths[0][0]);
  }
  assert.equal(homes.size, 3, "sessions are spread over all replicas");

  // Six streams that go on, two of a replica that end, two new ones.
  const counts = () =>
    Promise.all(replicas.map(async (replica) => (await replica.log()).filter((r) => r.prompt === "@gate @count 1").length));
  const streams = [],
    order = [];
  const another = async () => {
    const before = await counts();
    streams.push(stream(balancer.address, "@gate @count 1"));
    order.push(
      await eventually("it has arrived", async () => {
        const i = (await counts()).findIndex((n, i) => n > before[i]);
        return i >= 0 && String(i);
      }),
    );
  };
  for (let i = 0; i < 6; i++) await another();
  assert.deepEqual(await counts(), [2, 2, 2]);
  const free = order[5];
  await replicas[free].release(2);
  for (let i = 0; i < 6; i++) if (order[i] === free) assert.equal(await streams[i].text(), "1 ");
  await another();
  await another();
  assert.deepEqual(order.slice(6), [free, free], "not simply the next ones in turn");
  await Promise.all(replicas.map((replica) => replica.release(2)));
  for (const one of streams) await one.text();
});

test("when a replica is killed, only streams that had begun are lost", async (t) => {
  const replicas = await three(t, "-slots", "4", "-queue", "100");
  const balancer = await balance(t, replicas);
  // Five requests of each of twelve sessions, within what one client may have at once.
  const sessions = Array.from({ length: 12 }, (_, i) => `session ${i}`);
  const arrived = (replica) => replica.log().then((log) => log.length);
  const running = [];
  for (const session of sessions) {
    const before = await Promise.all(replicas.map(arrived));
    const answer = stream(balancer.address, "@gate @count 5", session);
    const home = await eventually("it has arrived", async () => {
      const now = await Promise.all(replicas.map(arrived));
      const i = now.findIndex((n, i) => n > before[i]);
      return i >= 0 && { index: i };
    });
    running.push({ session, answer, home: home.index, begun: false });
  }
  const victim = running[0].home;
  const there = running.filter((one) => one.home === victim);
  // Two streams of the victim begin; whatever else is there has no byte so far.
  await replicas[victim].release(2);
  const begun = await eventually("two words are out", async () => {
    const log = await replicas[victim].log();
    return log.reduce((sum, r) => sum + r.sent, 0) === 2 && log.filter((r) => r.sent > 0).map((r) => r.session);
  });
  for (const one of there) {
    one.begun = begun.includes(one.session);
    if (one.begun) assert.equal((await one.answer.next()).content, "1 ");
  }
  const waiting = sessions.flatMap((session) =>
    Array.from({ length: 4 }, () => ask(balancer.address, "@gate @count 5", session)),
  );
  await eventually(
    "all have arrived",
    async () => (await Promise.all(replicas.map(arrived))).reduce((a, b) => a + b) === 12 + waiting.length,
  );

  replicas[victim].child.kill("SIGKILL");
  await replicas[victim].gone;
  for (const [i, replica] of replicas.entries()) if (i !== victim) await replica.release(1000);
  for (const one of running) {
    if (one.begun)
      await assert.rejects(
        one.answer.text(),
        /terminated|aborted|other side closed/,
        "a broken stream is seen to be broken",
      );
    else assert.equal(await one.answer.text(), "1 2 3 4 5 ", one.session);
  }
  for (const { status, text } of await Promise.all(waiting)) assert.deepEqual([status, text], [200, "1 2 3 4 5 "]);
  // Its sessions have another home now, and keep it.
  for (let i = 0; i < 5; i++) assert.equal((await ask(balancer.address, "@say yes", there[0].session)).status, 200);
  const after = (await balancer.passed(there[0].session, 10)).slice(-5).map((path) => path.at(-1));
  assert.equal(new Set(after).size, 1);
  assert.notEqual(after[0], victim);
});

test("a replica that is told to stop ends its streams, and nothing is lost", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const sessions = Array.from({ length: 12 }, (_, i) => `session ${i}`);
  for (const session of sessions) await ask(balancer.address, "@say yes", session);
  const leaving = await at(replicas, sessions[0], balancer);
  const long = stream(balancer.address, "@gate @count 3", sessions[0]);
  await eventually("it has arrived", async () => (await leaving.log()).some((r) => r.prompt === "@gate @count 3"));
  await leaving.release(1);
  assert.equal((await long.next()).content, "1 ");

  // Requests go on all the time, over connections that nginx keeps open to the one that leaves.
  let stop = false;
  const failures = [];
  let served = 0;
  const clients = sessions.map(async (session) => {
    while (!stop) {
      const { status, text } = await ask(balancer.address, "@say fine", session);
      served++;
      if (status !== 200 || text !== "fine") failures.push({ session, status, text });
    }
  });
  await eventually("they run", () => served > 50);
  const before = served;
  leaving.child.kill("SIGTERM");
  await eventually("it takes nothing new", () =>
    leaving.call("/health").then(
      (r) => r.status === 503,
      () => true,
    ),
  );
  await eventually("they go on", () => served > before + 200);
  stop = true;
  await Promise.all(clients);
  assert.deepEqual(failures, []);
  // The stream that was running is still there.
  assert.equal(leaving.child.exitCode, null);
  long.abort();
  assert.equal(await leaving.gone, 0);
});

test("a full replica's requests go to another one, until all are full", async (t) => {
  const replicas = await three(t, "-slots", "1", "-queue", "0");
  const balancer = await balance(t, replicas);
  const running = [];
  for (let i = 0; i < 3; i++) {
    running.push(stream(balancer.address, "@gate @count 1", "one and the same"));
    await eventually(
      "it runs",
      async () => (await Promise.all(replicas.map((r) => r.state()))).filter((s) => s.slots[0].busy).length === i + 1,
    );
  }
  const { status, text, headers } = await ask(balancer.address, "@say no", "one and the same");
  assert.equal(status, 429);
  assert.equal(headers.get("Retry-After"), "1");
  assert.equal(JSON.parse(text).error.code, 429);
  // Being full is not being dead: as soon as there is room, a replica is used.
  for (const [i, replica] of replicas.entries()) {
    await replica.release(1);
    await eventually("there is room", async () => !(await replica.state()).slots[0].busy);
    for (let again = 0; again < 3; again++)
      assert.equal((await ask(balancer.address, "@say yes", `${i} ${again}`)).status, 200);
  }
  for (const one of running) assert.equal(await one.text(), "1 ");
});

test("a replica that loads is passed over, and clients can read that none is there", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const loading = (i, on) => replicas[i].call(`/standin/loading?on=${on}`, { method: "POST" });
  await loading(0, true);
  await loading(1, true);
  for (let i = 0; i < 12; i++) assert.equal((await ask(balancer.address, "@say yes", `session ${i}`)).status, 200);
  await loading(2, true);
  const answer = await ask(balancer.address, "@say no", "x");
  assert.equal(answer.status, 503);
  assert.equal(JSON.parse(answer.text).error.type, "unavailable_error");
  for (const replica of replicas) await replica.close();
  for (let i = 0; i < 3; i++) {
    const none = await ask(balancer.address, "@say no", `none ${i}`);
    assert.equal(none.status, 503);
    assert.equal(JSON.parse(none.text).error.type, "unavailable_error");
    assert.equal(none.headers.get("Retry-After"), "2");
  }
});

test("a client that goes away ends its request at the replica", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const answer = stream(balancer.address, "@gate @count 50", "s");
  const home = await eventually("it has arrived", async () => {
    for (const r of replicas) if ((await r.log()).length > 0) return r;
    return null;
  });
  await home.release(2);
  await answer.next();
  await answer.next();
  answer.abort();
  await eventually("it is cancelled", async () => (await home.log())[0].ended === "cancelled");
  assert.equal((await home.log())[0].sent, 2);
});

test("slow clients hold no slot", async (t) => {
  const replicas = await three(t, "-slots", "1", "-queue", "0");
  const balancer = await balance(t, replicas);
  const logs = async () => (await Promise.all(replicas.map((replica) => replica.log()))).flat();

  // Sending: a replica sees nothing before the whole request is there.
  const body = JSON.stringify({ prompt: "@say " + "x".repeat(100_000), stream: true });
  const slow = connect(balancer.port, "127.0.0.1");
  slow.write(
    `POST /completion HTTP/1.1\r\nHost: x\r\nX-Session-Id: slow\r\nContent-Length: ${body.length}\r\n\r\n${body.slice(0, 50_000)}`,
  );
  for (let i = 0; i < 6; i++) assert.equal((await ask(balancer.address, "@say yes", `meanwhile ${i}`)).status, 200);
  assert.ok(!(await logs()).some((r) => r.session === "slow"));
  slow.write(body.slice(50_000));
  await eventually("it has arrived", async () => (await logs()).some((r) => r.session === "slow" && r.ended === "done"));
  slow.destroy();

  // Reading: one that reads nothing. The answer, within what the connections' buffers hold, leaves its replica at once.
  const idle = connect(balancer.port, "127.0.0.1");
  idle.pause();
  const question = JSON.stringify({ prompt: "@count 500", stream: true });
  idle.write(
    `POST /completion HTTP/1.1\r\nHost: x\r\nX-Session-Id: idle\r\nContent-Length: ${question.length}\r\n\r\n${question}`,
  );
  await eventually("it is answered", async () => (await logs()).some((r) => r.session === "idle" && r.ended === "done"));
  for (const replica of replicas) assert.ok(!(await replica.state()).slots[0].busy);
  let read = "";
  idle.resume();
  idle.on("data", (data) => {
    read += data;
    if (read.includes('"stop":true')) idle.destroy();
  });
  await new Promise((resolve) => idle.once("close", resolve));
  assert.match(read, /"content":"500 "/);
});

test("bounds: large requests, many requests, and what is not for everybody", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas, { limit: true });
  // Clients are told apart by their keys, so that these do not count for the one below.
  const large = await fetch(`${balancer.address}/completion`, {
    method: "POST",
    body: "x".repeat(9 << 20),
    headers: { Authorization: "Bearer a" },
  });
  assert.equal(large.status, 413);
  assert.equal((await large.json()).error.code, 413);
  const smaller = await fetch(`${balancer.address}/completion`, {
    method: "POST",
    body: "x".repeat(7 << 20),
    headers: { Authorization: "Bearer a" },
  });
  assert.equal(smaller.status, 400, "a replica has read it");
  for (const path of ["/metrics", "/slots", "/slots/0?action=erase"]) {
    const answer = await fetch(balancer.address + path, { headers: { Authorization: "Bearer b" } });
    assert.equal(answer.status, 404, path);
    assert.match(await answer.text(), /nginx/, "no replica has been asked");
  }
  const answers = await Promise.all(
    Array.from({ length: 120 }, () => fetch(`${balancer.address}/props`, { headers: { Authorization: "Bearer c" } })),
  );
  const refused = answers.filter(({ status }) => status === 429);
  assert.ok(refused.length > 0 && refused.length < 90, `${refused.length} of 120 refused`);
  assert.equal(refused[0].headers.get("Retry-After"), "1");
  assert.equal((await refused[0].json()).error.type, "rate_limit_error");
  assert.equal((await fetch(`${balancer.address}/props`, { headers: { Authorization: "Bearer d" } })).status, 200);
});

test("the page and TLS", async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const page = await fetch(balancer.address);
  assert.match(page.headers.get("Content-Security-Policy"), /default-src 'none'/);
  assert.match(await page.text(), /<!doctype html>/);
  const status = await new Promise((resolve, reject) => {
    secureRequest({ host: "127.0.0.1", port: balancer.tlsPort, path: "/health", rejectUnauthorized: false }, (r) => {
      r.resume();
      resolve(r.statusCode);
    })
      .on("error", reject)
      .end();
  });
  assert.equal(status, 200);
  const raw = await new Promise((resolve, reject) => {
    request({ host: "127.0.0.1", port: balancer.port, path: "/health" }, (r) => {
      r.resume();
      resolve(r.headers);
    })
      .on("error", reject)
      .end();
  });
  assert.equal(raw.server, "nginx");
});
