"""Runs a model on the rows of a step: prefill chunks and decode steps over slots, sampled on the device.

`decode_step` is all that a CUDA graph captures (graphs.py); on CPU the same function runs eagerly. The host reads
sampled tokens one step late, so a GPU always has its next step before anybody looks at the last one.
Shapes: B rows (slots 0 to B - 1), N rows of a prefill, Q tokens of a chunk, T columns, V vocabulary.
"""

import functools
import logging
from collections.abc import Sequence as Rows
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from apt_jobs.generation.adapter_bank import adapting, adapting_rows
from apt_jobs.generation.attention import SLOT_ATTENTION, decoding, register_slot_attention
from apt_jobs.generation.cache import LayerShape, SlotCache
from apt_jobs.generation.graphs import GraphKey, GraphPool, PrefillGraphs
from apt_jobs.generation.launches import Launched, TokenReader, sample
from apt_jobs.generation.memory import free_bytes
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.prefixes import Prefixes
from apt_jobs.generation.row_state import RowState, Sampling
from apt_jobs.generation.sampler import choose
from apt_jobs.generation.sequences import Sequence

logger = logging.getLogger(__name__)

CACHE_MEMORY_FRACTION = 0.5  # of what is free when a model's first sequence comes
COLUMNS = 64  # the cache's width is a multiple of this on CPU
GRAPH_COLUMNS = 256  # the smallest width of a graph; the others double
MAX_PREFILL_LOGITS = 1 << 24  # entries of the logits of one prefill
PREFIX_FRACTION = 8  # of the cache's memory, besides it, for what ended sequences leave behind
MIN_PREFIX_CPU, MIN_PREFIX_GPU = 32, 512  # tokens; a GPU reads shorter prompts whole, in a graph, as fast
MAX_PREFILL_SLACK = 64  # columns behind the context for the padding of a chunk


class Runner(Protocol):
    """What the scheduler needs. Calls come from one thread; the sequences' slots are the runner's to give."""

    max_rows: int
    is_async: bool  # tokens are read a step after their launch

    def fits(self, sequence: Sequence, others: Rows[Sequence]) -> bool:
        """Say whether there is memory for all, each grown to its end. One is always admitted."""
        ...

    def admit(self, sequence: Sequence) -> None:
        """Give a slot."""
        ...

    def prefill(self, sequences: Rows[Sequence], max_tokens: int) -> list[Launched]:
        """Read the next chunk of the first sequences, at most so many tokens, padding included."""
        ...

    def decode(self, sequences: Rows[Sequence]) -> Launched:
        """Add a token to each."""
        ...

    def release(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Take the slot back."""
        ...

    def reset(self) -> None:
        """Forget all slots, after an error."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


def forward(model: LoadedModel, tokens_NQ: Tensor, positions_NQ: Tensor, cache: Cache, keep: Any) -> Tensor:
    """Run the model and return its logits (N, kept, V)."""
    arguments: dict[str, Any] = {"position_ids": positions_NQ, "logits_to_keep": keep}
    output = model.model(
        input_ids=tokens_NQ,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in arguments.items() if name in model.forward_arguments},
    )
    logits: Tensor = output.logits
    return logits


def decode_step(model: LoadedModel, cache: Cache, state: RowState, sampling: Sampling) -> None:
    """Add a token to each active row: everything is on the device, nothing waits, all results are written in place."""
    if sampling.adapters:
        with adapting(state.adapter_B):
            logits_BV = forward(model, state.token_B[:, None], state.position_B[:, None], cache, 1)[:, -1]
    else:
        logits_BV = forward(model, state.token_B[:, None], state.position_B[:, None], cache, 1)[:, -1]
    chosen_B = choose(logits_BV, state.position_B + 1, *state.sampling_rows(sampling))
    state.accept(logits_BV, chosen_B, sampling)


class SlotRunner:
    """Slots in place, all rows of a step in one forward."""

    def __init__(self, model: LoadedModel, *, max_rows: int, compile_graphs: bool = False) -> None:
        self._model = model
        self._device = model.device
        self.is_async = self._device.type == "cuda"
        self._shapes = layer_shapes(model)
        self._cache = SlotCache(self._shapes, model.model.dtype, self._device)
        budget_bytes = int(free_bytes(self._device) * CACHE_MEMORY_FRACTION)
        self._max_cached_tokens = max(1, budget_bytes // self._cache.bytes_per_token)
        self._prefixes = Prefixes(
            self._cache,
            max_tokens=self._max_cached_tokens // PREFIX_FRACTION,
            min_tokens=MIN_PREFIX_GPU if self.is_async else MIN_PREFIX_CPU,
        )
        self._slack = min(MAX_PREFILL_SLACK, model.context_tokens)
        self.max_rows = max_rows
        self._slots: list[Sequence | None] = []
        self._active: list[bool] = []  # as the device has it
        with torch.inference_mode():
            self._state = RowState.zeros(max_rows, self._device)
        step = functools.partial(decode_step, model)
        self._graphs = GraphPool(step, compile_graphs=compile_graphs) if self.is_async else None
        self._prefill_graphs = PrefillGraphs(self._read_whole, self._staging) if self.is_async else None
        select_slot_attention(model)

    def fits(self, sequence: Sequence, others: Rows[Sequence]) -> bool:
        """Say whether there is memory for all at the width of the longest."""
        widths = [each.final_tokens + self._slack for each in (sequence, *others)]
        return len(widths) == 1 or max(widths) * len(widths) <= self._max_cached_tokens

    def admit(self, sequence: Sequence) -> None:
        """Give the lowest free slot."""
        if None in self._slots:
            slot = self._slots.index(None)
            self._slots[slot] = sequence
        else:
            slot = len(self._slots)
            self._slots.append(sequence)
        sequence.slot, sequence.num_cached, sequence.num_reused = slot, 0, 0
        self._reserve(sequence)

    @torch.inference_mode()
    def prefill(self, sequences: Rows[Sequence], max_tokens: int) -> list[Launched]:
        """Read chunks of sequences in neighbouring slots together, as many as may be read in one go."""
        if sequences[0].num_cached == 0:
            self._reuse_prefix(sequences[0])
        rows = self._neighbours(sequences, max_tokens)
        chunks = [each.token_ids()[each.num_cached :][:max_tokens] for each in rows]
        width = max(map(len, chunks))
        starts = [each.num_cached for each in rows]
        is_whole = len(rows) == 1 and starts == [0] and width == rows[0].num_tokens
        if self._prefill_graphs is not None and is_whole and rows[0].adapter is None:
            read = self._prefill_graphs.run(chunks[0])
            if read is not None:
                self._cache.copy_from(read[1], rows[0].slot, width)
                rows[0].num_cached = width
                return self._sample_prefilled(rows, read[0])
        first_slot = rows[0].slot
        start_N = torch.tensor(starts, device=self._device)
        tokens_NQ = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self._device)
        positions_NQ = start_N[:, None] + torch.arange(width, device=self._device)
        # padding sits behind a row's end: its positions may lie behind the context, which a model need not know
        positions_NQ = positions_NQ.clamp(max=self._model.context_tokens - 1)
        cache = self._cache.rows(first_slot, len(rows), max(starts) + width, start_N)
        last = sorted({len(chunk) - 1 for chunk in chunks})
        keep = torch.tensor(last, device=self._device)
        with adapting_rows([each.adapter_slot for each in rows], self._device):
            logits_NKV = forward(self._model, tokens_NQ, positions_NQ, cache, keep)
        if logits_NKV.shape[1] != len(last):  # a model that keeps all
            logits_NKV = logits_NKV[:, keep]
        place_N = torch.tensor([last.index(len(chunk) - 1) for chunk in chunks], device=self._device)
        logits_NV = logits_NKV[torch.arange(len(rows), device=self._device), place_N]
        for each, chunk in zip(rows, chunks, strict=True):
            each.num_cached += len(chunk)
        return self._sample_prefilled(rows, logits_NV)

    @torch.inference_mode()
    def decode(self, sequences: Rows[Sequence]) -> Launched:
        """Run one step over slots 0 to the last one in use."""
        self._compact()
        num_rows = self._num_rows()
        width = 1 + max(each.num_cached for each in self._slots if each is not None)
        self._set_active(sequences, num_rows)
        sampling = Sampling.needed_by(sequences)
        if sampling.masked:
            self._state.set_allowed(sequences)
        rows = self._state.first(num_rows)
        if self._graphs is not None:
            width = _doubled(width, GRAPH_COLUMNS, self._cache.num_columns)
            self._graphs.run(self._cache, self._state, GraphKey(num_rows, width, sampling))
        else:
            self._cache.reserve(num_rows, _doubled(width, COLUMNS, self._model.context_tokens + self._slack))
            width = min(_padded(width), self._cache.num_columns)
            with decoding([1 if each is None else each.num_cached + 1 for each in self._slots]):
                decode_step(self._model, self._cache.rows(0, num_rows, width, rows.position_B), rows, sampling)
        for each in sequences:
            each.num_cached += 1
            each.num_launched += 1
        return TokenReader(rows, [each.slot for each in sequences], sampling).launched(sequences)

    def release(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Take the slot back."""
        slot, sequence.slot = sequence.slot, -1
        if slot < 0:
            return
        self._slots[slot] = None
        while self._slots and self._slots[-1] is None:
            self._slots.pop()
        with torch.inference_mode():
            if not wipe:
                self._prefixes.keep(sequence, slot)
            self._state.clear(slot)
            if wipe:
                self._cache.wipe(slot)

    def reset(self) -> None:
        """Forget all slots. The memory is given back: an error may have been about it."""
        for sequence in self._slots:
            if sequence is not None:
                sequence.slot = -1
        self._slots, self._active = [], []
        if self._graphs is not None:
            self._graphs.clear()
        if self._prefill_graphs is not None:
            self._prefill_graphs.clear()
        self._cache.free()
        self._prefixes.clear()
        with torch.inference_mode():
            self._state = RowState.zeros(self.max_rows, self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def num_compiled(self) -> int:
        """Return how many of the graphs hold compiled steps."""
        return 0 if self._graphs is None else self._graphs.num_compiled

    @property
    def is_compiling(self) -> bool:
        return self._graphs is not None and self._graphs.is_compiling

    def close(self) -> None:
        """Free the memory."""
        if self._graphs is not None:
            self._graphs.close()
        if self._prefill_graphs is not None:
            self._prefill_graphs.clear()
        self._cache.free()
        self._prefixes.clear()

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Begin behind what is known of a sequence's text."""
        sequence.num_cached = sequence.num_reused = self._prefixes.reuse(sequence, self._slots)
        if sequence.num_reused:
            self._state.set_positions([sequence])

    def _neighbours(self, sequences: Rows[Sequence], max_tokens: int) -> list[Sequence]:
        """Return the first sequence and those in the slots behind it that may be read with it."""
        by_slot = {each.slot: each for each in sequences}
        rows = [sequences[0]]
        last = {_remaining(sequences[0], max_tokens)}
        while (following := by_slot.get(rows[-1].slot + 1)) is not None:
            if following.num_cached == 0:
                if any(self._prefixes.waits_for(following, each) for each in rows):
                    break
                self._reuse_prefix(following)
            more = [*rows, following]
            width = max(_remaining(each, max_tokens) for each in more)
            last.add(_remaining(following, max_tokens))
            kept = len(last) if "logits_to_keep" in self._model.forward_arguments else width
            if (
                width * len(more) > max_tokens
                or len(more) * kept * self._model.vocabulary_size > MAX_PREFILL_LOGITS
                or max(each.num_cached for each in more) + width > self._cache.num_columns
            ):
                break
            rows = more
        return rows

    def _read_whole(self, tokens_1Q: Tensor, cache: Cache, last_1: Tensor) -> Tensor:
        """Read a prompt from its start; the logits (1, V) behind its last token."""
        positions_1Q = torch.arange(tokens_1Q.shape[1], device=self._device)[None]
        positions_1Q = positions_1Q.clamp(max=self._model.context_tokens - 1)  # of the padding
        logits_1QV = forward(self._model, tokens_1Q, positions_1Q, cache, last_1)
        return logits_1QV[:, 0] if logits_1QV.shape[1] == 1 else logits_1QV[0, last_1]

    def _staging(self) -> SlotCache:
        return SlotCache(self._shapes, self._model.model.dtype, self._device)

    def _sample_prefilled(self, rows: Rows[Sequence], logits_NV: Tensor) -> list[Launched]:
        """Sample for those whose last token was read; tell the device where the others are."""
        self._state.set_positions(rows)
        places = [place for place, each in enumerate(rows) if each.num_cached == each.num_tokens]
        if not places:
            return []
        ready = [rows[place] for place in places]
        ready_NV = logits_NV[torch.tensor(places, device=self._device)]
        return [sample(ready, ready_NV, self._state, is_first=True)]

    def _set_active(self, sequences: Rows[Sequence], num_rows: int) -> None:
        moving = {each.slot for each in sequences}
        active = [slot in moving for slot in range(num_rows)]
        if active != self._active:
            self._state.set_active(active)
            self._active = active

    def _reserve(self, sequence: Sequence) -> None:
        """Have memory for a sequence: on a GPU all at once, so that graphs find the cache in its place."""
        context = self._model.context_tokens
        slots, columns = len(self._slots), sequence.num_tokens + 1 + self._slack
        if self._graphs is None:
            columns = min(_doubled(columns, COLUMNS, context + self._slack), context + self._slack)
            columns = max(columns, self._cache.num_columns)
            slots = min(self.max_rows, _doubled(slots, 1, self.max_rows))
        else:
            columns = max(self._cache.num_columns, self._graph_columns(sequence))
            slots = max(slots, min(self.max_rows, max(1, self._max_cached_tokens // columns)))
        with torch.inference_mode():
            before = self._cache.num_slots, self._cache.num_columns
            self._cache.reserve(slots, columns)
            if self._graphs is not None and before != (self._cache.num_slots, self._cache.num_columns):
                self._graphs.clear()

    def _graph_columns(self, sequence: Sequence) -> int:
        """Return the context if all rows can have it, else what this sequence will need."""
        whole = self._model.context_tokens + self._slack
        if whole * self.max_rows <= self._max_cached_tokens:
            return whole
        return _doubled(sequence.final_tokens + self._slack, GRAPH_COLUMNS, whole)

    def _num_rows(self) -> int:
        """Return the rows of the next step: exact on CPU, a power of two with graphs."""
        used = len(self._slots)
        return used if self._graphs is None else min(_doubled(used, 1, self.max_rows), self._cache.num_slots)

    def _compact(self) -> None:
        """Move last slots into holes where that makes the step smaller."""
        while None in self._slots:
            num_used = sum(each is not None for each in self._slots)
            size = num_used if self._graphs is None else _doubled(num_used, 1, self.max_rows)
            if len(self._slots) <= size:
                return
            sequence = self._slots.pop()
            assert sequence is not None
            target = self._slots.index(None)
            self._cache.move(sequence.slot, target, sequence.num_cached)
            self._state.move(sequence.slot, target)
            self._active = []
            self._slots[target], sequence.slot = sequence, target
            while self._slots and self._slots[-1] is None:
                self._slots.pop()


def layer_shapes(model: LoadedModel) -> list[LayerShape]:
    """Find what each layer keeps by reading one token."""
    cache = DynamicCache(config=model.model.config)
    with torch.inference_mode():
        model.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache)
    shapes = []
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
            raise NotImplementedError(f"a layer of {model.model.config.model_type} keeps no keys and values")
        shapes.append(
            LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[1], layer.values.shape[3])
        )
    return shapes


def select_slot_attention(model: LoadedModel) -> None:
    """Have the model's own forward call the attention over slots."""
    register_slot_attention()
    for config in {id(c): c for c in (model.model.config, model.model.config.get_text_config(decoder=True))}.values():
        config._attn_implementation = SLOT_ATTENTION


def _remaining(sequence: Sequence, max_tokens: int) -> int:
    return min(sequence.num_tokens - sequence.num_cached, max_tokens)


def _padded(width: int) -> int:
    return (width + COLUMNS - 1) // COLUMNS * COLUMNS


def _doubled(number: int, smallest: int, largest: int) -> int:
    """Return the next power-of-two multiple of the smallest size, at most the largest."""
    size = smallest
    while size < number:
        size *= 2
    return min(size, largest)
