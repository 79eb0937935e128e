import { assert, test } from "vitest";
import { datasetFormatOf, datasetNameOf } from "./datasets.ts";

test.each([
  ["corpus.txt", "corpus", "text"],
  ["my rows.jsonl.gz", "my-rows", "jsonl"],
  ["rows.NDJSON", "rows", "jsonl"],
  ["table.parquet", "table", "parquet"],
  ["train.u16.bin", "train", "uint16"],
  ["ids.npy", "ids", "npy"],
  ["README", "README", "text"],
  ["...", "data", "text"],
])("%s is %s in the format %s", (filename, name, format) => {
  assert.strictEqual(datasetNameOf(filename), name);
  assert.strictEqual(datasetFormatOf(filename), format);
});
