// When to draw: charts once per animation frame at most, tables and heat maps four times a second.

const SLOW_MS = 250; // all that eyes can follow

export class Redraw {
  /** Counts up when curves have new points. */
  version = $state(0);
  /** The same, four times a second at most. */
  slowVersion = $state(0);
  private frame = 0;
  private slowTimer: ReturnType<typeof setTimeout> | undefined;
  private readonly beforeSlow: () => void;

  constructor(beforeSlow: () => void) {
    this.beforeSlow = beforeSlow;
  }

  /** A hidden tab gets no animation frames: it draws nothing, and catches up with one drawing when it is shown. */
  request(): void {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.version += 1;
      this.slowTimer ??= setTimeout(() => {
        this.slowTimer = undefined;
        this.beforeSlow();
        this.slowVersion += 1;
      }, SLOW_MS);
    });
  }

  stop(): void {
    cancelAnimationFrame(this.frame);
    clearTimeout(this.slowTimer);
  }
}
