"""The detectors: quiet while all is well, and right about what, where and who."""

import math
import random
from dataclasses import replace

import pytest

from apt_jobs.diagnosis.anomalies import AnomalyDetector
from apt_jobs.diagnosis.baselines import FAR_RATIO, Baseline
from apt_jobs.diagnosis.incidents import Finding
from apt_jobs.diagnosis.step_join import JoinedStep
from apt_jobs.events.kinds import GradientsRecorded, UpdatesMeasured
from apt_jobs.jobs.monitor_options import MonitorOptions
from tests.unit.diagnosis.steps import LAYERS, Training, record, scaled

ALL = tuple(range(4))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_healthy_training_has_no_findings(num_ranks: int) -> None:
    assert Training(num_ranks).healthy(600) == []


def test_a_layer_fifteen_times_as_large_is_found_at_once_and_named() -> None:
    training = Training()
    training.healthy(60)
    (found,) = training.step(lambda joined: scaled(joined, 15.0, ALL, (3,)))
    assert (found.anomaly, found.layers, found.ranks) == ("spike", (LAYERS[3],), ())
    assert found.expected is not None
    assert found.value is not None
    assert found.expected[0] < found.expected[1] < found.value
    assert found.message == f"{LAYERS[3]} is {found.value / found.expected[1]:.3g} times the usual maximum"
    assert training.healthy(50) == []


def test_norms_that_drift_together_as_a_model_begins_to_learn_are_no_spikes_but_one_among_them_is() -> None:
    """By a factor of 1,000 within 60 steps; a layer ten times as large is still found."""

    def drifted(joined: JoinedStep) -> None:
        scaled(joined, math.exp(6.9 * min(max(joined.step - 40, 0) / 60, 1.0)), ALL)

    training = Training()
    assert [training.step(drifted) for _ in range(80)] == [[]] * 80

    def also_broken(joined: JoinedStep) -> None:
        drifted(joined)
        scaled(joined, 10.0, ALL, (3,))

    found = [finding for _ in range(3) for finding in training.step(also_broken)]
    assert {(finding.anomaly, finding.layers) for finding in found} == {("spike", (LAYERS[3],))}


BLOCK = tuple(f"layers.0.{name}.weight" for name in ("query", "key", "value", "output", "up", "down"))


def test_a_block_that_jumps_as_a_whole_now_and_then_hides_no_layer_that_jumps_alone() -> None:
    dice = random.Random(3)
    detector = AnomalyDetector(MonitorOptions(), 1)
    detector.name_layers(BLOCK)

    def step(number: int, factor: float = 1.0) -> list[Finding]:
        jump = math.exp(dice.gauss(0.0, 0.7))  # its usual error is so large that 10 of it are a factor of 100
        norms = [jump * math.exp(dice.gauss(0.0, 0.1)) for _ in BLOCK]
        norms[2] *= factor
        joined = JoinedStep(number, GradientsRecorded(number, tuple(norms), ()))
        joined.ranks = {0: record(number, 0, ())}
        return detector.detect(joined)

    assert [step(number) for number in range(1, 201)] == [[]] * 200
    found = [finding.layers for number in range(201, 206) for finding in step(number, 10.0)]
    assert found
    assert set(found) == {(BLOCK[2],)}


def test_a_lasting_change_is_told_for_half_a_window_and_is_usual_then() -> None:
    training = Training(window_steps=64)
    training.healthy(100)
    found = [training.step(lambda joined: scaled(joined, 30.0, ALL, (3,))) for _ in range(64)]
    assert all(found[:30])
    assert not any(found[34:])
    assert training.step(lambda joined: scaled(joined, 30.0, ALL, (3,))) == []


def test_nothing_is_judged_by_a_past_that_is_too_short() -> None:
    training = Training(arm_after_steps=32)
    training.healthy(20)
    assert training.step(lambda joined: scaled(joined, 50.0, ALL)) == []


def test_one_outlier_does_not_hide_the_next() -> None:
    training = Training()
    training.healthy(60)
    found = [training.step(lambda joined: scaled(joined, 1e3, ALL, (2,))) for _ in range(10)]
    assert all(len(findings) == 1 and findings[0].anomaly == "spike" for findings in found)


def test_one_step_that_is_barely_unusual_is_no_spike_but_two_in_a_row_are() -> None:
    training = Training()
    training.healthy(60)

    def barely(joined: JoinedStep) -> None:
        assert joined.gradients is not None
        norms = list(joined.gradients.norms)
        norms[3] = math.exp(-3) * 7.0  # the limit is 5 times the median
        joined.gradients = replace(joined.gradients, norms=tuple(norms))

    assert training.step(barely) == []
    assert training.healthy(5) == []
    assert training.step(barely) == []
    assert [found.layers for found in training.step(barely)] == [(LAYERS[3],)]


@pytest.mark.parametrize(
    ("num_records", "window_steps", "usual_errors"),
    [(32, 128, 11.0), (64, 128, 10.0), (128, 128, 8.0), (200, 128, 8.0), (64, 64, 8.0)],
)
def test_limits_are_wider_while_the_window_fills(num_records: int, window_steps: int, usual_errors: float) -> None:
    def beyond(num_errors: float) -> float:
        baseline = Baseline(MonitorOptions(window_steps=window_steps))
        for _ in range(num_records):
            baseline.judge(1.0, 0.5, 0.0)
        return baseline.judge(1.0, 0.5 * num_errors, 0.0)

    assert beyond(usual_errors - 0.1) == 0.0
    assert beyond(usual_errors + 2 * math.log(FAR_RATIO) + 0.1) > 0.0


def test_fixed_thresholds_stay() -> None:
    training = Training()
    (found,) = training.step(lambda joined: scaled(joined, 1e5, ALL, (0,)))
    assert (found.anomaly, found.layers) == ("exploding", (LAYERS[0],))
    (found,) = training.step(lambda joined: scaled(joined, 1e-9, ALL, (5,)))
    assert (found.anomaly, found.layers) == ("vanishing", (LAYERS[5],))


def test_a_layer_that_fades_has_vanished_after_twenty_steps() -> None:
    training = Training()
    training.healthy(100)
    findings = [training.step(lambda joined: scaled(joined, 1e-3, ALL, (1,))) for _ in range(20)]
    assert [len(found) for found in findings] == [0] * 19 + [1]
    assert (findings[-1][0].anomaly, findings[-1][0].layers) == ("vanished", (LAYERS[1],))


def freeze(joined: JoinedStep) -> None:
    scaled(joined, 0.0, ALL, (4,))
    assert joined.gradients is not None
    joined.gradients = replace(joined.gradients, anomalous=())  # a layer without a gradient is no anomaly of its own


def test_a_layer_that_is_frozen_has_vanished_at_the_third_zero() -> None:
    training = Training()
    training.healthy(60)
    assert [len(training.step(freeze)) for _ in range(4)] == [0, 0, 1, 1]


def test_a_layer_that_is_unused_now_and_then_has_not_vanished() -> None:
    training = Training()
    for number in range(200):
        assert training.step(freeze if number % 7 < 4 else None) == []


def poison(joined: JoinedStep, rank: int, layers: tuple[int, ...], value: float = math.nan) -> None:
    old = joined.ranks[rank]
    norms = tuple(value if index in layers else norm for index, norm in enumerate(old.norms))
    joined.ranks[rank] = replace(old, norms=norms)
    assert joined.gradients is not None
    shared = tuple(value if index in layers else norm for index, norm in enumerate(joined.gradients.norms))
    joined.gradients = GradientsRecorded(joined.step, shared, layers)


def test_a_nan_is_traced_to_its_rank_and_to_the_first_layer_of_the_backward_pass() -> None:
    training = Training()
    training.detector.order_layers([5, 4, 3, 2, 1, 0])
    (found,) = training.step(lambda joined: poison(joined, 2, (0, 1, 2)))
    assert (found.anomaly, found.ranks, found.origin) == ("nan", (2,), LAYERS[2])
    assert found.layers == (LAYERS[2], LAYERS[1], LAYERS[0])
    assert "in the backward pass at layers.0.mlp.weight" in found.message


def test_a_nan_of_the_loss_began_in_the_forward_pass() -> None:
    def spoil(joined: JoinedStep) -> None:
        poison(joined, 1, tuple(range(6)))
        joined.ranks[1] = replace(joined.ranks[1], loss=math.nan)

    (found,) = Training().step(spoil)
    assert (found.ranks, found.origin) == ((1,), None)
    assert "in the forward pass" in found.message


def test_an_infinity_is_named_so_and_one_rank_alone_is_told_too() -> None:
    training = Training(num_ranks=1)
    (found,) = training.step(lambda joined: poison(joined, 0, (3,), math.inf))
    assert (found.anomaly, found.origin) == ("inf", LAYERS[3])


def test_a_loss_scaler_may_overflow_five_times_in_a_row() -> None:
    def spoil(joined: JoinedStep) -> None:
        poison(joined, 0, (1,), math.inf)
        joined.ranks[0] = replace(joined.ranks[0], is_scaled=True)

    training = Training()
    assert [len(training.step(spoil)) for _ in range(7)] == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("factor", [20.0, 0.05])
def test_a_rank_whose_loss_is_scaled_is_named(num_ranks: int, factor: float) -> None:
    training = Training(num_ranks)
    training.healthy(60)
    findings = [training.step(lambda joined: scaled(joined, factor, (1,))) for _ in range(3)]
    outliers = [found for found in findings[-1] if found.anomaly == "rank_outlier"]
    assert [found.ranks for found in outliers] == [(1,)]


def test_one_layer_of_one_rank_is_named_though_the_average_hides_it() -> None:
    training = Training(num_ranks=8)
    training.healthy(90)
    findings = [training.step(lambda joined: scaled(joined, 20.0, (5,), (2,))) for _ in range(3)]
    (found,) = findings[-1]
    assert (found.anomaly, found.ranks, found.layers) == ("rank_outlier", (5,), (LAYERS[2],))


def test_a_rank_that_always_differs_in_one_layer_is_no_outlier() -> None:
    training = Training(num_ranks=8)
    found = [training.step(lambda joined: scaled(joined, 20.0, (5,), (2,))) for _ in range(300)]
    assert [finding for findings in found[100:] for finding in findings] == []


def test_a_rank_with_a_higher_loss_is_named() -> None:
    def spoil(joined: JoinedStep) -> None:
        joined.ranks[0] = replace(joined.ranks[0], loss=7.0)

    training = Training(num_ranks=2)
    training.healthy(60)
    findings = [training.step(spoil) for _ in range(3)]
    assert [(found.anomaly, found.ranks) for found in findings[-1]] == [("rank_outlier", (0,))]


def test_no_rank_is_blamed_when_all_losses_have_grown() -> None:
    """A learning rate that was too high: every batch fits the broken weights badly in its own way."""

    def spoil(joined: JoinedStep) -> None:
        for rank, loss in enumerate((6.0, 7.0)):
            joined.ranks[rank] = replace(joined.ranks[rank], loss=loss)

    training = Training(num_ranks=2)
    training.healthy(60)
    assert [training.step(spoil) for _ in range(5)] == [[]] * 5


def test_of_two_ranks_whose_gradients_differ_the_one_with_the_higher_loss_is_blamed() -> None:
    def spoil(joined: JoinedStep) -> None:
        scaled(joined, 40.0, (1,))  # rank 1 left its own past, but
        joined.ranks[0] = replace(joined.ranks[0], loss=6.0)

    training = Training(num_ranks=2)
    training.healthy(60)
    outliers = [found.ranks for _ in range(6) for found in training.step(spoil) if found.anomaly == "rank_outlier"]
    assert outliers
    assert set(outliers) == {(0,)}


def test_a_straggler_is_named_after_fifty_steps() -> None:
    def spoil(joined: JoinedStep) -> None:
        joined.ranks[3] = replace(joined.ranks[3], compute_time_ms=130.0)

    training = Training()
    training.healthy(10)
    found = [finding for _ in range(50) for finding in training.step(spoil)]
    assert {(finding.anomaly, finding.ranks) for finding in found} == {("straggler", (3,))}


@pytest.mark.parametrize(("lag_ms", "is_told"), [(3.0, False), (6.0, True)])
def test_in_short_steps_a_straggler_is_behind_by_more_than_a_time_slice(lag_ms: float, is_told: bool) -> None:
    def spoil(joined: JoinedStep) -> None:
        for rank, told in joined.ranks.items():
            joined.ranks[rank] = replace(told, compute_time_ms=4.0 + (lag_ms if rank == 1 else 0.0))

    training = Training(num_ranks=2)
    found = [finding.anomaly for _ in range(60) for finding in training.step(spoil)]
    assert set(found) == ({"straggler"} if is_told else set())


def update(
    rank: int, weights: tuple[float, ...], ratios: tuple[float, ...] = (0.01,) * 6, step: int = 10
) -> UpdatesMeasured:
    return UpdatesMeasured(step, rank, weights, ratios)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_weights_that_differ_are_traced_to_the_rank_that_left(num_ranks: int) -> None:
    detector = Training(num_ranks).detector
    same = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert detector.detect_in_updates([update(rank, same) for rank in range(num_ranks)]) == []
    broken = (1.0, 2.0, 90.0, 4.0, 5.0, 6.0)
    (found,) = detector.detect_in_updates([update(rank, broken if rank == 1 else same) for rank in range(num_ranks)])
    assert (found.anomaly, found.ranks, found.layers) == ("desync", (1,), (LAYERS[2],))


def test_weights_that_part_by_the_last_bit_are_a_desync() -> None:
    detector = Training(4).detector
    same, parted = (1.0,) * 6, (1.0, 1.0, 1.0 + 2**-23, 1.0, 1.0, 1.0)
    assert detector.detect_in_updates([update(rank, same) for rank in range(4)]) == []
    for _ in range(2):
        (found,) = detector.detect_in_updates([update(rank, parted if rank == 3 else same) for rank in range(4)])
        assert (found.anomaly, found.ranks, found.layers) == ("desync", (3,), (LAYERS[2],))
    assert detector.detect_in_updates([update(rank, same) for rank in range(4)]) == []


def test_weights_that_never_agreed_to_the_last_bit_are_no_desync() -> None:
    detector = Training(2).detector
    for number in range(1, 5):
        updates = [update(rank, tuple(number * (1 + rank * 2**-21) for _ in range(6))) for rank in range(2)]
        assert detector.detect_in_updates(updates) == []


def test_of_two_ranks_that_moved_alike_both_are_named() -> None:
    detector = Training(2).detector
    assert detector.detect_in_updates([update(rank, (1.0,) * 6) for rank in range(2)]) == []
    moved = (1.01, 1.01001)
    (found,) = detector.detect_in_updates([update(rank, (1.01, moved[rank], *(1.01,) * 4)) for rank in range(2)])
    assert (found.ranks, found.layers) == ((0, 1), (LAYERS[1],))


def test_an_update_far_larger_than_the_last_ones_is_found() -> None:
    detector = Training(1).detector
    weights = (1.0,) * 6

    def look(ratio: float) -> list[Finding]:
        return detector.detect_in_updates([update(0, weights, (0.01, 0.01, ratio, 0.01, 0.01, 0.01))])

    assert [look(0.01 * number) for number in range(1, 6)] == [[]] * 5
    (found,) = look(4.0)
    assert (found.anomaly, found.layers, found.value) == ("update_spike", (LAYERS[2],), 4.0)


def test_layers_that_come_later_are_judged_by_their_own_past() -> None:
    training = Training(1)
    training.healthy(40)
    training.detector.name_layers((*LAYERS, "late.weight"))
    for step in range(41, 90):
        joined = training.make()
        assert joined.gradients is not None
        norms = (*joined.gradients.norms, 1e-3)
        joined.gradients = GradientsRecorded(step, norms, ())
        assert training.detector.detect(joined) == []
    joined.gradients = GradientsRecorded(90, (*norms[:-1], 1e-1), ())
    joined.ranks = {0: record(90, 0, ())}
    (found,) = training.detector.detect(joined)
    assert found.layers == ("late.weight",)
