import { assert, test } from "vitest";
import { filterOf, goesOn, quoted, statesOf, suggestionsOf, termsOf, withStates } from "./filterterms.ts";

const KNOWN = { queues: ["train", "night shift"], labels: ["team=a", "team=b c"], metrics: ["eval/acc"] };

test("a filter is cut at spaces outside of quotes", () => {
  assert.deepEqual(termsOf('  state:running label:"team=my team" -"a b"  lr>1e-3 '), [
    "state:running",
    'label:"team=my team"',
    '-"a b"',
    "lr>1e-3",
  ]);
  assert.deepEqual(termsOf('a "not closed yet'), ["a", '"not closed yet']);
  assert.deepEqual(termsOf(" "), []);
});

test("states are one term, others stay", () => {
  assert.strictEqual(
    withStates("label:a state:queued x state:dead", ["failed", "dead"]),
    "state:failed,dead label:a x",
  );
  assert.strictEqual(withStates("state:queued x", []), "x");
  assert.deepEqual(statesOf("state:failed,dead x"), ["failed", "dead"]);
});

test("addresses from before there were filters show the same", () => {
  const of = (query: string): string => filterOf((name) => new URLSearchParams(query).get(name));
  assert.strictEqual(of("state=failed&kind=train&text=my run"), 'state:failed,dead kind:train "my run"');
  assert.strictEqual(of("filter=&text=x"), "");
  assert.strictEqual(of("state=toString"), "");
  assert.strictEqual(of(""), "");
});

test("what is typed may become a field, a value or a further value", () => {
  assert.include(suggestionsOf("", KNOWN), "state:");
  assert.deepEqual(suggestionsOf("-sta", KNOWN), ["-state:"]);
  assert.deepEqual(suggestionsOf("state:running,pa", KNOWN), ["state:running,pausing", "state:running,paused"]);
  assert.deepEqual(suggestionsOf("queue:ni", KNOWN), ['queue:"night shift"']);
  assert.deepEqual(suggestionsOf("label:team=b", KNOWN), ['label:"team=b c"']);
  assert.deepEqual(suggestionsOf("eval", KNOWN), ["eval/acc<"]);
  assert.deepEqual(suggestionsOf("constructor:x", KNOWN), []);
  assert.isTrue(goesOn("state:") && goesOn("loss<") && !goesOn("state:running"));
  assert.strictEqual(quoted('a "b'), '"a b"');
});
