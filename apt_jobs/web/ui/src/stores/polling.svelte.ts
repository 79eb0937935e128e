// Polls while the page is visible: one request at a time, slower after failures, at once when the page is shown again.
import { untrack } from "svelte";
import { ApiProblem, messageOf } from "../api/client.ts";
import { reachability } from "./reachability.svelte.ts";
import { session } from "./services.ts";

const SLOWEST_MS = 30_000;
const TIMES_ITS_COST = 10; // what is slow to answer is asked for less often

export class Poll<Answer> {
  data = $state.raw<Answer | null>(null);
  private failure = $state.raw<unknown>(null);
  private timer: ReturnType<typeof setTimeout> | undefined;
  private abort: AbortController | undefined;
  private failures = 0;
  private stopped = true;
  private forget: () => void = () => undefined;
  private readonly load: (signal: AbortSignal) => Promise<Answer>;
  private readonly everyMs: number;

  constructor(load: (signal: AbortSignal) => Promise<Answer>, everyMs: number) {
    this.load = load;
    this.everyMs = everyMs;
  }

  /** What is wrong, but for a lost service or session: a banner says that for the whole page. */
  get error(): string | null {
    if (this.failure === null || isSaidElsewhere(this.failure)) return null;
    return messageOf(this.failure);
  }

  /** Start; returns the stop function, so that it can be the body of an effect. */
  start(): () => void {
    this.stopped = false;
    document.addEventListener("visibilitychange", this.refreshNow);
    const forget = [reachability.whenBack(this.refreshNow), session.whenBack(this.refreshNow)];
    this.forget = () => forget.forEach((one) => one());
    void this.run();
    return () => this.stop();
  }

  stop(): void {
    this.stopped = true;
    document.removeEventListener("visibilitychange", this.refreshNow);
    this.forget();
    clearTimeout(this.timer);
    this.abort?.abort();
  }

  /** Ask again now; resolves when the answer is there. */
  refresh = async (): Promise<void> => {
    if (!this.stopped) await this.run();
  };

  private readonly refreshNow = (): void => void this.refresh();

  private async run(): Promise<void> {
    clearTimeout(this.timer);
    this.abort?.abort();
    if (document.hidden && this.data !== null) return;
    const abort = new AbortController();
    this.abort = abort;
    const began = performance.now();
    let costMs = 0;
    try {
      const data = await this.load(abort.signal);
      if (abort.signal.aborted) return;
      this.data = data;
      this.failure = null;
      this.failures = 0;
      costMs = performance.now() - began;
    } catch (error) {
      if (abort.signal.aborted) return;
      this.failure = error;
      this.failures += 1;
    }
    const pauseMs = Math.max(this.everyMs * 2 ** this.failures, TIMES_ITS_COST * costMs);
    if (!this.stopped) this.timer = setTimeout(() => void this.refresh(), Math.min(SLOWEST_MS, pauseMs));
  }
}

/** Loads now, and again and again unless all is there; returns the stop function, so that it is the body of an effect. */
export function loadUntil(
  isComplete: boolean,
  load: (signal: AbortSignal) => Promise<void>,
  everyMs: number,
): () => void {
  const abort = new AbortController();
  untrack(() => void load(abort.signal)); // what it reads is no reason to load again at once
  const timer = isComplete ? undefined : setInterval(() => void load(abort.signal), everyMs);
  return () => {
    clearInterval(timer);
    abort.abort();
  };
}

function isSaidElsewhere(failure: unknown): boolean {
  if (!(failure instanceof ApiProblem)) return false;
  return (failure.status === 0 && reachability.lost) || failure.status === 401;
}

/** The time, as state, for "3 min ago" and running durations. */
class Clock {
  now = $state(Date.now());

  constructor() {
    setInterval(() => {
      if (!document.hidden) this.now = Date.now();
    }, 1000);
  }
}

export const clock = new Clock();
