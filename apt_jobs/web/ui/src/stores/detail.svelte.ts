// A range of steps that somebody zoomed into, in higher resolution than the whole history.
import { curvesOf, refined, type CurveName, type CurvePoints, type TrainingCurves } from "../charts/curves.ts";
import { rowsOf, type GradientHistory, type GradientRow } from "./gradients.ts";
import type { JobHistory } from "./jobhistory.ts";
import { Sharpener, spliced, type Range } from "./sharpener.ts";

interface Detail {
  range: Range;
  curves: TrainingCurves;
  rows: GradientRow[];
}

/** The histories of the whole job, as they are now. */
export interface Whole {
  curves: TrainingCurves;
  gradients: GradientHistory;
}

export class ZoomDetail {
  private detail = $state.raw<Detail | null>(null);
  private readonly sharpener: Sharpener<Detail>;
  private readonly history: JobHistory;
  private readonly whole: () => Whole;

  constructor(history: JobHistory, whole: () => Whole, onchange: () => void) {
    this.history = history;
    this.whole = whole;
    this.sharpener = new Sharpener<Detail>(
      (range, signal) => this.load(range, signal),
      (detail) => {
        this.detail = detail;
        onchange();
      },
    );
  }

  /** Show a range of steps as finely as it can be drawn; null: the whole history. */
  show = (range: Range | null): void => {
    if (range !== null) this.sharpener.show([Math.max(0, Math.floor(range[0])), Math.max(0, Math.ceil(range[1]))]);
    else if (this.detail === null) this.sharpener.stop();
    else this.sharpener.show(null);
  };

  clear(): void {
    this.sharpener.stop();
    this.detail = null;
  }

  stop(): void {
    this.sharpener.stop();
  }

  curve(name: CurveName): CurvePoints {
    const { curves } = this.whole();
    return this.detail === null ? curves[name] : refined(curves[name], this.detail.curves[name], this.detail.range);
  }

  /** Norms of all layers over the whole history. */
  rows(): GradientRow[] {
    const { rows } = this.whole().gradients;
    return this.detail === null ? rows : spliced(rows, this.detail.rows, (row) => row.step, this.detail.range);
  }

  /** Norms of all layers in the range, or over the whole history. */
  rowsInView(): GradientRow[] {
    return this.detail?.rows.length ? this.detail.rows : this.whole().gradients.rows;
  }

  private async load([from, wanted]: Range, signal: AbortSignal): Promise<Detail> {
    const { curves, gradients } = this.whole();
    const to = Math.max(from, Math.min(wanted, Math.max(curves.loss.lastStep, gradients.lastStep))); // later ones come live
    const [metrics, overview] = await Promise.all([
      this.history.readMetrics([from, to], signal),
      this.history.readOverview([from, to], signal),
    ]);
    const isSame = overview.names.length === this.whole().gradients.names.length; // else another attempt has begun
    return { range: [from, to], curves: curvesOf(metrics), rows: isSame ? rowsOf(overview) : [] };
  }
}
