// JSON whose numbers stay as they were written: a configuration is shown and sent back digit by digit.
// `JSON.parse` rounds integers from 2^53 on, and "1.0" or "1e-05" do not come back as they were.

/** A number as its JSON had it. */
export class NumberText {
  readonly text: string;

  constructor(text: string) {
    this.text = text;
  }
}

export type Exact = string | boolean | null | NumberText | Exact[] | { [key: string]: Exact };
export type ExactObject = Record<string, Exact>;

/** Parse JSON without a loss. Throws `SyntaxError` as `JSON.parse` does. */
export function parseExact(text: string): Exact {
  const reviver = (_key: string, value: unknown, context?: { source?: string }): unknown =>
    typeof value === "number" ? new NumberText(context?.source ?? String(value)) : value;
  return JSON.parse(text, reviver) as Exact; // old browsers give no source: theirs is as exact as a number can be
}

export function isExactObject(value: Exact | undefined): value is ExactObject {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof NumberText);
}

/** JSON text of a value; with `indent`, over several lines. */
export function exactJson(value: Exact, indent = 0, depth = 0): string {
  if (value instanceof NumberText) return value.text;
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  const isList = Array.isArray(value);
  const parts = isList
    ? value.map((item) => exactJson(item, indent, depth + 1))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${exactJson(item, indent, depth + 1)}`);
  const [begin, end] = isList ? "[]" : "{}";
  if (parts.length === 0) return begin + end;
  if (indent === 0) return `${begin}${parts.join(", ")}${end}`;
  const pad = (levels: number): string => "\n" + " ".repeat(indent * levels);
  return `${begin}${pad(depth + 1)}${parts.join(`,${pad(depth + 1)}`)}${pad(depth)}${end}`;
}

/** A value of a configuration for a reader: numbers as they were written, nothing for what was not given. */
export function showExact(value: Exact | undefined): string {
  if (value === undefined || value === null) return "–";
  return typeof value === "string" ? value : exactJson(value);
}
