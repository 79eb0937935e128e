import { assert, test } from "vitest";
import type uPlot from "uplot";
import { paintClipped, paintMarks, runsOf } from "./paint.ts";

test("a band ends where nothing was finite and begins again after it", () => {
  const runs = runsOf({ steps: [1, 2, 3, 4, 5], min: [0, 1, null, 2, 3], max: [1, 2, null, Infinity, 4] });
  assert.deepEqual(runs, [
    [
      [1, 0, 1],
      [2, 1, 2],
    ],
    [[5, 3, 4]],
  ]);
  assert.deepEqual(runsOf({ steps: [], min: [], max: [] }), []);
});

/** A plot of 100 x 100 pixels from 0 to 10 on both axes, which writes down what is painted. */
function plotOf(data: (number | null)[][]): { plot: uPlot; calls: string[] } {
  const calls: string[] = [];
  const ctx = new Proxy(
    {},
    {
      get: (_, name) => () => calls.push(String(name)),
      set: () => true,
    },
  );
  const series = data.map((_, index) => (index ? { show: true } : { idxs: [0, data[0].length - 1] }));
  const valToPos = (value: number): number => 10 * value;
  const bbox = { left: 0, top: 0, width: 100, height: 100 };
  const plot = { ctx, bbox, data, series, valToPos, scales: { y: { min: 0, max: 10 } } };
  return { plot: plot as unknown as uPlot, calls };
}

test("values beyond the scale are counted and marked at the edge", () => {
  const { plot, calls } = plotOf([
    [1, 2, 3, 4],
    [5, 1_100, null, -1],
  ]);
  assert.strictEqual(paintClipped(plot, String), 2);
  assert.strictEqual(calls.filter((name) => name === "fill").length, 2);
});

test("an anomaly is a dot, what has no place on the scale is a cross, what is out of view is nothing", () => {
  const { plot, calls } = plotOf([[1], [1]]);
  const marks = [
    { step: 1, value: 2 },
    { step: 2, value: Number.NaN },
    { step: 3, value: 0 },
    { step: 99, value: 1 },
  ];
  paintMarks(plot, marks, true, String);
  assert.strictEqual(calls.filter((name) => name === "arc").length, 1);
  assert.strictEqual(calls.filter((name) => name === "stroke").length, 2);
});
