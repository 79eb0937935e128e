import { assert, test } from "vitest";
import { formatBytes, formatDuration, formatElapsed, formatLarge, formatNumber, formatTick } from "./format.ts";

test("whole numbers are never rounded", () => {
  assert.strictEqual(formatNumber(123_456_789), "123,456,789");
  assert.strictEqual(formatNumber(41_632), "41,632");
  assert.strictEqual(formatNumber(-1_000_000), "-1,000,000");
  assert.strictEqual(formatNumber(0), "0");
});

test("numbers keep their names when they are not finite", () => {
  assert.strictEqual(formatNumber("NaN"), "NaN");
  assert.strictEqual(formatNumber("-Infinity"), "−∞");
  assert.strictEqual(formatNumber(0.00001234), "1.23e-5");
  assert.strictEqual(formatNumber(null), "–");
});

test("ticks have as many digits as they need", () => {
  assert.deepEqual([0.001, 0.25, 3, 1_500, 2e6, 1e-7, 2.335, 0, null].map(formatTick), [
    "0.001",
    "0.25",
    "3",
    "1,500",
    "2e6",
    "1e-7",
    "2.335",
    "0",
    "",
  ]);
});

test("durations and sizes have two units at most", () => {
  assert.strictEqual(formatDuration(3_725), "1 h 2 min");
  assert.strictEqual(formatDuration(59.6), "1 min 0 s");
  assert.strictEqual(formatBytes(1_234_567), "1.23 MB");
  assert.strictEqual(formatLarge(1_234_567), "1.23 M");
});

test("times of an axis are short", () => {
  assert.deepEqual([0, 59, 800, 4_000, 90_000].map(formatElapsed), ["0:00", "0:59", "13:20", "1:06:40", "25:00:00"]);
});
