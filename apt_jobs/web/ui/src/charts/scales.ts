// Ranges and ticks of the axes. A range may leave out single values far off; the chart marks what it leaves out.

export type Range = [min: number, max: number];

const SAMPLES = 4_000;
const MIN_VALUES = 8; // of fewer none is an outlier
const TRIMMED_SHARE = 0.01; // of the values at either end
const ROUNDED = 1e-6; // of the size of values: what differs by less is the same number, rounded
const FAR = 10; // times the range of the others: a value farther away would leave them a tenth of the height

/** Finite values of all series between two indexes, evenly sampled. */
export function visibleValues(
  series: readonly ArrayLike<number | null | undefined>[],
  from: number,
  to: number,
): number[] {
  const count = (to - from + 1) * series.length;
  const stride = Math.max(1, Math.floor(count / SAMPLES));
  const values: number[] = [];
  for (const one of series) {
    for (let index = from; index <= to; index += stride) {
      const value = one[index];
      if (typeof value === "number" && Number.isFinite(value)) values.push(value);
    }
  }
  return values;
}

/** The range from `min` to `max`, without the few of `values` that would flatten all others. */
export function robustRange(values: readonly number[], min: number, max: number): Range {
  if (values.length < MIN_VALUES) return [min, max];
  const sorted = Float64Array.from(values).sort();
  const trimmed = Math.max(1, Math.floor(sorted.length * TRIMMED_SHARE));
  const [low, high] = [sorted[trimmed], sorted[sorted.length - 1 - trimmed]];
  const span = high - low;
  if (span <= 0) return [min, max];
  const [floor, ceiling] = [low - FAR * span, high + FAR * span];
  return [min < floor ? firstFrom(sorted, floor) : min, max > ceiling ? lastUpTo(sorted, ceiling) : max];
}

function firstFrom(sorted: Float64Array, floor: number): number {
  return sorted.find((value) => value >= floor) ?? floor;
}

function lastUpTo(sorted: Float64Array, ceiling: number): number {
  return sorted.findLast((value) => value <= ceiling) ?? ceiling;
}

/** A linear axis with some air; it does not go below zero for values that do not. */
export function linearRange(min: number | null, max: number | null): Range {
  if (min === null || max === null) return [0, 1];
  const size = Math.max(Math.abs(min), Math.abs(max)) || 1;
  const pad = (max - min > ROUNDED * size ? max - min : size) * 0.06;
  return [min >= 0 ? Math.max(0, min - pad) : min - pad, max + pad];
}

export function logRange(min: number | null, max: number | null): Range {
  if (min === null || max === null || min <= 0) return [1e-4, 1];
  return [min / 1.15, max * 1.15];
}

const LOG_DIGITS = [[1], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]];
const MIN_TICKS = 3;
const MAX_TICKS = 8;

/** Ticks of a log axis at round numbers: decades, or finer where there are few of them. */
export function logTicks(min: number, max: number): number[] {
  for (const digits of LOG_DIGITS) {
    const ticks = ticksOf(digits, min, max);
    if (ticks.length >= MIN_TICKS) return everyNth(ticks, Math.ceil(ticks.length / MAX_TICKS));
  }
  return linearTicks(min, max);
}

function ticksOf(digits: readonly number[], min: number, max: number): number[] {
  const ticks: number[] = [];
  for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power += 1) {
    for (const digit of digits) {
      const tick = Number(`${digit}e${power}`); // 10 ** -3 is not 0.001
      if (tick >= min && tick <= max) ticks.push(tick);
    }
  }
  return ticks;
}

function everyNth(ticks: readonly number[], stride: number): number[] {
  return ticks.filter((_, index) => (ticks.length - 1 - index) % stride === 0);
}

/** Less than a factor of two: the log is nearly straight, and round numbers at equal distances are the best. */
function linearTicks(min: number, max: number): number[] {
  const rough = (max - min) / 5;
  const power = Math.floor(Math.log10(rough));
  const digit = [1, 2, 5, 10].find((one) => Number(`${one}e${power}`) >= rough) ?? 10;
  const increment = Number(`${digit}e${power}`);
  const ticks: number[] = [];
  for (let count = Math.ceil(min / increment); count * increment <= max; count += 1) {
    ticks.push(Number((count * increment).toPrecision(12)));
  }
  return ticks;
}
