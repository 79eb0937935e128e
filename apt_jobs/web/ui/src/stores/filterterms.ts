// A filter of jobs as chips: cut into its terms, put together again, and what may come next. The service alone reads
// what a term means, and says what is wrong with one.
import type { JobState } from "../generated/events.ts";

export const STATES: readonly JobState[] = [
  "running",
  "pausing",
  "queued",
  "paused",
  "succeeded",
  "failed",
  "cancelled",
  "dead",
];
const MAX_SUGGESTIONS = 12;

/** Cut at spaces outside of quotes; a quote that is not closed reaches to the end. */
export function termsOf(filter: string): string[] {
  return filter.match(/(?:[^\s"]|"[^"]*(?:"|$))+/g) ?? [];
}

export function joined(terms: readonly string[]): string {
  return terms.filter((term) => term !== "").join(" ");
}

/** A value as a term writes it, in quotes where it needs them. */
export function quoted(value: string): string {
  return /^[^\s"]+$/.test(value) ? value : `"${value.replaceAll('"', "")}"`;
}

/** The states that a filter asks for; none: all. */
export function statesOf(filter: string): string[] {
  return termsOf(filter)
    .filter((term) => term.startsWith("state:"))
    .flatMap((term) => term.slice("state:".length).split(","));
}

/** The filter with these states in place of those that it asked for. */
export function withStates(filter: string, states: readonly string[]): string {
  const others = termsOf(filter).filter((term) => !term.startsWith("state:"));
  return joined(states.length ? [`state:${states.join(",")}`, ...others] : others);
}

/** The filter of an address, also of one from before there were filters. */
export function filterOf(parameter: (name: string) => string | null): string {
  const filter = parameter("filter");
  if (filter !== null) return filter;
  const groups: Record<string, string> = {
    active: "state:queued,running,pausing,paused",
    failed: "state:failed,dead",
    succeeded: "state:succeeded",
    cancelled: "state:cancelled",
  };
  const [state, kind, text] = [parameter("state"), parameter("kind"), parameter("text")?.trim()];
  const states = state !== null && Object.hasOwn(groups, state) ? groups[state] : "";
  const words = text ? `"${text.replaceAll('"', "")}"` : "";
  return joined([states, kind ? `kind:${kind}` : "", words]);
}

/** What there is to filter by, as far as the page has seen it. */
export interface Known {
  queues: readonly string[];
  labels: readonly string[]; // "team=a"
  metrics: readonly string[];
}

/** What the term that is being typed may become; one that ends in ":" or ">" goes on. */
export function suggestionsOf(draft: string, known: Known): string[] {
  const minus = draft.startsWith("-") ? "-" : "";
  const typed = draft.slice(minus.length);
  const values: Record<string, readonly string[]> = {
    state: STATES,
    kind: ["train", "generate"],
    queue: known.queues,
    label: known.labels,
  };
  const colon = typed.indexOf(":");
  if (colon > 0) return ofValues(minus, typed.slice(0, colon), typed.slice(colon + 1), values);
  const fields = [
    ...Object.keys(values).map((field) => `${field}:`),
    "sweep:",
    "schedule:",
    "id:",
    ...["loss", "val_loss", "tokens_per_s", ...known.metrics].map((name) => `${name}<`),
    ...["step", "num_steps", "priority", "attempt"].map((name) => `${name}>`),
    "training.learning_rate>",
    "training.optimizer=",
    "model.d_model=",
  ];
  const wanted = typed.toLowerCase();
  const found = [...new Set(fields)].filter((field) => field.toLowerCase().startsWith(wanted) && field !== typed);
  return found.slice(0, MAX_SUGGESTIONS).map((field) => minus + field);
}

function ofValues(minus: string, field: string, typed: string, values: Record<string, readonly string[]>): string[] {
  if (!Object.hasOwn(values, field)) return [];
  const words = field === "label" ? [typed] : typed.split(",");
  const last = words.pop() ?? "";
  const before = words.length ? `${words.join(",")},` : "";
  return values[field]
    .filter((value) => value.toLowerCase().startsWith(last.replaceAll('"', "").toLowerCase()) && value !== last)
    .filter((value) => !words.includes(value))
    .slice(0, MAX_SUGGESTIONS)
    .map((value) => `${minus}${field}:${before}${quoted(value)}`);
}

/** Whether a term goes on after what was suggested: "state:", "loss<". */
export function goesOn(term: string): boolean {
  return /[:<>=]$/.test(term);
}
