"""Bytes of machine code of each kernel for a GPU of the given compute capability (90: H100), printed as JSON."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apt_jobs.gradient_monitor.kernels import LANES, PIECE_ELEMENTS, SUM_LANES, TYPES, _root_of_sums, _sum_squares

POINTERS = {"addresses": "*i64", "tensor_of": "*i32", "first_piece": "*i32", "num_elements": "*i64", "sums": "*fp32"}


def main() -> None:
    """Compile for what `NormKernels` launches."""
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    sources = {"sums": _source(_root_of_sums, POINTERS | {"norms": "*fp32"}, {"LANES": SUM_LANES})}
    for name, type_ in TYPES.items():
        constants = {"TYPE": type_, "PIECE": PIECE_ELEMENTS, "LANES": LANES}
        sources[f"squares of {name}"] = _source(_sum_squares, POINTERS, constants)
    print(
        json.dumps({name: len(triton.compile(source, target=target).asm["cubin"]) for name, source in sources.items()})
    )


def _source(kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object]) -> ASTSource:
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)


if __name__ == "__main__":
    main()
