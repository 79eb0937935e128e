"""L2 norms of many tensors at once. Shapes: N tensors."""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CPU_PIECE_ELEMENTS = 1 << 16  # PyTorch adds a whole CPU tensor in float32: of 38 million elements 0.3 % get lost


def norms_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return float32 L2 norms [N] on `device`, by one fused call for each type and device. Sparse tensors are allowed.

    No wait for a GPU.
    """
    kinds = {(tensor.dtype, tensor.get_device(), tensor.layout) for tensor in tensors}
    if len(kinds) == 1 and tensors[0].layout is torch.strided:  # nearly always; a step can be short on the host, too
        return _norms_of_alike(list(tensors)).to(device)
    dense = [tensor if tensor.layout is torch.strided else tensor.coalesce().values() for tensor in tensors]
    groups = alike(dense)
    norms: list[Tensor] = [torch.empty(0)] * len(dense)
    for indexes in groups:
        measured = _norms_of_alike([dense[index] for index in indexes]).to(device)
        for index, norm in zip(indexes, measured.unbind(), strict=True):
            norms[index] = norm
    return torch.stack(norms) if norms else torch.zeros(0, device=device)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: all of it, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_real(tensor: Tensor) -> Tensor:
    """Return the same elements, a complex one as two."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return indexes of tensors of one type and device together, in their order."""
    groups: dict[tuple[torch.dtype, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.get_device()), []).append(index)
    return list(groups.values())


def _norms_of_alike(tensors: list[Tensor]) -> Tensor:
    """Return norms of tensors of one type and device. On a CPU large ones are added up in pieces, as GPUs do."""
    tensors = [*map(as_real, tensors)] if tensors[0].is_complex() else tensors
    if tensors[0].dtype is torch.float64:
        return torch.stack(list(torch._foreach_norm(tensors, 2))).float()
    if tensors[0].device.type == "cpu":
        return _norms_in_pieces(tensors)
    measure = _gpu_kernels(tensors[0].dtype)
    if measure is None or not all(map(Tensor.is_contiguous, tensors)):
        return torch.stack(list(torch._foreach_norm(tensors, 2, dtype=torch.float32)))
    with torch.cuda.device(tensors[0].device):
        return measure(tensors)


def _norms_in_pieces(tensors: list[Tensor]) -> Tensor:
    pieces = [
        torch.split(tensor.reshape(-1), CPU_PIECE_ELEMENTS) if tensor.numel() > CPU_PIECE_ELEMENTS else (tensor,)
        for tensor in tensors
    ]
    measured = torch._foreach_norm([piece for of_tensor in pieces for piece in of_tensor], 2, dtype=torch.float32)
    norms, start = list[Tensor](), 0
    for of_tensor in pieces:
        of_pieces = measured[start : start + len(of_tensor)]
        norms.append(of_pieces[0] if len(of_pieces) == 1 else torch.linalg.vector_norm(torch.stack(of_pieces)))
        start += len(of_tensor)
    return torch.stack(norms)


@functools.cache
def _gpu_kernels(dtype: torch.dtype) -> Callable[[list[Tensor]], Tensor] | None:
    """Our kernels, if they can be compiled here for tensors of this type; None: PyTorch's slower ones have to do."""
    try:
        from apt_jobs.gradient_monitor.kernels import (  # needs Triton, which PyTorch has on Linux alone
            TYPES,
            NormKernels,
        )

        if dtype not in TYPES:
            return None
        kernels = NormKernels()
        kernels.norms([torch.zeros(1, dtype=dtype, device="cuda")])
    except Exception as exc:  # many ways: no Triton, no C compiler, no place for what is compiled, an old GPU
        warnings.warn(f"gradients are measured by PyTorch's slower kernels: {exc}", stacklevel=2)
        return None
    return kernels.norms
