// Views of the list of jobs that were saved in this browser: a filter and an order under a name.
import { isRecord, recall, remember } from "./remembered.ts";

export const MAX_VIEWS = 50;
export const MAX_NAME_CHARS = 60;

export interface SavedView {
  name: string;
  filter: string;
  sort: string;
}

export function readViews(stored: unknown): SavedView[] | null {
  return Array.isArray(stored) ? stored.filter(isView).slice(0, MAX_VIEWS) : null;
}

function isView(value: unknown): value is SavedView {
  return isRecord(value) && [value.name, value.filter, value.sort].every((part) => typeof part === "string");
}

export class SavedViews {
  list = $state.raw<readonly SavedView[]>(recall("views", readViews) ?? []);

  /** Under a name that there is, it takes the place of the old one. Returns what is wrong, if something is. */
  save(view: SavedView): string | null {
    const name = view.name.trim();
    if (name === "" || name.length > MAX_NAME_CHARS) return `Give it a name of 1 to ${MAX_NAME_CHARS} characters.`;
    const others = this.list.filter((one) => one.name !== name);
    if (others.length >= MAX_VIEWS) return `There are ${MAX_VIEWS} views already; delete one first.`;
    this.keep([...others, { ...view, name }].sort((left, right) => left.name.localeCompare(right.name)));
    return null;
  }

  remove(name: string): void {
    this.keep(this.list.filter((one) => one.name !== name));
  }

  private keep(views: readonly SavedView[]): void {
    this.list = views;
    remember("views", views);
  }
}

export const savedViews = new SavedViews();
