// The curves of a training: from its history over REST, then point by point from its events.
import type { Float, StoredEvent } from "../generated/events.ts";
import type { MetricsAnswer } from "../generated/rest.ts";
import { toNumber } from "../text/format.ts";
import { Curve, NO_MIN_MAX, type MinMax } from "./curve.ts";
import { spliced, type Range } from "../stores/sharpener.ts";

type Values = (Float | null)[];

export const CURVE_NAMES = ["loss", "rate", "gradNorm", "throughput", "validation"] as const;
export type CurveName = (typeof CURVE_NAMES)[number];
export type CurvePoints = Pick<Curve, "steps" | "values" | "minMax">;

export class TrainingCurves {
  loss = new Curve();
  rate = new Curve();
  gradNorm = new Curve();
  throughput = new Curve();
  validation = new Curve();

  get lastStep(): number {
    return Math.max(...CURVE_NAMES.map((name) => this[name].lastStep));
  }

  apply(event: StoredEvent): void {
    if (event.kind === "metric") {
      add(this.loss, event.step, event.train_loss);
      add(this.rate, event.step, event.learning_rate);
      add(this.gradNorm, event.step, event.grad_norm);
      add(this.throughput, event.step, event.tokens_per_s);
    } else if (event.kind === "validation") add(this.validation, event.step, event.val_loss);
  }
}

/** A user's script gives some values and others not: what was not given is no point. */
function add(curve: Curve, step: number, value: Float | null | undefined): void {
  if (value !== null && value !== undefined) curve.add(step, toNumber(value));
}

export function curvesOf({ training_history: history }: MetricsAnswer): TrainingCurves {
  const curve = (name: string, steps: readonly number[], values: Values = []): Curve => {
    const made = new Curve();
    const known = steps.map((_, index) => index).filter((index) => values[index] !== null && index in values);
    made.load(
      known.map((index) => steps[index]),
      known.map((index) => toNumber(values[index] ?? 0)),
      minMaxOf(steps, history.extremes[name]),
    );
    return made;
  };
  return Object.assign(new TrainingCurves(), {
    loss: curve("train_loss", history.steps, history.train_loss),
    rate: curve("learning_rate", history.steps, history.learning_rate),
    gradNorm: curve("grad_norm", history.steps, history.grad_norm),
    throughput: curve("tokens_per_s", history.steps, history.tokens_per_s),
    validation: curve("val_loss", history.val_steps ?? [], history.val_loss),
  });
}

function minMaxOf(steps: readonly number[], extremes: { min: Values; max: Values } | undefined): MinMax {
  if (extremes === undefined) return NO_MIN_MAX;
  const numbers = (side: Values): (number | null)[] => side.map((value) => (value === null ? null : toNumber(value)));
  return { steps, min: numbers(extremes.min), max: numbers(extremes.max) };
}

/** `whole`, with the points of `fine` in a range of steps. */
export function refined(whole: Curve, fine: Curve, range: Range): CurvePoints {
  const points = spliced(pointsOf(whole), pointsOf(fine), ([step]) => step, range);
  const minMax = spliced(bandOf(whole.minMax), bandOf(fine.minMax), ([step]) => step, range);
  return {
    steps: points.map(([step]) => step),
    values: points.map(([, value]) => value),
    minMax: {
      steps: minMax.map(([step]) => step),
      min: minMax.map(([, min]) => min),
      max: minMax.map(([, , max]) => max),
    },
  };
}

function pointsOf({ steps, values }: Curve): [number, number][] {
  return steps.map((step, index) => [step, values[index]]);
}

function bandOf({ steps, min, max }: MinMax): [number, number | null, number | null][] {
  return steps.map((step, index) => [step, min[index], max[index]]);
}
