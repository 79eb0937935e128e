import { assert, test } from "vitest";
import type { StoredEvent } from "../generated/events.ts";
import type { MetricsAnswer } from "../generated/rest.ts";
import { curvesOf, refined, TrainingCurves } from "./curves.ts";

function metric(step: number, values: Record<string, unknown>): StoredEvent {
  return {
    seq: step,
    attempt: 1,
    at: "2026-01-02T03:04:05Z",
    kind: "metric",
    step,
    ...values,
  } as unknown as StoredEvent;
}

test("what a user's script does not give is no point, zero is one", () => {
  const curves = new TrainingCurves();
  curves.apply(metric(1, { train_loss: 2, tokens_per_s: null, grad_norm: 0 }));
  curves.apply(metric(2, { train_loss: "NaN", tokens_per_s: null }));
  assert.deepEqual(curves.loss.values, [2, Number.NaN]);
  assert.deepEqual(curves.gradNorm.values, [0]);
  assert.deepEqual([curves.throughput.steps, curves.rate.steps], [[], []]);
  assert.strictEqual(curves.lastStep, 2);
});

test("a history without some values is loaded without them", () => {
  const steps = [1, 2, 3];
  const curves = curvesOf({
    training_history: {
      steps,
      train_loss: [3, null, "Infinity"],
      learning_rate: [null, null, null],
      extremes: { train_loss: { min: [1, null, 2], max: [4, null, "Infinity"] } },
    },
  } as unknown as MetricsAnswer);
  assert.deepEqual(
    [curves.loss.steps, curves.loss.values],
    [
      [1, 3],
      [3, Infinity],
    ],
  );
  assert.deepEqual(curves.loss.minMax, { steps, min: [1, null, 2], max: [4, null, Infinity] });
  assert.deepEqual([curves.rate.steps, curves.throughput.steps], [[], []]);
});

test("a range of steps is replaced by finer points", () => {
  const [whole, fine] = [new TrainingCurves().loss, new TrainingCurves().loss];
  whole.load([0, 10, 20, 30], [0, 1, 2, 3]);
  fine.load([10, 12, 14, 20], [5, 6, 7, 8]);
  const points = refined(whole, fine, [10, 20]);
  assert.deepEqual(points.steps, [0, 10, 12, 14, 20, 30]);
  assert.deepEqual(points.values, [0, 5, 6, 7, 8, 3]);
});
