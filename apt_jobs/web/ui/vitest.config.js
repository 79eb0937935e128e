// Tests of stores and drawing helpers, beside the files that they test.
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

export default defineConfig({
  plugins: [svelte()],
  resolve: { conditions: ["browser"] }, // else Svelte's runes are those of the server
  test: { environment: "happy-dom", include: ["src/**/*.test.ts"] },
});
