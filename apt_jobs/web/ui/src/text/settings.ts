// Values of settings as people read them: short, and never mistaken for another type.

const MAX_CHARS = 80;

/** A value of a job's field: text as it is, all else as JSON. */
export function shownSetting(value: unknown): string {
  if (value === undefined) return "–";
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.length > MAX_CHARS ? `${text.slice(0, MAX_CHARS - 1)}…` : text;
}
