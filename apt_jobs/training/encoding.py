"""Turn pieces of documents into token ids: documents keep their borders, and special tokens in a text stay text."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from apt_jobs.training.documents import Piece

Ids = np.ndarray[tuple[int], np.dtype[np.uint32]]
MAX_UINT16_VOCABULARY = 1 << 16
_STAGES = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of some pieces, and where in them documents begin."""

    ids: Ids
    starts: "array[int]"


class DocumentEncoder:
    """Encodes batches of pieces, in parallel over the cores as `tokenizers` does it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        definition = tokenizer_definition(tokenizer)
        self._first = _plain(definition)
        continued = _without_prefix(json.loads(definition))
        self._rest = self._first if continued == json.loads(definition) else _plain(json.dumps(continued))
        self.bos_id = _bos_id(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id
        largest = max([*tokenizer.get_vocab().values(), self.eos_id or 0])
        self.dtype = np.dtype("<u2" if largest < MAX_UINT16_VOCABULARY else "<u4")

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Return the tokens: BOS if the tokenizer wants one, the text, and EOS for each document."""
        encoded: dict[int, list[int]] = {}
        is_same = self._rest is self._first
        firsts = [number for number, piece in enumerate(pieces) if piece.begins_document or is_same]
        others = [number for number, piece in enumerate(pieces) if not (piece.begins_document or is_same)]
        for tokenizer, numbers in ((self._first, firsts), (self._rest, others)):
            texts = [pieces[number].text for number in numbers]
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            encoded |= {number: one.ids for number, one in zip(numbers, found, strict=True)}
        parts, starts, position = [], array("Q"), 0
        for number, piece in enumerate(pieces):
            ids = encoded.pop(number)
            if piece.begins_document:
                starts.append(position)
                ids = ids if self.bos_id is None else [self.bos_id, *ids]
            if piece.ends_document and self.eos_id is not None:
                ids = [*ids, self.eos_id]
            parts.append(np.asarray(ids, dtype=np.uint32))
            position += len(ids)
        return Encoded(np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32), starts)


def tokenizer_definition(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return all that decides which tokens a text becomes, as JSON. Saving and loading a tokenizer keeps it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    definition: str = backend.to_str()
    return definition


def _plain(definition: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.encode_special_tokens = True  # `<|endoftext|>` in a document is text
    return tokenizer


def _bos_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the token that begins a document, if the tokenizer puts one there by itself."""
    bos_id: int | None = tokenizer.bos_token_id
    backend = tokenizer.backend_tokenizer
    with_special, without = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    begins = bos_id is not None and with_special[:1] == [bos_id] and without[:1] != [bos_id]
    return bos_id if begins else None


def _without_prefix(part: Any) -> Any:
    """Return the definition without the space that some tokenizers put before a text: a piece goes on within one."""
    if isinstance(part, list):
        return [_without_prefix(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    changed = {key: _without_prefix(value) if key in _STAGES else value for key, value in part.items()}
    if isinstance(normalizer := changed.get("normalizer"), dict) and normalizer.get("type") == "Prepend":
        changed["normalizer"] = None
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed
