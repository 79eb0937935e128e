// The lines of a job's log: the newest first to be loaded, older ones on demand, in bounded memory.
import type { StoredEvent } from "../generated/events.ts";
import { lineOf, type LogLine } from "./loglines.ts";

const MAX_LINES = 20_000;
const MAX_FOLLOWED_LINES = 2_000; // without older ones that somebody asked for

export interface EventPage {
  data: StoredEvent[];
  has_more: boolean;
}

/** The newest events of the log before a `seq`, in order. */
export type ReadBefore = (before: number) => Promise<EventPage>;

export class JobLog {
  /** In order, as of the last `flush`. */
  lines = $state.raw<LogLine[]>([]);
  /** The server has lines before the first one. */
  hasOlder = $state(false);
  loading = $state(false);
  private pending: LogLine[] = [];
  private lastSeq = 0;
  private firstSeq = 0;
  private maxLines = MAX_FOLLOWED_LINES;
  private readonly readBefore: ReadBefore;

  constructor(readBefore: ReadBefore) {
    this.readBefore = readBefore;
  }

  get isFull(): boolean {
    return this.lines.length >= MAX_LINES;
  }

  /** Start again with the newest lines up to `lastSeq`. */
  async load(lastSeq: number): Promise<void> {
    const { data, has_more } = await this.readBefore(lastSeq + 1);
    this.lines = [];
    this.pending = [];
    this.maxLines = MAX_FOLLOWED_LINES;
    this.lastSeq = 0;
    this.firstSeq = data[0]?.seq ?? 0;
    this.hasOlder = has_more;
    for (const event of data) this.append(event);
    this.flush();
  }

  /** Put the lines before the first one in front. A failure leaves everything as it is. */
  async loadOlder(): Promise<void> {
    if (this.loading || !this.hasOlder || this.isFull) return;
    this.loading = true;
    const first = this.firstSeq;
    try {
      const { data, has_more } = await this.readBefore(first);
      if (first !== this.firstSeq) return; // started again meanwhile
      this.flush();
      this.lines = [...linesOf(data), ...this.lines].slice(-MAX_LINES);
      this.maxLines = MAX_LINES;
      this.firstSeq = data[0]?.seq ?? 0;
      this.hasOlder = has_more;
    } finally {
      this.loading = false;
    }
  }

  /** The history may hold events that come live once more: by their seq they are known. */
  append(event: StoredEvent): void {
    if (event.seq <= this.lastSeq) return;
    this.lastSeq = event.seq;
    const line = lineOf(event);
    if (line === null) return;
    add(this.pending, line);
    if (this.pending.length > 2 * this.maxLines) this.pending.splice(0, this.maxLines);
  }

  /** Show what came since the last time. The last line stays pending, for it may go on. */
  flush(): void {
    const last = this.pending[this.pending.length - 1];
    if (last === undefined || (this.pending.length === 1 && last === this.lines[this.lines.length - 1])) return;
    const goesOn = this.lines[this.lines.length - 1]?.seq === this.pending[0].seq;
    const all = [...(goesOn ? this.lines.slice(0, -1) : this.lines), ...this.pending];
    if (all.length > this.maxLines) this.hasOlder = true;
    this.lines = all.slice(-this.maxLines);
    if (this.lines.length < all.length) this.firstSeq = this.lines[0].seq;
    this.pending = [last];
  }
}

function linesOf(events: readonly StoredEvent[]): LogLine[] {
  const lines: LogLine[] = [];
  for (const event of events) {
    const line = lineOf(event);
    if (line !== null) add(lines, line);
  }
  return lines;
}

/** The same story step after step is one line that counts. */
function add(lines: LogLine[], line: LogLine): void {
  const before = lines[lines.length - 1];
  if (line.story === undefined || before?.story !== line.story) {
    lines.push(line);
    return;
  }
  const times = (before.times ?? 1) + 1;
  lines[lines.length - 1] = { ...line, seq: before.seq, at: before.at, since: before.since, times };
}
