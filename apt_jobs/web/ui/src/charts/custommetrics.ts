// Metrics that a user's script logged, as charts: names with the same prefix share one.
import uPlot from "uplot";
import type { Float } from "../generated/events.ts";
import { toNumber } from "../text/format.ts";

export interface CustomMetric {
  steps: number[];
  values: Float[];
  last: Float;
  min: number | null;
  max: number | null;
}

export type CustomMetrics = Record<string, CustomMetric>;

export interface MetricGroup {
  key: string;
  title: string;
  names: string[];
  labels: string[];
}

const MAX_LINES = 8; // of a chart: more cannot be told apart

/** Metrics of the built-in trainer whose lines are of different sizes: a chart for each of the last names. */
const EVALUATED = /^(eval\/)(.+)\/(loss|perplexity|bits_per_byte)$/;
const VALIDATED = /^validation\/(perplexity|bits_per_byte)$/;

/** Whether a metric says in another unit what a loss of the built-in trainer says. */
export function isDerived(name: string): boolean {
  return VALIDATED.test(name) || /^eval\/.+\/(perplexity|bits_per_byte)$/.test(name);
}

/** The chart that a name belongs to, with its title, and the name's label there. */
function placeOf(name: string): { key: string; title: string; label: string } {
  const evaluated = EVALUATED.exec(name);
  if (evaluated) {
    const what = evaluated[3].replaceAll("_", " ");
    return { key: `eval/*/${evaluated[3]}`, title: `evaluation: ${what}`, label: evaluated[2] };
  }
  const validated = VALIDATED.exec(name);
  if (validated) return { key: name, title: `validation: ${validated[1].replaceAll("_", " ")}`, label: validated[1] };
  const cut = name.indexOf("/");
  if (cut <= 0) return { key: name, title: name, label: name };
  return { key: name.slice(0, cut + 1), title: name.slice(0, cut), label: name.slice(cut + 1) || name };
}

/** `eval/bleu` and `eval/f1` are one group, `accuracy` is its own; a large group is several charts. */
export function groupsOf(metrics: CustomMetrics): MetricGroup[] {
  const byKey = new Map<string, string[]>();
  for (const name of Object.keys(metrics)) {
    const { key } = placeOf(name);
    byKey.set(key, [...(byKey.get(key) ?? []), name]);
  }
  return [...byKey].flatMap(([key, names]) => {
    const { title } = placeOf(names[0]);
    const numCharts = Math.ceil(names.length / MAX_LINES);
    return Array.from({ length: numCharts }, (_, part) => {
      const shown = names.slice(part * MAX_LINES, (part + 1) * MAX_LINES);
      return {
        key: `${key}#${part}`,
        title: numCharts > 1 ? `${title} (${part + 1} of ${numCharts})` : title,
        names: shown,
        labels: shown.map((name) => placeOf(name).label),
      };
    });
  });
}

/** All lines over the steps of any; a value that is not finite is a hole. */
export function groupData(metrics: CustomMetric[]): uPlot.AlignedData {
  const tables = metrics.map(({ steps, values }): uPlot.AlignedData => [
    steps,
    values.map((value) => (Number.isFinite(toNumber(value)) ? toNumber(value) : null)),
  ]);
  if (tables.length === 0) return [[]];
  return tables.length === 1 ? tables[0] : uPlot.join(tables);
}
