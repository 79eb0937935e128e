// Whether the service answers. Every answer is noted; after a short silence the service is asked, on every page.
import { urlOf } from "../api/urls.ts";

const SILENCE_MS = 2_000; // then the service is asked: with the time for an answer a loss is seen within 5 s
const ANSWER_MS = 2_000;
const TICK_MS = 500;

class Reachability {
  lost = $state(false);
  /** When the service last answered, in milliseconds since 1970: what the page shows is from then. */
  lostSince = $state(0);
  private answeredAt = Date.now();
  private asking = false;
  private readonly listeners = new Set<() => void>();

  constructor() {
    setInterval(() => {
      if (!document.hidden && (this.lost || Date.now() - this.answeredAt > SILENCE_MS)) this.suspect();
    }, TICK_MS);
    window.addEventListener("online", this.suspect);
    window.addEventListener("offline", this.suspect);
  }

  /** An answer or a message of the service came. */
  noteAnswer = (): void => {
    this.answeredAt = Date.now();
    if (!this.lost) return;
    this.lost = false;
    for (const listener of this.listeners) listener();
  };

  /** Something went wrong on the way: ask now. */
  suspect = (): void => {
    if (!this.asking) void this.ask();
  };

  /** Call `listener` when the service is back; returns the function that ends this. */
  whenBack(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  private async ask(): Promise<void> {
    this.asking = true;
    const before = this.answeredAt;
    const isUp = await isServiceUp();
    this.asking = false;
    if (isUp) this.noteAnswer();
    else if (this.answeredAt === before && !this.lost) {
      this.lostSince = before;
      this.lost = true;
    }
  }
}

async function isServiceUp(): Promise<boolean> {
  try {
    return (await fetch(urlOf("/healthz"), { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) })).ok;
  } catch {
    return false; // refused, cut or too late: all the same to who looks at the page
  }
}

export const reachability = new Reachability();
