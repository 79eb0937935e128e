"""The model: an `APTConfig` built as Hugging Face's Llama, or any local causal language model to start from."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from apt_jobs.errors import InvalidCheckpoint, InvalidInput
from apt_jobs.jobs.spec import APTConfig
from apt_jobs.training.weight_files import require_safetensors


def build_model(config: APTConfig, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """Build a Llama with random weights from the current seed. Every rank calls it with one seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.feed_forward_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            max_position_embeddings=config.max_seq_len,
            attention_dropout=config.dropout,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def load_model(folder: Path) -> nn.Module:
    """Load a local Hugging Face model in float32, from safetensors only.

    Raises:
        InvalidCheckpoint: the folder cannot be loaded.
    """
    require_safetensors(folder)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError) as exc:
        raise InvalidCheckpoint(f"the model {folder.name!r} cannot be loaded: {exc}") from exc
    return nn.Module.train(model)  # `from_pretrained` leaves it without dropout


def checkpoint_activations(model: nn.Module) -> None:
    """Compute each block's activations again in the backward pass instead of keeping them.

    Raises:
        InvalidInput: the model cannot.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]  # a PreTrainedModel
    except ValueError as exc:
        name = type(model).__name__
        raise InvalidInput(f"{name} cannot be trained with activation_checkpointing; leave it out: {exc}") from exc


def describe(model: nn.Module) -> dict[str, int | float | bool | str | None]:
    """Return the configuration under the names that users know (SPEC S2)."""
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", None)
    return {
        "architecture": type(model).__name__,
        "d_model": getattr(config, "hidden_size", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None),
        "d_ff": getattr(config, "intermediate_size", None),
        "vocab_size": config.vocab_size,
        "max_seq_len": getattr(config, "max_position_embeddings", None),
        "tie_embeddings": getattr(config, "tie_word_embeddings", None),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
