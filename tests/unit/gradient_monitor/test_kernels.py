"""The kernels for GPUs, run one program after the other by Triton's interpreter, against float64."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_kernels.py")
ROOT = Path(__file__).resolve().parents[3]
Results = dict[str, tuple[list[float], list[float]]]


@pytest.fixture(scope="module")
def results() -> Results:
    """Measured and expected norms of each case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found: Results = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_agree_with_float64_for_sizes_around_those_of_pieces(results: Results, dtype: str) -> None:
    measured, expected = results[f"sizes of torch.{dtype}"]
    assert measured == pytest.approx(expected, rel=1e-6)


def test_tensors_that_begin_at_any_address_are_read_from_there(results: Results) -> None:
    measured, expected = results["views at any address"]
    assert measured == pytest.approx(expected, rel=1e-6)


def test_what_is_not_finite_is_told_of_its_tensor_alone(results: Results) -> None:
    (first, second, third), expected = results["not finite"]
    assert math.isnan(first)
    assert math.isinf(second)
    assert third == pytest.approx(expected[2], rel=1e-6)


def test_tensors_that_moved_or_grew_are_read_where_they_are_now(results: Results) -> None:
    moved = [both for case, both in results.items() if case.startswith("moved")]
    assert len(moved) == 48
    for measured, expected in moved:
        assert measured == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_can_be_compiled_for_gpus(capability: int, tmp_path: Path) -> None:
    """Down to machine code, by the assembler that comes with Triton."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT.with_name("compiled_kernels.py")), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert all(size > 1_000 for size in json.loads(done.stdout).values())
