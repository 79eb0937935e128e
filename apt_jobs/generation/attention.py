"""Attention over slots: what a Hugging Face model calls in its own forward while the engine runs it.

Rows of a batch are of different age, so every row has a position of its own. The masks of all kinds of model (causal,
sliding, chunked) are functions of a query's position and a key's column; evaluated at each row's own positions they are
right for slots, too. Shapes: B rows, Q queries of a row, T columns, H heads, G key/value heads, D size of a head.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

SLOT_ATTENTION = "apt_jobs_slots"  # the name that a model's config selects it by
MAX_WASTED_COLUMNS = 512  # of a run of rows: reading them costs as much as one more call
_NOT_IN_SDPA = ("softcap", "s_aux", "position_bias")  # what only a model's own eager attention computes


Run = tuple[int, int, int]  # first row, row behind the last, columns that the longest of them has


class _Step(threading.local):
    """What the attention of all layers of a step shares. A thread runs one step at a time."""

    runs: Sequence[Run] = ()
    mask: Tensor | None = None
    additive: Tensor | None = None


_step = _Step()


@contextmanager
def decoding(num_columns_of_rows: Sequence[int]) -> Iterator[None]:
    """Let a decode step on CPU read of each row the columns that it has, not those of the longest one."""
    _step.runs = runs_of(num_columns_of_rows)
    try:
        yield
    finally:
        _step.runs, _step.mask, _step.additive = (), None, None


def runs_of(num_columns_of_rows: Sequence[int]) -> list[Run]:
    """Split neighbouring rows where reading them together reads too much that is not theirs."""
    runs: list[Run] = []
    first, widest, used = 0, 0, 0
    for row, columns in enumerate(num_columns_of_rows):
        if max(widest, columns) * (row + 1 - first) - (used + columns) > MAX_WASTED_COLUMNS:
            runs.append((first, row, widest))
            first, widest, used = row, 0, 0
        widest, used = max(widest, columns), used + columns
    return [*runs, (first, len(num_columns_of_rows), widest)]


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Build the mask (B, 1, Q, T), true where a query sees a column. `q_offset`: each row's position, of its cache."""
    if not isinstance(q_offset, Tensor) or q_offset.ndim != 1:  # a forward without slots
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor without dimensions is as good as a number there
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **options,
        )
        return mask
    positions_B1Q1 = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]
    columns_T = torch.arange(kv_length, device=device)[None, None, None, :] + kv_offset
    rows_B = torch.arange(batch_size, device=device)[:, None, None, None]
    heads = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
    seen: Tensor = mask_function(rows_B, heads, positions_B1Q1, columns_T)
    return seen.expand(batch_size, 1, q_length, kv_length)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend; a model that needs more than `scaled_dot_product_attention` has its own eager attention called."""
    if any(options.get(name) is not None for name in _NOT_IN_SDPA):
        return _eager(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    batch_size, num_heads, q_length, _ = query.shape
    groups = num_heads // key.shape[1]
    if groups > 1 and q_length == 1:  # the heads of a group are queries of one head: no copy of keys and values
        query = query.reshape(batch_size, key.shape[1], groups, query.shape[-1])
    elif groups > 1:
        key = _repeated(key, groups)
        value = _repeated(value, groups)
    if _step.runs and attention_mask is not None and q_length == 1:
        mixed = _by_runs(query, key, value, attention_mask, scaling)
    else:
        causal = attention_mask is None and q_length > 1
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=causal
        )
    mixed = mixed.reshape(batch_size, num_heads, q_length, value.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


def register_slot_attention() -> None:
    """Make both known to transformers; a model that selects them is otherwise untouched."""
    AttentionInterface.register(SLOT_ATTENTION, slot_attention)
    AttentionMaskInterface.register(SLOT_ATTENTION, slot_mask)


def _by_runs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    if _step.mask is not mask:  # the first layer, or one of another kind: sliding and full ones may take turns
        additive = (
            torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf) if _is_bool(mask) else mask
        )
        _step.mask, _step.additive = mask, additive
    assert _step.additive is not None
    parts = [
        scaled_dot_product_attention(
            query[first:end],
            key[first:end, :, :columns],
            value[first:end, :, :columns],
            attn_mask=_step.additive[first:end, :, :, :columns],
            scale=scaling,
        )
        for first, end, columns in _step.runs
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _is_bool(mask: Tensor) -> bool:
    return mask.dtype == torch.bool


def _eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    attend = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **options)
    return result


def _repeated(states: Tensor, groups: int) -> Tensor:
    batch_size, num_heads, width, size = states.shape
    return states[:, :, None].expand(batch_size, num_heads, groups, width, size).flatten(1, 2)
