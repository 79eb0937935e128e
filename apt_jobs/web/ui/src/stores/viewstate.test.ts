import { assert, test } from "vitest";
import { location, routeOf } from "./router.svelte.ts";
import { changedQuery, rangeOf, viewState } from "./viewstate.svelte.ts";

test("choices are added, changed and taken out; others stay", () => {
  assert.strictEqual(changedQuery("?a=1&b=2", { a: "3", c: "x y&z" }), "?a=3&b=2&c=x+y%26z");
  assert.strictEqual(changedQuery("?a=1", { a: null }), "");
});

test("a range is two steps in order, anything else is none", () => {
  assert.deepEqual(rangeOf("100-200"), [100, 200]);
  for (const text of [null, "", "5", "200-100", "5-5", "-1-5", "1-2-3", "a-b", "1e3-2e3", "9".repeat(16) + "-1"]) {
    assert.strictEqual(rangeOf(text), null, String(text));
  }
});

test("the address holds what is chosen, and the part of the page stays", () => {
  location.go("/jobs/job_1?zoom=1-9#gradients");
  viewState.set({ smooth: "0.5" });
  assert.strictEqual(window.location.search, "?zoom=1-9&smooth=0.5");
  assert.strictEqual(window.location.hash, "#gradients");
  location.go("#log");
  assert.strictEqual(window.location.search, "?zoom=1-9&smooth=0.5");
  assert.deepEqual(routeOf(location.path, location.hash), { page: "job", jobId: "job_1", tab: "log" });
});

test("numbers of the address are checked", () => {
  const numbers: [string, number][] = [
    ["?s=0.5", 0.5],
    ["?s=7", 0.8],
    ["?s=NaN", 0.8],
    ["?s=", 0.8],
    ["", 0.8],
    ["?s=0", 0],
  ];
  for (const [query, expected] of numbers) {
    location.go(`/jobs/job_1${query}`);
    assert.strictEqual(viewState.number("s", 0, 0.99, 0.8), expected, query);
  }
});

test("ids that are quoted wrongly do not break the page", () => {
  assert.deepEqual(routeOf("/jobs/%zz", ""), { page: "job", jobId: "%zz", tab: "" });
  assert.deepEqual(routeOf("/jobs/a%2Fb", "#log"), { page: "job", jobId: "a/b", tab: "log" });
  assert.deepEqual(routeOf("/nothing/here", ""), { page: "missing" });
});
