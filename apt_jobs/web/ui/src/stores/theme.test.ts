import { afterEach, assert, test } from "vitest";
import { Theme } from "./theme.svelte.ts";

afterEach(() => window.localStorage.clear());

test("a chosen scheme is kept in the browser and holds against the system's", () => {
  new Theme().choose("dark");
  assert.strictEqual(document.documentElement.dataset.theme, "dark");
  const next = new Theme();
  assert.deepEqual([next.chosen, next.dark], ["dark", true]);
  next.choose("system");
  assert.strictEqual(document.documentElement.dataset.theme, undefined);
});

test("an unknown stored scheme is the system's", () => {
  window.localStorage.setItem("apt_jobs.scheme", "<img>");
  assert.strictEqual(new Theme().chosen, "system");
});

test("layers have different colors, none of them red", () => {
  const theme = new Theme();
  const colors = Array.from({ length: 40 }, (_, index) => theme.layer(index, 40));
  assert.strictEqual(new Set(colors).size, 40);
  assert.ok(colors.every((color) => Number(/hsl\((\d+)/.exec(color)?.[1]) >= 42));
});
