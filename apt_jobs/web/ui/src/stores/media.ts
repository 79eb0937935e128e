// Images and tables that a job's script logged, by name; of each step the newest one counts.
import type { MediaAnswer } from "../generated/rest.ts";

export interface MediaGroup {
  key: string; // unique: an image and a table may have one name
  name: string;
  form: MediaAnswer["form"];
  steps: MediaAnswer[]; // by step
}

export interface MediaTable {
  columns: string[];
  rows: (string | number | boolean | null)[][];
}

export function mediaGroups(rows: readonly MediaAnswer[]): MediaGroup[] {
  const groups = new Map<string, Map<string, MediaAnswer>>();
  for (const row of rows) {
    const key = `${row.form} ${row.name}`;
    const steps = groups.get(key) ?? new Map<string, MediaAnswer>();
    groups.set(key, steps.set(`${row.step} ${row.rank}`, row));
  }
  return [...groups].map(([key, steps]) => {
    const sorted = [...steps.values()].sort((a, b) => a.step - b.step || a.rank - b.rank);
    return { key, name: sorted[0].name, form: sorted[0].form, steps: sorted };
  });
}

/** What came as a table, or null: a script may have written anything. */
export function tableOf(value: unknown): MediaTable | null {
  if (typeof value !== "object" || value === null) return null;
  const { columns, rows } = value as Partial<MediaTable>;
  if (!Array.isArray(columns) || !Array.isArray(rows) || !rows.every(Array.isArray)) return null;
  return { columns: columns.map(String), rows };
}
