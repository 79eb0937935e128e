// The rows of the list that are on the screen, of however many there are: the service is asked for that part alone,
// every few seconds, and at once after scrolling.
import { ApiProblem, get } from "../api/client.ts";
import type { JobAnswer, JobList as JobListAnswer } from "../generated/rest.ts";
import { Poll } from "./polling.svelte.ts";

export const DEFAULT_SORT = "active";
const POLL_MS = 2_000;
const SETTLE_MS = 60;
const MARGIN = 20; // rows before and after those on the screen
const MAX_LIMIT = 200; // of one request
const KEPT = 1_000; // rows before and after those on the screen that stay known
const FIELDS = [
  ...["id", "kind", "name", "queue", "priority", "labels", "state", "reason", "error", "attempt", "step", "num_steps"],
  ...["created_at", "claimed_at", "finished_at", "cancel_requested_at", "progress", "schedule_id", "sweep_id"],
  ...["queue_position", "waiting_for", "expected_start_at", "num_gpus", "num_ranks", "sparkline"],
] as const;

export type ListedJob = Pick<
  JobAnswer,
  | "id"
  | "kind"
  | "name"
  | "queue"
  | "priority"
  | "labels"
  | "state"
  | "reason"
  | "error"
  | "attempt"
  | "step"
  | "num_steps"
  | "created_at"
  | "claimed_at"
  | "finished_at"
  | "cancel_requested_at"
  | "progress"
  | "schedule_id"
  | "sweep_id"
  | "queue_position"
  | "waiting_for"
  | "expected_start_at"
  | "num_gpus"
  | "num_ranks"
  | "sparkline"
>;

export interface Question {
  filter: string;
  sort: string;
}

/** Address of a part of the list. */
export function listPath(
  question: Question,
  offset: number,
  limit: number,
  fields: readonly string[] = FIELDS,
): string {
  const parameters = new URLSearchParams({ sort: question.sort, fields: fields.join(",") });
  if (question.filter) parameters.set("filter", question.filter);
  parameters.set("offset", String(offset));
  parameters.set("limit", String(limit));
  return `/api/jobs?${parameters}`;
}

/** Known rows with those of an answer, without those far away. */
export function mergedRows(
  known: ReadonlyMap<number, ListedJob>,
  offset: number,
  limit: number,
  rows: readonly ListedJob[],
): Map<number, ListedJob> {
  const merged = new Map<number, ListedJob>();
  for (const [index, row] of known) {
    const isAnswered = index >= offset && index < offset + limit;
    const isBeyond = rows.length < limit && index >= offset + rows.length; // the list ends before
    if (!isAnswered && !isBeyond && Math.abs(index - offset) <= KEPT) merged.set(index, row);
  }
  rows.forEach((row, index) => merged.set(offset + index, row));
  return merged;
}

export class JobList {
  rows = $state.raw<ReadonlyMap<number, ListedJob>>(new Map());
  total = $state<number | null>(null);
  counts = $state.raw<Readonly<Record<string, number>>>({});
  /** What the service finds wrong with the filter or the order. */
  fault = $state<string | null>(null);
  private question: Question = { filter: "", sort: DEFAULT_SORT };
  private answered: Question | null = null;
  private first = 0;
  private last = 40;
  private settling: ReturnType<typeof setTimeout> | undefined;
  readonly poll = new Poll((signal) => this.load(signal), POLL_MS);

  /** Show another list, from its top. */
  ask(question: Question): void {
    if (question.filter === this.question.filter && question.sort === this.question.sort) return;
    this.question = question;
    this.see(0, this.last - this.first, true);
  }

  /** Rows `first` to before `last` are on the screen. */
  see(first: number, last: number, isOther = false): void {
    if (first === this.first && last === this.last && !isOther) return;
    [this.first, this.last] = [first, last];
    clearTimeout(this.settling);
    this.settling = setTimeout(this.poll.refresh, SETTLE_MS);
  }

  refresh = (): Promise<void> => this.poll.refresh();

  /** The jobs from one place to another, both included, in order: at most `max` of them. */
  async between(from: number, to: number, max: number): Promise<ListedJob[]> {
    const [begin, end] = [Math.min(from, to), Math.min(Math.max(from, to), Math.min(from, to) + max - 1)];
    const found: ListedJob[] = [];
    for (let at = begin; at <= end; at += 1) {
      const row = this.rows.get(at);
      if (row === undefined) break;
      found.push(row);
    }
    while (begin + found.length <= end) {
      const limit = Math.min(MAX_LIMIT, end - begin - found.length + 1);
      const { data } = await get<JobListAnswer>(listPath(this.question, begin + found.length, limit));
      if (data.length === 0) break;
      found.push(...data);
    }
    return found;
  }

  private async load(signal: AbortSignal): Promise<null> {
    const question = this.question;
    const offset = Math.max(0, this.first - MARGIN);
    const limit = Math.max(1, Math.min(MAX_LIMIT, this.last + MARGIN - offset));
    let answer: JobListAnswer;
    try {
      answer = await get<JobListAnswer>(`${listPath(question, offset, limit)}&counts=true`, signal);
    } catch (error) {
      if (signal.aborted || !(error instanceof ApiProblem) || error.status !== 422) throw error;
      this.fault = (error.faults[0]?.message ?? error.message).replace(/^Value error, /, "");
      return null;
    }
    if (signal.aborted) return null;
    this.fault = null;
    this.rows = mergedRows(this.answered === question ? this.rows : new Map(), offset, limit, answer.data);
    this.answered = question;
    this.total = answer.data.length ? Math.max(answer.total ?? 0, offset + answer.data.length) : (answer.total ?? 0);
    this.counts = answer.counts ?? {};
    return null;
  }
}
