// A job's configuration in groups for the page; a group or a value that was not given is not there.
import { isExactObject, type Exact, type ExactObject } from "../api/exact.ts";

export interface ConfigGroup {
  title: string;
  object: ExactObject;
}

const GROUPS: [key: string, title: string][] = [
  ["model", "Model"],
  ["training", "Training"],
  ["data", "Data"],
  ["monitor", "Gradient monitor"],
  ["resources", "Resources"],
];
const SHOWN_ELSEWHERE = ["code", "kind", "name", "queue", "priority", "labels", "time_limit_s", "max_attempts"];
const READ_BY_TRAINER = ["training", "data", "monitor"]; // its defaults, which the script of a job was not given
const BUILTIN_DATASET = "pydoc-topics"; // what the built-in trainer reads if nobody names data

/** `modelConfig`: the model as the ranks built it, which knows more than what was submitted. */
export function configGroups(spec: ExactObject, modelConfig: ExactObject): ConfigGroup[] {
  const isCode = spec.entry_point === "code";
  const hidden = isCode ? READ_BY_TRAINER : [];
  const known = new Set([...GROUPS.map(([key]) => key), ...SHOWN_ELSEWHERE]);
  if (isCode && spec.dataset === BUILTIN_DATASET) known.add("dataset");
  const rest = Object.fromEntries(Object.entries(spec).filter(([key]) => !known.has(key)));
  const groups = GROUPS.filter(([key]) => !hidden.includes(key)).map(([key, title]) => {
    const object = key === "model" && Object.keys(modelConfig).length ? modelConfig : spec[key];
    return { title, object: given(object) };
  });
  return [...groups, { title: "Job", object: given(rest) }].filter(({ object }) => Object.keys(object).length > 0);
}

/** The values that are neither null nor empty. */
function given(value: Exact | undefined): ExactObject {
  if (!isExactObject(value)) return {};
  return Object.fromEntries(Object.entries(value).filter(([, item]) => !isEmpty(item)));
}

function isEmpty(value: Exact): boolean {
  if (value === null || value === "") return true;
  return Array.isArray(value) ? value.length === 0 : isExactObject(value) && Object.keys(value).length === 0;
}
