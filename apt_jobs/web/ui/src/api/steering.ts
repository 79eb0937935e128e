// What a user may ask of a job in each state: read off the server's table of transitions.
import { TERMINAL_STATES, TRANSITIONS } from "../generated/events.ts";
import { messageOf, post } from "./client.ts";
import type { JobAnswer } from "../generated/rest.ts";

export type Verb = "pause" | "resume" | "retry" | "cancel";

export const VERBS: readonly Verb[] = ["pause", "resume", "retry", "cancel"];
export const VERB_LABELS: Record<Verb, string> = { pause: "Pause", resume: "Resume", retry: "Retry", cancel: "Cancel" };
const DONE_LABELS: Record<Verb, string> = {
  pause: "paused or pausing",
  resume: "resumed",
  retry: "queued again",
  cancel: "cancelled or being cancelled",
};

export type Steered = Pick<JobAnswer, "id" | "kind" | "state" | "cancel_requested_at">;

/** A job's name, or what it does. */
export function titleOf({ name, kind }: Pick<JobAnswer, "name" | "kind">): string {
  return name ?? (kind === "train" ? "Training job" : "Generation");
}

/** What may be asked now, in a fixed order. */
export function verbsOf(job: Steered): Verb[] {
  return VERBS.filter((verb) => allows(job, verb));
}

function allows({ kind, state, cancel_requested_at }: Steered, verb: Verb): boolean {
  const next = TRANSITIONS[state];
  const isEnded = TERMINAL_STATES.includes(state);
  const isBeingCancelled = cancel_requested_at !== null && !isEnded;
  switch (verb) {
    case "cancel":
      return next.includes("cancelled") && !isBeingCancelled;
    case "pause": // a generation that runs cannot stop in the middle
      return (
        !isBeingCancelled &&
        ((state === "queued" && next.includes("paused")) || (kind === "train" && next.includes("pausing")))
      );
    case "resume":
      return state === "paused" && next.includes("queued");
    case "retry":
      return isEnded && next.includes("queued");
  }
}

/** Ask the service. All four verbs may be repeated.

    Throws `ApiProblem` in the server's words when it refuses. */
export async function steer(jobId: string, verb: Verb): Promise<JobAnswer> {
  return post<JobAnswer>(`/api/jobs/${encodeURIComponent(jobId)}/${verb}`, {});
}

export interface Outcome {
  good: boolean;
  text: string;
}

/** Ask the same of several jobs, one after the other; what came of it in one sentence. */
export async function steerAll(jobs: readonly Steered[], verb: Verb): Promise<Outcome> {
  let refusal = "";
  let numRefused = 0;
  for (const job of jobs) {
    try {
      await steer(job.id, verb);
    } catch (error) {
      refusal ||= messageOf(error);
      numRefused += 1;
    }
  }
  const numDone = jobs.length - numRefused;
  const done = `${numDone} ${numDone === 1 ? "job is" : "jobs are"} ${DONE_LABELS[verb]}.`;
  return numRefused === 0
    ? { good: true, text: done }
    : { good: false, text: `${done} ${numRefused} refused: ${refusal}` };
}
