import { expect, test } from "vitest";
import { groupData, groupsOf, isDerived, type CustomMetric } from "./custommetrics.ts";

function metric(steps: number[], values: (number | "NaN")[]): CustomMetric {
  return { steps, values, last: values[values.length - 1], min: null, max: null };
}

test("names with the same prefix share a chart, others have their own", () => {
  const one = metric([1], [1]);
  const groups = groupsOf({ "eval/bleu": one, accuracy: one, "eval/loss": one, "/odd": one });
  expect(groups.map(({ title, labels }) => [title, labels])).toEqual([
    ["eval", ["bleu", "loss"]],
    ["accuracy", ["accuracy"]],
    ["/odd", ["/odd"]],
  ]);
});

test("evaluation sets share a chart for each of their measures", () => {
  const one = metric([1], [1]);
  const names = ["validation/perplexity", "eval/wiki/loss", "eval/wiki/bits_per_byte", "eval/code/loss"];
  const groups = groupsOf(Object.fromEntries(names.map((name) => [name, one])));
  expect(groups.map(({ title, labels }) => [title, labels])).toEqual([
    ["validation: perplexity", ["perplexity"]],
    ["evaluation: loss", ["wiki", "code"]],
    ["evaluation: bits per byte", ["wiki"]],
  ]);
});

test("perplexity and bits per byte say again what a loss says", () => {
  const names = ["eval/wiki/perplexity", "validation/bits_per_byte", "eval/wiki/loss", "eval/perplexity", "bleu"];
  expect(names.filter(isDerived)).toEqual(["eval/wiki/perplexity", "validation/bits_per_byte"]);
});

test("a group of many names is several charts", () => {
  const names = Array.from({ length: 20 }, (_, index) => [`m/${index}`, metric([1], [1])]);
  const groups = groupsOf(Object.fromEntries(names) as Record<string, CustomMetric>);
  expect(groups.map(({ title, names: shown }) => [title, shown.length])).toEqual([
    ["m (1 of 3)", 8],
    ["m (2 of 3)", 8],
    ["m (3 of 3)", 4],
  ]);
});

test("lines of different steps share an axis, and NaN is a hole", () => {
  expect(groupData([metric([1, 3], [1, "NaN"]), metric([2], [5])])).toEqual([
    [1, 2, 3],
    [1, undefined, null],
    [undefined, 5, undefined],
  ]);
  expect(groupData([])).toEqual([[]]);
});
