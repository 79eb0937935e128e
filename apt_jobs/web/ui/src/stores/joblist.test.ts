import { assert, test } from "vitest";
import { seenRows } from "../charts/virtual.ts";
import { sparklinePoints } from "../charts/sparkline.ts";
import { listPath, mergedRows, type ListedJob } from "./joblist.svelte.ts";

const job = (id: string): ListedJob => ({ id }) as ListedJob;

test("the service is asked for one part, in the order and by the filter of the address", () => {
  const path = listPath({ filter: 'state:running "a b"', sort: "-name" }, 40, 80, ["id"]);
  assert.strictEqual(path, "/api/jobs?sort=-name&fields=id&filter=state%3Arunning+%22a+b%22&offset=40&limit=80");
});

test("rows that were read take their places, those far away and beyond the end are forgotten", () => {
  const known = new Map([0, 10, 11, 5_000].map((index) => [index, job(`old${index}`)]));
  const merged = mergedRows(known, 10, 3, [job("a"), job("b")]);
  assert.deepEqual(
    [...merged].map(([index, { id }]) => [index, id]),
    [
      [0, "old0"],
      [10, "a"],
      [11, "b"],
    ],
  );
  assert.deepEqual(
    [...mergedRows(known, 4_990, 3, [job("a"), job("b"), job("c")]).keys()],
    [5_000, 4_990, 4_991, 4_992],
  );
});

test("of any number of rows those on the screen are drawn", () => {
  assert.deepEqual(seenRows(0, 320, 32, 100_000), { first: 0, last: 10, from: 0, to: 18 });
  assert.deepEqual(seenRows(32 * 50_000 + 5, 320, 32, 100_000), {
    first: 50_000,
    last: 50_011,
    from: 49_992,
    to: 50_019,
  });
  assert.deepEqual(seenRows(9e9, 320, 32, 100), { first: 100, last: 100, from: 92, to: 100 });
  assert.deepEqual(seenRows(0, 320, 32, 0), { first: 0, last: 0, from: 0, to: 0 });
});

test("a curve in small is broken where a loss is not finite, and one spike flattens nothing", () => {
  assert.deepEqual(sparklinePoints([], 72, 20), []);
  assert.deepEqual(sparklinePoints([null, null], 72, 20), []);
  assert.strictEqual(sparklinePoints([3, null, 2, 1], 72, 20).length, 2);
  assert.strictEqual(sparklinePoints([5], 72, 20)[0], "2.0,10.0 3.0,10.0");
  const usual = Array.from({ length: 23 }, (_, index) => 3 - index / 10);
  const [line] = sparklinePoints([1_100, ...usual], 72, 20);
  const heights = line.split(" ").map((point) => Number(point.split(",")[1]));
  assert.strictEqual(heights[0], 2); // cut off
  assert.isAbove(heights[23] - heights[1], 12); // the rest uses the height
});
