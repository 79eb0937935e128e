"""Norms against float64, for sizes at which a float32 sum forgets what is small."""

import pytest
import torch

from apt_jobs.gradient_monitor import norms
from apt_jobs.gradient_monitor.norms import CPU_PIECE_ELEMENTS, norms_of
from apt_jobs.gradient_monitor.update_norms import UpdateNorms

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 1, CPU_PIECE_ELEMENTS, CPU_PIECE_ELEMENTS + 1, 4_000_000])
def test_a_norm_agrees_with_float64_whatever_the_size(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))
    (norm,) = norms_of([values], CPU)
    assert norm.dtype is torch.float32
    assert norm.item() == pytest.approx(values.double().norm().item(), rel=1e-6)


def test_types_and_sizes_are_told_in_the_order_in_which_they_came() -> None:
    tensors = [torch.full((70_000,), 2.0), torch.ones(4, dtype=torch.bfloat16), torch.ones(9), torch.ones(3, 300).t()]
    assert [norm.item() for norm in norms_of(tensors, CPU)] == pytest.approx(
        [2 * 70_000**0.5, 2.0, 3.0, 30.0], rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128, torch.float16], ids=str)
def test_every_type_has_a_norm(dtype: torch.dtype) -> None:
    values = torch.randn(70_000, dtype=dtype, generator=torch.Generator().manual_seed(1))
    norms = norms_of([values, torch.ones(4)], CPU)
    assert norms.dtype is torch.float32
    assert norms[0].item() == pytest.approx(values.to(torch.complex128).norm().item(), rel=1e-5)
    assert norms[1].item() == 2.0


def test_a_nan_in_a_late_piece_is_a_nan() -> None:
    values = torch.ones(3 * CPU_PIECE_ELEMENTS)
    values[-1] = torch.nan
    assert norms_of([values], CPU)[0].isnan()


def test_a_machine_that_cannot_compile_kernels_says_so_once_and_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("apt_jobs.gradient_monitor.kernels.NormKernels", refuse)
    norms._gpu_kernels.cache_clear()
    with pytest.warns(UserWarning, match="slower kernels: Failed to find C compiler"):
        assert norms._gpu_kernels(torch.float32) is None
    assert norms._gpu_kernels(torch.float32) is None  # without a warning, which would fail the test
    norms._gpu_kernels.cache_clear()


@pytest.mark.parametrize(
    "weight",
    [
        *(torch.ones(3, 4), torch.ones(3, 4).t(), torch.ones(4, 6)[:, :5], torch.ones(2, 3, 4).permute(2, 0, 1)),
        *(torch.ones(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.complex64)),
    ],
    ids=["plain", "transposed", "with gaps", "permuted", "double", "complex"],
)
def test_an_update_is_measured_however_a_weight_lies_in_memory(weight: torch.Tensor) -> None:
    updates = UpdateNorms(CPU)
    assert updates.note(1, [weight]) is None
    weight *= 1.5
    noted = updates.note(2, [weight])
    assert noted is not None
    assert noted[1].tolist() == pytest.approx([1.5 * weight.numel() ** 0.5, 1 / 3])
