// Fetches the finer steps of the range that a chart shows: after a delay, and only for the newest range.

export type Range = [from: number, to: number];

export class Sharpener<Detail> {
  private timer: ReturnType<typeof setTimeout> | undefined;
  private request: AbortController | null = null;
  private readonly load: (range: Range, signal: AbortSignal) => Promise<Detail>;
  private readonly receive: (detail: Detail | null) => void;
  private readonly delayMs: number;

  /** `receive` gets each detail that is still wanted, and null when the whole history is shown again. */
  constructor(
    load: (range: Range, signal: AbortSignal) => Promise<Detail>,
    receive: (detail: Detail | null) => void,
    delayMs = 150,
  ) {
    this.load = load;
    this.receive = receive;
    this.delayMs = delayMs;
  }

  show(range: Range | null): void {
    this.stop();
    if (range === null) {
      this.receive(null);
      return;
    }
    this.timer = setTimeout(() => void this.fetch(range), this.delayMs);
  }

  stop(): void {
    clearTimeout(this.timer);
    this.request?.abort();
    this.request = null;
  }

  private async fetch(range: Range): Promise<void> {
    const request = new AbortController();
    this.request = request;
    try {
      const detail = await this.load(range, request.signal);
      if (this.request === request) this.receive(detail);
    } catch {
      // What is drawn stays as coarse as it was; the page shows elsewhere that the service is away.
    }
  }
}

/** `coarse` with the items from `from` to `to` replaced by `fine`; both in order of step. */
export function spliced<Item>(
  coarse: readonly Item[],
  fine: readonly Item[],
  stepOf: (item: Item) => number,
  [from, to]: Range,
): Item[] {
  return [...coarse.filter((item) => stepOf(item) < from), ...fine, ...coarse.filter((item) => stepOf(item) > to)];
}
