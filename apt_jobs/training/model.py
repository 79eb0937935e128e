"""The model: an `APTConfig` built as Hugging Face's Llama, or any local causal language model to start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from apt_jobs.errors import InvalidCheckpoint, InvalidInput
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.adapters import add_adapter, load_adapter, merge_adapter
from apt_jobs.training.causal import require_causal, require_causal_kind
from apt_jobs.training.optimization import compute_type_of
from apt_jobs.training.optimizers import freeze
from apt_jobs.training.quantization import num_values, quantize_base
from apt_jobs.training.weight_files import require_safetensors


def make_model(run_file: RunFile, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """Return what an attempt trains, on the CPU: from a checkpoint of the job, a base model, or nothing.

    Random weights come from the current seed: every rank calls it with one seed.

    Raises:
        InvalidCheckpoint: a folder cannot be loaded.
        InvalidInput: the model cannot be trained as the job asks.
    """
    model = _make_model(run_file, tokenizer)
    freeze(model, run_file.spec.training.freeze)
    return model.to(torch.bfloat16) if run_file.spec.training.precision == "bf16-true" else model


def _make_model(run_file: RunFile, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    spec, base, resume_dir = run_file.spec, run_file.base_model_dir, run_file.resume_dir
    if spec.training.lora is not None:
        assert base is not None, "the specification asks for it"
        assert spec.base_model is not None
        model = load_base(run_file)
        if resume_dir is None:
            add_adapter(model, spec.training.lora, spec.base_model)
        else:
            load_adapter(model, resume_dir)
        return model
    if resume_dir is not None:
        return load_model(resume_dir)
    if base is not None:
        return load_model(base, run_file.base_adapter_dirs)
    return build_model(spec.model, max(spec.model.vocab_size, len(tokenizer)), tokenizer.eos_token_id)


def load_base(run_file: RunFile) -> nn.Module:
    """Load the base model of a job, its linear layers in 4 bits if the job asks for that.

    Raises:
        InvalidCheckpoint: it cannot be loaded.
        InvalidInput: it cannot be quantized here.
    """
    options, base = run_file.spec.training, run_file.base_model_dir
    assert base is not None, "the specification asks for it"
    model = load_model(base, run_file.base_adapter_dirs)
    if options.lora is not None and options.lora.quantization is not None:
        device = torch.device(run_file.spec.device)
        quantize_base(model, compute_type_of(options.precision, device))
    return model


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
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_dropout=config.dropout,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def load_model(folder: Path, adapters: Sequence[Path] = ()) -> nn.Module:
    """Load a local Hugging Face model in float32, from safetensors only, and add `adapters` to its weights.

    Raises:
        InvalidCheckpoint: the folder cannot be loaded, or its weights are not those that its configuration asks for.
    """
    require_causal_kind(folder)
    require_safetensors(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # Any: typed without `output_loading_info`
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise InvalidCheckpoint(f"the model {folder.name!r} cannot be loaded: {exc}") from exc
    model: nn.Module = loaded[0]
    report: dict[str, Any] = loaded[1]
    if absent := sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"])):
        raise InvalidCheckpoint(
            f"the model {folder.name!r} lacks {len(absent)} weights that its config.json asks for, first {absent[0]}"
        )
    require_causal(model, folder.name)
    for adapter in adapters:
        load_adapter(model, adapter)
        merge_adapter(model)
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
        "num_parameters": num_parameters(model),
    }


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Return how many numbers the model has, or how many of them are trained."""
    return sum(num_values(p) for p in model.parameters() if p.requires_grad or not only_trainable)
