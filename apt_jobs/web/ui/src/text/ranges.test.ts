import { assert, test } from "vitest";
import { numbersOf, rangesText } from "./ranges.ts";

test("numbers become ranges and come back", () => {
  for (const numbers of [[], [0], [3, 1, 2, 9, 0], [5, 7, 9]]) {
    assert.deepEqual([...numbersOf(rangesText(numbers), 10)], [...numbers].sort());
  }
  assert.strictEqual(rangesText([2, 1, 1, 0, 9]), "0-2,9");
});

test("what cannot be read, or is too large, names nothing", () => {
  assert.deepEqual([...numbersOf("a,1-,-2,3-1,999999999,2-999999999", 4)], [2, 3]);
  assert.strictEqual(numbersOf(null, 4).size, 0);
});
