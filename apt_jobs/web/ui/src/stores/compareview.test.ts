import { expect, test } from "vitest";
import type { ComparisonAnswer } from "../generated/rest.ts";
import { isFinal, namesOf, placesOf, placeText, requestOf, toggled } from "./compareview.svelte.ts";

test("the answer is asked for by what the address names, and nothing else of it", () => {
  expect(requestOf("?jobs=a,b&smooth=0.9&x=tokens&hide=a&baseline=b&zoom=1-5")).toBe(
    "/api/compare?jobs=a%2Cb&x=tokens&baseline=b",
  );
  expect(requestOf("?sweep=s&metrics=loss%2Facc")).toBe("/api/compare?sweep=s&metrics=loss%2Facc");
  expect(requestOf("?jobs=a&sweep=s")).toBe("/api/compare?jobs=a");
  expect(requestOf("?jobs=a&x=days")).toBe("/api/compare?jobs=a");
  expect(requestOf("?x=step")).toBeNull();
  expect(requestOf("")).toBeNull();
});

test("names are toggled in their order", () => {
  expect(namesOf("a,,b")).toEqual(["a", "b"]);
  expect(namesOf(null)).toEqual([]);
  expect(toggled(["a", "b"], "c")).toEqual(["a", "b", "c"]);
  expect(toggled(["a", "b"], "a")).toEqual(["b"]);
});

test("a range of any axis comes back from the address", () => {
  expect(placesOf([0.25, 2].map(placeText).join("-"))).toEqual([0.25, 2]);
  expect(placesOf([1234.6, 8e9].map(placeText).join("-"))).toEqual([1235, 8e9]);
  for (const text of [null, "", "5-1", "1-1", "a-b", "1e3-1e4", "-1-4"]) expect(placesOf(text)).toBeNull();
});

test("an answer is final when all runs have ended and all logs were read", () => {
  const answer = (state: string, complete: boolean): ComparisonAnswer =>
    ({ jobs: [{ state: "succeeded" }, { state }], is_complete: complete }) as ComparisonAnswer;
  expect(isFinal(answer("failed", true))).toBe(true);
  expect(isFinal(answer("paused", true))).toBe(false);
  expect(isFinal(answer("failed", false))).toBe(false);
});
