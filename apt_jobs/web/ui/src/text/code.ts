// A job's command as a shell would read it, and its diff by lines.

export const MAX_DIFF_LINES = 2_000; // that the page shows

export interface DiffLine {
  kind: "added" | "removed" | "place" | "same";
  text: string;
}

/** Words of a command, quoted where a shell would need it. */
export function commandLine(words: readonly string[]): string {
  return words.map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`)).join(" ");
}

export function diffLines(diff: string): DiffLine[] {
  if (diff === "") return [];
  return diff
    .replace(/\n$/, "")
    .split("\n")
    .map((text) => ({ kind: kindOf(text), text }));
}

function kindOf(line: string): DiffLine["kind"] {
  if (/^(@@|diff |index |\+\+\+ |--- )/.test(line)) return "place";
  if (line.startsWith("+")) return "added";
  return line.startsWith("-") ? "removed" : "same";
}
