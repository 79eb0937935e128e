"""A rank keeps to its part of a GPU that others share. The GPU is a fake."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from apt_jobs.jobs.environment import GPU_MEMORY_VARIABLE
from apt_jobs.jobs.resources import Resources
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.launch import _environment
from apt_jobs.training.ddp import cap_memory
from apt_jobs.workers.embedded import _gpu_part
from tests.integration.run_files import run_file_in


@pytest.mark.parametrize(
    ("gpus", "resources", "fractions", "passed"),
    [
        ([3], {"gpus": 0.5}, {}, "0.5"),
        ([3], {"gpus": 0.5}, {3: 0.75}, "0.375"),
        ([0, 1], {}, {0: 0.75}, "0.75,1"),
        ([1, 2], {}, {0: 0.75}, None),
        ([0], {}, {}, None),
    ],
)
def test_ranks_are_told_their_part_of_each_gpu(
    tmp_path: Path, gpus: list[int], resources: Mapping[str, float], fractions: dict[int, float], passed: str | None
) -> None:
    spec = TrainSpec(kind="train", device="cuda", num_ranks=len(gpus), resources=Resources.model_validate(resources))
    environment = _environment(Settings(gpu_memory_fractions=fractions), run_file_in(tmp_path, spec), 0, gpus)
    assert environment.get(GPU_MEMORY_VARIABLE) == passed


@pytest.mark.parametrize(("variable", "capped"), [("0.75,1", [(0.75, 0), (1.0, 1)]), ("", []), (None, [])])
def test_each_rank_caps_what_torch_allocates(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, capped: list[tuple[float, int]]
) -> None:
    if variable is None:
        monkeypatch.delenv(GPU_MEMORY_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(GPU_MEMORY_VARIABLE, variable)
    found: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, index: found.append((part, index)))
    for local_rank in range(2):
        cap_memory(local_rank)
    assert found == capped


def test_up_shares_its_first_gpu_unless_an_operator_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _gpu_part(Settings(), [2, 3], 0.75).items():
        monkeypatch.setenv(name, value)
    assert Settings().gpu_memory_fractions == {2: 0.75}
    assert _gpu_part(Settings(), [2, 3], 0.25) == {}
    assert _gpu_part(Settings(gpu_memory_fractions={}), [], 0.25) == {}


@pytest.mark.parametrize("fractions", ['{"0": 0}', '{"0": 1.5}', '{"0": -0.5}', '{"a": 0.5}', "0.5", '{"0": NaN}'])
def test_parts_that_nobody_can_mean_are_refused(monkeypatch: pytest.MonkeyPatch, fractions: str) -> None:
    monkeypatch.setenv("APT_JOBS_GPU_MEMORY_FRACTIONS", fractions)
    with pytest.raises(ValueError, match="gpu_memory_fractions"):
        Settings()
