// The job's events as lines of a log.
import { LOG_LINES, type StoredEvent } from "../generated/events.ts";
import { formatCount, formatNumber } from "../text/format.ts";

export type Level = "debug" | "info" | "warning" | "error";

export interface LogLine {
  seq: number;
  at: string;
  level: Level;
  source: string;
  message: string;
  detail?: string;
  /** Lines of one story: the same anomaly step after step is one line that counts. */
  story?: string;
  since?: number;
  times?: number;
}

/** The line of the log that tells of an event; steps and gradients have their charts. */
export function lineOf(event: StoredEvent): LogLine | null {
  const { seq, at } = event;
  const line = (level: Level, source: string, message: string, detail?: string): LogLine => ({
    seq,
    at,
    level,
    source,
    message,
    detail,
  });
  switch (event.kind) {
    case "state": {
      const level = event.state === "failed" || event.state === "dead" ? "error" : "info";
      return line(
        level,
        "job",
        `${event.previous ?? "new"} → ${event.state}${event.reason ? `: ${event.reason}` : ""}`,
      );
    }
    case "started": {
      const from = event.resumed_from_step ? `, resumed from step ${formatCount(event.resumed_from_step)}` : "";
      const ranks = `${event.world_size} ${event.world_size === 1 ? "rank" : "ranks"}`;
      const isPart = event.num_trainable_parameters && event.num_trainable_parameters !== event.num_parameters;
      const trained = isPart ? ` (${formatCount(event.num_trainable_parameters ?? 0)} trained)` : "";
      const size = `${formatCount(event.num_parameters)} parameters${trained}, ${formatCount(event.num_steps)} steps`;
      return line(
        "info",
        "training",
        `attempt ${event.attempt} started on ${ranks} (${event.device}, ${event.backend}): ${size}${from}`,
      );
    }
    case "validation":
      return line(
        "info",
        "validation",
        `step ${formatCount(event.step)}: loss ${formatNumber(event.val_loss)}${event.is_best ? ", the best so far" : ""}`,
      );
    case "anomaly": {
      const first = event.layers[0];
      const more = event.layers.length > 1 ? ` and ${event.layers.length - 1} more` : "";
      const what = `${first?.anomaly} in ${first?.layer}`;
      const entry = line(
        "warning",
        "gradients",
        `step ${formatCount(event.step)}: ${what} (norm ${formatNumber(first?.norm)})${more}`,
      );
      return { ...entry, story: what, since: event.step };
    }
    case "incident": {
      const entry = line(
        "warning",
        "monitor",
        `step ${formatCount(event.step)}: ${event.phase === "ended" ? "over: " : ""}${event.message}`,
      );
      return event.phase === "updated"
        ? { ...entry, story: `incident ${event.incident}`, since: event.began_step }
        : entry;
    }
    case "action":
      return line(
        event.phase === "refused" ? "warning" : "info",
        "policy",
        `step ${formatCount(event.step)}: ${event.action.replaceAll("_", " ")} ${event.phase}: ${event.reason}`,
      );
    case "checkpoint":
      return line(
        "info",
        "checkpoint",
        `step ${formatCount(event.step)} saved as ${event.filename}${event.is_best ? ", the best so far" : ""}`,
      );
    case "log":
      return line(event.level, event.source, event.message);
    case "failure":
      return line("error", `rank ${event.rank}`, `${event.error}: ${event.message}`, event.traceback);
    default: {
      const declared = LOG_LINES[event.kind];
      if (!declared?.template) return null;
      return line(declared.level, declared.source, filled(declared.template, { ...event }));
    }
  }
}

/** A declared line with the values of its fields. */
function filled(template: string, values: Record<string, unknown>): string {
  return template.replace(/\{(\w+)\}/g, (_, name: string) => shown(values[name]));
}

function shown(value: unknown): string {
  if (typeof value === "string") return value;
  if (typeof value === "number") return Number.isInteger(value) ? formatCount(value) : formatNumber(value);
  return formatNumber(null);
}
