// A curve in a few pixels: points of SVG lines, broken where a value is not finite.

const PADDING = 2;
const CUT_AT = 0.92; // of the values in order; what lies far above this one is cut off
const FAR = 3; // times the range of the others

/** "x,y x,y" of each part; a single value is a short dash. */
export function sparklinePoints(values: readonly (number | null)[], width: number, height: number): string[] {
  const known = values.filter((value) => value !== null);
  if (known.length === 0) return [];
  const sorted = known.toSorted((left, right) => left - right);
  const min = sorted[0];
  const usual = sorted[Math.floor((sorted.length - 1) * CUT_AT)];
  const largest = sorted[sorted.length - 1];
  const max = usual > min && largest - min > FAR * (usual - min) ? usual : largest;
  const x = (index: number): number => PADDING + (index * (width - 2 * PADDING)) / Math.max(1, values.length - 1);
  const y = (value: number): number =>
    max === min ? height / 2 : height - PADDING - ((Math.min(value, max) - min) / (max - min)) * (height - 2 * PADDING);
  const parts: string[][] = [[]];
  values.forEach((value, index) => {
    if (value === null) parts.push([]);
    else parts[parts.length - 1].push(`${x(index).toFixed(1)},${y(value).toFixed(1)}`);
  });
  return parts.filter((part) => part.length).map((part) => (part.length === 1 ? dash(part[0]) : part.join(" ")));
}

function dash(point: string): string {
  const [x, y] = point.split(",");
  return `${point} ${(Number(x) + 1).toFixed(1)},${y}`;
}
