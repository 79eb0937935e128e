"""Tokenise text with a model's tokenizer into shards of token ids, as large corpora are kept: `apt-jobs datasets add`.

    python examples/make_shards.py MODEL_FOLDER TEXT... --output shards --shard-tokens 100000000

Each document is a file; it ends with EOS. A shard holds ids alone, little-endian: uint16 if the vocabulary fits, else
uint32. One process, bounded memory; the job maps the shards and reads what a step needs.
"""

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer

READ_CHARS = 1 << 20


def main() -> None:
    """Write the shards and name each."""
    options = _options()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    is_small = len(tokenizer) <= 1 << 16
    suffix, dtype = ("u16.bin", "<u2") if is_small else ("u32.bin", "<u4")
    options.output.mkdir(parents=True, exist_ok=True)
    number, held = 0, np.empty(0, dtype)
    for file in options.texts:
        held = np.concatenate([held, _tokens(tokenizer.backend_tokenizer, file, tokenizer.eos_token_id, dtype)])
        while len(held) >= options.shard_tokens or (file is options.texts[-1] and len(held)):
            shard = options.output / f"shard-{number:05d}.{suffix}"
            held[: options.shard_tokens].tofile(shard)
            print(f"{shard}: {min(len(held), options.shard_tokens):,} tokens")
            number, held = number + 1, held[options.shard_tokens :]


def _tokens(tokenizer: Tokenizer, file: Path, eos_id: int, dtype: str) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    """Return a document's ids. It is cut at ends of lines, so that memory is bounded by its tokens."""
    parts: list[np.ndarray[tuple[int], np.dtype[np.uint32]]] = []
    with file.open(encoding="utf-8") as opened:
        while lines := opened.readlines(READ_CHARS):
            parts.append(np.asarray(tokenizer.encode("".join(lines), add_special_tokens=False).ids, dtype))
    return np.concatenate([*parts, np.asarray([eos_id], dtype)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenise text into shards.")
    parser.add_argument("model", type=Path, help="folder with tokenizer.json")
    parser.add_argument("texts", type=Path, nargs="+", help="files of UTF-8 text, one document each")
    parser.add_argument("--output", type=Path, default=Path("shards"))
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
