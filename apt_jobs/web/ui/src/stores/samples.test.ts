import { expect, test } from "vitest";
import type { StoredEvent } from "../generated/events.ts";
import { samplesByStep } from "./samples.ts";

test("the later attempt counts where a step was trained again", () => {
  const event = (step: number, text: string): StoredEvent => ({
    kind: "samples",
    seq: 1,
    attempt: 1,
    at: "",
    step,
    prompts: ["a"],
    texts: [text],
  });
  const found = samplesByStep([event(2, "first"), event(4, "other"), event(2, "again")]);
  expect(Object.entries(found).map(([step, { texts }]) => [step, texts])).toEqual([
    ["2", ["again"]],
    ["4", ["other"]],
  ]);
});
