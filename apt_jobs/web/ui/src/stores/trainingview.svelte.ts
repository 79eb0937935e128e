// How the charts of a training are shown: range of steps, smoothing and log scales, all kept in the address.
import type { CurveName } from "../charts/curves.ts";
import { rangeOf, viewState } from "./viewstate.svelte.ts";

const DEFAULT_SMOOTHING = 0.8;
export const MAX_SMOOTHING = 0.99;
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
    viewState.set({ log: isDefault ? null : logs.join(",") });
  }

  setSmoothing(beta: number): void {
    viewState.set({ smooth: beta === DEFAULT_SMOOTHING ? null : String(beta) }, true);
  }

  setZoom = (range: readonly [number, number] | null): void => {
    viewState.set({ zoom: range === null ? null : `${Math.max(0, range[0])}-${range[1]}` });
  };
}

export const trainingView = new TrainingView();
