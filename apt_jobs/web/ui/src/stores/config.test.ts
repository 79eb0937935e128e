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

test("a job with a script of its own shows nothing that only the built-in trainer reads", () => {
  const data = { packing: true, chat_template: null };
  const spec = { entry_point: "code", dataset: "pydoc-topics", data, training: { seed: new NumberText("1") } };
  assert.deepEqual(configGroups(spec, {}), [{ title: "Job", object: { entry_point: "code" } }]);
  assert.deepEqual(configGroups({ ...spec, dataset: "mine" }, {}), [
    { title: "Job", object: { entry_point: "code", dataset: "mine" } },
  ]);
  assert.deepEqual(configGroups({ ...spec, entry_point: "language-model" }, {})[1], {
    title: "Data",
    object: { packing: true },
  });
});

test("resources that nobody asked for are not there", () => {
  const none = { gpus: null, gpu_type: null };
  assert.deepEqual(configGroups({ resources: none }, {}), []);
  assert.deepEqual(configGroups({ resources: { ...none, gpus: new NumberText("2") } }, {}), [
    { title: "Resources", object: { gpus: new NumberText("2") } },
  ]);
});
