// Schedules as the pages read and write them, and their due times in two zones.
import type { ScheduleAnswer } from "../generated/rest.ts";

export type Overlap = ScheduleAnswer["overlap"];
export type CatchUp = ScheduleAnswer["catch_up"];

/** What a user sets besides the job. */
export type Timing = Pick<ScheduleAnswer, "name" | "cron" | "time_zone" | "overlap" | "catch_up">;

export const OVERLAPS: Record<Overlap, string> = {
  skip: "skip this run",
  queue: "queue another job",
  cancel: "cancel the old job",
};
export const CATCH_UPS: Record<CatchUp, string> = {
  latest: "run the latest one",
  skip: "skip them",
  all: "run all of them",
};

export const LOCAL_ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone;

export function newTiming(): Timing {
  return { name: "", cron: "@nightly", time_zone: LOCAL_ZONE || "UTC", overlap: "skip", catch_up: "latest" };
}

/** "Wed, 25 Nov 2026, 03:30" on the clocks of a zone; null if the browser does not know the zone. */
export function formatDue(at: string, timeZone: string): string | null {
  try {
    return new Intl.DateTimeFormat("en-GB", {
      timeZone,
      weekday: "short",
      day: "numeric",
      month: "short",
      year: "numeric",
      hour: "2-digit",
      minute: "2-digit",
    }).format(new Date(at));
  } catch {
    return null; // the server's list of zones is the one that counts
  }
}

/** "in 3 h 20 min", from `now` in milliseconds. */
export function untilDue(at: string, now: number): string {
  const minutes = Math.max(0, Math.ceil((Date.parse(at) - now) / 60_000));
  if (minutes < 60) return `in ${minutes} min`;
  if (minutes < 48 * 60) return `in ${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `in ${Math.floor(minutes / 1440)} days`;
}
