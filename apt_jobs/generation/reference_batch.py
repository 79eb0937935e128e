"""The key/value cache of rows that are generated together. Rows join and leave between tokens.

All rows end at the last column: a younger row has padding on its left, masked out, and its positions count from its own
first token. Shapes: B rows, N rows that join, T columns of the cache, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from apt_jobs.generation.models import LoadedModel


class Batch:
    """Rows in the order in which they joined. Only the tokens and the cache; who they belong to is the engine's.

    Args:
        model: of the rows.
        keeps_cache: false: all of the only row's text is read for each of its tokens.
    """

    def __init__(self, model: LoadedModel, *, keeps_cache: bool = True) -> None:
        self._model, self._keeps_cache = model, keeps_cache
        self._cache: DynamicCache | None = None
        self._tokens: list[int] = []  # of the only row of a model without a cache
        self.lengths: list[int] = []  # tokens of each row in the cache

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add a row for each prompt and return the logits behind it, (N, V)."""
        assert self._model.joinable or (self.num_rows == 0 and len(prompts) == 1)
        lengths = [len(prompt) for prompt in prompts]
        if not self._keeps_cache:
            self._tokens, self.lengths = list(prompts[0]), lengths
            return self._read_all()
        width = max(lengths)
        tokens_NT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        cache = self._new_cache()
        logits_NV = self._forward(tokens_NT, cache, lengths)
        self._cache = cache if self._cache is None else _joined(self._cache, cache)
        self.lengths += lengths
        return logits_NV

    @torch.inference_mode()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to every row and return the logits behind it, (B, V)."""
        self.lengths = [length + 1 for length in self.lengths]
        if not self._keeps_cache:
            self._tokens += tokens
            return self._read_all()
        assert self._cache is not None
        return self._forward(torch.tensor(tokens)[:, None], self._cache, self.lengths)

    @torch.inference_mode()
    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these, in this order, and the columns that nobody needs any more."""
        if list(places) == list(range(self.num_rows)):
            return
        self.lengths = [self.lengths[place] for place in places]
        if not places:
            self._cache, self._tokens = None, []
            return
        assert self._cache is not None
        width = max(self.lengths)
        places_B = torch.tensor(places, device=self._model.device)
        for layer in _attention_layers(self._cache):
            if layer.keys is not None and layer.values is not None:
                layer.keys = layer.keys[places_B, :, -width:]
                layer.values = layer.values[places_B, :, -width:]

    def _new_cache(self) -> DynamicCache:
        """Full attention where that is possible: a sliding window is then the mask's affair, and rows can join."""
        return DynamicCache() if self._model.joinable else DynamicCache(config=self._model.model.config)

    def _forward(self, tokens_BT: Tensor, cache: DynamicCache, lengths: Sequence[int]) -> Tensor:
        device = self._model.device
        lengths_B1 = torch.tensor(lengths, device=device)[:, None]
        columns_T = torch.arange(max(lengths), device=device)
        positions_BT = columns_T - (columns_T.numel() - lengths_B1)  # of a row's own tokens: 0, 1, 2, ...
        arguments: dict[str, Any] = {
            "position_ids": positions_BT[:, -tokens_BT.shape[1] :].clamp(min=0),
            "logits_to_keep": 1,
            "attention_mask": (positions_BT >= 0).long(),
            self._model.cache_argument or "": cache,
        }
        output = self._model.model(
            input_ids=tokens_BT.to(device),
            use_cache=True,
            **{name: value for name, value in arguments.items() if name in self._model.forward_arguments},
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _read_all(self) -> Tensor:
        tokens_1T = torch.tensor([self._tokens], device=self._model.device)
        logits_1V: Tensor = self._model.model(input_ids=tokens_1T, use_cache=False).logits[:, -1]
        return logits_1V


def _joined(old: DynamicCache, new: DynamicCache) -> DynamicCache:
    """Merge the rows of both into one cache."""
    for layer, more in zip(_attention_layers(old), _attention_layers(new), strict=True):
        if layer.keys is None or layer.values is None or more.keys is None or more.values is None:
            continue  # a layer that uses another one's cache
        layer.keys = _stacked(layer.keys, more.keys)
        layer.values = _stacked(layer.values, more.values)
    return old


def _attention_layers(cache: DynamicCache) -> list[CacheLayerMixin]:
    return [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]


def _stacked(old: Tensor, new: Tensor) -> Tensor:
    width = max(old.shape[-2], new.shape[-2])
    return torch.cat([_padded(old, width), _padded(new, width)])


def _padded(states: Tensor, width: int) -> Tensor:
    """Zeros on the left; the mask hides them."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
