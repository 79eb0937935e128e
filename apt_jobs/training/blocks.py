"""The parts of a Hugging Face model that repeat: what is sharded, compiled and recomputed one by one."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, by the names that Hugging Face models give; empty if they give none."""
    names = getattr(model, "_no_split_modules", None) or ()
    # By all classes of a module: FSDP2 puts one of its own in front.
    return [module for module in model.modules() if any(cls.__name__ in names for cls in type(module).__mro__)]


def norms_outside_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the normalisations that belong to no block, as the last one."""
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    outside = (module for module in model.modules() if id(module) not in inside)
    return [module for module in outside if "Norm" in type(module).__name__ and not any(module.children())]
