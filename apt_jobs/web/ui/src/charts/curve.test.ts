import { assert, test } from "vitest";
import { GradientHistory } from "../stores/gradients.ts";
import { Curve, smoothed } from "./curve.ts";
import { formatDuration, formatNumber } from "../text/format.ts";
import { defaultsWith, faultsOf, numParameters, PRESETS, requestOf } from "../stores/trainform.ts";

test("a curve stays bounded and keeps its spikes", () => {
  const curve = new Curve(500);
  for (let step = 1; step <= 20_000; step += 1) curve.add(step, step === 7_777 ? 90 : Math.sin(step / 500));
  curve.add(20_001, Number.NaN);
  for (let step = 20_002; step <= 30_000; step += 1) curve.add(step, Math.sin(step / 500));
  assert.ok(curve.steps.length <= 500);
  assert.strictEqual(curve.steps[0], 1);
  assert.strictEqual(curve.lastStep, 30_000);
  assert.ok(curve.values.includes(90));
  assert.ok(curve.values.some((value) => Number.isNaN(value)));
  assert.ok(curve.steps.every((step, index) => index === 0 || step > curve.steps[index - 1]));
});

test("a step that comes twice is one point", () => {
  const curve = new Curve();
  curve.add(1, 5);
  curve.add(2, 4);
  curve.add(2, 9);
  curve.add(1, 9);
  assert.deepEqual(
    [curve.steps, curve.values],
    [
      [1, 2],
      [5, 4],
    ],
  );
});

test("points stay evenly spread however long a job trains", () => {
  const curve = new Curve(500);
  for (let step = 1; step <= 100_000; step += 1) curve.add(step, step);
  const early = curve.steps.filter((step) => step <= 50_000).length;
  assert.ok(Math.abs(early - curve.steps.length / 2) < 5, `${early} of ${curve.steps.length} are in the first half`);
});

test("a loaded curve goes on at its own density", () => {
  const curve = new Curve(600);
  curve.load(
    Array.from({ length: 500 }, (_, index) => index * 100),
    new Array<number>(500).fill(1),
  );
  for (let step = 49_901; step <= 52_000; step += 1) curve.add(step, 1);
  assert.ok(curve.steps.length <= 525, `${curve.steps.length} points`);
  assert.strictEqual(curve.lastStep, 52_000);
});

test("smoothing passes over what is not a number", () => {
  assert.deepEqual(smoothed([1, Number.NaN, 3], 1), [1, 2, 3]);
  assert.deepEqual(smoothed([Number.NaN], 1), [null]);
});

test("gradient statistics are those of all steps, whatever was thinned", () => {
  const history = new GradientHistory();
  history.setNames(["a", "b"]);
  for (let step = 1; step <= 9_000; step += 1) {
    history.add(step, [step % 2 ? 1 : 3, step === 123 ? "NaN" : 2], step === 123 ? [1] : []);
  }
  assert.ok(history.rows.length <= history.maxRows);
  const [a, b] = history.statistics();
  assert.ok(Math.abs((a.mean ?? 0) - 2) < 1e-9);
  assert.ok(Math.abs((a.std ?? 0) - 1) < 1e-9);
  assert.strictEqual(b.anomalies, 1);
  assert.strictEqual(b.max, 2);
  assert.ok(
    history.rows.some((row) => row.anomalous[1] === 1 && Number.isNaN(row.norms[1])),
    "the NaN is still there",
  );
});

test("an anomaly of a step that has no row of its own is marked at the next one", () => {
  const history = new GradientHistory();
  history.setNames(["a"]);
  for (const step of [1, 50, 100]) history.add(step, [1], []);
  history.mark(33, [{ layer: "a", anomaly: "nan", norm: "NaN" }]);
  history.mark(34, [{ layer: "unknown", anomaly: "nan", norm: "NaN" }]);
  assert.deepEqual(
    history.rows.map((row) => row.anomalous[0]),
    [0, 1, 0],
  );
  assert.ok(Number.isNaN(history.rows[1].norms[0]));
});

test("numbers keep their names when they are not finite", () => {
  assert.strictEqual(formatNumber("NaN"), "NaN");
  assert.strictEqual(formatNumber("-Infinity"), "−∞");
  assert.strictEqual(formatNumber(0.00001234), "1.23e-5");
  assert.strictEqual(formatNumber(null), "–");
  assert.strictEqual(formatDuration(3_725), "1 h 2 min");
});

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

test("the number of parameters is the one of the specification", () => {
  // APTConfig().num_parameters, as Python computes it.
  assert.strictEqual(numParameters(defaultsWith({ id: "", label: "", note: "", values: {} })), 1_053_824);
});
