// How many anomalies of each kind a job had, and the newest ones.
import type { LayerAnomaly } from "../generated/events.ts";

const MAX_ANOMALIES = 300;

export interface AnomalyLine extends LayerAnomaly {
  step: number;
}

export class AnomalyLog {
  /** Newest first, as of the last `flush`. */
  latest = $state.raw<AnomalyLine[]>([]);
  counts = $state.raw<Record<string, number>>({});
  private pending: AnomalyLine[] = [];
  private lastStep = -1;

  get total(): number {
    return Object.values(this.counts).reduce((sum, count) => sum + count, 0);
  }

  clear(): void {
    this.latest = [];
    this.counts = {};
    this.pending = [];
    this.lastStep = -1;
  }

  /** Start with what the server counted, and the newest of them in order of step. */
  load(counts: Record<string, number>, newest: readonly { step: number; layers: readonly LayerAnomaly[] }[]): void {
    this.counts = { ...counts };
    for (const { step, layers } of newest) this.push(step, layers);
  }

  /** Count the anomalies of a step; of a step that is known they are known. */
  add(step: number, layers: readonly LayerAnomaly[]): void {
    if (step <= this.lastStep) return;
    const counts = { ...this.counts };
    for (const { anomaly } of layers) counts[anomaly] = (counts[anomaly] ?? 0) + 1;
    this.counts = counts;
    this.push(step, layers);
  }

  /** Show what came since the last time. */
  flush(): void {
    if (this.pending.length === 0) return;
    this.latest = [...this.pending.reverse(), ...this.latest].slice(0, MAX_ANOMALIES);
    this.pending = [];
  }

  private push(step: number, layers: readonly LayerAnomaly[]): void {
    this.lastStep = Math.max(this.lastStep, step);
    for (const layer of layers) this.pending.push({ step, ...layer });
    if (this.pending.length > 2 * MAX_ANOMALIES) this.pending.splice(0, this.pending.length - MAX_ANOMALIES);
  }
}
