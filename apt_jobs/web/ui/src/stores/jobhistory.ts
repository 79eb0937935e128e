// What a job page reads over REST before its live connection begins, by the names of the job's endpoints.
import { get, getBytes, getExact } from "../api/client.ts";
import { isExactObject, type Exact, type ExactObject } from "../api/exact.ts";
import { decodeOverview, OVERVIEW_TYPE, type Overview } from "../api/overview.ts";
import type { CheckpointAnswer, CheckpointList, JobAnswer, MetricsAnswer } from "../generated/rest.ts";
import { LOG_LINES, type StoredEvent, type TrainingStarted } from "../generated/events.ts";
import type { EventPage } from "./joblog.svelte.ts";
import type { Range } from "./sharpener.ts";

const HISTORY_POINTS = 1500;
const PAGE_SIZE = 1_000;
const MAX_PAGES = 10;
const RANK_EVENTS = 6_000; // of all kinds before the newest: what the ranks did in them is shown
const LOG_KINDS = Object.keys(LOG_LINES) as StoredEvent["kind"][];

export interface Started {
  event: TrainingStarted;
  /** The model's configuration, digit by digit. */
  modelConfig: ExactObject;
}

export class JobHistory {
  readonly jobId: string;

  constructor(jobId: string) {
    this.jobId = jobId;
  }

  readJob(): Promise<{ answer: JobAnswer; exact: Exact }> {
    return getExact<JobAnswer>(this.path());
  }

  async readCheckpoints(): Promise<CheckpointAnswer[]> {
    const query = `job_id=${encodeURIComponent(this.jobId)}&limit=200`;
    return (await get<CheckpointList>(`/api/checkpoints?${query}`)).data;
  }

  /** Curves of a range of steps, or of all. */
  readMetrics(range?: Range, signal?: AbortSignal): Promise<MetricsAnswer> {
    return get<MetricsAnswer>(this.path(`/metrics?points=${HISTORY_POINTS}${queryOf(range)}`), signal);
  }

  async readOverview(range?: Range, signal?: AbortSignal): Promise<Overview> {
    const path = this.path(`/gradients/overview${queryOf(range).replace("&", "?")}`);
    return decodeOverview(await getBytes(path, OVERVIEW_TYPE, signal));
  }

  /** The rows from a step on as one. */
  async readLatest(fromStep: number): Promise<Overview> {
    const path = this.path(`/gradients/overview?points=1&from_step=${fromStep}`);
    return decodeOverview(await getBytes(path, OVERVIEW_TYPE));
  }

  /** The newest events of the log before a `seq`. */
  readLogBefore = (before: number): Promise<EventPage> => this.readBefore(before, LOG_KINDS, PAGE_SIZE);

  /** The newest attempt's start up to `lastSeq`. */
  async readStarted(lastSeq: number): Promise<Started | null> {
    const path = this.path(`/events?before=${lastSeq + 1}&limit=1&kind=started`);
    const { answer, exact } = await getExact<EventPage>(path);
    const event = answer.data[0];
    if (event?.kind !== "started") return null;
    const rows = isExactObject(exact) && Array.isArray(exact.data) ? exact.data : [];
    const config = isExactObject(rows[0]) ? rows[0].model_config : undefined;
    return { event, modelConfig: isExactObject(config) ? config : {} };
  }

  /** The newest events of few kinds up to `lastSeq`, in order. */
  async readNewest(lastSeq: number, kinds: StoredEvent["kind"][]): Promise<StoredEvent[]> {
    let events: StoredEvent[] = [];
    let before = lastSeq + 1;
    for (let page = 0; page < MAX_PAGES; page += 1) {
      const { data, has_more } = await this.readBefore(before, kinds, PAGE_SIZE);
      events = [...data, ...events];
      if (!has_more || data.length === 0) break;
      before = data[0].seq;
    }
    return events;
  }

  async readRanks(lastSeq: number, receive: (event: StoredEvent) => void): Promise<void> {
    let after = Math.max(0, lastSeq - RANK_EVENTS);
    for (let hasMore = true; hasMore && after < lastSeq;) {
      const path = this.path(`/events?after=${after}&limit=${PAGE_SIZE}&kind=ranks&kind=rank_gradient`);
      const events = await get<EventPage>(path);
      events.data.forEach(receive);
      after = events.data[events.data.length - 1]?.seq ?? lastSeq;
      hasMore = events.has_more;
    }
  }

  private readBefore(before: number, kinds: StoredEvent["kind"][], limit: number): Promise<EventPage> {
    const query = kinds.map((kind) => `&kind=${kind}`).join("");
    return get<EventPage>(this.path(`/events?before=${before}&limit=${limit}${query}`));
  }

  private path(rest = ""): string {
    return `/api/jobs/${encodeURIComponent(this.jobId)}${rest}`;
  }
}

function queryOf(range?: Range): string {
  return range === undefined ? "" : `&from_step=${range[0]}&to_step=${range[1]}`;
}
