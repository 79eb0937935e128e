// Client-side routing by path, and the state of the page in its query: eleven pages do not need a library.
import { pathOf, urlOf } from "../api/urls.ts";

/** Pages that need nothing but their address, with their links: `workers` is `/workers`, shown by `WorkersPage.svelte`. */
export const PAGES = {
  sweeps: "Sweeps",
  schedules: "Schedules",
  checkpoints: "Checkpoints",
  generate: "Generate",
  workers: "Workers",
} as const;
export type PlainPage = keyof typeof PAGES;

export type Route =
  | { page: "jobs" }
  | { page: "new" }
  | { page: "job"; jobId: string; tab: string }
  | { page: "sweep"; sweepId: string }
  | { page: "compare" }
  | { page: PlainPage }
  | { page: "missing" };

class Location {
  path = $state("/");
  query = $state("");
  hash = $state("");

  constructor() {
    this.read();
    window.addEventListener("popstate", () => this.read());
    document.addEventListener("click", (event) => this.follow(event));
  }

  read(): void {
    this.path = pathOf(window.location.pathname) ?? window.location.pathname;
    this.query = window.location.search;
    this.hash = window.location.hash;
  }

  /** Show a path of the service, like "/jobs/new#schedule"; "#log" is a part of the page that is shown. */
  go(target: string, replace = false): void {
    const { pathname, search } = window.location;
    const url = target.startsWith("/") ? urlOf(target) : pathname + (target.startsWith("?") ? "" : search) + target;
    const moved = new URL(url, window.location.origin).pathname !== pathname;
    if (replace) history.replaceState(null, "", url);
    else history.pushState(null, "", url);
    this.read();
    if (moved) window.scrollTo(0, 0);
  }

  /** Clicks on our own links change the page without loading it again; downloads and the API's pages are left alone. */
  private follow(event: MouseEvent): void {
    if (event.defaultPrevented || event.button !== 0) return;
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (link === null || link.target || link.hasAttribute("download") || link.origin !== window.location.origin) return;
    const path = pathOf(link.pathname);
    if (path === null || routeOf(path, "").page === "missing") return;
    event.preventDefault();
    this.go(path + link.search + link.hash);
  }
}

export function routeOf(path: string, hash: string): Route {
  const parts = path.split("/").filter(Boolean);
  if (parts.length === 0 || (parts.length === 1 && parts[0] === "jobs")) return { page: "jobs" };
  if (parts.length === 2 && parts[0] === "jobs") {
    if (parts[1] === "new") return { page: "new" };
    return { page: "job", jobId: decoded(parts[1]), tab: hash.replace("#", "") };
  }
  if (parts.length === 2 && parts[0] === "sweeps") return { page: "sweep", sweepId: decoded(parts[1]) };
  const [name] = parts;
  if (parts.length > 1) return { page: "missing" };
  if (name === "compare") return { page: "compare" };
  return isPlainPage(name) ? { page: name } : { page: "missing" };
}

export function isPlainPage(name: string): name is PlainPage {
  return Object.hasOwn(PAGES, name);
}

/** A part of a path; as it is when it was quoted wrongly ("%zz"). */
function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const location = new Location();
