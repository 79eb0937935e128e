import { assert, test } from "vitest";
import { labelsOf } from "./labels.ts";

test("labels are read as they are typed", () => {
  assert.deepEqual(labelsOf(" team=nlp, run = a=b ,"), { labels: { team: "nlp", run: "a=b" } });
  assert.deepEqual(labelsOf(""), { labels: {} });
});

test("a label without a key or a value sign is named", () => {
  assert.match(labelsOf("team=nlp, nightly").fault ?? "", /“nightly” is no label/);
  assert.match(labelsOf("=x").fault ?? "", /“=x” is no label/);
});
