// See `run`.
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import assert from "node:assert/strict";
import { chromium } from "playwright-core";
import { upstream } from "./upstream.mjs";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const shots = process.env.SHOTS;
mkdirSync(shots, { recursive: true });
const folder = mkdtempSync(join(tmpdir(), "ifnewer-page-"));
const registry = await upstream();
registry.push("library/alpine", "3.20", [3400000]);
registry.push("library/python", "3.12", [3400001, 6000000]);
registry.push("acme/web", "main", [4000000]);

const config = join(folder, "ifnewer.toml");
writeFileSync(config, `data = "data"
[listen]
registry = ["127.0.0.1:0"]
admin = "127.0.0.1:0"
[tls]
folder = "certs"
[upstream."docker.io"]
url = "${registry.url}"
`);
const program = spawn(process.env.IFNEWER, ["serve", "--config", config], { stdio: ["ignore", "pipe", "ignore"] });
const said = { registry: null, admin: null };
await new Promise((done, fail) => {
  let text = "";
  program.on("exit", () => fail(new Error("ifnewer did not start")));
  program.stdout.on("data", (bytes) => {
    text += bytes;
    for (const name of Object.keys(said)) said[name] ??= new RegExp(`^${name} listening on (\\S+)\n`, "m").exec(text)?.[1] ?? null;
    if (said.registry && said.admin) done();
  });
});
const page = `http://${said.admin}/`;

async function pull(image, tag) {
  const get = (path) => fetch(`http://${said.registry}/v2/${image}/${path}`, { headers: { "user-agent": "docker/27.3.1" } });
  const manifest = await (await get(`manifests/${tag}`)).json();
  for (const part of [manifest.config, ...manifest.layers]) await (await get(`blobs/${part.digest}`)).arrayBuffer();
}

const browser = await chromium.launch({
  executablePath: process.env.BROWSER,
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
});
const failures = [];
async function test(name, options, body) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const tab = await context.newPage();
  const errors = [];
  tab.on("pageerror", (error) => errors.push(error.message));
  tab.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });
  tab.on("request", (request) => { if (!request.url().startsWith(page)) errors.push(`unexpected request ${request.url()}`); });
  try {
    await body(tab);
    assert.deepEqual(errors, []);
    console.log(`ok   ${name}`);
  } catch (error) {
    failures.push(name);
    console.log(`FAIL ${name}: ${error.message}`);
    await tab.screenshot({ path: join(shots, "failed.png"), fullPage: true });
  }
  await context.close();
}

async function accessible(tab) {
  // The page's own policy does not allow the checker.
  await tab.context().newCDPSession(tab).then((session) => session.send("Page.setBypassCSP", { enabled: true }));
  await tab.reload();
  await tab.evaluate(axe);
  const found = await tab.evaluate(async () => (await globalThis.axe.run()).violations.map(
    (violation) => `${violation.id}: ${violation.nodes.map((node) => node.html).slice(0, 3).join(" ")}`));
  assert.deepEqual(found, []);
}

try {
  await test("an empty cache links to the client setup", {}, async (tab) => {
    await tab.goto(page);
    await tab.getByText("Nothing has been pulled yet").waitFor();
    await accessible(tab);
  });
  await test("a new decision appears without a reload", {}, async (tab) => {
    await tab.goto(page);
    await tab.waitForFunction(() => document.documentElement.dataset.live === "yes");
    await pull("library/python", "3.12");
    await tab.getByText("not cached: fetched from docker.io").first().waitFor({ timeout: 15000 });
    await tab.locator("#images").getByText("library/python").first().waitFor();
    await tab.locator("#clients").getByText("docker", { exact: true }).waitFor();
  });
  await test("a pull in advance shows its progress", {}, async (tab) => {
    registry.slow(30);
    await tab.goto(page);
    await tab.getByLabel("Pull in advance").fill("acme/web:main");
    await tab.getByRole("button", { name: "Pull", exact: true }).click();
    await tab.getByText("Pulling acme/web:main.").waitFor();
    await tab.locator("#transfers progress").first().waitFor();
    await tab.locator("#transfers").getByText("pulled").waitFor({ timeout: 20000 });
    registry.slow(0);
  });
  await test("every action works without scripts", { javaScriptEnabled: false }, async (tab) => {
    await tab.goto(page);
    await tab.getByRole("button", { name: "Refresh docker.io/library/python:3.12" }).click();
    await tab.getByText("docker.io/library/python:3.12: unchanged at docker.io.").waitFor();
    await tab.getByRole("button", { name: "Pin docker.io/library/python:3.12" }).click();
    await tab.getByText("docker.io/library/python:3.12 is pinned").waitFor();
    await tab.getByRole("button", { name: "Unpin docker.io/library/python:3.12" }).click();
    await tab.getByRole("button", { name: "Go offline" }).click();
    await tab.getByText("Offline: serving cached images, no upstream requests").waitFor();
    await tab.getByRole("button", { name: "Go online" }).click();
    await tab.getByRole("button", { name: "Remove docker.io/acme/web:main" }).click();
    await tab.getByRole("heading", { name: "Remove docker.io/acme/web:main?" }).waitFor();
    await tab.getByRole("button", { name: "Remove", exact: true }).click();
    await tab.getByText("Removed docker.io/acme/web:main;").waitFor();
    assert.equal(await tab.locator("#images-list").getByText("acme/web").count(), 0);
  });
  await test("four numbers, two plots, state of each upstream, and the CA download", {}, async (tab) => {
    await tab.goto(page);
    for (const number of ["Byte hit ratio", "Bytes saved", "Served stale", "Quota left"])
      assert.equal(await tab.locator("dt").getByText(number, { exact: false }).count() > 0, true, number);
    assert.equal(await tab.locator("svg[role=img]").count() >= 2, true, "two plots");
    await tab.locator("#upstreams").getByText("last request").first().waitFor();
    const ca = await tab.request.get(new URL(await tab.locator("a[href='/ca.pem']").first().getAttribute("href"), page).href);
    assert.match(await ca.text(), /BEGIN CERTIFICATE/);
  });
  await pull("library/alpine", "3.20");
  for (const [name, width, colorScheme] of [["wide", 1280, "light"], ["wide", 1280, "dark"], ["phone", 390, "light"], ["phone", 390, "dark"]]) {
    await test(`${name}, ${colorScheme}: nothing overflows and axe finds nothing`, { viewport: { width, height: 900 }, colorScheme }, async (tab) => {
      await tab.goto(page);
      await tab.screenshot({ path: join(shots, `page-${name}-${colorScheme}.png`), fullPage: true });
      assert.equal(await tab.evaluate(() => document.documentElement.scrollWidth <= innerWidth), true, "horizontal overflow");
      await accessible(tab);
    });
  }
  await test("keyboard alone suffices", {}, async (tab) => {
    await tab.goto(page);
    await tab.keyboard.press("Tab");
    assert.equal(await tab.evaluate(() => document.activeElement.textContent), "Skip to the content");
  });
  // The picture of the README: some pulls, then an outage of the registry.
  for (let times = 0; times < 8; times++) {
    await pull("library/python", "3.12");
    await pull("library/alpine", "3.20");
  }
  registry.end();
  await pull("library/alpine", "3.20");
  for (const colorScheme of ["light", "dark"]) {
    await test(`an outage is told, ${colorScheme}`, { viewport: { width: 1280, height: 1080 }, colorScheme }, async (tab) => {
      await tab.goto(page);
      await tab.locator("#decisions").getByText("stale").first().waitFor();
      await tab.screenshot({ path: join(shots, `readme-${colorScheme}.png`) });
    });
  }
} finally {
  await browser.close();
  program.kill("SIGTERM");
  registry.end();
  rmSync(folder, { recursive: true, force: true });
}
console.log(failures.length ? `${failures.length} failed` : "all page tests passed");
process.exit(failures.length ? 1 : 0);
