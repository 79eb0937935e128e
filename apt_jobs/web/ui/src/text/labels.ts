// Labels of a job as people type them: "team=nlp, run=nightly".

export interface Labels {
  labels: Record<string, string>;
  fault?: string;
}

export function labelsOf(text: string): Labels {
  const labels: Record<string, string> = {};
  for (const part of text.split(",").map((one) => one.trim())) {
    if (part === "") continue;
    const at = part.indexOf("=");
    if (at < 1) return { labels: {}, fault: `“${part}” is no label: write key=value` };
    labels[part.slice(0, at).trim()] = part.slice(at + 1).trim();
  }
  return { labels };
}
