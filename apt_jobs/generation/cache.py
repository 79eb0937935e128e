"""The key/value cache in slots: each sequence has one, from its first chunk of prompt to its last token.

A slot is written in place, at the column that is the token's position, so no token costs a copy of the cache, and a
captured CUDA graph finds it where it was. What is behind a sequence's position is old and hidden by the mask.
Shapes: S slots, C columns, N rows of a forward, Q tokens of a row, T columns that a forward looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps for a token. Keys and values may differ in size (DeepSeek's latent attention)."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int

    @property
    def num_elements(self) -> int:
        return self.key_heads * self.key_size + self.value_heads * self.value_size


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # the library's `__init_subclass__`
    """One layer's slots during one forward. `positions_N`: where each row's first new token goes."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, positions_N: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library's
        self.keys, self.values, self.positions_N = keys, values, positions_N
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the slots exist before the forward."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens into their columns and return all that the rows have."""
        assert self.keys is not None
        assert self.values is not None
        num_rows, _, num_tokens, _ = key_states.shape
        rows_N1 = torch.arange(num_rows, device=key_states.device)[:, None]
        columns_NQ = self.positions_N[:, None] + torch.arange(num_tokens, device=key_states.device)
        self.keys[rows_N1, :, columns_NQ] = key_states.transpose(1, 2)
        self.values[rows_N1, :, columns_NQ] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns and the position of the first."""
        assert self.keys is not None
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> Tensor:  # type: ignore[override]  # each row has its own
        """Return the position of each row, which reaches the mask as the queries' offset."""
        return self.positions_N

    def get_max_length(self) -> int:
        """Return the number of columns."""
        assert self.keys is not None
        return self.keys.shape[-2]


class SlotCache:
    """The slots of all layers. Memory grows by doubling where graphs do not need it to stay in its place."""

    def __init__(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._dtype, self._device = list(shapes), dtype, device
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.num_slots = 0
        self.num_columns = 0

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def bytes_per_token(self) -> int:
        return sum(shape.num_elements for shape in self._shapes) * self._dtype.itemsize

    def reserve(self, num_slots: int, num_columns: int) -> None:
        """Have at least so many slots and columns; what is in them stays."""
        if num_slots <= self.num_slots and num_columns <= self.num_columns:
            return
        num_slots, num_columns = max(num_slots, self.num_slots), max(num_columns, self.num_columns)
        for layer, shape in enumerate(self._shapes):
            keys = self._grown(self._keys, layer, (num_slots, shape.key_heads, num_columns, shape.key_size))
            values = self._grown(self._values, layer, (num_slots, shape.value_heads, num_columns, shape.value_size))
            if layer < len(self._keys):
                self._keys[layer], self._values[layer] = keys, values
            else:
                self._keys.append(keys)
                self._values.append(values)
        self.num_slots, self.num_columns = num_slots, num_columns

    def rows(self, first: int, num_rows: int, num_columns: int, positions_N: Tensor) -> Cache:
        """Return a view of neighbouring slots for one forward."""
        end = first + num_rows
        return Cache(
            layers=[
                SlotLayer(keys[first:end, :, :num_columns], values[first:end, :, :num_columns], positions_N)
                for keys, values in zip(self._keys, self._values, strict=True)
            ]
        )

    def scratch(self, num_rows: int, num_columns: int, positions_N: Tensor) -> Cache:
        """Return rows with the layout of `rows` that are nobody's: a compiler runs what it compiles on them."""
        other = SlotCache(self._shapes, self._dtype, self._device)
        other.reserve(num_rows, self.num_columns)
        return other.rows(0, num_rows, num_columns, positions_N)

    def scratch_bytes(self, num_rows: int) -> int:
        """Return the memory that `scratch` takes."""
        return num_rows * self.num_columns * self.bytes_per_token

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Copy a slot's first columns to another slot."""
        torch._foreach_copy_(self.columns(target, num_columns), self.columns(source, num_columns))

    def copy_from(self, other: "SlotCache", slot: int, num_columns: int) -> None:
        """Copy the first slot of another cache into a slot."""
        torch._foreach_copy_(self.columns(slot, num_columns), other.columns(0, num_columns))

    def columns(self, slot: int, num_columns: int) -> list[Tensor]:
        """Return views of a slot's first columns, (heads, columns, size): the keys of all layers, then the values."""
        return [tensor[slot, :, :num_columns] for tensor in (*self._keys, *self._values)]

    def write(self, slot: int, columns: Sequence[Tensor], num_columns: int) -> None:
        """Write what `columns` returned, or the beginning of it, into a slot."""
        torch._foreach_copy_(self.columns(slot, num_columns), [tensor[:, :num_columns] for tensor in columns])

    def wipe(self, slot: int) -> None:
        """Zero a slot that holds NaN: hidden by a mask it would still make NaN of whoever comes next."""
        for tensor in (*self._keys, *self._values):
            tensor[slot].zero_()

    def free(self) -> None:
        """Give the memory back."""
        self._keys, self._values = [], []
        self.num_slots = self.num_columns = 0

    def _grown(self, tensors: list[Tensor], layer: int, shape: tuple[int, int, int, int]) -> Tensor:
        new = torch.zeros(shape, dtype=self._dtype, device=self._device)
        if layer < len(tensors):
            old = tensors[layer]
            new[: old.shape[0], :, : old.shape[2]] = old
        return new
