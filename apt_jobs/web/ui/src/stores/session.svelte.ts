// Whether this browser has a session. A lost one is noticed by any call or socket, and by itself when it is back.

const CHECK_MS = 4_000;

export class Session {
  /** The service does not know this browser (any more). */
  lost = $state(false);
  /** It did before: what is on the page stays, under a banner. */
  known = $state(false);
  private readonly listeners = new Set<() => void>();
  private readonly ask: () => Promise<unknown>;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private asking = false;

  /** `ask` makes an authenticated call, whose outcome is reported to `confirm` or `deny`. */
  constructor(ask: () => Promise<unknown>) {
    this.ask = ask;
  }

  /** A call was answered as a signed-in user's. */
  confirm = (): void => {
    this.known = true;
    if (!this.lost) return;
    this.lost = false;
    clearTimeout(this.timer);
    for (const listener of this.listeners) listener();
  };

  /** A call or a socket was refused for want of a session. */
  deny = (): void => {
    this.lost = true;
    this.checkSoon();
  };

  /** Ask now, for instance when a socket was closed without a reason. */
  check = async (): Promise<void> => {
    if (this.asking) return;
    this.asking = true;
    try {
      await this.ask();
    } catch {
      // `deny` was called, or the service is away, which the page shows elsewhere.
    }
    this.asking = false;
    if (this.lost) this.checkSoon();
  };

  /** Call `listener` when the session is back; returns the function that ends this. */
  whenBack(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  private checkSoon(): void {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (document.hidden) this.checkSoon();
      else void this.check();
    }, CHECK_MS);
  }
}
