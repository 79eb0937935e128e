// Canvas does not know CSS variables: charts read their colours here and are drawn anew when the scheme changes.

const query = window.matchMedia("(prefers-color-scheme: dark)");

class Theme {
  dark = $state(query.matches);

  constructor() {
    query.addEventListener("change", () => {
      this.dark = query.matches;
    });
  }

  /** Value of a CSS variable, like `color("--red")`. */
  color(name: string): string {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  /** One hue per layer, first to last; red is kept for anomalies. */
  layer(index: number, count: number): string {
    const hue = 42 + (285 * index) / Math.max(1, count - 1);
    const lightness = (this.dark ? 64 : 40) + (index % 2 === 0 ? 0 : 8);
    return `hsl(${hue.toFixed(0)} ${this.dark ? 62 : 66}% ${lightness}%)`;
  }
}

export const theme = new Theme();
