// Client-side routing by path: seven pages do not need a library.

import { inRoot, rootPath } from "./rootpath.ts";

export type Route =
  | { page: "jobs" }
  | { page: "new" }
  | { page: "job"; jobId: string; tab: string }
  | { page: "checkpoints" }
  | { page: "generate" }
  | { page: "schedules" }
  | { page: "workers" }
  | { page: "missing" };

class Location {
  path = $state(pathBelowRoot(window.location.pathname));
  query = $state(window.location.search);
  hash = $state(window.location.hash);

  constructor() {
    window.addEventListener("popstate", () => this.read());
    document.addEventListener("click", (event) => this.follow(event));
  }

  read(): void {
    this.path = pathBelowRoot(window.location.pathname);
    this.query = window.location.search;
    this.hash = window.location.hash;
  }

  /** Go to "/jobs/ID", as this service calls its pages, or to a "#part" of the page. */
  go(path: string, replace = false): void {
    const url = inRoot(path);
    const moved = new URL(url, window.location.href).pathname !== window.location.pathname;
    if (replace) history.replaceState(null, "", url);
    else history.pushState(null, "", url);
    this.read();
    if (moved) window.scrollTo(0, 0);
  }

  /** Clicks on our own links change the page without loading it again; downloads and the API's pages are left alone. */
  private follow(event: MouseEvent): void {
    if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (link === null || link.target || link.hasAttribute("download") || link.origin !== window.location.origin) return;
    if (!link.pathname.startsWith(`${rootPath}/`)) return;
    const path = pathBelowRoot(link.pathname);
    if (routeOf(path, "").page === "missing") return;
    event.preventDefault();
    this.go(path + link.search + link.hash);
  }
}

function pathBelowRoot(path: string): string {
  return path.startsWith(`${rootPath}/`) ? path.slice(rootPath.length) : path;
}

export function routeOf(path: string, hash: string): Route {
  const parts = path.split("/").filter(Boolean);
  if (parts.length === 0 || (parts.length === 1 && parts[0] === "jobs")) return { page: "jobs" };
  if (parts.length === 2 && parts[0] === "jobs") {
    if (parts[1] === "new") return { page: "new" };
    return { page: "job", jobId: decodeURIComponent(parts[1]), tab: hash.replace("#", "") };
  }
  const [name] = parts;
  if (parts.length === 1 && (name === "checkpoints" || name === "generate" || name === "schedules" || name === "workers")) return { page: name };
  return { page: "missing" };
}

export const location = new Location();
