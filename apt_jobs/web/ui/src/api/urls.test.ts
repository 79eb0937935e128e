import { assert, test } from "vitest";
import { basePathOf, jobUrlOf, pathOf, urlOf } from "./urls.ts";

test("at the root of a host paths are addresses", () => {
  assert.deepEqual(["", "/"].map(basePathOf), ["", ""]);
  assert.strictEqual(urlOf("/api/jobs", ""), "/api/jobs");
  assert.strictEqual(pathOf("/jobs/new", ""), "/jobs/new");
  assert.strictEqual(pathOf("/", ""), "/");
});

test("below a path each address begins with it", () => {
  const base = basePathOf("/team/apt");
  assert.strictEqual(basePathOf("/team/apt/"), base);
  assert.strictEqual(base, "/team/apt");
  assert.strictEqual(urlOf("/api/jobs?limit=5", base), "/team/apt/api/jobs?limit=5");
  assert.strictEqual(pathOf("/team/apt/jobs/new", base), "/jobs/new");
  assert.strictEqual(pathOf("/team/apt", base), "/");
  assert.strictEqual(pathOf("/team/aptitude", base), null);
});

test("ids are quoted", () => assert.strictEqual(jobUrlOf("a/b?c#d"), "/jobs/a%2Fb%3Fc%23d"));
