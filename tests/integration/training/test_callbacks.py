"""The callbacks against what the trainers themselves measure before they clip, on two real gloo ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("watched_trainers.py")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank measured."""
    folder = tmp_path_factory.mktemp("trainers")
    command = [
        *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--nproc-per-node=2", "--rdzv-backend=apt-jobs"),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(SCRIPT), str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


def test_lightning_norms_of_every_layer_are_those_before_clipping(results: list[dict[str, Any]]) -> None:
    seen = results[0]["lightning"]
    assert len(seen["norms"]) == len(seen["expected"]) == 3
    for found, expected in zip(seen["norms"], seen["expected"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert math.hypot(*found) > 0.01


def test_hugging_face_norms_are_those_before_clipping(results: list[dict[str, Any]]) -> None:
    seen = results[0]["hugging_face"]
    assert len(seen["norms"]) == len(seen["expected"]) == 3
    assert [math.hypot(*norms) for norms in seen["norms"]] == pytest.approx(seen["expected"], rel=1e-5)
    assert min(seen["expected"]) > 0.01


@pytest.mark.parametrize("name", ["lightning", "hugging_face"])
def test_every_rank_tells_its_own_norms_and_loss(results: list[dict[str, Any]], name: str) -> None:
    first, second = (result[name] for result in results)
    for seen in (first, second):
        assert [len(norms) for norms in seen["local"]] == [4, 4, 4]
        assert seen["num_samples"] == [8, 8, 8]
    assert first["local"] != second["local"]
    assert first["losses"] != second["losses"]
    for local, other, both in zip(first["local"], second["local"], first["norms"], strict=True):
        for one, two, mean in zip(local, other, both, strict=True):
            assert abs(one - two) / 2 - 1e-6 <= mean <= (one + two) / 2 + 1e-6  # the triangle's inequality


def test_losses_are_those_that_were_differentiated(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["lightning"]["losses"] == pytest.approx(result["lightning"]["expected_losses"], rel=1e-5)
    first, second = (result["hugging_face"]["losses"] for result in results)
    means = [(one + two) / 2 for one, two in zip(first, second, strict=True)]
    assert means == pytest.approx(results[0]["hugging_face"]["expected_losses"], rel=1e-3)  # logged with few digits
