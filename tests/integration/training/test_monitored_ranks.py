"""Local norms before the reduction and norms after it, on two real gloo ranks, against float64 done the slow way."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.diagnosis.step_join import JoinedStep, NoiseScale
from apt_jobs.events.kinds import GradientsRecorded, RankGradientsRecorded

SCRIPT = Path(__file__).with_name("monitored_ranks.py")
ROOT = Path(__file__).resolve().parents[3]
CASES = {
    "plain": 1e-5,
    "bucket_view": 1e-5,
    "small_buckets": 1e-5,
    "accumulated": 1e-5,
    "accumulated_bucket_view": 1e-5,
    "scaled": 1e-5,
    "unscaled": 1e-5,
    "clipped": 1e-5,
    "bf16_autocast": 1e-5,
    "bf16_weights": 2e-2,  # the mean of two bf16 numbers is rounded to bf16
    "compiled": 1e-5,
    "odd_layers": 1e-5,
    "sparse": 1e-5,
    "nested": 1e-5,
    "static_graph": 1e-5,
    "other_hook": 1e-5,
    "scaled_by_hook": 1e-5,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank measured."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--nproc-per-node=2", "--rdzv-backend=apt-jobs"),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(SCRIPT), str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("case", "tolerance"), CASES.items())
def test_norms_agree_with_float64_on_every_rank(results: list[dict[str, Any]], case: str, tolerance: float) -> None:
    for result in (result[case] for result in results):
        assert len(result["local"]) == len(result["expected_local"]) == 3
        for found, expected in zip(result["local"], result["expected_local"], strict=True):
            assert found == pytest.approx(expected, rel=tolerance, abs=1e-7)
        for total, expected in zip(result["totals"], result["expected"], strict=True):
            assert total == pytest.approx(math.hypot(*expected), rel=tolerance)
        assert all(time > 0 for time in result["compute_ms"][1:])
    for found, expected in zip(results[0][case]["norms"], results[0][case]["expected"], strict=True):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-7)


@pytest.mark.parametrize("case", [*CASES, "sharded", "sharded_accumulated"])
def test_the_monitor_keeps_no_model_alive(results: list[dict[str, Any]], case: str) -> None:
    """Nor with it the process group, whose threads can abort a process that is being taken apart."""
    assert all(result[case]["is_freed"] for result in results)


@pytest.mark.parametrize("case", ["sharded", "sharded_accumulated"])
def test_norms_of_sharded_gradients_are_those_of_whole_ones(results: list[dict[str, Any]], case: str) -> None:
    for result in (result[case] for result in results):
        assert result["local"] == [[], [], []]  # no rank has a whole gradient
        for total, expected in zip(result["totals"], result["expected"], strict=True):
            assert total == pytest.approx(math.hypot(*expected), rel=1e-5)
    for found, expected in zip(results[0][case]["norms"], results[0][case]["expected"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", [*CASES, "sharded", "sharded_accumulated"])
def test_weight_norms_and_update_ratios_agree_with_float64(results: list[dict[str, Any]], case: str) -> None:
    for result in (result[case] for result in results):
        ((step, weights, ratios),) = result["updates"]
        expected_step, expected_weights, expected_ratios = result["expected_updates"]
        assert step == expected_step
        assert weights == pytest.approx(expected_weights, rel=1e-5)
        assert any(expected_ratios)
        # The update is a difference of float32 weights: what the weights lose in rounding, a small update lacks.
        assert ratios == pytest.approx(expected_ratios, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("case", ["plain", "accumulated", "scaled", "clipped", "compiled"])
def test_the_noise_scale_is_that_of_float64_gradients(results: list[dict[str, Any]], case: str) -> None:
    """McCandlish et al. 2018, appendix A.1: from gradients of the small batches and of the big one, smoothed."""
    first, second = (result[case] for result in results)
    noise_scale, signal, noise = NoiseScale(), 0.0, 0.0
    for index in range(3):
        joined = JoinedStep(index + 1, GradientsRecorded(index + 1, tuple(first["norms"][index]), ()))
        for rank, result in enumerate((first, second)):
            joined.ranks[rank] = RankGradientsRecorded(
                index + 1, rank, tuple(result["local"][index]), None, None, None, 8, False, 0
            )
        found = noise_scale.add(joined)
        small = sum(math.hypot(*result["expected_local"][index]) ** 2 for result in (first, second)) / 2
        big = math.hypot(*first["expected"][index]) ** 2
        signal = 0.95 * signal + 0.05 * (16 * big - 8 * small) / (16 - 8)
        noise = 0.95 * noise + 0.05 * (small - big) / (1 / 8 - 1 / 16)
    assert signal > 0.0 < noise
    assert found == pytest.approx(noise / signal, rel=1e-4)


def test_ranks_tell_their_own_and_only_the_first_tells_what_all_share(results: list[dict[str, Any]]) -> None:
    assert results[0]["plain"]["local"] != results[1]["plain"]["local"]
    assert results[1]["plain"]["norms"] == []
    assert results[1]["plain"]["kinds"] == ["rank_gradient", "rank_gradient", "update", "rank_gradient"]
    assert results[0]["plain"]["kinds"].count("backward_order") == 1
    assert results[0]["plain"]["kinds"].count("layers") == 1


def test_odd_layers_are_named_once_and_frozen_ones_not_at_all(results: list[dict[str, Any]]) -> None:
    assert results[0]["odd_layers"]["names"] == [
        *("empty", "first.weight", "first.bias", "last.weight", "last.bias", "sometimes.weight", "sometimes.bias")
    ]


def test_a_nan_of_one_rank_is_seen_on_that_rank_alone(results: list[dict[str, Any]]) -> None:
    shared, healthy, poisoned = results[0]["poisoned"]["norms"][1], *(r["poisoned"]["local"][1] for r in results)
    assert all(norm == "NaN" or math.isnan(norm) for norm in shared)
    assert all(math.isfinite(norm) for norm in healthy)
    assert all(math.isnan(norm) for norm in poisoned)


def test_buckets_that_no_hook_can_see_are_watched_without_local_norms(results: list[dict[str, Any]]) -> None:
    hidden = results[0]["other_hook_bucket_view"]
    assert hidden["local"] == [[], [], []]
    assert hidden["kinds"].count("log") == 1
    for found, expected in zip(hidden["norms"], hidden["expected"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_ranks_with_other_layers_are_refused_on_every_rank(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["other_layers"].startswith("InvalidInput: ranks [1] have other layers than rank 0")
