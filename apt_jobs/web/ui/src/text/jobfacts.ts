// What a row of the list of jobs says: why a job waits, its newest numbers, how long it has been so.
import { TERMINAL_STATES } from "../generated/events.ts";
import type { ListedJob } from "../stores/joblist.svelte.ts";
import { formatAgo, formatCount, formatDuration, formatNumber, toNumber } from "./format.ts";

type Metrics = NonNullable<NonNullable<ListedJob["progress"]>["metrics"]>;

/** Why it waits or failed, how long it goes on. */
export function detailOf(job: ListedJob, now: number): string {
  const { state, waiting_for, error, progress, reason, expected_start_at: start } = job;
  if (state === "queued") {
    const in_s = start === null ? null : Math.max(0, (Date.parse(start) - now) / 1000);
    return `${in_s === null ? "" : `starts in about ${formatDuration(in_s)}; `}${waiting_for ?? ""}`;
  }
  if (state === "running" && waiting_for) return waiting_for;
  if (error) return error.message;
  if (job.cancel_requested_at !== null && !TERMINAL_STATES.includes(state)) return "is being cancelled";
  if (state === "running" && progress?.eta_s != null) return `${formatDuration(toNumber(progress.eta_s))} left`;
  return reason ?? "";
}

export function whenOf({ state, finished_at, claimed_at, created_at }: ListedJob, now: number): string {
  if (TERMINAL_STATES.includes(state)) return formatAgo(finished_at, now);
  if (state === "queued" || state === "paused" || !claimed_at) return formatAgo(created_at, now);
  return `for ${formatDuration((now - Date.parse(claimed_at)) / 1000)}`;
}

/** The training loss, or the first metric that a script logged. */
export function lastOf({ progress }: ListedJob): { name: string; value: string } | null {
  if (progress?.train_loss != null) return { name: "loss", value: formatNumber(progress.train_loss) };
  const [first] = metricsOf(progress);
  return first ? { name: first[0], value: formatNumber(first[1].last) } : null;
}

/** The best validation loss, or the best value of the first metric. */
export function bestOf({ progress }: ListedJob): { name: string; value: string } | null {
  if (progress?.best_val_loss != null) return { name: "val_loss", value: formatNumber(progress.best_val_loss) };
  const [first] = metricsOf(progress);
  return first?.[1].best != null ? { name: first[0], value: formatNumber(first[1].best) } : null;
}

export function metricsOf(progress: ListedJob["progress"]): [string, Metrics[string]][] {
  return Object.entries(progress?.metrics ?? {});
}

/** "8", "0.5", or nothing of a job that did not say. */
export function gpusOf({ num_gpus, kind }: ListedJob): string {
  if (num_gpus !== null) return String(num_gpus);
  return kind === "train" ? "auto" : "";
}

export function stepsOf({ step, num_steps }: ListedJob): string {
  return num_steps === null ? "" : `${formatCount(step ?? 0)} / ${formatCount(num_steps)}`;
}
