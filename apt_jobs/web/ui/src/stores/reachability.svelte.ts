// Whether the service answers. Whatever hears from it says so; after a short silence it is asked, on every page.
import { urlOf } from "../api/urls.ts";

const SILENCE_MS = 2_000; // then the service is asked: with the time for an answer a loss is seen within 5 s
const ANSWER_MS = 2_000;
const TICK_MS = 500;

class Reachability {
  lost = $state(false);
  /** When the service was last heard, in milliseconds since 1970: what the page shows is from then. */
  lostSince = $state(0);
  private heardAt = Date.now();
  private asking = false;
  private readonly listeners = new Set<() => void>();

  constructor() {
    setInterval(() => {
      if (!document.hidden && (this.lost || Date.now() - this.heardAt > SILENCE_MS)) this.suspect();
    }, TICK_MS);
    window.addEventListener("online", this.suspect);
    window.addEventListener("offline", this.suspect);
  }

  /** An answer or a message of the service came. */
  heard = (): void => {
    this.heardAt = Date.now();
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
    const before = this.heardAt;
    const isThere = await answers();
    this.asking = false;
    if (isThere) this.heard();
    else if (this.heardAt === before && !this.lost) {
      this.lostSince = before;
      this.lost = true;
    }
  }
}

async function answers(): Promise<boolean> {
  try {
    return (await fetch(urlOf("/healthz"), { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) })).ok;
  } catch {
    return false; // refused, cut or too late: all the same to who looks at the page
  }
}

export const reachability = new Reachability();
