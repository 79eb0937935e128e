// Points of a curve in bounded memory: neighbours share a point when there are many, and what stands out is kept.

const MAX_POINTS = 3_000;

/** Steps per point with which `count` points over `span` steps are evenly spread. */
export function strideOver(span: number, count: number): number {
  return Math.max(1, Math.ceil(span / Math.max(1, count)));
}

export interface MinMax {
  steps: readonly number[];
  /** null: nothing was finite. */
  min: readonly (number | null)[];
  max: readonly (number | null)[];
}

export const NO_MIN_MAX: MinMax = { steps: [], min: [], max: [] };

/** A curve over steps: one point for each `stride` steps. Values may be NaN or infinite. Steps only grow. */
export class Curve {
  steps: number[] = [];
  values: number[] = [];
  /** Min and max of the points that stand for several steps, as the server gave them. */
  minMax: MinMax = NO_MIN_MAX;
  lastStep = -1;
  private stride = 1;
  private readonly maxPoints: number;

  constructor(maxPoints = MAX_POINTS) {
    this.maxPoints = maxPoints;
  }

  /** Start with points that a server has downsampled; later ones come at the same density. */
  load(steps: readonly number[], values: readonly number[], minMax: MinMax = NO_MIN_MAX): void {
    if (steps.length === 0) return;
    this.minMax = minMax;
    this.steps = [...steps];
    this.values = [...values];
    this.lastStep = steps[steps.length - 1];
    this.stride = steps.length < this.maxPoints / 3 ? 1 : strideOver(this.lastStep - steps[0], steps.length);
  }

  /** Append; a step that is already there is not added again. */
  add(step: number, value: number): void {
    if (step <= this.lastStep) return;
    this.lastStep = step;
    this.place(step, value);
    if (this.steps.length > this.maxPoints) this.downsample();
  }

  private place(step: number, value: number): void {
    const end = this.steps.length - 1;
    if (end < 1 || Math.floor(step / this.stride) !== Math.floor(this.steps[end] / this.stride)) {
      this.steps.push(step);
      this.values.push(value);
    } else if (standsOut(value, this.values[end - 1]) > standsOut(this.values[end], this.values[end - 1])) {
      this.steps[end] = step;
      this.values[end] = value;
    }
  }

  private downsample(): void {
    const [steps, values] = [this.steps, this.values];
    this.stride *= 2;
    this.steps = [];
    this.values = [];
    steps.forEach((step, index) => this.place(step, values[index]));
    if (this.steps.length > this.maxPoints) this.downsample();
  }
}

/** Of two points that share a place the one farther from their predecessor is shown: a spike survives. */
function standsOut(value: number, before: number): number {
  return Number.isFinite(value) ? Math.abs(value - (Number.isFinite(before) ? before : 0)) : Infinity;
}
