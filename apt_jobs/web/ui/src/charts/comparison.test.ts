import { expect, test } from "vitest";
import { brokenMarks, dimensionOf, lineOf, runStyle } from "./comparison.ts";

test("neighbours differ in hue and dash, and the first 32 runs in one of them", () => {
  const styles = Array.from({ length: 100 }, (_, index) => runStyle(index, false));
  styles.slice(1, 32).forEach((style, index) => {
    expect(style.color).not.toBe(styles[index].color);
    expect(style.dash).not.toEqual(styles[index].dash);
  });
  expect(new Set(styles.slice(0, 32).map((style) => JSON.stringify(style))).size).toBe(32);
});

test("a line goes on where nothing is, and has a gap where a value is not finite", () => {
  expect(lineOf([1, null, 3, "NaN", 5], 0, false)).toEqual([1, undefined, 3, null, 5]);
  expect(lineOf([-1, 0, 2], 0, true)).toEqual([null, null, 2]);
  const smoothed = lineOf([2, null, 2, "NaN", 4], 0.5, false);
  expect(smoothed.slice(0, 4)).toEqual([2, undefined, 2, null]);
  expect(smoothed[4]).toBeCloseTo(2 + 2 * (0.5 / 0.875));
});

test("what cannot be drawn is marked", () => {
  expect(
    brokenMarks(
      [10, 20],
      [
        [1, "NaN"],
        ["Infinity", null],
      ],
    ),
  ).toEqual([
    { step: 20, value: Number.NaN },
    { step: 10, value: Infinity },
  ]);
});

test("axes are linear, logarithmic or have a place for each word", () => {
  const linear = dimensionOf("a", [1, 2, null, 3], String);
  expect([linear.places, linear.isLog]).toEqual([[0, 0.5, null, 1], false]);
  const log = dimensionOf("lr", [0.001, 0.01, 0.1, "NaN"], String);
  expect(log.isLog).toBe(true);
  expect(log.places[1]).toBeCloseTo(0.5);
  expect(log.places[3]).toBeNull();
  const words = dimensionOf("b", ["lion", "adamw", true], String);
  expect(words.places).toEqual([0.5, 0, 1]);
  expect(words.ticks.map(({ label }) => label)).toEqual(["adamw", "lion", "true"]);
  expect(dimensionOf("c", [5, 5], String).places).toEqual([0.5, 0.5]);
  expect(dimensionOf("d", [null, null], String).ticks).toEqual([]);
});
