// The columns of the list of jobs: which there are, which this browser shows, how wide they are.
import { isRecord, recall, remember } from "./remembered.ts";

export interface Column {
  id: string;
  label: string;
  width: number; // px
  /** What the service sorts by, in the direction of the first click. */
  sort?: string;
  isRight?: boolean;
}

export const COLUMNS: readonly Column[] = [
  { id: "state", label: "State", width: 126, sort: "active" },
  { id: "name", label: "Name", width: 220, sort: "name" },
  { id: "progress", label: "Progress", width: 140, sort: "-step" },
  { id: "sparkline", label: "Loss curve", width: 84 },
  { id: "last", label: "Loss", width: 72, sort: "metrics.loss.last", isRight: true },
  { id: "best", label: "Best", width: 72, sort: "metrics.val_loss.best", isRight: true },
  { id: "speed", label: "Tokens/s", width: 76, sort: "-metrics.tokens_per_s.last", isRight: true },
  { id: "gpus", label: "GPUs", width: 54, isRight: true },
  { id: "queue", label: "Queue", width: 80, sort: "queue" },
  { id: "age", label: "When", width: 112, sort: "-created_at" },
  { id: "detail", label: "Why", width: 170 },
  { id: "labels", label: "Labels", width: 110 },
  { id: "sweep", label: "Sweep", width: 110 },
  { id: "priority", label: "Priority", width: 72, sort: "-priority", isRight: true },
  { id: "attempt", label: "Attempt", width: 72, isRight: true },
  { id: "id", label: "Id", width: 220, sort: "-created_at" },
];
export const DEFAULT_SHOWN: readonly string[] = COLUMNS.slice(0, 12).map(({ id }) => id);
export const MIN_WIDTH = 48;
export const MAX_WIDTH = 900;
const MAX_SHOWN = 30;
const METRIC = "metric:";

/** A column that shows the last value of a metric which scripts log. */
export function metricColumn(name: string): Column {
  return { id: METRIC + name, label: name, width: 96, sort: `-metrics.${name}.last`, isRight: true };
}

export function columnOf(id: string): Column | null {
  if (id.startsWith(METRIC)) return metricColumn(id.slice(METRIC.length));
  return COLUMNS.find((column) => column.id === id) ?? null;
}

export function metricOf(column: Column): string | null {
  return column.id.startsWith(METRIC) ? column.id.slice(METRIC.length) : null;
}

/** The order after a click on a column's head: its own, then the other way round, then the list's own order again. */
export function nextSort(column: Column, sort: string): string | null {
  if (column.sort === undefined) return sort;
  if (sort === column.sort) return column.sort === "active" ? null : reversed(sort);
  return sort === reversed(column.sort) || column.sort === "active" ? null : column.sort;
}

export function direction(column: Column, sort: string): "ascending" | "descending" | undefined {
  if (column.sort === undefined || (sort !== column.sort && sort !== reversed(column.sort))) return undefined;
  return sort.startsWith("-") ? "descending" : "ascending";
}

function reversed(sort: string): string {
  return sort.startsWith("-") ? sort.slice(1) : `-${sort}`;
}

export interface Shown {
  ids: string[];
  widths: Record<string, number>;
}

/** What was stored, without columns that there are not; null: something else. */
export function readShown(stored: unknown): Shown | null {
  if (!isRecord(stored) || !Array.isArray(stored.ids)) return null;
  const ids = stored.ids.filter((id): id is string => typeof id === "string" && columnOf(id) !== null);
  const widths = isRecord(stored.widths) ? Object.entries(stored.widths) : [];
  const valid = widths.filter((entry): entry is [string, number] => typeof entry[1] === "number");
  const shown = ids.includes("name") ? ids : ["name", ...ids]; // it has the link
  return {
    ids: [...new Set(shown)].slice(0, MAX_SHOWN),
    widths: Object.fromEntries(valid.map(([id, width]) => [id, Math.min(MAX_WIDTH, Math.max(MIN_WIDTH, width))])),
  };
}

export class ShownColumns {
  private state = $state.raw<Shown>(recall("columns", readShown) ?? { ids: [...DEFAULT_SHOWN], widths: {} });
  readonly ids = $derived(this.state.ids);
  readonly list = $derived(
    this.state.ids
      .map((id) => columnOf(id))
      .filter((column) => column !== null)
      .map((column) => ({ ...column, width: this.state.widths[column.id] ?? column.width })),
  );

  toggle(id: string): void {
    if (id === "name") return;
    const { ids } = this.state;
    if (ids.includes(id)) this.keep({ ...this.state, ids: ids.filter((one) => one !== id) });
    else this.show([...ids, id]);
  }

  /** In the order in which there are columns; those of metrics follow. */
  show(ids: readonly string[]): void {
    const order = COLUMNS.map((column) => column.id);
    const known = order.filter((id) => ids.includes(id));
    this.keep({ ...this.state, ids: [...known, ...ids.filter((id) => !order.includes(id))].slice(0, MAX_SHOWN) });
  }

  resize(id: string, width: number): void {
    const bounded = Math.round(Math.min(MAX_WIDTH, Math.max(MIN_WIDTH, width)));
    this.keep({ ...this.state, widths: { ...this.state.widths, [id]: bounded } });
  }

  reset(): void {
    this.keep({ ids: [...DEFAULT_SHOWN], widths: {} });
  }

  private keep(shown: Shown): void {
    this.state = shown;
    remember("columns", shown);
  }
}

export const shownColumns = new ShownColumns();
