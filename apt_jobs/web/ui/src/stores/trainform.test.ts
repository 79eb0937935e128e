import { assert, test } from "vitest";
import { defaultsWith, faultsOf, numParameters, PRESETS, requestOf } from "./trainform.ts";

test("every preset is a valid job and says only what differs from the defaults", () => {
  for (const preset of PRESETS) {
    const values = defaultsWith(preset);
    assert.deepEqual(faultsOf(values), {});
    assert.strictEqual(requestOf(values).kind, "train");
  }
  const values = defaultsWith({ id: "", label: "", note: "", values: {} });
  assert.deepEqual(requestOf(values), { kind: "train" });
});

test("faults name the field and the bound", () => {
  const values = defaultsWith({
    id: "",
    label: "",
    note: "",
    values: { "training.batch_size": 0, "model.d_model": 30 },
  });
  assert.deepEqual(faultsOf(values), {
    "training.batch_size": "must be at least 1",
    "model.d_model": "must be an even multiple of the 4 attention heads",
  });
});

test("a base model brings its shape, and an adapter is asked for by its switch", () => {
  const values = {
    ...defaultsWith(PRESETS[0]),
    base_model: "tiny",
    "model.max_seq_len": 64,
    "training.lora.r": 8,
    "training.lora.target_modules": "q_proj, v_proj",
  };
  const full = requestOf(values);
  assert.deepEqual(full.model, { max_seq_len: 64 });
  assert.notProperty(full.training as object, "lora");
  const adapted = requestOf({ ...values, "training.lora": true });
  assert.deepEqual((adapted.training as Record<string, unknown>).lora, { r: 8, target_modules: ["q_proj", "v_proj"] });
  const plain = requestOf({ ...defaultsWith(PRESETS[0]), base_model: "tiny", "training.lora": true });
  assert.deepEqual((plain.training as Record<string, unknown>).lora, {});
});

test("the number of parameters is the one of the specification", () => {
  // APTConfig().num_parameters, as Python computes it.
  assert.strictEqual(numParameters(defaultsWith({ id: "", label: "", note: "", values: {} })), 1_053_824);
});

test("an integer that a browser would round is refused with its bound", () => {
  const values = { ...defaultsWith(PRESETS[0]), "training.seed": Number("9007199254740993") };
  assert.match(faultsOf(values)["training.seed"], /^must be at most 9,007,199,254,740,991 here/);
});

test("sample prompts are one a line", () => {
  const values = { ...defaultsWith(PRESETS[0]), "training.sample_prompts": "Once upon a time\n\n 从前 \n" };
  const asked = requestOf(values).training as Record<string, unknown>;
  assert.deepEqual(asked.sample_prompts, ["Once upon a time", "从前"]);
  const empty = requestOf({ ...values, "training.sample_prompts": " \n" }).training as Record<string, unknown>;
  assert.isUndefined(empty.sample_prompts);
  const tooMany = { ...values, "training.sample_prompts": "a\n".repeat(9) };
  assert.strictEqual(faultsOf(tooMany)["training.sample_prompts"], "has at most 8 lines");
});
