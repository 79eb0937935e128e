// One metric over steps as lines of a chart: raw and smoothed, on a linear or a log scale.
import type uPlot from "uplot";
import type { CurvePoints } from "./curves.ts";
import type { Line } from "./options.ts";
import type { Band, Mark } from "./paint.ts";
import { ema } from "./smoothing.ts";

export interface Metric {
  label: string;
  color: string;
  points: CurvePoints;
}

/** The raw line, and when `beta` smooths it, the smoothed one before a fainter raw one. */
export function metricLines(label: string, color: string, beta: number): Line[] {
  if (beta === 0) return [{ label, color, width: 1.5 }];
  return [
    { label, color, width: 1, alpha: 0.35 },
    { label: "smoothed", color, width: 2 },
  ];
}

export function metricData({ steps, values }: CurvePoints, beta: number, isLog: boolean): uPlot.AlignedData {
  const raw = values.map((value) => drawable(value, isLog));
  if (beta === 0) return [steps, raw];
  return [steps, raw, ema(values, beta).map((value) => (value === null ? null : drawable(value, isLog)))];
}

function drawable(value: number, isLog: boolean): number | null {
  return Number.isFinite(value) && !(isLog && value <= 0) ? value : null;
}

/** NaN and infinite values have no place on any scale. */
export function nonfiniteMarks({ steps, values }: CurvePoints): Mark[] {
  return steps.flatMap((step, index) => (Number.isFinite(values[index]) ? [] : [{ step, value: values[index] }]));
}

/** How many values a log scale has no place for. */
export function numNonpositive({ values }: CurvePoints): number {
  return values.reduce((count, value) => count + (value <= 0 ? 1 : 0), 0);
}

export function bandsOf({ minMax }: CurvePoints, color: string): Band[] {
  return minMax.steps.length ? [{ color, ...minMax }] : [];
}
