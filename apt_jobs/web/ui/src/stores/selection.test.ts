import { assert, test } from "vitest";
import { statesFor, type Steered } from "../api/steering.ts";
import { MAX_SELECTED, Selection } from "./selection.svelte.ts";

const job = (id: string, state: Steered["state"] = "running", kind: Steered["kind"] = "train"): Steered => ({
  ...{ id, state, kind },
  cancel_requested_at: null,
});

test("jobs are selected one by one, and follow what becomes of them", () => {
  const selection = new Selection();
  selection.toggle(job("a"));
  selection.toggle(job("b", "failed"));
  selection.toggle(job("c", "queued", "generate"));
  assert.deepEqual(
    [selection.ids, selection.trainingIds],
    [
      ["a", "b", "c"],
      ["a", "b"],
    ],
  );
  assert.deepEqual(
    selection.allowed("cancel").map(({ id }) => id),
    ["a", "c"],
  );
  selection.update([job("a", "succeeded"), job("z")]);
  assert.deepEqual(
    selection.allowed("cancel").map(({ id }) => id),
    ["c"],
  );
  assert.deepEqual(
    selection.ended.map(({ id }) => id),
    ["a", "b"],
  );
  selection.toggle(job("b"));
  assert.strictEqual(selection.count, 2);
  selection.clear();
  assert.strictEqual(selection.count, 0);
});

test("all that match are one filter, until one of them is taken out", () => {
  const selection = new Selection();
  selection.selectAll({ filter: "label:a", total: 5_000 });
  assert.deepEqual([selection.count, selection.has("anything"), selection.ids], [5_000, true, []]);
  selection.toggle(job("b"), [job("a"), job("b"), job("c")]);
  assert.deepEqual([selection.all, selection.ids], [null, ["a", "c"]]);
});

test("no more are selected than the service takes at once", () => {
  const selection = new Selection();
  selection.add(Array.from({ length: 2 * MAX_SELECTED }, (_, index) => job(String(index))));
  assert.strictEqual(selection.count, MAX_SELECTED);
});

test("a verb is asked of those states in which it does something", () => {
  assert.deepEqual(statesFor("cancel").sort(), ["paused", "pausing", "queued", "running"]);
  assert.deepEqual(statesFor("pause").sort(), ["queued", "running"]);
  assert.deepEqual(statesFor("resume"), ["paused"]);
  assert.deepEqual(statesFor("delete").sort(), ["cancelled", "dead", "failed", "succeeded"]);
});
