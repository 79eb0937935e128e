"""Prompts that begin as a text that was read before: its keys and values are copied instead of computed again.

They come from a sequence at work, or from an ended one, of which the latest used are kept in memory of their own. What
follows is as if all had been read, but for the rounding that other chunks of a prompt bring, too.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_jobs.generation.adapter_bank import Adapter
from apt_jobs.generation.cache import SlotCache
from apt_jobs.generation.sequences import Sequence

MAX_TEXTS = 64


@dataclass(slots=True, eq=False)
class _Kept:
    """An ended sequence's tokens and what each layer has of them, (heads, tokens, size)."""

    tokens: list[int]
    columns: list[Tensor]
    adapter: Adapter | None


class Prefixes:
    """What is known of one model's texts. Owned by its runner.

    Args:
        cache: of the sequences at work.
        max_tokens: kept of ended sequences, in all.
        min_tokens: what shares fewer is read.
    """

    def __init__(self, cache: SlotCache, *, max_tokens: int, min_tokens: int) -> None:
        self._cache, self._max_tokens, self._min_tokens = cache, max_tokens, min_tokens
        self._kept: list[_Kept] = []  # the latest used last

    def reuse(self, sequence: Sequence, others: Rows[Sequence | None]) -> int:
        """Copy the longest known beginning of a sequence into its slot; return how many tokens it has, or 0."""
        tokens = sequence.token_ids()
        most = len(tokens) - 1  # the last one is read, for the logits behind it
        if most < self._min_tokens:
            return 0
        size, source = 0, None
        for other in others:
            if other is not None and other is not sequence and other.adapter is sequence.adapter:
                shared = self._shared(tokens, _known(other))
                if shared > size:
                    size, source = shared, other.slot
        best: _Kept | None = None
        for kept in self._kept_of(sequence):
            shared = self._shared(tokens, kept.tokens)
            if shared > size:
                size, best = shared, kept
        size = min(size, most)
        if size < self._min_tokens:
            return 0
        if best is not None:
            self._cache.write(sequence.slot, best.columns, size)
            self._kept.remove(best)
            self._kept.append(best)
        else:
            assert source is not None
            self._cache.move(source, sequence.slot, size)
        return size

    def keep(self, sequence: Sequence, slot: int) -> None:
        """Keep what the slot of a sequence holds that has left it."""
        tokens = _known(sequence)
        if not self._min_tokens <= len(tokens) <= self._max_tokens:
            return
        same_adapter = self._kept_of(sequence)
        if any(kept.tokens[: len(tokens)] == tokens for kept in same_adapter):
            return
        shorter = [kept for kept in same_adapter if tokens[: len(kept.tokens)] == kept.tokens]
        self._kept = [kept for kept in self._kept if kept not in shorter]
        while self._kept and (len(self._kept) >= MAX_TEXTS or self.num_tokens + len(tokens) > self._max_tokens):
            self._kept.pop(0)
        try:
            columns = [column.clone() for column in self._cache.columns(slot, len(tokens))]
        except torch.OutOfMemoryError:
            self.clear()
        else:
            self._kept.append(_Kept(tokens, columns, sequence.adapter))

    def waits_for(self, sequence: Sequence, other: Sequence) -> bool:
        """Say whether a sequence that is not read yet had better wait until the other one is."""
        is_same = other.adapter is sequence.adapter
        return is_same and self._shared(sequence.prompt_ids[:-1], other.prompt_ids) >= self._min_tokens

    @property
    def num_tokens(self) -> int:
        """Return the tokens that are kept."""
        return sum(len(kept.tokens) for kept in self._kept)

    def clear(self) -> None:
        """Forget the ended sequences."""
        self._kept = []

    def _kept_of(self, sequence: Sequence) -> list[_Kept]:
        """Return what ended sequences with the same adapter left."""
        return [kept for kept in self._kept if kept.adapter is sequence.adapter]

    def _shared(self, tokens: list[int], known: list[int]) -> int:
        """Return how many tokens both begin with; 0 for fewer than are worth it."""
        low, high = self._min_tokens, min(len(tokens), len(known))
        if high < low or tokens[:low] != known[:low]:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if tokens[low:middle] == known[low:middle]:
                low = middle
            else:
                high = middle - 1
        return low


def _known(sequence: Sequence) -> list[int]:
    """Return the tokens whose keys and values are in the slot."""
    return sequence.token_ids()[: sequence.num_cached]
