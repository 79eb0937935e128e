// What this browser remembers between visits. A browser may forbid the store, or hold what an older page wrote.

const PREFIX = "apt_jobs.";

/** What was remembered under a name, as `read` understands it; null if there is nothing of that form. */
export function recall<Value>(name: string, read: (stored: unknown) => Value | null): Value | null {
  try {
    const text = window.localStorage.getItem(PREFIX + name);
    return text === null ? null : read(JSON.parse(text));
  } catch {
    return null;
  }
}

/** Without a store it holds for as long as the page. */
export function remember(name: string, value: unknown): void {
  try {
    if (value === null) window.localStorage.removeItem(PREFIX + name);
    else window.localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Full or forbidden.
  }
}

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
