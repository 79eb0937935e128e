import { expect, test } from "vitest";
import { commandLine, diffLines } from "./code.ts";

test("a command is quoted where a shell would need it", () => {
  expect(commandLine(["python", "train.py", "--lr", "3e-4", "a b", "it's", ""])).toBe(
    `python train.py --lr 3e-4 'a b' 'it'\\''s' ''`,
  );
});

test("a diff is known by its first characters", () => {
  expect(diffLines("")).toEqual([]);
  expect(diffLines("diff --git a/x b/x\n@@ -1 +1 @@\n-old\n+new\n same\n").map((line) => line.kind)).toEqual([
    "place",
    "place",
    "removed",
    "added",
    "same",
  ]);
});
