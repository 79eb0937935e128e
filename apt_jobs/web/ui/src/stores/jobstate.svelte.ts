// The job itself: its answer over REST, kept up to date by its events.
import { isExactObject, type Exact, type ExactObject } from "../api/exact.ts";
import type { JobAnswer, Progress } from "../generated/rest.ts";
import { TERMINAL_STATES, type StoredEvent } from "../generated/events.ts";
import { formatDuration, toNumber } from "../text/format.ts";

type Metric = Extract<StoredEvent, { kind: "metric" }>;

export class JobState {
  job = $state.raw<JobAnswer | null>(null);
  progress = $state.raw<Partial<Progress>>({});
  /** What was submitted, digit by digit. */
  spec = $state.raw<ExactObject>({});
  private stepTimeMs: number | null = null;

  get ended(): boolean {
    return this.job !== null && TERMINAL_STATES.includes(this.job.state);
  }

  receive(job: JobAnswer, exact?: Exact): void {
    this.job = { ...this.job, ...job };
    this.progress = { ...job.progress };
    if (isExactObject(exact) && isExactObject(exact.spec)) this.spec = exact.spec;
  }

  /** A live connection greets with the job; attempts and the place in the queue are known to REST alone. */
  receiveLive(job: JobAnswer): void {
    const { attempts, queue_position, waiting_for } = this.job ?? job;
    this.receive({ ...job, attempts, queue_position, waiting_for });
  }

  apply(event: StoredEvent): void {
    if (this.job === null) return;
    switch (event.kind) {
      case "metric":
        this.applyMetric(event, this.job);
        break;
      case "validation":
        this.progress = { ...this.progress, val_loss: event.val_loss };
        if (event.is_best) this.progress = { ...this.progress, best_val_loss: event.val_loss };
        break;
      case "started":
        this.job = { ...this.job, num_steps: event.num_steps, attempt: event.attempt };
        break;
      case "state":
        this.job = { ...this.job, state: event.state as JobAnswer["state"], reason: event.reason };
        break;
    }
  }

  private applyMetric(event: Metric, job: JobAnswer): void {
    const timeMs = event.step_time_ms === null ? Number.NaN : toNumber(event.step_time_ms);
    if (Number.isFinite(timeMs)) {
      this.stepTimeMs = this.stepTimeMs === null ? timeMs : 0.9 * this.stepTimeMs + 0.1 * timeMs;
    }
    if (event.step > (job.step ?? 0)) this.job = { ...job, step: event.step };
    this.progress = { ...this.progress, ...event, eta_s: this.etaS(event.step, job) };
  }

  private etaS(step: number, { num_steps: numSteps }: JobAnswer): number | null {
    return this.stepTimeMs === null || !numSteps ? null : ((numSteps - step) * this.stepTimeMs) / 1000;
  }
}

export function runningFor(job: JobAnswer, now: number): string {
  if (!job.claimed_at) return "–";
  const end = job.finished_at ? Date.parse(job.finished_at) : now;
  return formatDuration((end - Date.parse(job.claimed_at)) / 1000);
}
