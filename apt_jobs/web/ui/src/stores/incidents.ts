// What the monitor found wrong, and what the job's policies did about it: one entry an incident, kept up to date.
import type { ActionTaken, IncidentChanged, StoredEvent } from "../generated/events.ts";

const MAX_INCIDENTS = 300; // the newest

export interface Incident extends IncidentChanged {
  key: string;
  attempt: number;
  begunAt: string;
  actions: ActionTaken[];
}

export class IncidentLog {
  private readonly byKey = new Map<string, Incident>(); // in the order in which they began

  /** Events may come twice; those of other kinds are left alone. */
  apply(event: StoredEvent): void {
    if (event.kind === "incident") this.change(event);
    else if (event.kind === "action") this.addAction(event);
  }

  /** Newest first. */
  list(): Incident[] {
    return [...this.byKey.values()].reverse();
  }

  private change(event: StoredEvent & IncidentChanged): void {
    const key = `${event.attempt}-${event.incident}`;
    const known = this.byKey.get(key);
    this.byKey.set(key, { ...event, key, begunAt: known?.begunAt ?? event.at, actions: known?.actions ?? [] });
    if (this.byKey.size > MAX_INCIDENTS) this.byKey.delete(this.byKey.keys().next().value as string);
  }

  private addAction(event: StoredEvent & ActionTaken): void {
    const incident = this.byKey.get(`${event.attempt}-${event.incident}`);
    if (incident === undefined) return;
    const isKnown = incident.actions.some(
      (one) => one.step === event.step && one.phase === event.phase && one.action === event.action,
    );
    if (!isKnown) incident.actions = [...incident.actions, event];
  }
}

/** The steps during which anything was wrong, without overlaps. */
export function troubledSpans(incidents: readonly Incident[]): { from: number; to: number }[] {
  const spans: { from: number; to: number }[] = [];
  for (const { began_step, step } of incidents.toSorted((left, right) => left.began_step - right.began_step)) {
    const last = spans[spans.length - 1];
    if (last !== undefined && began_step <= last.to) last.to = Math.max(last.to, step);
    else spans.push({ from: began_step, to: step });
  }
  return spans;
}
