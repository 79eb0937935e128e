import { assert, test } from "vitest";
import { NumberText } from "../api/exact.ts";
import { configGroups } from "./config.ts";

test("a user's script shows no model that nobody gave", () => {
  const spec = {
    kind: "train",
    entry_point: "mine",
    model: null,
    training: null,
    arguments: { n: new NumberText("1") },
  };
  assert.deepEqual(configGroups(spec, {}), [
    { title: "Job", object: { entry_point: "mine", arguments: { n: new NumberText("1") } } },
  ]);
});

test("the model that the ranks built is shown instead of the submitted one", () => {
  const groups = configGroups({ model: { d_model: new NumberText("8") } }, { d_ff: new NumberText("24") });
  assert.deepEqual(groups, [{ title: "Model", object: { d_ff: new NumberText("24") } }]);
});

test("zero and false are given, null and empty are not", () => {
  const training = { seed: new NumberText("0"), deterministic: false, keep_every_steps: null, note: "", tags: [] };
  assert.deepEqual(configGroups({ training }, {}), [
    { title: "Training", object: { seed: new NumberText("0"), deterministic: false } },
  ]);
});
