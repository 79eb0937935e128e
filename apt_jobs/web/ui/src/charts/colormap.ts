// From dark blue over teal to pale yellow: lightness grows with the value, and no colour in it is near red.
const STOPS: readonly (readonly [number, number, number])[] = [
  [38, 30, 86],
  [48, 74, 140],
  [38, 118, 150],
  [40, 160, 148],
  [110, 198, 124],
  [190, 222, 110],
  [246, 238, 150],
];
const SIZE = 256;

function table(): Uint8ClampedArray {
  const colors = new Uint8ClampedArray(SIZE * 3);
  for (let index = 0; index < SIZE; index += 1) {
    const position = (index / (SIZE - 1)) * (STOPS.length - 1);
    const left = Math.min(STOPS.length - 2, Math.floor(position));
    for (let channel = 0; channel < 3; channel += 1) {
      const [from, to] = [STOPS[left][channel], STOPS[left + 1][channel]];
      colors[index * 3 + channel] = from + (to - from) * (position - left);
    }
  }
  return colors;
}

export const COLORS = table();

/** Offset into COLORS for a share between 0 and 1. */
export function colorOffset(share: number): number {
  return Math.max(0, Math.min(SIZE - 1, Math.round(share * (SIZE - 1)))) * 3;
}
