// The page for everybody: on a phone, by keyboard, with a screen reader.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { axePath, launch, openPage, ready } from "./harness.mjs";
import { eventually, standin } from "./servers.mjs";

let chromium;
before(async () => {
  chromium = await launch();
});
after(async () => {
  await chromium.close();
});

const PHONE = { viewport: { width: 360, height: 640 }, hasTouch: true, isMobile: true };

// The page of a new stand-in.
async function open(t, { options = [], ...more } = {}) {
  const server = await standin(...options);
  t.after(() => server.close());
  return { server, ...(await openPage(t, chromium, server, more)) };
}

test("a phone's screen is wide enough", async (t) => {
  const { page, ask, finished, server } = await open(t, { context: PHONE });
  await ready(page);
  const fits = async (what) => {
    const wide = await page.evaluate(() => {
      const scrolls = (node) =>
        node && (/auto|scroll|hidden/.test(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
      return {
        page: document.documentElement.scrollWidth,
        nodes: [...document.querySelectorAll("body *")]
          .filter((node) => {
            const box = node.getBoundingClientRect();
            return (
              box.width > 0 &&
              (box.right > 360.5 || box.left < -0.5) &&
              !scrolls(node.parentElement) &&
              !node.matches(".skip, .unseen")
            );
          })
          .map((node) => node.outerHTML.slice(0, 80)),
        log: document.getElementById("log").scrollWidth - document.getElementById("log").clientWidth,
        details: document.getElementById("details").scrollWidth - document.getElementById("details").clientWidth,
      };
    });
    assert.deepEqual(wide, { page: 360, nodes: [], log: 0, details: 0 }, what);
  };
  await fits("empty");
  await ask(
    `@say ${"W".repeat(200)} https://example.com/${"a".repeat(200)} and\n\n| ${"wide | ".repeat(20)}\n| ${"- | ".repeat(20)}\n\n\`\`\`\n${"c".repeat(200)}\n\`\`\`\n\n1. ${"L".repeat(100)}\n\nend`,
  );
  await finished("end");
  await fits("an answer of long words");
  await page.tap("#strip");
  await page.locator("#details").waitFor();
  assert.equal(await page.getAttribute("#strip", "aria-expanded"), "true");
  await fits("the picture");
  await page.tap("#strip");
  await page.locator("#details").waitFor({ state: "hidden" });
  await page.tap("button:text-is('Edit')");
  await fits("editing");
  await page.tap("#open-settings");
  await fits("settings");
  const dialog = await page.locator("#settings").boundingBox();
  assert.ok(dialog.x >= 0 && dialog.x + dialog.width <= 360 && dialog.y >= 0 && dialog.y + dialog.height <= 640);
  assert.equal(await page.locator("#settings").evaluate((node) => node.scrollWidth > node.clientWidth), false);
  await page.tap("#cancel");
  const small = await page
    .locator("button:visible")
    .evaluateAll((buttons) => buttons.filter((b) => b.getBoundingClientRect().height < 40).map((b) => b.textContent));
  assert.deepEqual(small, [], "buttons for fingers");

  // With a keyboard on the screen the message field is still there.
  await page.setViewportSize({ width: 360, height: 300 });
  const field = await page.locator("#composer").boundingBox();
  assert.ok(field.y >= 0 && field.y + field.height <= 300, JSON.stringify(field));
  await ask("@error 400 invalid_request_error " + "E".repeat(300));
  await page.locator("article .error").waitFor();
  await fits("an error of one word");
  assert.equal((await server.log()).length, 2);
});

test("everything can be done by keyboard, and focus is seen", async (t) => {
  const { page, server } = await open(t);
  await ready(page);
  const focused = () =>
    page.evaluate(() => {
      const node = document.activeElement,
        style = getComputedStyle(node),
        box = node.closest("#composer") ?? node;
      const seen =
        (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2) || getComputedStyle(box).boxShadow !== "none";
      return { name: node.id || node.textContent, seen };
    });
  const tab = async (keys = "Tab") => {
    await page.keyboard.press(keys);
    const { name, seen } = await focused();
    assert.ok(seen, `${name}: focus cannot be seen`);
    return name;
  };
  assert.equal((await focused()).name, "message", "the page begins at the message");
  await page.keyboard.type("@say one");
  await page.keyboard.press("Enter");
  await page.locator("text=Regenerate").waitFor();
  assert.equal((await focused()).name, "message", "the focus stays");
  await page.focus(".skip");
  const order = ["Skip to the message field"];
  for (let i = 0; i < 10; i++) order.push(await tab());
  assert.deepEqual(order, [
    "Skip to the message field",
    "new",
    "open-settings",
    "details",
    "log",
    "Edit",
    "Copy",
    "Regenerate",
    "Delete",
    "message",
    "send",
  ]);
  for (let i = 0; i < 3; i++) await tab("Shift+Tab");
  await page.keyboard.press("Enter"); // Regenerate
  await eventually("asked again", async () => (await server.log()).length === 2);
  await page.locator("text=Regenerate").waitFor();
  assert.equal((await focused()).name, "send", "the button is gone, the focus is not");

  await page.focus(".skip");
  await page.keyboard.press("Enter");
  assert.equal((await focused()).name, "message");

  await page.focus("#open-settings");
  await page.keyboard.press("Enter");
  await page.locator("#settings").waitFor();
  const inside = new Set();
  for (let i = 0; i < 20; i++) {
    await page.keyboard.press("Tab");
    inside.add(
      await page.evaluate(() =>
        document.activeElement === document.body ? "body" : String(Boolean(document.activeElement.closest("dialog"))),
      ),
    );
  }
  assert.ok(!inside.has("false"), "the focus stays in the dialog");
  await page.keyboard.press("Escape");
  assert.equal((await focused()).name, "open-settings", "and returns to where it came from");

  await page.focus("#message");
  await page.keyboard.type("@gate @count 9");
  await tab();
  await page.keyboard.press("Space");
  await page.locator("#send", { hasText: "Stop" }).waitFor();
  assert.equal((await focused()).name, "send", "Send becomes Stop without losing the focus");
  await page.keyboard.press("Space");
  await eventually("stopped", async () => (await server.log()).at(-1).ended === "cancelled");
  await page.locator(".stats", { hasText: "stopped" }).waitFor();
});

test("headings and landmarks tell where one is", async (t) => {
  const { page, ask, finished } = await open(t);
  await ask("hello");
  await finished("hello");
  for (const [role, name] of [
    ["banner", undefined],
    ["main", undefined],
    ["complementary", "What the model is doing"],
    ["region", "Conversation"],
  ]) {
    assert.equal(
      await page
        .getByRole(role, name ? { name, exact: true } : {})
        .first()
        .count(),
      1,
      role,
    );
  }
  assert.equal(await page.getByRole("textbox", { name: "Message", exact: true }).count(), 1);
  assert.equal(await page.getByRole("img", { name: "Hidden ring" }).count(), 1);
  assert.equal(await page.getByRole("heading", { name: "You", exact: true }).count(), 1);
  assert.equal(await page.getByRole("heading", { name: "Model", exact: true }).count(), 1);
  assert.equal(await page.locator("#turns [aria-live]").count(), 0, "tokens are not read out one by one");
});

for (const colorScheme of ["light", "dark"]) {
  for (const [device, context] of [
    ["desktop", {}],
    ["phone", PHONE],
  ]) {
    test(`axe finds nothing (${device}, ${colorScheme})`, async (t) => {
      // axe comes into the page as a script, which the page's own policy forbids.
      const { page, ask, finished } = await open(t, { context: { ...context, colorScheme, bypassCSP: true } });
      await ready(page);
      await page.locator("#ring rect").first().waitFor({ state: "attached" });
      await page.addScriptTag({ path: axePath });
      const check = async (state) => {
        const { violations, incomplete } = await page.evaluate(() =>
          axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }),
        );
        const short = (list) =>
          list.map(
            ({ id, nodes }) =>
              `${id}: ${nodes.map((node) => node.html.slice(0, 100) + " " + node.failureSummary).join("; ")}`,
          );
        assert.deepEqual(short(violations), [], state);
        assert.deepEqual(short(incomplete.filter(({ id }) => id !== "color-contrast")), [], `${state}: to be looked at`);
      };
      await check("empty");
      await ask(
        "@say # Title\n\ntext with `code`, [a link](https://example.com/)\n\n- a list\n\n> a quote\n\n| a | b |\n| - | - |\n| c | d |\n\n```js\nlet a;\n```\n\nend",
      );
      await finished("end");
      await check("an answer");
      await ask("@error 400 invalid_request_error no");
      await page.locator("article .error").waitFor();
      await check("an error");
      await ask("@gate @count 3");
      await page.locator(".pending:visible").waitFor();
      await check("waiting");
      await page.keyboard.press("Escape");
      if (device === "phone") {
        await page.tap("#strip");
        await check("the picture");
      }
      await page.click("button:text-is('Edit')");
      await check("editing");
      await page.click("#open-settings");
      await check("settings");
      await page.fill("#top_p", "7");
      await page.click("text=Save");
      await check("a wrong setting");
    });
  }
}
