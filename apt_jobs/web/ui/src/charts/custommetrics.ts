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

/** `eval/bleu` and `eval/loss` are one group, `accuracy` is its own; a large group is several charts. */
export function groupsOf(metrics: CustomMetrics): MetricGroup[] {
  const byPrefix = new Map<string, string[]>();
  for (const name of Object.keys(metrics)) {
    const cut = name.indexOf("/");
    const key = cut > 0 ? name.slice(0, cut + 1) : name;
    byPrefix.set(key, [...(byPrefix.get(key) ?? []), name]);
  }
  return [...byPrefix].flatMap(([key, names]) => {
    const title = key.endsWith("/") ? key.slice(0, -1) : key;
    const numCharts = Math.ceil(names.length / MAX_LINES);
    return Array.from({ length: numCharts }, (_, part) => {
      const shown = names.slice(part * MAX_LINES, (part + 1) * MAX_LINES);
      return {
        key: `${key}#${part}`,
        title: numCharts > 1 ? `${title} (${part + 1} of ${numCharts})` : title,
        names: shown,
        labels: shown.map((name) => (key.endsWith("/") ? name.slice(key.length) || name : name)),
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
