// Several runs in one chart: how each is told from the others, and its values as lines.
import type uPlot from "uplot";
import type { ComparisonAnswer } from "../generated/rest.ts";
import { toNumber } from "../text/format.ts";
import type { Mark } from "./paint.ts";
import { ema } from "./smoothing.ts";

export type Number = ComparisonAnswer["series"][string][number][number];

const HUES = [225, 25, 165, 285, 195, 335, 60, 115];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

export interface RunStyle {
  color: string;
  dash: number[];
}

/** Hue and dash of a run by its place: neighbours differ in both, and the first 32 in one of them. */
export function runStyle(index: number, isDark: boolean): RunStyle {
  const round = Math.floor(index / HUES.length);
  const lightness = (isDark ? 68 : 40) - 6 * (Math.floor(round / DASHES.length) % 3);
  return {
    color: `hsl(${HUES[index % HUES.length]} ${isDark ? 72 : 68}% ${lightness}%)`,
    dash: DASHES[(index + round) % DASHES.length],
  };
}

/** Values of a run; undefined: nothing is there, the line goes on; null: it cannot be drawn, the line has a gap. */
export function lineOf(values: readonly Number[], beta: number, isLog: boolean): (number | null | undefined)[] {
  const numbers = values.map((value) => (value === null ? null : toNumber(value)));
  const shown = beta === 0 ? numbers : ema(numbers, beta);
  return values.map((value, index) => {
    const number = shown[index];
    if (value === null) return undefined;
    if (!Number.isFinite(numbers[index]) || number === null) return null;
    return Number.isFinite(number) && !(isLog && number <= 0) ? number : null;
  });
}

export function chartData(
  points: readonly number[],
  series: readonly (readonly Number[])[],
  beta: number,
  isLog: boolean,
): uPlot.AlignedData {
  return [points as number[], ...series.map((values) => lineOf(values, beta, isLog))];
}

/** What cannot be drawn of all runs that are shown. */
export function brokenMarks(points: readonly number[], series: readonly (readonly Number[])[]): Mark[] {
  return series.flatMap((values) =>
    values.flatMap((value, index) =>
      typeof value === "string" ? [{ step: points[index], value: toNumber(value) }] : [],
    ),
  );
}

/** One axis of parallel coordinates: where each run is, from 0 (below) to 1; null: it has no value. */
export interface Dimension {
  name: string;
  places: (number | null)[];
  ticks: { place: number; label: string }[];
  isLog: boolean;
}

const LOG_FROM = 50; // times as large as the smallest: equal factors are then worth equal lengths
const MAX_TICKS = 8;

/** An axis for values of any kind: numbers on a linear or log scale, all else one place each. */
export function dimensionOf(name: string, values: readonly unknown[], format: (value: number) => string): Dimension {
  const numbers = values.map((value) => (typeof value === "number" && Number.isFinite(value) ? value : null));
  const known = numbers.filter((value) => value !== null);
  const others = values.filter((value, index) => value !== null && value !== undefined && numbers[index] === null);
  if (others.some((value) => typeof value !== "string" || !isBroken(value)) || known.length === 0) {
    return categoriesOf(name, values);
  }
  const [min, max] = [Math.min(...known), Math.max(...known)];
  const isLog = min > 0 && max / min >= LOG_FROM;
  const scale = (value: number): number => (isLog ? Math.log(value) : value);
  const span = scale(max) - scale(min);
  const placeOf = (value: number): number => (span > 0 ? (scale(value) - scale(min)) / span : 0.5);
  const ends = span > 0 ? [min, max] : [min];
  return {
    name,
    isLog,
    places: numbers.map((value) => (value === null ? null : placeOf(value))),
    ticks: ends.map((value) => ({ place: placeOf(value), label: format(value) })),
  };
}

function isBroken(text: string): boolean {
  return ["NaN", "Infinity", "-Infinity"].includes(text);
}

function categoriesOf(name: string, values: readonly unknown[]): Dimension {
  const labelOf = (value: unknown): string => (typeof value === "string" ? value : JSON.stringify(value));
  const labels = [...new Set(values.filter((value) => value !== null && value !== undefined).map(labelOf))].sort();
  const placeOf = (label: string): number => (labels.length > 1 ? labels.indexOf(label) / (labels.length - 1) : 0.5);
  const stride = Math.ceil(labels.length / MAX_TICKS);
  return {
    name,
    isLog: false,
    places: values.map((value) => (value === null || value === undefined ? null : placeOf(labelOf(value)))),
    ticks: labels.filter((_, index) => index % stride === 0).map((label) => ({ place: placeOf(label), label })),
  };
}
