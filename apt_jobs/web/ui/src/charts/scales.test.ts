import { assert, test } from "vitest";
import { linearRange, logRange, logTicks, robustRange, visibleValues } from "./scales.ts";

const DECAY = Array.from({ length: 300 }, (_, step) => 2 + 8 * Math.exp(-step / 40));

test("a single value far off does not flatten the others", () => {
  const values = [...DECAY];
  values[2] = 1_100;
  const [min, max] = robustRange(values, 2, 1_100);
  assert.deepEqual([min, max], [2, Math.max(...values.filter((value) => value < 1_100))]);
});

test("an ordinary decay is shown from its first value on", () => {
  assert.deepEqual(robustRange(DECAY, Math.min(...DECAY), 10), [Math.min(...DECAY), 10]);
  const long = Array.from({ length: 4_000 }, (_, step) => 3 + Math.cos(step) / 2 + 7.8 * Math.exp(-step / 10));
  const [low, high] = [Math.min(...long), Math.max(...long)];
  assert.deepEqual(robustRange(long, low, high), [low, high]);
});

test("values far below are left out alike; few or equal values never", () => {
  const dipped = [...DECAY, -5_000];
  assert.ok(robustRange(dipped, -5_000, 10)[0] > -10);
  assert.deepEqual(robustRange([1, 2, 900], 1, 900), [1, 900]);
  assert.deepEqual(robustRange([...new Array<number>(50).fill(3), 900], 3, 900), [3, 900]);
});

test("only finite values count for a range", () => {
  assert.deepEqual(
    visibleValues(
      [
        [null, 1, Number.NaN],
        [Infinity, 2, undefined],
      ],
      0,
      2,
    ),
    [1, 2],
  );
  assert.ok(visibleValues([new Float64Array(1_000_000)], 0, 999_999).length <= 4_001);
});

test("an axis of values that are not negative does not show negative ones", () => {
  assert.strictEqual(linearRange(0.01, 5)[0], 0);
  assert.ok(linearRange(-1, 5)[0] < -1);
  assert.deepEqual(linearRange(null, null), [0, 1]);
  assert.ok(linearRange(3, 3)[0] < linearRange(3, 3)[1]);
  assert.ok(linearRange(0.001, 0.001 + 1e-10)[1] > 0.00105); // one number, rounded
  assert.ok(linearRange(2, 2.0001)[0] > 1.9999);
  assert.deepEqual(logRange(null, null), [1e-4, 1]);
});

test.each([
  [2.1, 6.3],
  [2.31, 2.33],
  [0.9, 1.1],
  [1e-7, 1e3],
  [3e-5, 9e-5],
  [1e-30, 1e30],
  [95, 105],
])("a log axis from %f to %f has ticks that are round and few", (min, max) => {
  const ticks = logTicks(min, max);
  assert.ok(ticks.length >= 2 && ticks.length <= 10, `${ticks.length}: ${ticks.join(", ")}`);
  assert.ok(ticks.every((tick) => tick >= min && tick <= max));
  assert.ok(
    ticks.every((tick) => String(Number(tick.toPrecision(4))) === String(tick)),
    ticks.join(", "),
  );
});

test("decades are exact", () => assert.deepEqual(logTicks(0.0005, 2), [0.001, 0.01, 0.1, 1]));
