import { expect, test } from "vitest";
import { shownSetting } from "./settings.ts";

test.each([
  [0.001, "0.001"],
  [null, "null"],
  [undefined, "–"],
  ["adamw", "adamw"],
  [["a", 1], '["a",1]'],
  ["x".repeat(100), `${"x".repeat(79)}…`],
])("%j is shown as %s", (value, shown) => {
  expect(shownSetting(value)).toBe(shown);
});
