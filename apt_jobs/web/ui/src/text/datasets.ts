// What the name of a file says of a data set: its name and its format, as `apt-jobs datasets add` reads them.

const COMPRESSION = /\.(gz|zst)$/i;
const FORMATS: [RegExp, string][] = [
  [/\.(jsonl|ndjson)$/i, "jsonl"],
  [/\.parquet$/i, "parquet"],
  [/\.npy$/i, "npy"],
  [/\.u16\.bin$/i, "uint16"],
  [/\.u32\.bin$/i, "uint32"],
];

export function datasetFormatOf(filename: string): string {
  const plain = filename.replace(COMPRESSION, "");
  return FORMATS.find(([suffix]) => suffix.test(plain))?.[1] ?? "text";
}

export function datasetNameOf(filename: string): string {
  return (
    filename
      .replace(COMPRESSION, "")
      .replace(/(\.u(16|32))?\.[^.]*$/, "")
      .replace(/[^A-Za-z0-9._-]+/g, "-")
      .replace(/^[^A-Za-z0-9]+/, "")
      .slice(0, 100) || "data"
  );
}
