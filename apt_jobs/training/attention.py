"""Which attention a training computes with: scaled dot product with FlashAttention's kernels, and no mask.

Every sequence is full, so that causality is all that a mask would say. Hugging Face looks for packed sequences in the
position ids before it leaves a mask out, and waits for the GPU to tell: an attention that is registered under a name
of its own, without a mask function, is never given one.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from apt_jobs.training.loss import PLAIN_HEADS

CAUSAL_SDPA = "causal_sdpa"


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
