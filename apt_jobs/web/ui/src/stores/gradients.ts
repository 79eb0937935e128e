// Norms of all layers over steps, in bounded memory, with running statistics per layer.
import type { Float, LayerAnomaly } from "../generated/events.ts";
import { toNumber } from "../text/format.ts";
import { strideOver } from "../charts/curve.ts";
import { hasBit, type Overview } from "../api/overview.ts";

const MAX_CELLS = 1_500_000;
const MAX_ROWS = 2_000;
const MIN_ROWS = 200;

export interface LayerStatistics {
  name: string;
  last: number | null;
  mean: number | null;
  std: number | null;
  min: number | null;
  max: number | null;
  anomalies: number;
}

interface Running {
  count: number; // finite norms only
  mean: number;
  squares: number; // sum of squared differences from the mean (Welford)
  min: number;
  max: number;
  last: number | null;
  anomalies: number;
}

export interface GradientRow {
  step: number;
  norms: Float64Array;
  anomalous: Uint8Array;
  /** Of a row that stands for several steps. */
  min?: Float32Array;
  max?: Float32Array;
}

export class GradientHistory {
  names: string[] = [];
  rows: GradientRow[] = [];
  /** The newest step as it was, not merged with others. */
  latest: GradientRow | null = null;
  private running: Running[] = [];
  private stride = 1;
  private index = new Map<string, number>();

  get lastStep(): number {
    return this.latest?.step ?? -1;
  }

  get maxRows(): number {
    return Math.max(MIN_ROWS, Math.min(MAX_ROWS, Math.floor(MAX_CELLS / Math.max(1, this.names.length))));
  }

  /** Layers of the attempt, in the order of every later `gradient` event. Other layers than before: start again. */
  setNames(names: readonly string[]): void {
    if (names.length === this.names.length && names.every((name, index) => name === this.names[index])) return;
    this.names = [...names];
    this.index = new Map(this.names.map((name, index) => [name, index]));
    this.rows = [];
    this.latest = null;
    this.stride = 1;
    this.running = this.names.map(() => newRunning());
  }

  /** Start with buckets that a server has made. */
  loadOverview(overview: Overview): void {
    this.setNames(overview.names);
    this.rows = rowsOf(overview);
    const newest = this.rows[this.rows.length - 1];
    this.latest = newest
      ? { step: newest.step, norms: newest.norms.slice(), anomalous: newest.anomalous.slice() }
      : null;
    const span = this.rows.length ? this.lastStep - this.rows[0].step : 0;
    this.stride = overview.min === null ? 1 : strideOver(span, this.rows.length);
    this.running = this.names.map((_, index) => runningOf(overview, index, this.latest?.norms[index] ?? null));
  }

  /** The newest step itself, after its bucket was loaded. */
  setLatest(row: GradientRow): void {
    this.latest = row;
    this.running.forEach((running, index) => (running.last = row.norms[index]));
  }

  /** Append one step; a step that is already there is not added again. */
  add(step: number, norms: readonly Float[], anomalous: readonly number[]): void {
    if (step <= this.lastStep || norms.length !== this.names.length) return;
    const row = { step, norms: Float64Array.from(norms, toNumber), anomalous: new Uint8Array(norms.length) };
    for (const index of anomalous) row.anomalous[index] = 1;
    for (let index = 0; index < norms.length; index += 1) {
      if (!Number.isFinite(row.norms[index])) row.anomalous[index] = 1;
      count(this.running[index], row.norms[index], row.anomalous[index] === 1);
    }
    this.latest = row;
    this.place(row);
    if (this.rows.length > this.maxRows) this.downsample();
  }

  /** Show an anomaly of a step that downsampling has left out, in the place of the nearest step that is there. */
  mark(step: number, layers: readonly LayerAnomaly[]): void {
    if (this.rows.length === 0 || step > this.lastStep) return;
    let [low, high] = [0, this.rows.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.rows[middle].step < step) low = middle + 1;
      else high = middle;
    }
    const row = this.rows[low];
    for (const { layer, norm } of layers) {
      const index = this.index.get(layer);
      if (index === undefined || row.anomalous[index] === 1) continue;
      row.anomalous[index] = 1;
      row.norms[index] = toNumber(norm);
    }
  }

  statistics(): LayerStatistics[] {
    return this.names.map((name, index) => {
      const { count, mean, squares, min, max, last, anomalies } = this.running[index];
      if (count === 0) return { name, last, mean: null, std: null, min: null, max: null, anomalies };
      return { name, last, mean, std: Math.sqrt(squares / count), min, max, anomalies };
    });
  }

  /** Rows of one stride share a place; what was anomalous in any of them stays. */
  private place(row: GradientRow): void {
    const end = this.rows.length - 1;
    const shares = end >= 0 && Math.floor(row.step / this.stride) === Math.floor(this.rows[end].step / this.stride);
    if (shares) this.rows[end] = merged(this.rows[end], row);
    else this.rows.push(row);
  }

  private downsample(): void {
    const rows = this.rows;
    this.stride *= 2;
    this.rows = [];
    for (const row of rows) this.place(row);
    if (this.rows.length > this.maxRows) this.downsample();
  }
}

/** A row for each point. Of an anomalous layer it has the norm farthest from the mean, or NaN if one was not finite. */
export function rowsOf(overview: Overview): GradientRow[] {
  const { names, lastSteps, mean, min, max, anomalous, nonfinite } = overview;
  const width = names.length;
  return Array.from(lastSteps, (step, point) => {
    const begin = point * width;
    const row: GradientRow = {
      step,
      norms: Float64Array.from(mean.subarray(begin, begin + width)),
      anomalous: new Uint8Array(width),
      min: min?.subarray(begin, begin + width),
      max: max?.subarray(begin, begin + width),
    };
    for (let layer = 0; layer < width; layer += 1) {
      const isNonfinite = hasBit(nonfinite, begin + layer);
      if (!isNonfinite && !hasBit(anomalous, begin + layer)) continue;
      row.anomalous[layer] = 1;
      if (min === null || max === null) continue;
      const [low, high, middle] = [min[begin + layer], max[begin + layer], mean[begin + layer]];
      row.norms[layer] = isNonfinite ? Number.NaN : high * low >= middle * middle ? high : low;
    }
    return row;
  });
}

function merged(left: GradientRow, right: GradientRow): GradientRow {
  const row = { step: right.step, norms: right.norms.slice(), anomalous: right.anomalous.slice() };
  for (let index = 0; index < row.norms.length; index += 1) {
    const keepLeft =
      left.anomalous[index] === 1 && (right.anomalous[index] === 0 || !Number.isFinite(left.norms[index]));
    if (!keepLeft) continue;
    row.norms[index] = left.norms[index];
    row.anomalous[index] = 1;
  }
  return row;
}

function newRunning(): Running {
  return { count: 0, mean: 0, squares: 0, min: Infinity, max: -Infinity, last: null, anomalies: 0 };
}

/** No finite norm yet: the statistics are null. */
function runningOf({ statistics, totalSteps }: Overview, index: number, last: number | null): Running {
  const [mean, std, min, max] = [statistics.mean, statistics.std, statistics.min, statistics.max].map(
    (of) => of[index],
  );
  const anomalies = statistics.anomaly_count[index];
  if (mean === null || std === null || min === null || max === null) return { ...newRunning(), last, anomalies };
  return {
    count: totalSteps,
    mean: toNumber(mean),
    squares: toNumber(std) ** 2 * totalSteps,
    min: toNumber(min),
    max: toNumber(max),
    last,
    anomalies,
  };
}

function count(running: Running, norm: number, isAnomaly: boolean): void {
  running.last = norm;
  if (isAnomaly) running.anomalies += 1;
  if (!Number.isFinite(norm)) return;
  running.count += 1;
  const before = norm - running.mean;
  running.mean += before / running.count;
  running.squares += before * (norm - running.mean);
  running.min = Math.min(running.min, norm);
  running.max = Math.max(running.max, norm);
}
