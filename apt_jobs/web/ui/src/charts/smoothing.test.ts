import { assert, test } from "vitest";
import { ema } from "./smoothing.ts";

test("the first values are averages of themselves, not of zeros", () => {
  const smooth = ema([4, 4, 4], 0.9);
  assert.ok(smooth.every((value) => Math.abs((value ?? 0) - 4) < 1e-12));
});

test("it is the bias-corrected average of its definition", () => {
  const [beta, values] = [0.8, [3, 1, 4, 1, 5]];
  let biased = 0;
  values.forEach((value, index) => {
    biased = beta * biased + (1 - beta) * value;
    assert.ok(Math.abs((ema(values, beta)[index] ?? 0) - biased / (1 - beta ** (index + 1))) < 1e-12);
  });
});

test("what is not finite is passed over", () => {
  assert.deepEqual(ema([Number.NaN, null, 2, Infinity, 2], 0.5), [null, null, 2, 2, 2]);
});

test("without weight on the past nothing is smoothed", () => assert.deepEqual(ema([1, 2, 3], 0), [1, 2, 3]));
