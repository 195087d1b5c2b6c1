// nginx before three real servers with the small model of this repository.
import assert from "node:assert/strict";
import { connect } from "node:net";
import { test } from "node:test";
import { eventually, hasPhdServer, phdServer, tinyModel } from "../web/servers.mjs";
import { balance, stream } from "./balancer.mjs";

const skip = !hasPhdServer && "target/phd-server is not there";

async function three(t) {
  const replicas = await Promise.all(
    [0, 1, 2].map(() =>
      phdServer(
        tinyModel,
        "--threads",
        "1",
        "--ctx-size",
        "4096",
        "--parallel",
        "4",
        "--kv-unified",
        "--ignore-eos",
        "--drain-timeout",
        "60",
      ),
    ),
  );
  t.after(() => Promise.all(replicas.map((replica) => replica.close())));
  return replicas;
}

test("a conversation's next turn begins in its replica's cache", { skip }, async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const prompts = Array.from({ length: 9 }, (_, i) =>
    `${i}. In the beginning God created the heaven and the earth. `.repeat(10),
  );
  const cached = await Promise.all(
    prompts.map(async (prompt, i) => {
      const turns = [];
      for (let turn = 0; turn < 3; turn++) {
        const answer = stream(balancer.address, prompt, `session ${i}`, { n_predict: 8 });
        let last = null;
        for (let event; (event = await answer.next());) {
          prompt += event.content;
          last = event;
        }
        turns.push(last.timings);
      }
      return turns;
    }),
  );
  for (const [first, ...others] of cached) {
    assert.ok(first.prompt_n > 100, JSON.stringify(first));
    for (const { prompt_n, cache_n } of others)
      assert.ok(cache_n > 100 && prompt_n < 16, `${cache_n} from the cache, ${prompt_n} computed`);
  }
});

// Clients that ask all the time, until told to stop; what became of each request.
function clients(balancer, n) {
  const results = [];
  let stop = false;
  const all = Array.from({ length: n }, async (_, i) => {
    for (let turn = 0; !stop; turn++) {
      const result = { session: i % 2 ? `session ${i}` : "", events: 0, status: 0, whole: false };
      results.push(result);
      try {
        const answer = stream(balancer.address, `${i}.${turn} And God said`, result.session, { n_predict: 24 });
        result.status = (await answer.begun).status;
        for (let event; (event = await answer.next());) {
          result.events++;
          result.whole = event.stop;
        }
      } catch (error) {
        result.error = String(error);
      }
      result.over = true;
    }
  });
  return {
    results,
    done: () => results.filter((result) => result.over).length,
    async stop() {
      stop = true;
      await Promise.all(all);
    },
  };
}

for (const [signal, word] of [
  ["SIGKILL", "killed"],
  ["SIGTERM", "told to stop"],
]) {
  test(`a replica is ${word} while twelve clients ask`, { skip }, async (t) => {
    const replicas = await three(t);
    const balancer = await balance(t, replicas);
    const load = clients(balancer, 12);
    await eventually(
      "all replicas work",
      async () =>
        load.done() > 24 &&
        (await Promise.all(replicas.map((r) => r.state()))).every(
          (s) => s.totals.requests > 0 && s.slots.some((slot) => slot.busy),
        ),
    );
    replicas[0].child.kill(signal);
    const status = await replicas[0].gone;
    const then = load.done();
    await eventually("they go on", () => load.done() > then + 24);
    await load.stop();
    const lost = load.results.filter(({ whole }) => !whole);
    if (signal === "SIGTERM") {
      assert.deepEqual(lost, [], "nothing is lost");
      assert.equal(status, 0);
    }
    assert.deepEqual(
      lost.filter(({ events }) => events === 0),
      [],
      "what had not begun is not lost",
    );
    assert.ok(load.results.every(({ status }) => status === 200));
    assert.ok(lost.length <= 4, "at most what ran in its slots");
    t.diagnostic(`${load.results.length} requests, ${lost.length} broken streams`);
  });
}

test("one who does not read holds no slot", { skip }, async (t) => {
  const replicas = await three(t);
  const balancer = await balance(t, replicas);
  const socket = connect(balancer.port, "127.0.0.1");
  socket.pause();
  const body = JSON.stringify({ prompt: "In the beginning", stream: true, n_predict: 400 });
  socket.write(`POST /completion HTTP/1.1\r\nHost: x\r\nX-Session-Id: s\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
  await eventually("it is answered, and no slot is busy", async () => {
    const states = await Promise.all(replicas.map((r) => r.state()));
    return states.some((s) => s.totals.predicted_tokens === 400) && states.every((s) => s.slots.every((slot) => !slot.busy));
  });
  let read = "";
  socket.resume();
  socket.on("data", (data) => {
    read += data;
    if (read.includes('"stop":true')) socket.destroy();
  });
  await new Promise((resolve) => socket.once("close", resolve));
  assert.equal(read.match(/"stop":false/g).length, 400);
});
