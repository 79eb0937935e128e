// Reads the binary overview of gradient norms (docs/explanation/histories.md): buckets of steps, as typed arrays, not parsed text.
import type { Float } from "../generated/events.ts";

export const OVERVIEW_TYPE = "application/vnd.apt-jobs.overview";

export interface Overview {
  names: string[];
  firstSteps: Float64Array;
  lastSteps: Float64Array;
  numSteps: Uint32Array;
  /** By point, then layer. */
  mean: Float32Array;
  /** null: every point is one step. */
  min: Float32Array | null;
  max: Float32Array | null;
  anomalous: Uint8Array; // bits
  nonfinite: Uint8Array; // bits
  statistics: Record<"mean" | "std" | "min" | "max", (Float | null)[]> & { anomaly_count: number[] };
  anomalySummary: Record<string, number>;
  totalSteps: number;
}

const VERSION = 1;
const HEADER_BYTES = 24;

export function decodeOverview(buffer: ArrayBuffer): Overview {
  const [version, numLayers, numPoints, size, restBytes] = new Uint32Array(buffer, 0, 6);
  if (version !== VERSION) throw new Error(`an overview of version ${version}`);
  let at = HEADER_BYTES;
  const count = numPoints * numLayers;
  const bits = Math.ceil(count / 8);
  const firstSteps = new Float64Array(buffer, at, numPoints);
  const lastSteps = new Float64Array(buffer, (at += 8 * numPoints), numPoints);
  const numSteps = new Uint32Array(buffer, (at += 8 * numPoints), numPoints);
  at += 4 * numPoints;
  const columns: Float32Array[] = [];
  for (let left = size === 4 ? 1 : 3; left > 0; left -= 1) {
    columns.push(size === 4 ? new Float32Array(buffer, at, count) : widened(new Uint16Array(buffer, at, count)));
    at += size * count;
  }
  const anomalous = new Uint8Array(buffer, at, bits);
  const nonfinite = new Uint8Array(buffer, (at += bits), bits);
  const rest = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, at + bits, restBytes))) as {
    names: string[];
    layer_statistics: Overview["statistics"];
    anomaly_summary: Record<string, number>;
    total_steps: number;
  };
  return {
    names: rest.names,
    firstSteps,
    lastSteps,
    numSteps,
    mean: columns[columns.length - 1],
    min: size === 4 ? null : columns[0],
    max: size === 4 ? null : columns[1],
    anomalous,
    nonfinite,
    statistics: rest.layer_statistics,
    anomalySummary: rest.anomaly_summary,
    totalSteps: rest.total_steps,
  };
}

export function hasBit(bits: Uint8Array, index: number): boolean {
  return ((bits[index >> 3] >> (index & 7)) & 1) === 1;
}

/** The upper halves of floats as floats. */
function widened(halves: Uint16Array): Float32Array {
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
}
