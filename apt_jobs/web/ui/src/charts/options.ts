// uPlot's options for a chart over steps: axes, scales, cursor, legend.
import type uPlot from "uplot";
import { formatCount, formatNumber, formatTick } from "../text/format.ts";
import type { Ink } from "./paint.ts";
import { linearRange, logRange, logTicks, robustRange, visibleValues, type Range } from "./scales.ts";

export interface Line {
  label: string;
  color: string; // a CSS color or the name of a variable
  width?: number;
  alpha?: number;
  points?: boolean;
  show?: boolean;
  /** Lengths of strokes and gaps, in CSS pixels. */
  dash?: number[];
}

export interface ChartShape {
  width: number;
  height: number;
  lines: readonly Line[];
  logY: boolean;
  /** The range of y shows every value, however far off. */
  full: boolean;
  legend: boolean;
  sync?: string;
  hasFocus: boolean;
  ink: Ink;
  /** Range of x while there is no point. */
  emptyRange: () => Range | null;
  /** What x is; default: the step. */
  axis?: XAxis;
}

export interface XAxis {
  label: string;
  format: (value: number) => string;
}

// eslint-disable-next-line @typescript-eslint/no-unsafe-enum-assignment -- a `const enum` of a declaration has no value at run time
const LOGARITHMIC: uPlot.Scale.Distr = 3;
const NEAREST_POINTS = 400; // how far from the cursor a line is looked for that has no value there

export function chartOptions(shape: ChartShape, hooks: uPlot.Hooks.Arrays): uPlot.Options {
  const { width, height, lines, logY, legend, sync, hasFocus, ink } = shape;
  const axis: uPlot.Axis = {
    stroke: ink("--muted"),
    grid: { stroke: ink("--grid"), width: 1 },
    ticks: { stroke: ink("--grid"), width: 1, size: 4 },
    font: "11px system-ui, sans-serif",
  };
  const stepValues = (_: uPlot, splits: number[]): string[] =>
    splits.map((value) => (shape.axis ? shape.axis.format(value) : Number.isInteger(value) ? formatCount(value) : ""));
  const yAxis: uPlot.Axis = { ...axis, size: 58, values: (_, splits) => splits.map(formatTick) };
  if (logY) Object.assign(yAxis, { splits: (_: uPlot, __: number, min: number, max: number) => logTicks(min, max) });
  return {
    width,
    height,
    padding: [10, 20, 0, 0],
    legend: { show: legend },
    focus: { alpha: hasFocus ? 0.15 : 1 },
    cursor: {
      sync: sync ? { key: sync, setSeries: false } : undefined,
      focus: hasFocus ? { prox: 24 } : undefined,
      drag: { x: true, y: false, dist: 6 },
      points: { size: 7 },
      ...(hasFocus ? {} : { dataIdx: nearestIndex }),
    },
    scales: {
      x: { time: false, range: (_, min, max) => stepRange(min, max, shape.emptyRange()) },
      y: logY
        ? { distr: LOGARITHMIC, range: (_, min, max) => logRange(min, max) }
        : { range: (plot, min, max) => linearRange(...visibleRange(plot, min, max, shape.full)) },
    },
    axes: [{ ...axis, size: 30, values: stepValues }, yAxis],
    series: [
      { label: shape.axis?.label ?? "step", value: (_, value: number | null) => formatCount(value) },
      ...lines.map(seriesOf(ink)),
    ],
    hooks,
  };
}

export function stepRange(min: number | null, max: number | null, empty: Range | null): Range {
  if (min === null || max === null) return empty ?? [0, 10];
  return min === max ? [min - 1, max + 1] : [min, max];
}

function visibleRange(
  plot: uPlot,
  min: number | null,
  max: number | null,
  full: boolean,
): [number | null, number | null] {
  const [from, to] = plot.series[0].idxs ?? [0, -1];
  if (full || min === null || max === null) return [min, max];
  const shown = plot.data.slice(1).filter((_, index) => plot.series[index + 1].show !== false);
  return robustRange(visibleValues(shown, from, to), min, max);
}

function seriesOf(ink: Ink): (line: Line) => uPlot.Series {
  return (line) => ({
    label: line.label,
    stroke: ink(line.color),
    width: line.width ?? 1.5,
    alpha: line.alpha ?? 1,
    show: line.show ?? true,
    dash: line.dash,
    spanGaps: false,
    points: { show: line.points ?? false, size: 7, fill: ink(line.color) },
    value: (_: uPlot, value: number | null) => formatNumber(value),
  });
}

/** Under the cursor most lines have a point at each step, others (validation) the nearest one. */
function nearestIndex(plot: uPlot, series: number, index: number): number | null {
  return series === 0 ? index : nearestValue(plot.data[series], index);
}

export function nearestValue(values: ArrayLike<number | null | undefined>, index: number): number | null {
  const isThere = (at: number): boolean => values[at] !== null && values[at] !== undefined;
  for (let distance = 0; distance <= NEAREST_POINTS; distance += 1) {
    if (isThere(index - distance)) return index - distance;
    if (isThere(index + distance)) return index + distance;
  }
  return null;
}

/** Index of the last value of each series up to `end`: what the legend shows while there is no cursor. */
export function lastIndexes(data: uPlot.AlignedData, end: number): (number | null)[] {
  return data.map((values) => {
    for (let index = Math.min(end, values.length - 1); index >= 0; index -= 1) {
      if (values[index] !== null && values[index] !== undefined) return index;
    }
    return null;
  });
}
