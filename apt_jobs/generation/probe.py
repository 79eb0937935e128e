"""Which runner serves a model: slots, if its own forward says the same over slots as without a cache.

The answer is measured, not looked up, so a new architecture is served right, and fast where it can be.
"""

import logging

import torch
from torch import Tensor

from apt_jobs.generation.cache import SlotCache
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.reference import ReferenceRunner
from apt_jobs.generation.reference_batch import Batch
from apt_jobs.generation.runner import Runner, SlotRunner, forward, layer_shapes, select_slot_attention

logger = logging.getLogger(__name__)

_LENGTHS = (7, 12)  # tokens of the two prompts
_MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative to the logits' norm
_MAX_DIFFERENCE_16_BITS = 0.05  # a wrong mask differs by about 1


def make_runner(model: LoadedModel, *, max_rows: int, compile_graphs: bool) -> Runner:
    """Return the fastest runner that is right for the model."""
    attention = model.model.config._attn_implementation
    if model.joinable and not _depends_on_batch(model):
        try:
            difference = slot_difference(model)
            if difference <= tolerance(model):
                return SlotRunner(model, max_rows=max_rows, compile_graphs=compile_graphs)
            why = f"its logits differ by {difference:.3g}"
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:  # a model's forward raises whatever comes to it
            why = repr(exc)
    else:
        why = f"its cache is none that rows of different age can share ({model.model.config.model_type})"
    logger.info("a model is served by the reference runner: %s", why[:500], extra={"model": model.folder.name})
    model.model.config._attn_implementation = attention
    return ReferenceRunner(model, max_rows=max_rows, keeps_cache=_keeps_cache(model))


@torch.inference_mode()
def slot_difference(model: LoadedModel) -> float:
    """Read two prompts into slots, one in chunks, step both, and compare the logits with those without a cache."""
    device = model.device
    generator = torch.Generator().manual_seed(0)
    size = min(model.context_tokens, max(_LENGTHS) + 1)
    prompts = [
        torch.randint(model.vocabulary_size, (1, min(length + 1, size)), generator=generator).to(device)
        for length in _LENGTHS
    ]
    expected = [model.model(input_ids=prompt, use_cache=False).logits[0, -1].float() for prompt in prompts]
    shapes = layer_shapes(model)
    select_slot_attention(model)
    cache = SlotCache(shapes, model.model.dtype, device)
    cache.reserve(len(prompts), size + 8)
    for slot, prompt in enumerate(prompts):
        middle = (prompt.shape[1] - 1) // 2
        for start, end in ((0, middle), (middle, prompt.shape[1] - 1)):
            _read(model, cache, slot, prompt, start, end)
    position_B = torch.tensor([prompt.shape[1] - 1 for prompt in prompts], device=device)
    token_B1 = torch.cat([prompt[:, -1:] for prompt in prompts])
    rows = cache.rows(0, len(prompts), size + 8, position_B)
    found_BV = forward(model, token_B1, position_B[:, None], rows, 1)[:, -1].float()
    return max(relative_difference(found, right) for found, right in zip(found_BV, expected, strict=True))


def tolerance(model: LoadedModel) -> float:
    """Return how much logits may differ that should be the same."""
    return _MAX_DIFFERENCE.get(model.model.dtype, _MAX_DIFFERENCE_16_BITS)


def relative_difference(found_V: Tensor, right_V: Tensor) -> float:
    """Return how much logits (V,) differ from the right ones, relative to their norm; NaN is infinitely far."""
    if not bool(right_V.isfinite().all()):
        return 0.0  # a model that diverged is wrong in either way; its requests are told
    norm = max(float(right_V.norm()), 1e-9)
    difference = float((found_V - right_V).norm()) / norm
    return difference if difference == difference else float("inf")


def _keeps_cache(model: LoadedModel) -> bool:
    """Say whether the model continues a text from a cache of transformers' as it does without one."""
    if model.cache_argument is None:
        return False
    try:
        difference = _cached_difference(model)
        if difference <= tolerance(model):
            return True
        why = f"its logits differ by {difference:.3g}"
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # as above
        why = repr(exc)
    logger.info("a model reads its whole text again for each token: %s", why[:500], extra={"model": model.folder.name})
    return False


@torch.inference_mode()
def _cached_difference(model: LoadedModel) -> float:
    """Read a prompt whole but for two tokens, and but for its first, add the rest, and compare with no cache."""
    size = max(3, min(model.context_tokens, max(_LENGTHS)))
    prompt = torch.randint(model.vocabulary_size, (size,), generator=torch.Generator().manual_seed(0)).tolist()
    expected_V = model.model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0, -1]
    differences = []
    for read in (size - 2, 1):
        batch = Batch(model)
        found_1V = batch.join([prompt[:read]])
        for token in prompt[read:]:
            found_1V = batch.advance([token])
        differences.append(relative_difference(found_1V[0].float(), expected_V.float()))
    return max(differences)


def _read(model: LoadedModel, cache: SlotCache, slot: int, prompt: Tensor, start: int, end: int) -> None:
    if start < end:
        positions = torch.arange(start, end, device=prompt.device)[None]
        rows = cache.rows(slot, 1, end, positions[:, 0])
        forward(model, prompt[:, start:end], positions, rows, 1)


def _depends_on_batch(model: LoadedModel) -> bool:
    """Say whether a row's positions are scaled by the longest row beside it, as "dynamic" rotary embeddings are."""
    rope = getattr(model.model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
