// The path below which a proxy shows the service ("/apt"; empty: the host is its own). web/pages.py writes it into the page.
export const rootPath: string =
  typeof document === "undefined" ? "" : (document.querySelector<HTMLMetaElement>('meta[name="root-path"]')?.content ?? "");

/** The address at which this service shows what it calls `path`. */
export function inRoot(path: string): string {
  return path.startsWith("/") ? rootPath + path : path;
}
