// A set of small numbers as short text: "0-3,7".

/** Of numbers from 0 on, in any order. */
export function rangesText(numbers: Iterable<number>): string {
  const parts: [number, number][] = [];
  for (const number of [...numbers].sort((left, right) => left - right)) {
    const last = parts.at(-1);
    if (last !== undefined && number <= last[1] + 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([from, to]) => (from === to ? String(from) : `${from}-${to}`)).join(",");
}

/** The numbers below `end` that a text names; parts that cannot be read name none. */
export function numbersOf(text: string | null, end: number): Set<number> {
  const found = new Set<number>();
  for (const part of (text ?? "").split(",")) {
    const match = /^(\d{1,9})(?:-(\d{1,9}))?$/.exec(part);
    if (match === null) continue;
    const to = Math.min(Number(match[2] ?? match[1]), end - 1);
    for (let number = Number(match[1]); number <= to; number += 1) found.add(number);
  }
  return found;
}
