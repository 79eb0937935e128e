// How the charts of a training are shown: range of steps, smoothing and log scales, all kept in the address. Smoothing
// and scales are remembered by the browser, too: for an address that says nothing.
import type { CurveName } from "../charts/curves.ts";
import { isRecord, recall, remember } from "./remembered.ts";
import { location } from "./router.svelte.ts";
import { rangeOf, viewState } from "./viewstate.svelte.ts";

const DEFAULT_SMOOTHING = 0.8;
export const MAX_SMOOTHING = 0.99;
const REMEMBERED = ["smooth", "log"] as const;
const DEFAULT_LOG: readonly string[] = ["gradNorm"];

class TrainingView {
  readonly smoothing = $derived(viewState.number("smooth", 0, MAX_SMOOTHING, DEFAULT_SMOOTHING));
  readonly zoom = $derived(rangeOf(viewState.get("zoom")));
  private readonly logs = $derived(viewState.get("log")?.split(",").filter(Boolean) ?? DEFAULT_LOG);

  isLog(name: CurveName): boolean {
    return this.logs.includes(name);
  }

  toggleLog(name: CurveName): void {
    const logs = this.isLog(name) ? this.logs.filter((one) => one !== name) : [...this.logs, name];
    const isDefault = [...logs].sort().join() === [...DEFAULT_LOG].sort().join();
    this.choose("log", isDefault ? null : logs.join(","), false);
  }

  setSmoothing(beta: number): void {
    this.choose("smooth", beta === DEFAULT_SMOOTHING ? null : String(beta), true);
  }

  /** Show a job as this browser showed the last one, unless its address says how; then the address has all of it. */
  recall(): void {
    if (location.query !== "") return;
    const chosen = recall("training", (stored) => (isRecord(stored) ? stored : null)) ?? {};
    const texts = REMEMBERED.filter((name) => typeof chosen[name] === "string");
    if (texts.length) viewState.set(Object.fromEntries(texts.map((name) => [name, chosen[name] as string])), true);
  }

  private choose(name: (typeof REMEMBERED)[number], text: string | null, replace: boolean): void {
    viewState.set({ [name]: text }, replace);
    remember("training", Object.fromEntries(REMEMBERED.map((one) => [one, viewState.get(one)])));
  }

  setZoom = (range: readonly [number, number] | null): void => {
    viewState.set({ zoom: range === null ? null : `${Math.max(0, range[0])}-${range[1]}` });
  };
}

export const trainingView = new TrainingView();
