// The color scheme: the system's, or the one chosen in this browser. Canvas knows no CSS variables: charts read theirs here.

export const SCHEMES = ["system", "light", "dark"] as const;
export type Scheme = (typeof SCHEMES)[number];

const KEY = "apt_jobs.scheme";
const query = window.matchMedia("(prefers-color-scheme: dark)");

export class Theme {
  chosen = $state<Scheme>("system");
  private systemDark = $state(query.matches);
  private readonly colors = new Map<string, string>();

  constructor() {
    this.apply(stored());
    query.addEventListener("change", () => {
      this.systemDark = query.matches;
      this.colors.clear();
    });
    window.addEventListener("storage", (event) => {
      if (event.key === KEY) this.apply(stored()); // another tab has chosen
    });
  }

  get dark(): boolean {
    return this.chosen === "system" ? this.systemDark : this.chosen === "dark";
  }

  choose(scheme: Scheme): void {
    this.apply(scheme);
    try {
      window.localStorage.setItem(KEY, scheme);
    } catch {
      // Without a store the choice holds for as long as the page.
    }
  }

  /** Value of a CSS variable as a color, like `color("--red")`: what `light-dark()` comes to now. */
  color(name: string): string {
    const known = this.colors.get(name);
    if (known !== undefined) return known;
    const probe = document.createElement("span");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const color = getComputedStyle(probe).color;
    probe.remove();
    this.colors.set(name, color);
    return color;
  }

  /** One hue per layer, first to last; red is kept for anomalies. */
  layer(index: number, count: number): string {
    const hue = 42 + (285 * index) / Math.max(1, count - 1);
    const lightness = (this.dark ? 64 : 40) + (index % 2 === 0 ? 0 : 8);
    return `hsl(${hue.toFixed(0)} ${this.dark ? 62 : 66}% ${lightness}%)`;
  }

  private apply(scheme: Scheme): void {
    this.chosen = scheme;
    this.colors.clear();
    if (scheme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = scheme;
  }
}

function stored(): Scheme {
  try {
    const text = window.localStorage.getItem(KEY);
    return SCHEMES.find((one) => one === text) ?? "system";
  } catch {
    return "system"; // a browser may forbid the store
  }
}

export const theme = new Theme();
