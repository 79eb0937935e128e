"""LoRA by `peft`: thin matrices that are trained beside the frozen weights of a base model.

The layers are put into the base model in place: it stays the class that it was, so that attention, compilation and
sharding treat it as they do without. A checkpoint holds the adapter alone, in peft's own folder format
(`adapter_config.json`, `adapter_model.safetensors`), which `PeftModel.from_pretrained` reads.

peft is imported by the functions that need it: it takes half a second, which other trainings need not wait for.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apt_jobs.artifacts.adapters import ADAPTER_CONFIG
from apt_jobs.errors import InvalidCheckpoint, InvalidInput
from apt_jobs.jobs.lora_options import LoraOptions

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files: the base model within a `PeftModel`
MAX_NAMED = 50  # layers in an error
# What peft adapts in no model of these kinds: their kernels read the weights and do not call the layers.
MAMBA_KINDS = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
NOT_IN_MAMBA = frozenset({"out_proj", "conv1d"})


def has_adapter(model: nn.Module) -> bool:
    """Return whether an adapter is trained on `model`."""
    return hasattr(model, "peft_config")


def add_adapter(model: nn.Module, options: LoraOptions, base_model: str) -> None:
    """Freeze `model` and add an adapter that changes nothing yet: one of its matrices is zero.

    `base_model` is the id that the adapter's configuration names. Random values come from the current seed: every rank
    calls it with one seed.

    Raises:
        InvalidInput: a target matches no layer, or peft cannot adapt one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(model, options.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft divides it by r: it need not be an integer
        lora_dropout=options.dropout,
        target_modules=targets,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        fan_in_fan_out=_is_transposed(model, targets),
    )
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, NotImplementedError) as exc:
        raise InvalidInput(f"training.lora cannot adapt {type(model).__name__}: {exc}") from exc


def called_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that the model calls and whose weights nothing else reads."""
    config: Any = model.config
    left_out = NOT_IN_MAMBA if config.model_type in MAMBA_KINDS else frozenset()
    return [name for name in _linear_layers(model) if name.rpartition(".")[2] not in left_out]


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter of `folder` into its base model, to be trained on.

    Raises:
        InvalidCheckpoint: it cannot be read, or is none of this model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    try:
        config = LoraConfig.from_pretrained(str(folder))
        assert isinstance(config, LoraConfig)
        config.inference_mode = False
        inject_adapter_in_model(config, model)
    except (OSError, ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as exc:
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} of {folder.name!r} does not fit its base model: {exc}") from exc
    weights = read_adapter(model, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def merge_adapter(model: nn.Module) -> None:
    """Add the adapter to the weights of its base model and leave it out: a model as any other, nothing frozen."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the model's adapter by their names, also those that `freeze` keeps from training."""
    names = _names_in_files(model)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def read_adapter(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the weights of an adapter by the names of the model's parameters.

    Raises:
        InvalidCheckpoint: they cannot be read, or are other ones than those of the model's adapter.
    """
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as exc:
        raise InvalidCheckpoint(f"{WEIGHTS} of {folder.name!r} cannot be read: {exc}") from exc
    names = _names_in_files(model)
    expected = {names[name]: tuple(p.shape) for name, p in model.named_parameters() if name in names}
    wrong = sorted(set(expected) ^ set(found)) or [
        name for name, shape in expected.items() if tuple(found[name].shape) != shape
    ]
    if wrong:
        raise InvalidCheckpoint(
            f"adapter {folder.name!r} does not fit its base model in {len(wrong)} weights, first {wrong[0]}"
        )
    return {name: found[in_file] for name, in_file in names.items()}


def write_adapter(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write peft's files. `weights` are by the names of the model's parameters; other ones are left out.

    Raises:
        OSError, SafetensorError: the disk does not take them.
    """
    names = _names_in_files(model)
    save_file({in_file: weights[name] for name, in_file in names.items()}, folder / WEIGHTS, {"format": "pt"})
    config: Any = model.peft_config
    config["default"].save_pretrained(str(folder))


def _names_in_files(model: nn.Module) -> dict[str, str]:
    """Return how peft's files name each parameter of the adapter, by the parameter's own name."""
    from peft import get_peft_model_state_dict

    own_names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[str, Any] = dict(model.named_parameters())
    in_files = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return {own_names[id(parameter)]: PREFIX + name for name, parameter in in_files.items()}


def _targets(model: nn.Module, wanted: list[str] | str) -> list[str]:
    """Return the names of the layers to adapt.

    Raises:
        InvalidInput: one that is wanted matches none; the message has the names that exist.
    """
    if wanted == "all-linear":
        return called_layers(model)
    linear = _linear_layers(model)
    unmatched = [end for end in wanted if not any(name == end or name.endswith(f".{end}") for name in linear)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise InvalidInput(
            f"training.lora.target_modules: {unmatched[0]!r} matches no linear layer of {type(model).__name__}; "
            f"it has {', '.join(known[:MAX_NAMED])}"
        )
    return [name for name in linear if any(name == end or name.endswith(f".{end}") for end in wanted)]


def _linear_layers(model: nn.Module) -> list[str]:
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()  # its weight is often that of the input, too, and the loss reads it directly
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _is_transposed(model: nn.Module, targets: list[str]) -> bool:
    """Return whether the layers keep their weights as (in, out), as those of GPT-2 do."""
    return isinstance(model.get_submodule(targets[0]), Conv1D) if targets else False
