// Numbers, times and sizes as people read them. Non-finite numbers keep their name: a monitor must not hide them.
import type { Float } from "../generated/events.ts";

/** The number that a JSON float stands for. */
export function toNumber(value: Float): number {
  return typeof value === "number" ? value : Number(value);
}

/** A measured value in few digits; whole numbers are exact. */
export function formatNumber(value: Float | null | undefined, digits = 4): string {
  if (value === null || value === undefined) return "–";
  const number = toNumber(value);
  if (Number.isNaN(number)) return "NaN";
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  if (Number.isSafeInteger(number)) return formatCount(number);
  const size = Math.abs(number);
  if (size >= 1e6 || size < 1e-3) {
    return number.toExponential(Math.max(0, Math.min(2, digits - 1))).replace("e+", "e");
  }
  return size >= 1000 ? formatCount(Math.round(number)) : number.toPrecision(digits);
}

/** A tick of an axis: as many digits as it has. */
export function formatTick(value: number | null): string {
  if (value === null) return "";
  const size = Math.abs(value);
  if (value === 0 || (size < 1e6 && size >= 1e-3)) {
    return Number(value.toPrecision(6)).toLocaleString("en-US", { maximumFractionDigits: 8 });
  }
  const [digits, power] = value.toExponential(4).split("e");
  return `${Number(digits)}e${Number(power)}`;
}

export function formatCount(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : value.toLocaleString("en-US", { maximumFractionDigits: 0 });
}

/** 1,234,567 as "1.23 M". */
export function formatLarge(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e4, "k"],
  ] as const) {
    if (value >= size) return `${(value / (unit === "k" ? 1e3 : size)).toPrecision(3)} ${unit}`;
  }
  return formatCount(Math.round(value));
}

export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toPrecision(3)} ${units[unit]}`;
}

export function formatDuration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

/** A time of an axis: 800 seconds as "13:20", 4,000 as "1:06:40". */
export function formatElapsed(seconds: number): string {
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  const pad = (value: number): string => String(value).padStart(2, "0");
  return `${hours ? `${hours}:${pad(minutes)}` : minutes}:${pad(whole % 60)}`;
}

/** "3 min ago", or the date when it is long ago. */
export function formatAgo(at: string | null | undefined, now: number): string {
  if (!at) return "–";
  const seconds = (now - Date.parse(at)) / 1000;
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(at).toLocaleDateString(undefined, { year: "numeric", month: "short", day: "numeric" });
}

export function formatInstant(at: string | null | undefined): string {
  return at ? new Date(at).toLocaleString() : "–";
}

export function formatClock(at: string): string {
  return new Date(at).toLocaleTimeString([], { hour12: false });
}
