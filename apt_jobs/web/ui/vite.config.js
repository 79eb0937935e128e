// Builds into apt_jobs/web/static, which the web process serves. Every asset is a file: the page's CSP allows no inline code.
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

const backend = process.env.APT_JOBS_DEV_BACKEND ?? "http://127.0.0.1:8000";

export default defineConfig({
  base: "./", // one build for every path below which a proxy may show it: see web/pages.py
  plugins: [svelte()],
  build: {
    outDir: "../static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  server: {
    host: "127.0.0.1",
    proxy: { "/api": backend, "/login": backend, "/ws": { target: backend, ws: true } },
  },
});
