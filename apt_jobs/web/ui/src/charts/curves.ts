// The curves of a training: as REST tells them, and finer in a range of steps that somebody zoomed into.
import type { Float } from "../generated/events.ts";
import { toNumber } from "../text/format.ts";
import { Curve, NO_SPREAD, type Spread } from "./curve.ts";
import { spliced, type Range } from "../stores/sharpener.ts";

export interface MetricsAnswer {
  training_history: {
    steps: number[];
    train_loss: Float[];
    learning_rate: Float[];
    grad_norm?: Float[];
    tokens_per_s?: Float[];
    val_steps?: number[];
    val_loss?: Float[];
    extremes: Partial<Record<string, { least: (Float | null)[]; most: (Float | null)[] }>>;
  };
}

export type CurveName = "loss" | "rate" | "gradNorm" | "throughput" | "validation";
export type Curves = Record<CurveName, Curve>;
export type CurvePoints = Pick<Curve, "steps" | "values" | "spread">;

export function curvesOf({ training_history: history }: MetricsAnswer): Curves {
  const curve = (name: string, steps: number[], values: (Float | null)[] | undefined): Curve => {
    const made = new Curve();
    const extremes = history.extremes[name];
    const numbers = (side: (Float | null)[]): (number | null)[] =>
      side.map((value) => (value === null ? null : toNumber(value)));
    const spread = extremes ? { steps, least: numbers(extremes.least), most: numbers(extremes.most) } : NO_SPREAD;
    const known = steps.map((_, index) => index).filter((index) => values?.[index] != null);
    made.load(
      known.map((index) => steps[index]),
      known.map((index) => toNumber(values?.[index] ?? 0)),
      spread,
    );
    return made;
  };
  return {
    loss: curve("train_loss", history.steps, history.train_loss),
    rate: curve("learning_rate", history.steps, history.learning_rate),
    gradNorm: curve("grad_norm", history.steps, history.grad_norm),
    throughput: curve("tokens_per_s", history.steps, history.tokens_per_s),
    validation: curve("val_loss", history.val_steps ?? [], history.val_loss),
  };
}

/** `whole`, with the points of `fine` in a range of steps. */
export function refined(whole: Curve, fine: Curve, range: Range): CurvePoints {
  const points = spliced(pointsOf(whole), pointsOf(fine), ([step]) => step, range);
  const spread = spliced(spreadOf(whole.spread), spreadOf(fine.spread), ([step]) => step, range);
  return {
    steps: points.map(([step]) => step),
    values: points.map(([, value]) => value),
    spread: {
      steps: spread.map(([step]) => step),
      least: spread.map(([, least]) => least),
      most: spread.map(([, , most]) => most),
    },
  };
}

function pointsOf({ steps, values }: Curve): [number, number][] {
  return steps.map((step, index) => [step, values[index]]);
}

function spreadOf({ steps, least, most }: Spread): [number, number | null, number | null][] {
  return steps.map((step, index) => [step, least[index], most[index]]);
}
