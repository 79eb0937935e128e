// What the page of a comparison shows, all of it in its address: which runs, axis, metrics, smoothing, scales, baseline.
import type { ComparisonAnswer } from "../generated/rest.ts";
import { location } from "./router.svelte.ts";
import { viewState } from "./viewstate.svelte.ts";

export const AXES = ["step", "tokens", "seconds", "epoch"] as const;
export type Axis = (typeof AXES)[number];
export const AXIS_LABELS: Record<Axis, string> = {
  step: "Step",
  tokens: "Tokens",
  seconds: "Time",
  epoch: "Epoch",
};
const DEFAULT_LOG: readonly string[] = ["grad_norm"];
const FINAL_STATES = ["succeeded", "failed", "cancelled", "dead"];

/** Names with commas between them. */
export function namesOf(text: string | null): string[] {
  return text === null ? [] : text.split(",").filter(Boolean);
}

/** `names` with one more, or without it if it is there. */
export function toggled(names: readonly string[], name: string): string[] {
  return names.includes(name) ? names.filter((one) => one !== name) : [...names, name];
}

/** The address of the answer that a page's query asks for; null: it names no runs. */
export function requestOf(query: string): string | null {
  const given = new URLSearchParams(query);
  const asked = new URLSearchParams();
  const which = ["jobs", "sweep", "filter"].find((name) => given.get(name));
  if (which === undefined) return null;
  for (const name of [which, "x", "metrics", "baseline"]) {
    const value = given.get(name);
    if (value && (name !== "x" || isAxis(value))) asked.set(name, value);
  }
  return `/api/compare?${asked}`;
}

function isAxis(text: string): text is Axis {
  return AXES.some((axis) => axis === text);
}

/** "0.5-20" as a range of an axis; null if it is none. */
export function placesOf(text: string | null): [number, number] | null {
  const match = /^(\d{1,15}(?:\.\d{1,9})?)-(\d{1,15}(?:\.\d{1,9})?)$/.exec(text ?? "");
  if (match === null) return null;
  const [from, to] = [Number(match[1]), Number(match[2])];
  return from < to ? [from, to] : null;
}

/** A place of an axis in an address. */
export function placeText(place: number): string {
  return String(Number(Math.max(0, place).toFixed(place < 1000 ? 4 : 0)));
}

/** Whether nothing of the answer will change. */
export function isFinal(answer: ComparisonAnswer): boolean {
  return answer.is_complete && answer.jobs.every(({ state }) => FINAL_STATES.includes(state));
}

class CompareView {
  readonly request = $derived(requestOf(location.query));
  readonly axis = $derived<Axis>(AXES.find((axis) => axis === viewState.get("x")) ?? "step");
  readonly smoothing = $derived(viewState.number("smooth", 0, 0.99, 0));
  readonly zoom = $derived(placesOf(viewState.get("zoom")));
  readonly hidden = $derived(new Set(namesOf(viewState.get("hide"))));
  private readonly logs = $derived(viewState.get("log")?.split(",").filter(Boolean) ?? DEFAULT_LOG);

  isLog(metric: string): boolean {
    return this.logs.includes(metric);
  }

  toggleLog(metric: string): void {
    const logs = toggled(this.logs, metric);
    viewState.set({ log: [...logs].sort().join() === DEFAULT_LOG.join() ? null : logs.join(",") });
  }

  toggleHidden(jobId: string): void {
    viewState.set({ hide: toggled([...this.hidden], jobId).join(",") || null });
  }

  toggleMetric(shown: readonly string[], metric: string): void {
    viewState.set({ metrics: toggled(shown, metric).join(",") || null });
  }

  pin(jobId: string | null): void {
    viewState.set({ baseline: jobId });
  }

  setAxis(axis: Axis): void {
    viewState.set({ x: axis === "step" ? null : axis, zoom: null });
  }

  setSmoothing(beta: number): void {
    viewState.set({ smooth: beta === 0 ? null : String(beta) }, true);
  }

  setZoom = (range: readonly [number, number] | null): void => {
    viewState.set({ zoom: range === null ? null : range.map(placeText).join("-") });
  };
}

export const compareView = new CompareView();
