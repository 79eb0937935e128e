// What a page shows, in its address: Back undoes a choice, and a link shows a colleague the same.
import { location } from "./router.svelte.ts";

export type Choices = Record<string, string | null>;

/** The query with some choices changed; null takes one out. */
export function changedQuery(query: string, changes: Choices): string {
  const parameters = new URLSearchParams(query);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) parameters.delete(name);
    else parameters.set(name, value);
  }
  const text = parameters.toString();
  return text === "" ? "" : `?${text}`;
}

/** "100-200" as a range of steps; null if it is none. */
export function rangeOf(text: string | null): [number, number] | null {
  const match = /^(\d{1,15})-(\d{1,15})$/.exec(text ?? "");
  if (match === null) return null;
  const [from, to] = [Number(match[1]), Number(match[2])];
  return from < to ? [from, to] : null;
}

class ViewState {
  private readonly parameters = $derived(new URLSearchParams(location.query));

  get(name: string): string | null {
    return this.parameters.get(name);
  }

  /** A number from `min` to `max`, or `fallback`. */
  number(name: string, min: number, max: number, fallback: number): number {
    const text = this.get(name);
    const value = text === null || text.trim() === "" ? Number.NaN : Number(text);
    return value >= min && value <= max ? value : fallback;
  }

  /** `replace`: a choice in motion, like typing, is one entry of the browser's history. */
  set(changes: Choices, replace = false): void {
    const query = changedQuery(location.query, changes);
    if (query !== location.query) location.go(location.path + query + location.hash, replace);
  }
}

export const viewState = new ViewState();
