"""The reference runner: Hugging Face's own cache and attention, for models that slots cannot serve.

It is slower (the cache is copied for each token) and has no chunks, but knows each model as transformers knows it.
"""

from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager

import torch

from apt_jobs.generation.adapter_bank import adapting_rows
from apt_jobs.generation.launches import Launched, sample
from apt_jobs.generation.memory import free_bytes
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.reference_batch import Batch
from apt_jobs.generation.row_state import RowState
from apt_jobs.generation.runner import CACHE_MEMORY_FRACTION
from apt_jobs.generation.sequences import Sequence


class ReferenceRunner:
    """Rows share a cache where the model allows it; else there is one row at a time, if need be without a cache."""

    is_async = False

    def __init__(self, model: LoadedModel, *, max_rows: int, keeps_cache: bool = True) -> None:
        self._model, self._keeps_cache = model, keeps_cache
        self.max_rows = max_rows if model.joinable and keeps_cache else 1
        self._batch = Batch(model, keeps_cache=keeps_cache)
        self._rows: list[Sequence] = []  # as in the batch
        self._free_slots = list(range(self.max_rows))
        self._max_cached_tokens = _tokens_that_fit(model)
        with torch.inference_mode():
            self._state = RowState.zeros(self.max_rows, model.device)

    def fits(self, sequence: Sequence, others: Rows[Sequence]) -> bool:
        """Say whether there is memory for all at the width of the longest."""
        widths = [each.final_tokens for each in (sequence, *others)]
        return len(widths) == 1 or max(widths) * len(widths) <= self._max_cached_tokens

    def admit(self, sequence: Sequence) -> None:
        """Give a slot: a row of sampling parameters."""
        sequence.slot, sequence.num_cached = self._free_slots.pop(0), 0

    @torch.inference_mode()
    def prefill(self, sequences: Rows[Sequence], max_tokens: int) -> list[Launched]:
        """Read the whole prompts of the first sequences, as many as may be read in one go."""
        rows = [sequences[0]]
        for each in sequences[1:]:
            width = max(row.num_tokens for row in (*rows, each))
            if width * (len(rows) + 1) > max_tokens:
                break
            rows.append(each)
        with self._adapting(rows):
            logits_NV = self._batch.join([each.token_ids() for each in rows])
        self._rows += rows
        for each in rows:
            each.num_cached = each.num_tokens
        self._state.set_positions(rows)
        return [sample(rows, logits_NV, self._state, is_first=True)]

    @torch.inference_mode()
    def decode(self, sequences: Rows[Sequence]) -> Launched:
        """Add a token to each row: all that were read have one more."""
        assert {each.id for each in sequences} == {each.id for each in self._rows}
        with self._adapting(self._rows):
            logits_BV = self._batch.advance([each.token_ids()[-1] for each in self._rows])
        for each in self._rows:
            each.num_cached += 1
        self._state.set_positions(self._rows)
        return sample(list(self._rows), logits_BV, self._state, is_first=False)

    def _adapting(self, rows: Rows[Sequence]) -> AbstractContextManager[None]:
        return adapting_rows([each.adapter_slot for each in rows], self._model.device)

    @torch.inference_mode()
    def release(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Drop a row and the columns that nobody needs any more."""
        if sequence.slot < 0:
            return
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        if sequence in self._rows:
            self._batch.keep([place for place, each in enumerate(self._rows) if each is not sequence])
            self._rows.remove(sequence)

    def reset(self) -> None:
        """Forget all rows."""
        for each in self._rows:
            each.slot = -1
        self._rows, self._batch = [], Batch(self._model, keeps_cache=self._keeps_cache)
        self._free_slots = list(range(self.max_rows))
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the memory."""
        self.reset()


def _tokens_that_fit(model: LoadedModel) -> int:
    """Return the tokens of key/value cache that there is memory for, as the config tells it."""
    config = model.model.config.get_text_config(decoder=True)
    heads = int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    num_layers: int = getattr(config, "num_hidden_layers", 1)
    bytes_per_token: int = 2 * num_layers * heads * head_size * model.model.dtype.itemsize
    return max(1, int(free_bytes(model.device) * CACHE_MEMORY_FRACTION / bytes_per_token))
