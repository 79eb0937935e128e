import { assert, test } from "vitest";
import { exactJson, isExactObject, NumberText, parseExact, showExact } from "./exact.ts";

// As the engines that give the source of a number do, whatever engine runs this test.
const SOURCES = [
  "123456789",
  "41632",
  "9007199254740993",
  "1.0",
  "1e-05",
  "0.1",
  "-0",
  "1E400",
  "12345678901234567890",
];

test.each(SOURCES)("%s is shown and written as it came", (source) => {
  const parsed = parseExact(`{"value": ${source}}`);
  assert.ok(isExactObject(parsed));
  assert.strictEqual(showExact(parsed.value), source);
  assert.strictEqual(exactJson(parsed), `{"value": ${source}}`);
});

test("everything else is as JSON.parse makes it", () => {
  const value = parseExact('{"a": [true, null, "1.0"], "b": {}, "c": []}');
  assert.deepEqual(value, { a: [true, null, "1.0"], b: {}, c: [] });
  assert.strictEqual(exactJson(value), '{"a": [true, null, "1.0"], "b": {}, "c": []}');
});

test("indented text is laid out as JSON.stringify does", () => {
  const value = { a: [new NumberText("1.50"), { b: null }], c: {}, "<img>": "x" };
  const plain = { a: [1.5, { b: null }], c: {}, "<img>": "x" };
  assert.strictEqual(exactJson(value, 2).replace("1.50", "1.5"), JSON.stringify(plain, null, 2));
});

test("what was not given is shown as a dash", () => {
  assert.strictEqual(showExact(undefined), "–");
  assert.strictEqual(showExact(null), "–");
  assert.strictEqual(showExact(""), "");
});

test("text that is no JSON is refused", () => assert.throws(() => parseExact("{1}"), SyntaxError));
