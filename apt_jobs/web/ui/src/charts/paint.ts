// What a chart draws besides uPlot's lines: shaded ranges behind them, and marks for what has no place on the scale.
import type uPlot from "uplot";
import type { MinMax } from "./curve.ts";

/** A value that is an anomaly, or has no y (NaN, infinite, zero on a log scale) and is pinned to an edge. */
export interface Mark {
  step: number;
  value: number;
}

/** Min and max of points that stand for several steps: shaded behind the line. */
export interface Band extends MinMax {
  color: string;
}

/** Steps that are shaded over the whole height. */
export interface Span {
  from: number;
  to: number;
}

/** Make a color of the canvas of a CSS color or the name of a variable. */
export type Ink = (color: string) => string;

const MIN_SPAN_PX = 2;
const MARK_PX = 2.6;
const CROSS_PX = 3.4;
const EDGE_PX = 5;
const MAX_CLIPPED = 300; // marks of values beyond the scale

export function paintSpans(plot: uPlot, spans: readonly Span[], ink: Ink): void {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.globalAlpha = 0.13;
  ctx.fillStyle = ink("--alarm");
  for (const { from, to } of spans) {
    const left = Math.max(bbox.left, plot.valToPos(from, "x", true));
    const right = Math.min(bbox.left + bbox.width, plot.valToPos(to, "x", true));
    const width = Math.max(MIN_SPAN_PX * devicePixelRatio, right - left);
    if (right >= left) ctx.fillRect(left, bbox.top, width, bbox.height);
  }
  ctx.restore();
}

export function paintBands(plot: uPlot, bands: readonly Band[], isLog: boolean, ink: Ink): void {
  const { ctx, bbox } = plot;
  const yOf = (value: number): number =>
    isLog && value <= 0 ? bbox.top + bbox.height : plot.valToPos(value, "y", true);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.globalAlpha = 0.18;
  for (const band of bands) {
    ctx.fillStyle = ink(band.color);
    ctx.beginPath();
    for (const run of runsOf(band)) {
      run.forEach(([step, , max], index) => {
        const [x, y] = [plot.valToPos(step, "x", true), yOf(max)];
        if (index) ctx.lineTo(x, y);
        else ctx.moveTo(x, y);
      });
      for (const [step, min] of run.toReversed()) ctx.lineTo(plot.valToPos(step, "x", true), yOf(min));
    }
    ctx.fill();
  }
  ctx.restore();
}

/** Neighbouring points that have a finite min and max. */
export function runsOf({ steps, min, max }: MinMax): [step: number, min: number, max: number][][] {
  const runs: [number, number, number][][] = [];
  let run: [number, number, number][] = [];
  steps.forEach((step, index) => {
    const [low, high] = [min[index], max[index]];
    if (low !== null && high !== null && Number.isFinite(low) && Number.isFinite(high)) run.push([step, low, high]);
    else if (run.length) {
      runs.push(run);
      run = [];
    }
  });
  return run.length ? [...runs, run] : runs;
}

export function paintMarks(plot: uPlot, marks: readonly Mark[], isLog: boolean, ink: Ink): void {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - 6, bbox.top - 8, bbox.width + 12, bbox.height + 16);
  ctx.clip();
  ctx.fillStyle = ctx.strokeStyle = ink("--alarm");
  ctx.lineWidth = 1.6 * ratio;
  for (const { step, value } of marks) {
    const x = plot.valToPos(step, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    if (Number.isFinite(value) && !(isLog && value <= 0)) {
      ctx.arc(x, plot.valToPos(value, "y", true), MARK_PX * ratio, 0, 2 * Math.PI);
      ctx.fill();
    } else {
      const y = value <= 0 ? bbox.top + bbox.height - EDGE_PX * ratio : bbox.top + EDGE_PX * ratio;
      cross(ctx, x, y, CROSS_PX * ratio);
      ctx.stroke();
    }
  }
  ctx.restore();
}

function cross(ctx: CanvasRenderingContext2D, x: number, y: number, arm: number): void {
  ctx.moveTo(x - arm, y - arm);
  ctx.lineTo(x + arm, y + arm);
  ctx.moveTo(x + arm, y - arm);
  ctx.lineTo(x - arm, y + arm);
}

/** Small arrows at the edge for values that a robust range leaves out. Returns how many there are. */
export function paintClipped(plot: uPlot, ink: Ink): number {
  const { ctx, bbox } = plot;
  const { min, max } = plot.scales.y;
  if (min === undefined || max === undefined) return 0;
  const arm = 4 * devicePixelRatio;
  let count = 0;
  ctx.save();
  ctx.fillStyle = ink("--muted");
  plot.series.forEach((series, index) => {
    if (index === 0 || series.show === false) return;
    const values = plot.data[index];
    for (let at = plot.series[0].idxs?.[0] ?? 0; at <= (plot.series[0].idxs?.[1] ?? -1); at += 1) {
      const value = values[at];
      if (value === null || value === undefined || (value >= min && value <= max)) continue;
      count += 1;
      if (count > MAX_CLIPPED) continue;
      const x = plot.valToPos(plot.data[0][at], "x", true);
      const [tip, base] =
        value > max ? [bbox.top, bbox.top + arm] : [bbox.top + bbox.height, bbox.top + bbox.height - arm];
      ctx.beginPath();
      ctx.moveTo(x, tip);
      ctx.lineTo(x - arm, base);
      ctx.lineTo(x + arm, base);
      ctx.fill();
    }
  });
  ctx.restore();
  return count;
}
