import { assert, test } from "vitest";
import { NO_MIN_MAX } from "./curve.ts";
import { metricData, metricLines, nonfiniteMarks, numNonpositive } from "./metric.ts";

const POINTS = { steps: [1, 2, 3, 4], values: [2, 0, Number.NaN, -1], minMax: NO_MIN_MAX };

test("a log scale leaves out what it has no place for, and says how much", () => {
  assert.deepEqual(metricData(POINTS, 0, true), [POINTS.steps, [2, null, null, null]]);
  assert.deepEqual(metricData(POINTS, 0, false), [POINTS.steps, [2, 0, null, -1]]);
  assert.strictEqual(numNonpositive(POINTS), 2);
  assert.deepEqual(nonfiniteMarks(POINTS), [{ step: 3, value: Number.NaN }]);
});

test("there are as many lines as rows of data", () => {
  for (const beta of [0, 0.9]) {
    assert.strictEqual(metricLines("loss", "--x", beta).length, metricData(POINTS, beta, false).length - 1);
  }
});
