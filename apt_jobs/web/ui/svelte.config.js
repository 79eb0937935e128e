import path from "node:path";
import { vitePreprocess } from "@sveltejs/vite-plugin-svelte";

const ROOT_PATH = path.resolve(import.meta.dirname, "src/lib/rootpath.ts");
const LINK = /\b(href|src)=("\/|\{`\/)/g;

/** Every link of a component that begins with "/" leads below the path at which the page is shown: nobody has to think of it. */
const linksBelowRootPath = {
  name: "links-below-root-path",
  markup({ content, filename }) {
    if (!filename || content.search(LINK) < 0) return undefined;
    const relative = path.relative(path.dirname(filename), ROOT_PATH).replaceAll("\\", "/");
    const specifier = relative.startsWith(".") ? relative : `./${relative}`;
    const code = content
      .replaceAll(LINK, (_, name, start) => (start === '"/' ? `${name}="{rootPath}/` : `${name}={\`\${rootPath}/`))
      .replace(/<script lang="ts">/, `$& import { rootPath } from ${JSON.stringify(specifier)};`);
    if (!code.includes("import { rootPath }")) throw new Error(`${filename} has links, and no <script lang="ts"> for them`);
    return { code };
  },
};

export default { preprocess: [linksBelowRootPath, vitePreprocess({ script: false })], compilerOptions: { runes: true } };
