// Which rows of a long list are on the screen.

const OVERSCAN = 8; // rows before and after, so that scrolling shows no gap

export interface Seen {
  /** On the screen: from `first` to before `last`. */
  first: number;
  last: number;
  /** Drawn: from `from` to before `to`. */
  from: number;
  to: number;
}

/** `top` is the part of the list, in px, that is scrolled out above. */
export function seenRows(top: number, viewHeight: number, rowHeight: number, total: number): Seen {
  const clamp = (value: number): number => Math.max(0, Math.min(total, value));
  const first = clamp(Math.floor(top / rowHeight));
  const last = clamp(Math.max(first, Math.ceil((top + viewHeight) / rowHeight)));
  return { first, last, from: clamp(first - OVERSCAN), to: clamp(last + OVERSCAN) };
}
