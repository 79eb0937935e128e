import { expect, test } from "vitest";
import type { MediaAnswer } from "../generated/rest.ts";
import { mediaGroups, tableOf } from "./media.ts";

function row(seq: number, name: string, step: number, form: MediaAnswer["form"] = "image"): MediaAnswer {
  const rest = { attempt: 1, created_at: "", rank: 0, size_bytes: 1, caption: null, num_rows: null, path: "" };
  return { seq, name, step, form, ...rest };
}

test("of a step that was done again the newest image counts", () => {
  const groups = mediaGroups([row(1, "a", 2), row(2, "a", 1), row(3, "b", 1, "table"), row(4, "a", 2)]);
  expect(groups.map((group) => group.name)).toEqual(["a", "b"]);
  expect(groups[0].steps.map((one) => [one.step, one.seq])).toEqual([
    [1, 2],
    [2, 4],
  ]);
});

test("what is no table is none", () => {
  expect(tableOf({ columns: ["a"], rows: [[1]] })).toEqual({ columns: ["a"], rows: [[1]] });
  for (const wrong of [null, "x", {}, { columns: "a", rows: [] }, { columns: [], rows: [1] }])
    expect(tableOf(wrong)).toBeNull();
});
