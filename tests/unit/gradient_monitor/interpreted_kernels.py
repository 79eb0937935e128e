"""Norms by the kernels for GPUs and in float64, printed as JSON. Needs TRITON_INTERPRET=1 from its start."""

import json

import torch
from torch import Tensor

from apt_jobs.gradient_monitor.kernels import MAX_PLANS, PIECE_ELEMENTS, TYPES, NormKernels

SIZES = [0, 1, 5, PIECE_ELEMENTS - 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 300 * 300, 0]


def main() -> None:
    """Print [norms, expected norms] of each case."""
    kernels = NormKernels()
    cases = {f"sizes of {dtype}": [torch.randn(size).to(dtype) for size in SIZES] for dtype in TYPES}
    buffer = torch.randn(40_000)
    cases["views at any address"] = [buffer[1:20_000], buffer[20_003:]]
    cases["not finite"] = [torch.ones(PIECE_ELEMENTS + 7) for _ in range(3)]
    cases["not finite"][0][-1], cases["not finite"][1][3] = torch.nan, torch.inf
    kept: list[Tensor] = []  # so that nothing lies where something was
    for number in range(3 * MAX_PLANS):  # more sizes and places than are remembered
        kept += [torch.full((10 + number // 2,), float(number)) for _ in range(2)]
        cases[f"moved {number}"] = kept[-2:]
    results = {
        case: [kernels.norms(tensors).tolist(), [tensor.double().norm().item() for tensor in tensors]]
        for case, tensors in cases.items()
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
