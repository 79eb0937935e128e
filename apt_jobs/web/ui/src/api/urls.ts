// The one place that builds addresses: a proxy may show the service below a path, which the page names in its head.

/** Path below which the service answers, without a slash at its end: "" at the root of its host. */
export const basePath = basePathOf(document.querySelector<HTMLMetaElement>('meta[name="root-path"]')?.content ?? "");

/** A path as the service names it, without a slash at its end. */
export function basePathOf(path: string): string {
  return new URL(path, `${window.location.origin}/`).pathname.replace(/\/+$/, "");
}

/** Address of a path of the service, like "/api/jobs" or "/jobs/new". */
export function urlOf(path: string, base = basePath): string {
  return base + path;
}

/** The same with the host, for a command or a link to give away. */
export function absoluteUrlOf(path: string): string {
  return window.location.origin + urlOf(path);
}

export function socketUrlOf(path: string): string {
  return absoluteUrlOf(path).replace(/^http/, "ws");
}

/** Address of a job's page. */
export function jobUrlOf(jobId: string): string {
  return urlOf(`/jobs/${encodeURIComponent(jobId)}`);
}

/** Address of a sweep's page. */
export function sweepUrlOf(sweepId: string): string {
  return urlOf(`/sweeps/${encodeURIComponent(sweepId)}`);
}

/** Address of a comparison of jobs. */
export function compareUrlOf(jobIds: readonly string[]): string {
  return urlOf(`/compare?jobs=${jobIds.map(encodeURIComponent).join(",")}`);
}

/** The path of the service that an address names, or null when the address is outside of the service. */
export function pathOf(pathname: string, base = basePath): string | null {
  if (pathname === base) return "/";
  return pathname.startsWith(`${base}/`) ? pathname.slice(base.length) : null;
}
