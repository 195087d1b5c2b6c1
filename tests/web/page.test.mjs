// The page in a browser, against a server whose answers are known and whose tokens come when the test says so.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { launch, openPage, ready } from "./harness.mjs";
import { eventually, standin } from "./servers.mjs";

let chromium;
before(async () => {
  chromium = await launch();
});
after(async () => {
  await chromium.close();
});

// The page of a new stand-in.
async function open(t, { options = [], ...more } = {}) {
  const server = await standin(...options);
  t.after(() => server.close());
  return { server, ...(await openPage(t, chromium, server, more)) };
}

test("an answer is streamed, read out once, and kept over a reload", async (t) => {
  const { server, page, ask, answers, finished } = await open(t);
  await ready(page);
  await page.evaluate(() => {
    globalThis.said = [];
    new MutationObserver(() => said.push(document.getElementById("status").textContent)).observe(
      document.getElementById("status"),
      { childList: true },
    );
  });
  await ask("@gate @count 5");
  await server.release(2);
  await page.locator("article.answer .body", { hasText: /^1 2/ }).waitFor();
  assert.equal(await answers.getAttribute("aria-busy"), "true");
  assert.equal(await page.textContent("#send"), "Stop");
  assert.equal(await page.inputValue("#message"), "");
  await server.release(3);
  await finished("1 2 3 4 5");
  assert.equal(await page.textContent("#send"), "Send");
  assert.match(await page.textContent(".stats"), /5 tokens · 65 tok\/s/);
  const said = (await page.evaluate(() => said)).filter(Boolean);
  assert.deepEqual(said, ["The model is answering.", "The model's answer: 1 2 3 4 5 "]);

  await ask("And now?");
  await finished("You said: And now?");
  const [, second] = await server.log();
  assert.deepEqual(second.body.messages, [
    { role: "user", content: "@gate @count 5" },
    { role: "assistant", content: "1 2 3 4 5 " },
    { role: "user", content: "And now?" },
  ]);
  assert.equal(second.body.stream, true);
  assert.match(second.session, /^[0-9a-f]{32}$/);
  assert.equal((await server.log())[0].session, second.session, "a conversation has one session id");

  await page.reload();
  await finished("You said: And now?");
  assert.equal(await answers.count(), 2);
});

for (const way of ["the button", "Escape", "New chat", "leaving the page"]) {
  test(`${way} stops the answer within a step`, async (t) => {
    const { server, page, ask } = await open(t);
    await ask("@gate @count 100");
    await server.release(3);
    await page.locator("article.answer .body", { hasText: "1 2 3" }).waitFor();
    if (way === "the button") await page.click("#send");
    if (way === "Escape") await page.keyboard.press("Escape");
    if (way === "New chat") await page.click("#new");
    if (way === "leaving the page") await page.goto("about:blank");
    await eventually("the server sees it", async () => (await server.log())[0].ended === "cancelled");
    assert.equal((await server.log())[0].sent, 3);
    if (way === "New chat" || way === "leaving the page") return;
    await page.locator(".stats", { hasText: "stopped" }).waitFor();
    assert.equal(await page.textContent("article.answer .body"), "1 2 3 ");
    assert.equal(await page.textContent("#send"), "Send");
    // What was answered so far belongs to the conversation.
    await ask("next");
    await page.locator("article.answer .body", { hasText: "You said" }).waitFor();
    assert.equal((await server.log())[1].body.messages[1].content, "1 2 3 ");
  });
}

test("Enter sends, Shift+Enter begins a line, an input method's Enter does neither", async (t) => {
  const { server, page, finished } = await open(t);
  await page.focus("#message");
  await page.keyboard.press("Enter");
  await page.keyboard.type(" ");
  await page.keyboard.press("Enter");
  assert.equal((await server.log()).length, 0, "nothing is sent without text");
  await page.fill("#message", "");
  await page.keyboard.type("one");
  const height = await page.locator("#message").evaluate((node) => node.clientHeight);
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("two");
  assert.equal(await page.inputValue("#message"), "one\ntwo");
  assert.ok((await page.locator("#message").evaluate((node) => node.clientHeight)) > height, "the field grows");
  await page
    .locator("#message")
    .evaluate((node) =>
      node.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true })),
    );
  assert.equal((await server.log()).length, 0);
  await page.keyboard.press("Enter");
  await finished("You said: one");
  assert.equal((await server.log())[0].prompt, "one\ntwo");
});

test("regenerate, edit, delete and their undo", async (t) => {
  const { server, page, ask, answers, finished } = await open(t);
  await ask("first");
  await finished("You said: first");
  await ask("second");
  await finished("You said: second");
  assert.equal(await page.locator("button", { hasText: "Regenerate" }).count(), 1, "only the last turn can be changed");

  await page.click("text=Regenerate");
  await eventually("asked again", async () => (await server.log()).length === 3);
  await finished("You said: second");
  assert.deepEqual((await server.log())[2].body.messages, (await server.log())[1].body.messages);

  await page.click("button:text-is('Edit')");
  assert.equal(await page.inputValue("#message"), "second");
  await page.keyboard.press("Escape");
  assert.equal(await page.inputValue("#message"), "", "Escape leaves the turn as it was");
  assert.equal(await answers.count(), 2);
  await page.click("button:text-is('Edit')");
  await page.fill("#message", "other");
  await page.keyboard.press("Enter");
  await finished("You said: other");
  assert.equal(await answers.count(), 2);
  assert.deepEqual(
    (await server.log())[3].body.messages.map((m) => m.content),
    ["first", "You said: first", "other"],
  );

  await page.click("button:text-is('Delete')");
  assert.equal(await answers.count(), 1);
  await page.click("text=Undo");
  assert.equal(await answers.count(), 2);
  await page.click("#new");
  assert.equal(await answers.count(), 0);
  assert.ok(await page.isVisible("#welcome"));
  await page.click("text=Undo");
  assert.equal(await answers.count(), 2);
  const before = (await server.log()).at(-1).session;
  await page.click("#new");
  await ask("new");
  await finished("You said: new");
  assert.notEqual((await server.log()).at(-1).session, before, "a new conversation has another session id");
  assert.equal((await server.log()).at(-1).body.messages.length, 1);
});

for (const secure of [true, false]) {
  test(`copying, with${secure ? "" : "out"} the clipboard interface`, async (t) => {
    const { session, page, ask, finished } = await open(t, {
      prepare: (page) =>
        secure ||
        page.addInitScript(() => {
          Object.defineProperty(navigator, "clipboard", { value: undefined });
        }),
    });
    await session.grantPermissions(["clipboard-read", "clipboard-write"]);
    await page.evaluate(() => {
      document.addEventListener("copy", () => {
        globalThis.copied = getSelection().toString() || document.activeElement.value;
      });
    });
    await ask("@say **bold**\n```js\nlet a = 1;\n```");
    await finished("bold");
    const clipboard = () => page.evaluate((secure) => (secure ? navigator.clipboard.readText() : globalThis.copied), secure);
    await page.click("button:text-is('Copy')");
    await page.locator("button", { hasText: /^Copied$/ }).waitFor();
    assert.equal(await clipboard(), "**bold**\n```js\nlet a = 1;\n```");
    await page.click("text=Copy code");
    await eventually("the code is copied", async () => (await clipboard()) === "let a = 1;");
  });
}

test("settings: the server's values are shown, one's own are sent and kept", async (t) => {
  const { server, page, ask, finished } = await open(t);
  await ready(page);
  await ask("as it is");
  await finished("as it is");
  const plain = (await server.log())[0].body;
  for (const name of ["temperature", "top_k", "top_p", "min_p", "max_tokens", "n_predict", "seed"])
    assert.ok(!(name in plain), name);

  await page.click("#open-settings");
  const placeholders = await page
    .locator("#sampling input")
    .evaluateAll((inputs) => inputs.map((input) => `${input.name} ${input.placeholder}`));
  assert.deepEqual(placeholders, [
    "temperature 0.8",
    "top_k 40",
    "top_p 0.95",
    "min_p 0.05",
    "n_predict no limit",
    "seed random",
  ]);

  await page.fill("#temperature", "-1");
  await page.click("text=Save");
  assert.match(await page.textContent("#settings-error"), /Temperature: a number from 0 to 10/);
  assert.ok(await page.locator("#temperature").evaluate((node) => node === document.activeElement));
  await page.fill("#temperature", "0");
  await page.fill("#top_k", "1.5");
  await page.click("text=Save");
  assert.match(await page.textContent("#settings-error"), /Top k: a whole number/);
  await page.fill("#top_k", "7");
  await page.fill("#top_p", "0.5");
  await page.fill("#n_predict", "3");
  await page.fill("#seed", "42");
  await page.fill("#system", "Be brief.");
  await page.click("text=Save");
  assert.ok(!(await page.isVisible("#settings")));

  await page.reload();
  await ask("@count 10");
  await finished("1 2 3");
  assert.match(await page.locator(".stats").last().textContent(), /limit of tokens reached/);
  const { temperature, top_k, top_p, max_tokens, seed, messages, ...rest } = (await server.log())[1].body;
  assert.deepEqual(
    { temperature, top_k, top_p, max_tokens, seed },
    { temperature: 0, top_k: 7, top_p: 0.5, max_tokens: 3, seed: 42 },
  );
  assert.ok(!("min_p" in rest));
  assert.deepEqual(messages[0], { role: "system", content: "Be brief." });

  await page.click("#open-settings");
  await page.fill("#seed", "1");
  await page.click("#cancel");
  await page.click("#open-settings");
  assert.equal(await page.inputValue("#seed"), "42", "Cancel changes nothing");
  await page.click("#clear");
  await page.click("text=Save");
  await ask("plain again");
  await finished("plain again");
  const again = (await server.log()).at(-1).body;
  assert.ok(!("temperature" in again) && again.messages[0].role === "user");
});

test("an API key is asked for, and kept for the tab unless wished otherwise", async (t) => {
  const { session, server, page, ask, finished } = await open(t, { options: ["-api-key", "secret"] });
  await page.locator("#notice", { hasText: "asks for an API key" }).waitFor();
  await page.locator("#picture-missing", { hasText: "needs the API key" }).waitFor();
  await ask("hello");
  await page.locator("#settings-error", { hasText: "asks for an API key" }).waitFor();
  assert.ok(await page.locator("#key").evaluate((node) => node === document.activeElement));
  await page.keyboard.type("wrong");
  await page.keyboard.press("Enter");
  await page.locator("#settings-error", { hasText: "does not accept this API key" }).waitFor();
  await page.fill("#key", "secret");
  await page.keyboard.press("Enter");
  await finished("You said: hello");
  await ready(page);
  assert.ok(!(await page.isVisible("#notice")));
  await page.locator("#picture-missing").waitFor({ state: "hidden" });

  const stored = () =>
    page.evaluate(() =>
      [JSON.stringify(localStorage), JSON.stringify(sessionStorage)].map((text) => text.includes("secret")),
    );
  assert.deepEqual(await stored(), [false, true]);
  await page.reload();
  await ready(page);
  await page.click("#open-settings");
  await page.check("[name=keep]");
  await page.click("text=Save");
  assert.deepEqual(await stored(), [true, true]);
  const other = await session.newPage();
  await other.goto(server.address);
  await ready(other);

  await page.click("#open-settings");
  await page.fill("#key", "");
  await page.click("text=Save");
  assert.deepEqual(await stored(), [false, false]);
  await ask("without");
  await page.locator("#settings-error", { hasText: "asks for an API key" }).waitFor();
  await page.keyboard.press("Escape");
  await page.locator("article .error", { hasText: "API key" }).waitFor();
});

test("a text that is too long is refused in words, and the older half can be forgotten", async (t) => {
  const { server, page, ask, finished } = await open(t);
  await ask("one");
  await finished("one");
  await ask("two");
  await finished("two");
  await ask("x ".repeat(600));
  await page
    .locator("article .error", { hasText: "This conversation is too long: it has 601 tokens, and the server takes 512." })
    .waitFor();
  await page.click("text=Forget the older half");
  await eventually("asked again", async () => (await server.log()).length === 4);
  assert.deepEqual(
    (await server.log())[3].body.messages.map((m) => m.content.slice(0, 8)),
    ["two", "You said", "x x x x "],
  );
  await page.locator("article .error", { hasText: "too long" }).waitFor();
  await ask("three");
  await finished("three");
  assert.deepEqual(
    (await server.log())[4].body.messages.map((m) => m.content),
    ["two", "You said: two", "three"],
    "what was not answered is not part of the conversation",
  );
});

test("a full queue is waited for, as long as the server says", async (t) => {
  const { server, page, ask, finished } = await open(t, {
    options: ["-slots", "1", "-queue", "0"],
    prepare: (page) => page.clock.install(),
  });
  const busy = new AbortController();
  const other = server
    .call("/completion", { method: "POST", body: JSON.stringify({ prompt: "@gate @count 9" }), signal: busy.signal })
    .catch(() => {});
  await eventually("the slot is taken", async () => (await server.state()).slots[0].busy);
  await ask("hello");
  await page.locator(".pending", { hasText: "The server is busy. Trying again in 1 second" }).waitFor();
  await page.clock.runFor(1100);
  await page.locator(".pending", { hasText: "The server is busy" }).waitFor();
  busy.abort();
  await other;
  await eventually("the slot is free", async () => !(await server.state()).slots[0].busy);
  await page.clock.runFor(2000);
  await finished("You said: hello");

  const again = new AbortController();
  const third = server
    .call("/completion", { method: "POST", body: JSON.stringify({ prompt: "@gate @count 9" }), signal: again.signal })
    .catch(() => {});
  await eventually("the slot is taken", async () => (await server.state()).slots[0].busy);
  await ask("patience");
  await page.locator(".pending", { hasText: "busy" }).waitFor();
  await page.keyboard.press("Escape");
  await page.locator(".stats", { hasText: "stopped" }).last().waitFor();
  again.abort();
  await third;
});

test("a server that is still loading is waited for", async (t) => {
  const { server, page, ask, finished } = await open(t, { options: ["-loading"], prepare: (page) => page.clock.install() });
  await page.locator("#notice", { hasText: "The model is loading." }).waitFor();
  await ask("hello");
  await page.locator(".pending", { hasText: "The model is loading. Trying again" }).waitFor();
  await server.call("/standin/loading?on=false", { method: "POST" });
  await page.clock.runFor(20_000);
  await finished("You said: hello");
  await ready(page);
  await page.locator("#notice").waitFor({ state: "hidden" });
});

test("errors are said in words and leave what was there", async (t) => {
  const { server, page, ask, finished } = await open(t);
  await ask("@gate @break 3");
  await server.release(3);
  await page.locator("article.answer .body", { hasText: "1 2 3" }).waitFor();
  await server.release(1);
  await page.locator("article .error", { hasText: /connection ended before the answer did|cannot be reached/ }).waitFor();
  assert.equal(await page.textContent("article.answer .body"), "1 2 3 ");
  await page.click("text=Try again");
  await eventually("asked again", async () => (await server.log()).length === 2);
  await page.keyboard.press("Escape");
  await page.click("button:text-is('Delete')");

  await ask("@error 413 invalid_request_error too large");
  await page.locator("article .error", { hasText: "larger than the server accepts" }).waitFor();
  await ask("@error 400 invalid_request_error top_k: expected a number");
  await page.locator("article .error", { hasText: "The server refuses: top_k: expected a number" }).waitFor();

  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({ status: 502, contentType: "text/html", body: "<h1>Bad Gateway</h1>" }),
  );
  await ask("behind a balancer");
  await page.locator("article .error", { hasText: "No server answers behind the balancer" }).waitFor();
  await page.unroute("**/v1/chat/completions");
  const stream =
    'data: {"choices":[{"delta":{"content":"some"}}]}\n\ndata: {"error":{"code":500,"message":"out of luck","type":"server_error"}}\n\n';
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body: stream }));
  await ask("fails later");
  await page.locator("article .error", { hasText: "The server refuses: out of luck" }).waitFor();
  assert.equal(await page.locator("article.answer .body").last().textContent(), "some");
  await page.unroute("**/v1/chat/completions");

  await server.close();
  await ask("anybody there?");
  await page.locator("article .error", { hasText: "The server cannot be reached." }).waitFor();
  await page.locator("#picture-missing", { hasText: "cannot be read" }).waitFor();
});

test("events cut anywhere, with comments, any line ends and thoughts", async (t) => {
  const text =
    ': ping\r\n\r\nevent: x\r\ndata: {"choices":[{"delta":{"role":"assistant","content":null}}]}\r\n\r\n' +
    'data: {"choices":[{"delta":{"reasoning_content":"hm …"}}]}\n\n' +
    'data:{"choices":[\ndata: {"delta":{"content":"grüß 🙂"}}]}\r\rdata: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n';
  const { page, ask, finished } = await open(t, {
    prepare: (page) =>
      page.addInitScript((text) => {
        const real = fetch;
        globalThis.fetch = (path, init) => {
          if (!path.endsWith("completions")) return real(path, init);
          const bytes = new TextEncoder().encode(text);
          return Promise.resolve(
            new Response(
              new ReadableStream({
                start(c) {
                  for (const byte of bytes) c.enqueue(new Uint8Array([byte]));
                  c.close();
                },
              }),
            ),
          );
        };
      }, text),
  });
  await ask("anything");
  await finished("grüß 🙂");
  assert.equal(await page.locator("details.thoughts div").textContent(), "hm …");
  assert.ok(!(await page.isVisible("details.thoughts div")));
});

for (const template of ["", "{% for m in messages %}<|im_start|>{{ m }}"]) {
  test(`models ${template ? "to which ChatML is foreign" : "without a chat template"} continue a text`, async (t) => {
    const { server, page, ask, finished } = await open(t, { options: ["-chat-template", template] });
    await page.locator("#welcome-name", { hasText: "Begin a text" }).waitFor();
    await ask("@say and so on");
    await finished("and so on");
    assert.equal(await page.textContent("article.answer .body"), "@say and so onand so on");
    await page.click("button:text-is('Continue')");
    await finished(/and so onand so onand so on/);
    const [first, second] = await server.log();
    assert.equal(first.path, "/completion");
    assert.equal(first.body.prompt, "@say and so on");
    assert.equal(second.body.prompt, "@say and so onand so on");
    assert.ok(!("messages" in first.body));

    await page.click("#open-settings");
    assert.match(await page.textContent("#mode-auto"), /plain text/);
    await page.check("[name=mode][value=chat]");
    await page.fill("#n_predict", "2");
    await page.click("text=Save");
    await ask("@count 5");
    await finished("1 2");
    const third = (await server.log())[2];
    assert.equal(third.path, "/v1/chat/completions");
    assert.equal(third.body.messages.length, 1);
    await page.reload();
    await ready(page);
    assert.equal(await page.getAttribute("#message", "placeholder"), "Message", "the switch is kept");

    await page.click("#open-settings");
    await page.check("[name=mode][value=text]");
    await page.click("text=Save");
    await ask("@count 5");
    await finished("@count 51 2");
    assert.equal((await server.log())[3].body.n_predict, 2);
    assert.match(await page.locator(".stats").last().textContent(), /limit of tokens reached/);
  });
}

const HOSTILE = [
  "<img src=x onerror='hacked=1'>",
  "<script>hacked=1</script>",
  "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
  "[click](javascript:hacked=1)",
  "[click](JaVaScRiPt:hacked=1)",
  "[click](data:text/html,<script>hacked=1</script>)",
  "[click](//elsewhere.example/)",
  "![image](https://elsewhere.example/a.png)",
  "`<img src=x onerror=hacked=1>`",
  "| <svg onload=hacked=1> | b |\n| --- | --- |\n| <a href=javascript:hacked=1>x</a> | y |",
  "> <b onclick=hacked=1>q</b>",
  "# <i onmouseover=hacked=1>h</i>",
  "- <style>*{display:none}</style>",
  "```html\n<script>hacked=1</script>\n```",
  '```"><img src=x onerror=hacked=1>\ncode\n```',
  '[<img src=x onerror=hacked=1>](https://example.com/"onmouseover="hacked=1)',
  "&lt;b&gt; &amp; \u202e",
];
test("what the model, the user or the server writes stays text", async (t) => {
  const name = "<img src=x onerror=hacked=1>";
  const { page, ask, finished } = await open(t, { options: ["-name", name] });
  await ready(page, "<img");
  for (const [i, text] of HOSTILE.entries()) {
    await ask(`@say ${text}\n\nend${i}`);
    await finished(`end${i}`);
  }
  await ask(`@error 400 invalid_request_error ${HOSTILE[0]}`);
  await page.locator("article .error", { hasText: "<img" }).waitFor();
  const found = await page.evaluate(() => ({
    hacked: globalThis.hacked,
    elements: [
      ...document.querySelectorAll(
        "#turns img, #turns script, #turns iframe, #turns style, #turns svg, #turns b, #turns i, #name *",
      ),
    ].length,
    handlers: [...document.querySelectorAll("#turns *")].filter((node) =>
      node.getAttributeNames().some((name) => name.startsWith("on") || name === "style"),
    ).length,
    links: [...document.querySelectorAll("#turns a")].map((link) => [link.protocol, link.rel, link.target]),
  }));
  assert.equal(found.hacked, undefined);
  assert.equal(found.elements, 0);
  assert.equal(found.handlers, 0);
  for (const [protocol, rel, target] of found.links) {
    assert.equal(protocol, "https:");
    assert.match(rel, /noopener noreferrer/);
    assert.equal(target, "_blank");
  }
  await page.reload();
  await finished(`end${HOSTILE.length - 1}`);
  assert.equal(await page.evaluate(() => globalThis.hacked), undefined);
});

test("the policy forbids what the page does not do", async (t) => {
  const { page } = await open(t, { expected: /Content Security Policy|Trusted|HTMLScriptElement/ });
  await ready(page);
  const results = await page.evaluate(async () => {
    const script = document.createElement("script");
    const tries = {
      inline: () => {
        script.append("globalThis.ran = 1");
        document.body.append(script);
      },
      html: () => {
        document.createElement("div").innerHTML = "<b>x</b>";
      },
      elsewhere: () => fetch("https://elsewhere.example/"),
    };
    const failed = {};
    for (const [name, attempt] of Object.entries(tries)) {
      try {
        await attempt();
        failed[name] = false;
      } catch {
        failed[name] = true;
      }
    }
    return { failed, ran: globalThis.ran };
  });
  assert.equal(results.ran, undefined);
  assert.equal(results.failed.html, true);
  assert.equal(results.failed.elsewhere, true);
});

test("Markdown as models write it", async (t) => {
  const { page, ask, answers } = await open(t);
  // The structure of an answer: names of elements and their texts.
  const shape = (text) =>
    page.evaluate((text) => {
      const tree = (node) =>
        node.nodeType === 3
          ? node.data
          : `${node.localName}(${[...node.childNodes]
              .filter((n) => n.localName !== "button")
              .map(tree)
              .join(",")})`;
      return [...document.querySelectorAll("article.answer .body")].at(-1).childNodes.length
        ? [...[...document.querySelectorAll("article.answer .body")].at(-1).childNodes].map(tree).join(" ")
        : text;
    }, text);
  const cases = [
    ["a *b* **c** `d` ~~e~~ _f_ __g__", "p(a ,em(b), ,strong(c), ,code(d), ,s(e), ,em(f), ,strong(g))"],
    ["snake_case_name 2*3*4 ** a**b", "p(snake_case_name 2,em(3),4 ** a**b)"],
    ["**bold *and* both** ***x***", "p(strong(bold ,em(and), both), ,strong(em(x)))"],
    ["\\*no\\* `a*b*` ``x`y``", "p(*no* ,code(a*b*), ,code(x`y))"],
    ["# One\ntext\n### Three #", "h3(One) p(text) h5(Three)"],
    ["- a\n- b\n  more\n  1. c\n  2. d\n- e", "ul(li(a),li(b\nmore,ol(li(c),li(d))),li(e))"],
    ["3. x\n4. y", "ol(li(x),li(y))"],
    ["intro:\n* a\n\nafter", "p(intro:) ul(li(a)) p(after)"],
    ["```py\na = 1\n\n# b\n```\nafter", "div(div(span(py)),pre(code(a = 1\n\n# b))) p(after)"],
    ["~~~\n```\n~~~", "div(div(span(code)),pre(code(```)))"],
    ["```\nunfinished", "div(div(span(code)),pre(code(unfinished)))"],
    ["> a\n> - b", "blockquote(p(a),ul(li(b)))"],
    ["a\n\n---\n\nb", "p(a) hr() p(b)"],
    ["| a | b |\n|:--|--:|\n| 1 | *2* |", "div(table(thead(tr(th(a),th(b))),tbody(tr(td(1),td(em(2))))))"],
    ["see [x](https://a.example/b_c) and https://b.example/d.", "p(see ,a(x), and ,a(https://b.example/d),.)"],
    ["a | b is no table", "p(a | b is no table)"],
    ["**unfinished and `open", "p(**unfinished and `open)"],
  ];
  for (const [i, [text, expected]] of cases.entries()) {
    await ask(`@say ${text}`);
    await page.waitForFunction((n) => document.querySelectorAll("article.answer[aria-busy=false]").length === n, i + 1);
    assert.equal(await shape(text), expected, text);
  }
  assert.equal(await answers.locator("ol").nth(1).getAttribute("start"), "3");
});

test("hostile Markdown does not hang the page", async (t) => {
  const { page, ask } = await open(t, {
    prepare: (page) =>
      page.addInitScript(() => {
        const real = fetch;
        globalThis.fetch = (path, init) => {
          if (!path.endsWith("completions")) return real(path, init);
          const last = JSON.parse(init.body).messages.at(-1).content;
          const text = {
            stars: "*a ".repeat(40_000),
            marks: "*_".repeat(50_000),
            ticks: "`x ``y ".repeat(20_000),
            brackets: "[".repeat(100_000),
            quotes: `${">".repeat(50_000)} x`,
            lists: Array.from({ length: 3000 }, (_, i) => `${" ".repeat(i)}- x`).join("\n"),
            lines: "| a\n".repeat(50_000),
          }[last];
          const event = JSON.stringify({ choices: [{ delta: { content: text }, finish_reason: "stop" }] });
          return Promise.resolve(new Response(`data: ${event}\n\ndata: [DONE]\n\n`));
        };
      }),
  });
  for (const [i, kind] of ["stars", "marks", "ticks", "brackets", "quotes", "lists", "lines"].entries()) {
    await ask(kind);
    await page.waitForFunction((n) => document.querySelectorAll("article.answer[aria-busy=false]").length === n, i + 1);
  }
});

test("a long conversation is stored from its end, and damaged storage is ignored", async (t) => {
  const { page, ask, answers, finished, server } = await open(t);
  for (let i = 0; i < 5; i++) {
    await ask(`${i}${"x".repeat(90_000)}`);
    await finished(`You said: ${i}x`);
  }
  await page.reload();
  await finished("You said: 4x");
  assert.equal(await answers.count(), 2, "of five turns of 180,000 characters two fit into 400,000");

  for (const stored of [
    "{",
    "null",
    "[]",
    '{"turns":7}',
    '{"turns":[null,1,{"prompt":1},{"mode":"x","prompt":"a","answer":"b"}],"id":"a\\nb"}',
  ]) {
    await page.evaluate((stored) => {
      for (const name of ["conversation", "settings", "key"])
        localStorage.setItem(`phd ${location.pathname} ${name}`, stored);
    }, stored);
    await page.goto("about:blank");
    await page.goto(server.address);
    await ready(page);
    assert.equal(await answers.count(), 0, stored);
  }
  await page.evaluate(() => localStorage.clear());
});

test("the page works where nothing can be stored", async (t) => {
  const { page, ask, finished } = await open(t, {
    prepare: (page) =>
      page.addInitScript(() => {
        for (const name of ["localStorage", "sessionStorage"])
          Object.defineProperty(globalThis, name, {
            get() {
              throw new DOMException("denied", "SecurityError");
            },
          });
      }),
  });
  await ask("hello");
  await finished("You said: hello");
});

test("the page stays at the end unless its reader has scrolled up", async (t) => {
  const { server, page, ask, finished } = await open(t);
  await ask("@gate @say " + "line\n\n".repeat(100) + "last words");
  await server.release(1);
  await page.waitForFunction(() => {
    const log = document.getElementById("log");
    return log.scrollHeight > 2000 && log.scrollHeight - log.scrollTop - log.clientHeight < 2;
  });
  await page.locator("#log").evaluate((log) => {
    log.scrollTop = 100;
  });
  await page.locator("#down").waitFor();
  await server.release(1);
  await finished("last words");
  assert.equal(await page.locator("#log").evaluate((log) => log.scrollTop), 100);
  await page.click("#down");
  assert.ok(await page.locator("#log").evaluate((log) => log.scrollHeight - log.scrollTop - log.clientHeight < 2));
  assert.ok(!(await page.isVisible("#down")));
});

// ---- The picture ----

// The rule as the paper has it, by enumeration: which hidden copies, numbered among themselves, are among the last W of the
// newest position's chunk.
function alive(copies, window, chunk, newest) {
  const list = [];
  for (let i = 0; i <= newest; i++) {
    if (chunk > 0 && Math.floor(i / chunk) !== Math.floor(newest / chunk)) continue;
    for (let s = 1; s < copies; s++) list.push(`${i}.${s}`);
  }
  return new Set(window > 0 ? list.slice(-window) : list.slice(-(copies - 1)));
}

for (const [copies, window, chunk, columns] of [
  [2, 16, 32, 32],
  [3, 16, 32, 32],
  [4, 5, 6, 30],
  [2, 8, 0, 32],
  [3, 0, 0, 32],
  [2, 100, 128, 32],
]) {
  test(`the picture of K = ${copies}, W = ${window}, C = ${chunk} moves with each token`, async (t) => {
    const { server, page, ask } = await open(t, {
      options: ["-copies", copies, "-window", window, "-chunk", chunk].map(String),
    });
    await page.locator("#ring rect").first().waitFor({ state: "attached" });
    await ask("@gate @count 200");
    let released = 0;
    for (const upto of [1, 2, 29, 30, 31, 61, 62, 100, 125]) {
      await server.release(upto - released);
      released = upto;
      const newest = 3 + (upto - 1) - 1; // the prompt has three tokens, and the newest token has still to be read
      await page.locator("#ring-where", { hasText: new RegExp(`^position ${newest + 1}( |$)`) }).waitFor();
      const cells = await page.locator("#ring rect").evaluateAll((rects) =>
        rects.map((rect) => ({
          kind: rect.getAttribute("class"),
          x: Number(rect.getAttribute("x")),
          y: Number(rect.getAttribute("y")),
        })),
      );
      const lines = [...new Set(cells.map((cell) => cell.y))].sort((a, b) => a - b);
      const xs = [...new Set(cells.map((cell) => cell.x))].sort((a, b) => a - b);
      assert.equal(xs.length, columns);
      const first = Math.max(0, Math.floor(newest / columns) - 2);
      const live = alive(copies, window, chunk, newest);
      for (const cell of cells) {
        const line = lines.indexOf(cell.y),
          copy = line % copies;
        const position = (first + Math.floor(line / copies)) * columns + xs.indexOf(cell.x);
        const kind = position > newest ? "future" : copy === 0 ? "kept" : live.has(`${position}.${copy}`) ? "live" : "gone";
        assert.equal(
          cell.kind,
          position === newest ? `${kind} now` : kind,
          `position ${position}, copy ${copy}, after position ${newest}`,
        );
      }
      const [kept, ring, gone] = await page.locator("#ring-legend dd").allTextContents();
      assert.equal(Number(kept), newest + 1);
      assert.equal(ring.split(" ")[0], String(live.size));
      assert.equal(Number(gone), (newest + 1) * (copies - 1) - live.size);
    }
  });
}

test("a state that arrives after the answer's end does not take the picture back", async (t) => {
  const { server, page, ask, finished } = await open(t);
  await page.locator("#ring rect").first().waitFor({ state: "attached" });
  await ask("@gate @count 20");
  await eventually("the slot is taken", async () => (await server.state()).slots.some((slot) => slot.busy));
  const states = [];
  let arrive;
  const late = new Promise((resolve) => {
    arrive = resolve;
  });
  await page.route("**/phd/state", async (route) => {
    const response = await route.fetch();
    states.push(await response.json());
    if (states.length === 1) await late;
    await route.fulfill({ response });
  });
  await eventually("the state is asked for", () => states.length === 1);
  assert.ok(states[0].slots.some((slot) => slot.busy && slot.n_past === 3));
  await server.release(20);
  await finished("20");
  const end = page.locator("#ring-where", { hasText: /^position 22( |$)/ });
  await end.waitFor();
  arrive();
  await eventually("the next state is asked for", () => states.length > 1); // the late one has been shown
  assert.ok(await end.isVisible(), await page.textContent("#ring-where"));
});

test("the picture shows the pool, the slots and the memory as the server counts them", async (t) => {
  const state = {
    model: { name: "m", copies: 3, window: 16, chunk: 32, n_layers: 16 },
    n_positions: 4096,
    queue: { waiting: 2, capacity: 64 },
    totals: { predicted_tokens: 500, predicted_seconds: 10 },
    usage: { used: 1024, shared: 256, retained: 512, free: 2560, block: 16 },
    memory: { weights_bytes: 2 ** 30, cache_bytes: 64 * 2 ** 20, hidden_bytes: 2 ** 20, scratch_bytes: 2 ** 21 },
    slots: Array.from({ length: 10 }, (_, id) => ({
      id,
      busy: id >= 8,
      n_context: 1024,
      n_past: id === 9 ? 512 : id === 8 ? 100 : 0,
      n_prompt: id === 8 ? 300 : 400,
      n_prompt_done: id === 8 ? 100 : 400,
      n_decoded: 112,
      tokens_per_second: 48.25,
    })),
  };
  const { page } = await open(t, {
    prepare: (page) => page.route("**/phd/state", (route) => route.fulfill({ json: state })),
  });
  await page.locator("#cache-sum", { hasText: "1,024 of 4,096 positions" }).waitFor();
  assert.deepEqual(await page.locator("#cache-legend div").allTextContents(), [
    "in use768",
    "shared256",
    "retained512",
    "free2,560",
  ]);
  const widths = await page.locator("#cache span").evaluateAll((spans) => spans.map((span) => span.style.width));
  assert.deepEqual(widths, ["18.75%", "6.25%", "12.5%"]);
  assert.equal(await page.textContent("#rule"), "K = 3 · W = 16 · C = 32");
  assert.match(await page.textContent("#queue"), /2 waiting · each request 50/);
  const slots = await page.locator("#slots li").allTextContents();
  assert.equal(slots.length, 8, "busy slots come first");
  assert.equal(slots[6], "Slot 8reading 100 of 300 · 100 of 1,024");
  assert.equal(slots[7], "Slot 948 tok/s · 512 of 1,024");
  assert.equal(await page.textContent("#more-slots"), "and 2 more slots");
  assert.deepEqual(await page.locator("#memory li").allTextContents(), [
    "Cache of the originals64.0 MiB",
    "Hidden ring1.00 MiB",
    "If all 3 copies were kept192 MiB",
  ]);
  assert.match(await page.textContent("#memory-rest"), /Weights 1.00 GiB, scratch 2.00 MiB/);
  const words = await page.textContent("#picture-text");
  assert.match(words, /holds 1,024 of 4,096 positions; 256 of them are shared, and 512 more are retained/);
  assert.match(words, /10 slots, 2 busy, 2 requests waiting/);
  assert.match(words, /The cache takes 64.0 MiB. 3 full caches would take 192 MiB/);
});

test("a plain transformer has no ring, and a server without state no picture", async (t) => {
  const { page } = await open(t, { options: ["-copies", "1", "-window", "0", "-chunk", "0"] });
  await page.locator("#rule", { hasText: "K = 1" }).waitFor();
  assert.ok(!(await page.isVisible("#ring-section")));
  assert.equal(await page.locator("#memory li").count(), 1);
  await page.route("**/phd/state", (route) => route.fulfill({ status: 404, body: "no" }));
  await page.reload();
  await page.locator("#picture-missing", { hasText: "does not tell its state" }).waitFor();
});

test("the server is asked for its state while somebody looks, and the words change calmly", async (t) => {
  const { server, page, ask } = await open(t, {
    prepare: async (page) => {
      await page.clock.install();
      await page.addInitScript(() => {
        let hidden = false;
        Object.defineProperty(document, "hidden", { get: () => hidden });
        globalThis.look = (away) => {
          hidden = away;
          document.dispatchEvent(new Event("visibilitychange"));
        };
      });
    },
  });
  // The page's clock goes on only when what it has asked for has been answered; how long that takes does not count.
  let asked = 0;
  const pending = new Set();
  page.on("request", (request) => {
    if (request.url().endsWith("/phd/state")) pending.add(request);
  });
  for (const end of ["requestfinished", "requestfailed"]) page.on(end, (request) => pending.delete(request) && asked++);
  const run = async (seconds) => {
    asked = 0;
    for (let i = 0; i < seconds * 20; i++) {
      await page.clock.runFor(50);
      await eventually("the state is there", async () => (await page.evaluate(() => true)) && pending.size === 0);
    }
    return asked;
  };
  await ready(page);
  await run(1);
  const idle = await run(4);
  assert.ok(idle >= 2 && idle <= 5, `idle: ${idle} in 4 s`);
  await ask("@gate @count 50");
  await server.release(5);
  await page.locator("article.answer .body", { hasText: "5" }).waitFor();
  const busy = await run(4);
  assert.ok(busy > idle && busy <= 17, `answering: ${busy} in 4 s`);
  await page.evaluate(() => look(true));
  await run(1);
  assert.equal(await run(10), 0, "nobody looks");
  await page.evaluate(() => look(false));
  assert.ok((await run(2)) > 0);

  // With each second a token; the words change once, then not for five seconds, and then again.
  const words = () => page.textContent("#picture-text");
  const changesWithin = async (seconds) => {
    const before = await words();
    for (let i = 0; i < seconds; i++) {
      await server.release(1);
      await run(1);
      if ((await words()) !== before) return true;
    }
    return false;
  };
  assert.ok(await changesWithin(12));
  assert.ok(!(await changesWithin(5)));
  assert.ok(await changesWithin(8));
});

test("nothing moves for those who do not want it", async (t) => {
  const { page, ask } = await open(t);
  await ask("@gate @count 3");
  await page.locator(".pending:visible").waitFor();
  const moving = () =>
    page.evaluate(
      () =>
        [...document.querySelectorAll("*")]
          .flatMap((node) => [null, "::after"].map((part) => getComputedStyle(node, part)))
          .filter(
            (style) =>
              style.animationName !== "none" || (style.transitionDuration !== "0s" && style.transitionProperty !== "none"),
          ).length,
    );
  assert.equal(await moving(), 0);
  await page.emulateMedia({ reducedMotion: "no-preference" });
  assert.ok((await moving()) > 0);
});
