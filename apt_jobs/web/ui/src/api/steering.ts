// What a user may ask of a job in each state: read off the server's table of transitions.
import { TERMINAL_STATES, TRANSITIONS, type JobState } from "../generated/events.ts";
import { messageOf, post } from "./client.ts";
import type { JobAnswer, JobsChanged } from "../generated/rest.ts";

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

export type BulkVerb = Verb | "delete";
export const BULK_LABELS: Record<BulkVerb, string> = { ...VERB_LABELS, delete: "Delete" };
const BULK_DONE: Record<BulkVerb, string> = { ...DONE_LABELS, delete: "deleted" };

/** Jobs by their ids, or all that match a filter. */
export type Which = { ids: string[] } | { filter: string };

export interface Outcome {
  good: boolean;
  text: string;
  refused?: readonly { id: string; why: string }[];
}

/** The states in which a verb may do something. */
export function statesFor(verb: BulkVerb): JobState[] {
  const states = Object.keys(TRANSITIONS) as JobState[];
  if (verb === "delete") return states.filter((state) => TERMINAL_STATES.includes(state));
  return states.filter((state) => allows({ id: "", kind: "train", state, cancel_requested_at: null }, verb));
}

/** Ask the same of many jobs in one request; what came of it, and what was refused. */
export async function steerMany(which: Which, verb: BulkVerb): Promise<Outcome> {
  const scope = "ids" in which ? which : { filter: `state:${statesFor(verb).join(",")} ${which.filter}`.trim() };
  let answer: JobsChanged;
  try {
    answer = await post<JobsChanged>(`/api/jobs/${verb}`, scope);
  } catch (error) {
    return { good: false, text: messageOf(error) };
  }
  const { matched, refused } = answer;
  const done = matched - refused.length;
  const text = `${done} ${done === 1 ? "job is" : "jobs are"} ${BULK_DONE[verb]}.`;
  return { good: refused.length === 0, text: refused.length ? `${text} ${refused.length} refused:` : text, refused };
}
