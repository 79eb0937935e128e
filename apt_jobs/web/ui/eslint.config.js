// The rules of the UI: typescript-eslint strict with types, eslint-plugin-svelte, and files short enough to read.
import js from "@eslint/js";
import svelte from "eslint-plugin-svelte";
import ts from "typescript-eslint";
import svelteConfig from "./svelte.config.js";

const MAX_LINES = 400;

export default ts.config(
  { ignores: ["node_modules", "src/generated"] },
  js.configs.recommended,
  ...ts.configs.strictTypeChecked,
  ...svelte.configs.recommended,
  ...svelte.configs.prettier,
  {
    languageOptions: {
      parserOptions: { projectService: { allowDefaultProject: ["*.js"] }, tsconfigRootDir: import.meta.dirname },
    },
    rules: {
      "max-lines": ["error", { max: MAX_LINES }],
      "no-undef": "off", // the compiler knows better
      "@typescript-eslint/no-meaningless-void-operator": "off", // `void view.version` names what an effect depends on
      "@typescript-eslint/no-unnecessary-condition": "off", // it believes that every index of an array is there
      "@typescript-eslint/no-confusing-void-expression": ["error", { ignoreArrowShorthand: true }],
      "@typescript-eslint/restrict-template-expressions": ["error", { allowNumber: true }],
    },
  },
  {
    files: ["**/*.svelte", "**/*.svelte.ts"],
    languageOptions: {
      parserOptions: { projectService: true, extraFileExtensions: [".svelte"], parser: ts.parser, svelteConfig },
    },
    rules: {
      "svelte/prefer-svelte-reactivity": "off", // collections in `$state.raw` are replaced, not changed
      // Types of imported components are known to svelte-check alone, which checks the same.
      "@typescript-eslint/no-unsafe-argument": "off",
      "@typescript-eslint/no-unsafe-assignment": "off",
      "@typescript-eslint/no-unsafe-call": "off",
      "@typescript-eslint/no-unsafe-return": "off",
    },
  },
  { files: ["*.js"], ...ts.configs.disableTypeChecked },
);
