"""Which attention a training computes with: scaled dot product with FlashAttention's kernels, and no mask.

Every sequence is full, so that causality is all that a mask would say. Hugging Face looks for packed sequences in the
position ids before it leaves a mask out, and waits for the GPU to tell: an attention that is registered under a name
of its own, without a mask function, is never given one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from apt_jobs.training.loss import PLAIN_HEADS

CAUSAL_SDPA = "causal_sdpa"
_PROBE_TOKENS = 5  # of each of two examples
_PROBE_TOLERANCE = 1e-4  # of logits, relative to the largest


def prefer_flash_attention() -> None:
    """Leave cuDNN's attention out: on an H200 it is slower at heads of 64 and no faster at 128."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_causal_attention(model: nn.Module) -> bool:
    """Let `model` attend without a mask, if that is what it computes; returns whether it does."""
    config: Any = model.config
    is_sdpa = getattr(config, "_attn_implementation", None) == "sdpa"
    is_full = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    has_window = getattr(config, "sliding_window", None) is not None
    if type(model).__name__ not in PLAIN_HEADS or not is_sdpa or not is_full or has_window:
        return False
    AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)
    config._attn_implementation = CAUSAL_SDPA
    return True


@torch.no_grad()
def keeps_examples_apart(model: nn.Module) -> bool:
    """Return whether `model` computes two examples in one row as it computes each alone.

    It is told by position ids that begin again at 0. Models with attention build their mask from them; others carry
    their state on (Mamba), or take no position ids (Bloom). Whether it works is tried, not looked up.
    """
    device = next(model.parameters()).device
    ids = torch.arange(2 * _PROBE_TOKENS, device=device)[None] % model.config.vocab_size  # type: ignore[union-attr,operator]
    positions = torch.arange(_PROBE_TOKENS, device=device).repeat(2)[None]
    was_training = model.training
    nn.Module.train(model, False)
    try:
        packed: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone: Tensor = model(input_ids=ids[:, _PROBE_TOKENS:], use_cache=False).logits
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        nn.Module.train(model, was_training)
    difference = (packed[:, _PROBE_TOKENS:] - alone).abs().max()
    return bool(difference <= _PROBE_TOLERANCE * alone.abs().max())
