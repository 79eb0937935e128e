"""Which models continue text: each token is predicted from those before it alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from apt_jobs.errors import InvalidCheckpoint

PROBE_TOKENS = 4
REMEDY = "choose one that continues text, as Llama, Qwen, Mistral or GPT-2 do"


def require_causal_kind(folder: Path) -> None:
    """Return if the configuration in `folder` is that of a decoder. Nothing else of the model is read.

    Raises:
        InvalidCheckpoint: it is of another kind, or cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidCheckpoint(f"config.json of model {folder.name!r} cannot be read: {str(exc)[:500]}") from exc
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise InvalidCheckpoint(
            f"model {folder.name!r} is of type {config.model_type!r}, which is no causal language model; {REMEDY}"
        )


@torch.no_grad()
def require_causal(model: nn.Module, name: str) -> None:
    """Return if no token of `model` sees a later one. Measured, where the configuration leaves it open.

    Encoders as BERT load as causal models, and attend to both sides unless they are told otherwise.

    Raises:
        InvalidCheckpoint: one does.
    """
    config: Any = model.config
    if getattr(config, "is_decoder", None) is not False:
        return
    ids = torch.arange(1, 1 + PROBE_TOKENS)[None] % config.vocab_size
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % config.vocab_size
    nn.Module.train(model, False)
    first, second = (model(input_ids=each, use_cache=False).logits[:, :-1].float() for each in (ids, other))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
        raise InvalidCheckpoint(
            f"model {name!r} is a {type(model).__name__} that sees the tokens after each one, which is no causal "
            f"language model; {REMEDY}"
        )
