// The newest steps as each rank saw them, in bounded memory: loss, times, norms, and the norms of each rank's layers.
import type { Float, RankGradientsRecorded, RanksJoined, StoredEvent } from "../generated/events.ts";
import { toNumber } from "../text/format.ts";
import type { GradientRow } from "./gradients.ts";

const MAX_STEPS = 1_000;
const MIN_STEPS = 100;
const MAX_CELLS = 400_000; // of ranks by steps, and of ranks by layers by steps

export type Measure = "losses" | "grad_norms" | "step_times_ms" | "compute_times_ms";

interface LayerRow {
  step: number;
  byRank: Map<number, readonly Float[]>;
}

export class RankHistory {
  private rows: RanksJoined[] = [];
  private layers: LayerRow[] = [];

  get numRanks(): number {
    return this.rows[this.rows.length - 1]?.losses.length ?? 0;
  }

  get latest(): RanksJoined | null {
    return this.rows[this.rows.length - 1] ?? null;
  }

  get ranksWithLayers(): number[] {
    const last = this.layers[this.layers.length - 1];
    return last === undefined ? [] : [...last.byRank.keys()].sort((left, right) => left - right);
  }

  /** Steps that were trained again, after a resume or a roll-back, take the place of what was there. */
  apply(event: StoredEvent): void {
    if (event.kind === "ranks") this.join(event);
    else if (event.kind === "rank_gradient") this.record(event);
  }

  /** Steps, then the values of each of `ranks`. */
  curves(measure: Measure, ranks: readonly number[]): [number[], ...(number | null)[][]] {
    const rows = this.rows;
    return [rows.map((row) => row.step), ...ranks.map((rank) => rows.map((row) => finite(row[measure][rank])))];
  }

  noise(): [number[], (number | null)[]] {
    const known = this.rows.filter((row) => row.noise_scale !== null);
    return [known.map((row) => row.step), known.map((row) => positive(row.noise_scale))];
  }

  /** Steps, the global norm of one layer out of `global` (rows by step), and the norm of each of `ranks`. */
  layerCurves(
    layer: number,
    ranks: readonly number[],
    global: readonly GradientRow[],
  ): [number[], ...(number | null)[][]] {
    const rows = this.layers;
    return [
      rows.map((row) => row.step),
      rows.map((row) => positive(atOrAfter(global, row.step)?.norms[layer])),
      ...ranks.map((rank) => rows.map((row) => positive(row.byRank.get(rank)?.[layer]))),
    ];
  }

  private join(event: RanksJoined): void {
    while ((this.latest?.step ?? -1) >= event.step) this.rows.pop();
    this.rows.push(event);
    const maxRows = Math.max(MIN_STEPS, Math.min(MAX_STEPS, Math.floor(MAX_CELLS / Math.max(1, event.losses.length))));
    if (this.rows.length > maxRows) this.rows.splice(0, this.rows.length - maxRows);
  }

  private record(event: RankGradientsRecorded): void {
    if (event.norms.length === 0) return;
    while ((this.layers[this.layers.length - 1]?.step ?? -1) > event.step) this.layers.pop();
    let row = this.layers[this.layers.length - 1];
    if (row?.step !== event.step) {
      row = { step: event.step, byRank: new Map() };
      this.layers.push(row);
    }
    row.byRank.set(event.rank, event.norms);
    const maxRows = Math.max(20, Math.min(MAX_STEPS, Math.floor(MAX_CELLS / (event.norms.length * row.byRank.size))));
    if (this.layers.length > maxRows) this.layers.splice(0, this.layers.length - maxRows);
  }
}

function atOrAfter(rows: readonly GradientRow[], step: number): GradientRow | undefined {
  let [low, high] = [0, rows.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rows[middle].step < step) low = middle + 1;
    else high = middle;
  }
  return rows[low];
}

function finite(value: Float | null | undefined): number | null {
  const number = value === null || value === undefined ? Number.NaN : toNumber(value);
  return Number.isFinite(number) ? number : null;
}

/** For a log scale, which has no zero. */
function positive(value: Float | null | undefined): number | null {
  const number = finite(value);
  return number !== null && number > 0 ? number : null;
}
