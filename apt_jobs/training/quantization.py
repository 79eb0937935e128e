"""QLoRA (Dettmers et al. 2023): the frozen weights of a base model in 4 bits, an adapter of whole numbers beside them.

`bitsandbytes` keeps each block of 64 weights as 4-bit NormalFloat values and a scale (section 3), and computes products
in the type of the training. Weights are quantized when they are moved to their device, layer by layer.

It is imported by the functions that need it: it is optional.
"""

from typing import Any

import torch
from torch import nn

from apt_jobs.errors import InvalidInput
from apt_jobs.training.adapters import called_layers


def quantize_base(model: nn.Module, compute_type: torch.dtype) -> None:
    """Put layers of 4-bit weights in the place of the linear ones of `model`, but for the output's.

    To be called on the CPU, before an adapter is added: peft chooses its layers by what they adapt.

    Raises:
        InvalidInput: bitsandbytes is not installed, or the model has no layer that it can quantize.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as exc:
        raise InvalidInput(
            "training.lora.quantization needs bitsandbytes, which is not installed on this worker; leave it out, or "
            "install it there (pip install bitsandbytes)"
        ) from exc
    layers = {name: model.get_submodule(name) for name in called_layers(model)}
    chosen = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not chosen:
        raise InvalidInput(f"training.lora.quantization finds no linear layer in {type(model).__name__}; leave it out")
    for name, linear in chosen.items():
        quantized = Linear4bit(
            *(linear.in_features, linear.out_features, linear.bias is not None, compute_type),
            device="meta",
        )
        quantized.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
        # Evaluation on some CPUs would pack the weights for good, into a form that training does not read.
        quantized.support_avx512bf16_for_cpu = False
        if linear.bias is not None:
            quantized.bias = linear.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, quantized)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks for


def num_values(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for: one of 4 bits holds two in a byte."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
