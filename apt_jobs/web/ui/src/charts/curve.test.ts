import { assert, test } from "vitest";
import { Curve } from "./curve.ts";

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
