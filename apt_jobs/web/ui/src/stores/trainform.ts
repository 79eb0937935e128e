// The form of a training job as data: values by path, the request they make, and the faults a server would find.
// Bounds and defaults are generated from the Python specification: see ../generated/events.ts.
import { TRAIN_FIELDS, type FieldRule } from "../generated/events.ts";

/** The form holds numbers as a browser does: a larger integer would be rounded on its way. */
const INEXACT = `must be at most ${Number.MAX_SAFE_INTEGER.toLocaleString("en-US")} here; the REST API takes larger ones`;

export type FieldValue = string | number | boolean | null;
export type Values = Record<string, FieldValue>;

export interface Preset {
  id: string;
  label: string;
  note: string;
  values: Values;
}

export const PRESETS: Preset[] = [
  {
    id: "demo",
    label: "Tiny demo",
    note: "0.5 M parameters, about a minute on two CPU cores",
    values: {
      name: "tiny demo",
      num_ranks: 2,
      "model.d_model": 96,
      "model.num_layers": 4,
      "model.num_attention_heads": 4,
      "model.vocab_size": 1024,
      "model.max_seq_len": 96,
      "training.epochs": 2,
      "training.batch_size": 8,
      "training.max_steps": 300,
      "training.learning_rate": 0.003,
      "training.warmup_steps": 20,
    },
  },
  {
    id: "small",
    label: "Small",
    note: "29 M parameters, for one GPU",
    values: {
      name: "small",
      num_ranks: 1,
      "model.d_model": 512,
      "model.num_layers": 8,
      "model.num_attention_heads": 8,
      "model.vocab_size": 8192,
      "model.max_seq_len": 512,
      "training.epochs": 3,
      "training.batch_size": 16,
      "training.learning_rate": 0.0006,
      "training.warmup_steps": 100,
      "training.validate_every_steps": 100,
      "training.checkpoint_every_steps": 500,
    },
  },
];

/** The fields that the form shows at once. */
export const FORM_GROUPS: { title: string; fields: string[] }[] = [
  {
    title: "Model",
    fields: ["model.d_model", "model.num_layers", "model.num_attention_heads", "model.vocab_size", "model.max_seq_len"],
  },
  {
    title: "Training",
    fields: [
      "training.epochs",
      "training.max_steps",
      "training.batch_size",
      "training.learning_rate",
      "training.warmup_steps",
      "num_ranks",
    ],
  },
  {
    title: "Gradient monitor",
    fields: ["monitor.vanishing_below", "monitor.exploding_above", "monitor.every_steps"],
  },
];
export const QUEUE_FIELDS = ["queue", "priority", "max_attempts", "time_limit_s"];
/** The field that says whether the form asks for an adapter; the request has an object there. */
export const LORA = "training.lora";
export const LORA_FIELDS = Object.keys(TRAIN_FIELDS).filter((path) => path.startsWith(`${LORA}.`));
/** The one field of the model's shape that a base model leaves open. */
const OPEN_SHAPE = "model.max_seq_len";
const ABOVE = new Set([
  "name",
  ...QUEUE_FIELDS,
  "dataset",
  "base_model",
  "entry_point",
  "launcher",
  ...FORM_GROUPS.flatMap((group) => group.fields),
  ...LORA_FIELDS,
  ...Object.keys(TRAIN_FIELDS).filter((path) => path.startsWith("environment.")), // of scripts
]);
/** All others: under “More options”. */
export const OTHER_FIELDS = Object.keys(TRAIN_FIELDS).filter((path) => !ABOVE.has(path));

export function ruleOf(path: string): FieldRule {
  const rule = TRAIN_FIELDS[path];
  if (rule === undefined) throw new Error(`no field ${path} in a training job`);
  return rule;
}

export function defaultsWith(preset: Preset): Values {
  const values: Values = {};
  for (const [path, rule] of Object.entries(TRAIN_FIELDS)) values[path] = rule.default ?? null;
  return { ...values, ...preset.values };
}

/** Whether a field means something in this form: a base model brings its own shape, and adapters need one. */
export function isUsed(path: string, values: Values): boolean {
  if (path.startsWith("model.") && path !== OPEN_SHAPE) return !values.base_model;
  if (path.startsWith(`${LORA}.`)) return Boolean(values.base_model && values[LORA]);
  return true;
}

/** The request: what differs from the server's defaults, nested as the API wants it. */
export function requestOf(values: Values): Record<string, unknown> {
  const request: Record<string, unknown> = { kind: "train" };
  if (values.base_model && values[LORA]) request.training = { lora: {} };
  for (const [path, value] of Object.entries(values)) {
    const rule = TRAIN_FIELDS[path];
    if (rule === undefined || value === (rule.default ?? null) || (value === "" && rule.nullable)) continue;
    if (!isUsed(path, values)) continue;
    if (rule.type === "lines" && !linesOf(value).length) continue;
    let node = request;
    const names = path.split(".");
    for (const name of names.slice(0, -1)) node = (node[name] ??= {}) as Record<string, unknown>;
    node[names[names.length - 1]] =
      rule.type === "array"
        ? String(value)
            .split(/[\s,]+/)
            .filter(Boolean)
        : rule.type === "lines"
          ? linesOf(value)
          : value;
  }
  return request;
}

/** Faults by path, in the words of the field. */
export function faultsOf(values: Values): Record<string, string> {
  const faults: Record<string, string> = {};
  for (const [path, rule] of Object.entries(TRAIN_FIELDS)) {
    const fault = isUsed(path, values) ? faultOf(values[path] ?? null, rule) : null;
    if (fault !== null) faults[path] = fault;
  }
  if (Number(values["monitor.vanishing_below"]) >= Number(values["monitor.exploding_above"])) {
    faults["monitor.vanishing_below"] = "must be less than the exploding threshold";
  }
  if (values.base_model) return faults;
  const [width, heads] = [Number(values["model.d_model"]), Number(values["model.num_attention_heads"])];
  if (!faults["model.d_model"] && !faults["model.num_attention_heads"] && (width % heads || (width / heads) % 2)) {
    faults["model.d_model"] = `must be an even multiple of the ${heads} attention heads`;
  }
  const groups = Number(values["model.num_key_value_heads"] ?? 0);
  if (groups && heads % groups) faults["model.num_key_value_heads"] = `must divide the ${heads} attention heads`;
  return faults;
}

/** The texts of a field that takes one a line. */
function linesOf(value: FieldValue): string[] {
  return String(value ?? "")
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
}

function faultOf(value: FieldValue, rule: FieldRule): string | null {
  if (value === null || value === "") return rule.nullable ? null : "is needed";
  if (rule.type === "lines") {
    const lines = linesOf(value);
    if (lines.length > (rule.maxItems ?? Infinity)) return `has at most ${rule.maxItems} lines`;
    return lines.some((line) => line.length > (rule.maxLength ?? Infinity))
      ? `has at most ${rule.maxLength} characters a line`
      : null;
  }
  if (rule.maxLength !== undefined && String(value).length > rule.maxLength)
    return `has at most ${rule.maxLength} characters`;
  if (rule.type !== "integer" && rule.type !== "number") return null;
  const number = Number(value);
  if (!Number.isFinite(number)) return "must be a number";
  if (rule.type === "integer" && !Number.isInteger(number)) return "must be a whole number";
  if (rule.type === "integer" && !Number.isSafeInteger(number)) return INEXACT;
  if (rule.minimum !== undefined && number < rule.minimum) return `must be at least ${rule.minimum}`;
  if (rule.exclusiveMinimum !== undefined && number <= rule.exclusiveMinimum)
    return `must be more than ${rule.exclusiveMinimum}`;
  if (rule.maximum !== undefined && number > rule.maximum)
    return `must be at most ${rule.maximum.toLocaleString("en-US")}`;
  if (rule.exclusiveMaximum !== undefined && number >= rule.exclusiveMaximum)
    return `must be less than ${rule.exclusiveMaximum}`;
  return null;
}

/** Parameters of the Llama model that the form describes; the same sum as in `APTConfig.num_parameters`. */
export function numParameters(values: Values): number {
  const number = (path: string): number => Number(values[path] ?? 0);
  const width = number("model.d_model");
  const heads = number("model.num_attention_heads") || 1;
  const feedForward = number("model.d_ff") || Math.floor((Math.floor((width * 8) / 3) + 7) / 8) * 8;
  const keyValue = (width / heads) * (number("model.num_key_value_heads") || heads);
  const block = 2 * width * width + 2 * width * keyValue + 3 * width * feedForward + 2 * width;
  const embeddings = number("model.vocab_size") * width * (values["model.tie_embeddings"] ? 1 : 2);
  return number("model.num_layers") * block + embeddings + width;
}
