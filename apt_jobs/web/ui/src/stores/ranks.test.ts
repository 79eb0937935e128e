import { assert, test } from "vitest";
import type { Float, StoredEvent } from "../generated/events.ts";
import { RankHistory } from "./ranks.ts";

function joined(step: number, losses: Float[]): StoredEvent {
  const times = losses.map(() => 1);
  return {
    seq: step,
    attempt: 1,
    at: "",
    kind: "ranks",
    step,
    losses,
    grad_norms: losses,
    step_times_ms: times,
    compute_times_ms: times,
    noise_scale: step % 2 ? null : 5,
  };
}

function recorded(step: number, rank: number, norms: Float[]): StoredEvent {
  return {
    seq: step,
    attempt: 1,
    at: "",
    kind: "rank_gradient",
    step,
    rank,
    norms,
    loss: null,
    step_time_ms: null,
    compute_time_ms: null,
    num_samples: 1,
    is_scaled: false,
    num_dropped: 0,
    num_rollbacks: 0,
  };
}

test("each rank has its curve, and what is not a number is a gap", () => {
  const history = new RankHistory();
  for (const event of [joined(1, [1, 2]), joined(2, ["NaN", 3])]) history.apply(event);
  assert.deepEqual(history.curves("losses", [0, 1]), [
    [1, 2],
    [1, null],
    [2, 3],
  ]);
  assert.deepEqual(history.noise(), [[2], [5]]);
});

test("steps that are trained again take the place of the old ones", () => {
  const history = new RankHistory();
  for (const step of [1, 2, 3, 2]) history.apply(joined(step, [step]));
  assert.deepEqual(history.curves("losses", [0]), [
    [1, 2],
    [1, 2],
  ]);
});

test("a layer's norm of each rank stands next to the global one", () => {
  const history = new RankHistory();
  for (const rank of [1, 0]) history.apply(recorded(10, rank, [rank + 1, 0]));
  const global = [9, 10, 11].map((step) => ({
    step,
    norms: Float64Array.of(step / 10, 7),
    anomalous: new Uint8Array(2),
  }));
  assert.deepEqual(history.ranksWithLayers, [0, 1]);
  assert.deepEqual(history.layerCurves(0, [0, 1], global), [[10], [1], [1], [2]]);
  assert.deepEqual(history.layerCurves(1, [0], global), [[10], [7], [null]]);
});

test("memory is bounded however long a job trains", () => {
  const history = new RankHistory();
  for (let step = 1; step <= 5_000; step += 1) history.apply(joined(step, [1]));
  assert.deepEqual([history.curves("losses", [0])[0].length, history.latest?.step], [1_000, 5_000]);
});
