// How to continue texts, as it was chosen last in this browser.

export interface GenerationSettings {
  model: string;
  maxLength: number;
  temperature: number;
  topP: number;
  seed: number | null;
}

export const DEFAULTS: GenerationSettings = { model: "", maxLength: 80, temperature: 0.8, topP: 0.95, seed: null };

const KEY = "apt_jobs.generation";

/** The settings that were kept; what is missing or out of bounds is as usual. */
export function keptSettings(): GenerationSettings {
  let kept: unknown = null;
  try {
    kept = JSON.parse(window.localStorage.getItem(KEY) ?? "null");
  } catch {
    // A browser may forbid the store, and anybody may write to it.
  }
  const values = new Map<string, unknown>(typeof kept === "object" && kept !== null ? Object.entries(kept) : []);
  const number = (name: string, min: number, max: number, fallback: number): number => {
    const value = values.get(name);
    return typeof value === "number" && value >= min && value <= max ? value : fallback;
  };
  const model = values.get("model");
  const seed = values.get("seed");
  return {
    model: typeof model === "string" ? model : DEFAULTS.model,
    maxLength: Math.round(number("maxLength", 1, 4096, DEFAULTS.maxLength)),
    temperature: number("temperature", 0, 10, DEFAULTS.temperature),
    topP: number("topP", 0.01, 1, DEFAULTS.topP),
    seed: Number.isSafeInteger(seed) && Number(seed) >= 0 ? Number(seed) : null,
  };
}

export function keepSettings(settings: GenerationSettings): void {
  try {
    window.localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // Without a store they hold for as long as the page.
  }
}

/** "40 tokens in 1,250 ms, 32 a second". */
export function speedOf(tokens: number, ms: number): string {
  const count = `${tokens.toLocaleString("en-US")} ${tokens === 1 ? "token" : "tokens"}`;
  const rate =
    ms > 0 ? `, ${((tokens * 1000) / ms).toLocaleString("en-US", { maximumSignificantDigits: 3 })} a second` : "";
  return `${count} in ${Math.round(ms).toLocaleString("en-US")} ms${rate}`;
}

/** "120 characters, 60 a second": how much of a text came so far, and how fast since its first part. */
export function paceOf(characters: number, ms: number): string {
  const count = `${characters.toLocaleString("en-US")} characters`;
  return ms < 500 ? count : `${count}, ${Math.round((characters * 1000) / ms).toLocaleString("en-US")} a second`;
}
