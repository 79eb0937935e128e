"""What a sweep plans: settings by method, limits, and one sentence for each way to ask for the wrong thing."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from apt_jobs.jobs.sweep_scores import is_promoted, score_of
from apt_jobs.jobs.sweeps import MAX_JOBS, Halving, InvalidSweep, SweepSpec, plan_jobs, plan_settings, rung_steps

RATE, BATCH = "training.learning_rate", "training.batch_size"


def sweep(parameters: dict[str, Any], **fields: Any) -> SweepSpec:
    spec = {"kind": "train", **fields.pop("spec", {})}
    return SweepSpec.model_validate({"spec": spec, "parameters": parameters, **fields})


def test_a_grid_has_every_combination_in_order() -> None:
    planned = plan_jobs(sweep({RATE: {"values": [0.1, 0.01]}, BATCH: {"values": [2, 4]}}, name="rates"))
    found = [(one.spec.training.learning_rate, one.spec.training.batch_size) for one in planned]
    assert found == [(0.1, 2), (0.1, 4), (0.01, 2), (0.01, 4)]
    assert [one.spec.name for one in planned] == ["rates #1", "rates #2", "rates #3", "rates #4"]


def test_a_list_takes_the_values_side_by_side() -> None:
    both = {RATE: {"values": [0.1, 0.01]}, BATCH: {"values": [2, 4]}}
    assert plan_settings(sweep(both, method="list")) == [{RATE: 0.1, BATCH: 2}, {RATE: 0.01, BATCH: 4}]


def test_repeats_differ_in_their_seed_alone() -> None:
    planned = plan_jobs(sweep({BATCH: {"values": [2, 4]}}, repeats=3, spec={"training": {"seed": 7}}))
    assert [(one.number, one.repeat, one.spec.training.seed) for one in planned] == [
        (number, repeat, 7 + repeat) for number in (1, 2) for repeat in range(3)
    ]


@given(st.integers(0, 2**63 - 1), st.integers(1, 30))
def test_a_sample_is_of_its_range_and_the_same_for_its_seed(seed: int, number: int) -> None:
    parameters = {
        RATE: {"min": 1e-5, "max": 0.1, "scale": "log"},
        BATCH: {"min": 1, "max": 64, "scale": "log"},
        "training.beta1": {"min": 0.5, "max": 0.99},
        "training.optimizer": {"values": ["adamw", "lion"]},
    }
    asked = sweep(parameters, method="random", num_jobs=number, seed=seed)
    settings = plan_settings(asked)
    assert settings == plan_settings(asked)
    assert len({repr(setting) for setting in settings}) == number
    for setting in settings:
        assert 1e-5 <= setting[RATE] <= 0.1
        assert isinstance(setting[BATCH], int)
        assert 1 <= setting[BATCH] <= 64
        assert 0.5 <= setting["training.beta1"] <= 0.99


def test_a_log_scale_has_as_many_samples_in_each_order_of_magnitude() -> None:
    asked = sweep({RATE: {"min": 1e-4, "max": 1.0, "scale": "log"}}, method="random", num_jobs=1_000)
    decades = [math.floor(math.log10(setting[RATE])) for setting in plan_settings(asked)]
    assert all(180 < decades.count(decade) < 320 for decade in (-4, -3, -2, -1))


def test_parameters_reach_fields_arguments_and_lists() -> None:
    values = {"arguments.optim.lr": {"values": [0.5]}, "model.d_model": {"values": [32]}, "argv": {"values": [["-x"]]}}
    (planned,) = plan_jobs(sweep(values, spec={"entry_point": "mine"}))
    assert planned.spec.arguments == {"optim.lr": 0.5}
    assert planned.spec.model.d_model == 32
    assert list(planned.spec.argv) == ["-x"]


def test_names_may_be_a_parameter() -> None:
    planned = plan_jobs(sweep({"name": {"values": ["a", "b"]}}, spec={"name": 5}))
    assert [one.spec.name for one in planned] == ["a #1", "b #2"]


@pytest.mark.parametrize(
    ("parameters", "fields", "where"),
    [
        ({"training.nope": {"values": [1]}}, {}, "parameters.training.nope"),
        ({"nope": {"values": [1]}}, {}, "parameters.nope"),
        ({RATE: {"values": [0.1, -1.0]}}, {}, f"parameters.{RATE}"),
        ({RATE: {"values": ["much"]}}, {}, f"parameters.{RATE}"),
        ({"kind.x": {"values": [1]}}, {}, "parameters.kind.x"),
        ({"training": {"values": [{}]}, RATE: {"values": [1.0]}}, {}, f"parameters.{RATE}"),
        ({RATE: {"values": [0.1]}}, {"spec": {"kind": "generate", "texts": ["x"]}}, "spec.kind"),
        ({RATE: {"values": [0.1]}}, {"spec": {"nope": 1}}, "spec.nope"),
        ({RATE: {"values": [0.1, 0.2]}}, {"num_jobs": 3}, "num_jobs"),
        ({RATE: {"values": [0.1, 0.2]}}, {"method": "random", "num_jobs": 3}, "num_jobs"),
        ({BATCH: {"min": 1, "max": 3}}, {"method": "random", "num_jobs": 4}, "num_jobs"),
        ({BATCH: {"min": 1, "max": 1_000}}, {"method": "random", "num_jobs": 1_000_000}, "parameters"),
        ({f"arguments.a{n}": {"values": list(range(100))} for n in range(3)}, {}, "parameters"),
        ({BATCH: {"values": list(range(1, 101))}}, {"repeats": 11}, "parameters"),
        ({RATE: {"values": [0.1, 0.2]}, BATCH: {"values": [1]}}, {"method": "list"}, "parameters"),
        (
            {RATE: {"min": 0.1, "max": 0.2}},
            {"method": "halving", "num_jobs": 2, "halving": {"min_steps": 9}, "spec": {"training": {"max_steps": 9}}},
            "halving.min_steps",
        ),
    ],
)
def test_a_plan_that_cannot_be_names_its_field(parameters: Any, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidSweep) as caught:
        plan_jobs(sweep(parameters, **fields))
    assert ".".join(caught.value.faults[0].path) == where
    assert str(caught.value).startswith(f"{where}: ")


@pytest.mark.parametrize(
    ("parameters", "fields", "words"),
    [
        ({}, {}, "at least 1"),
        ({RATE: {"values": []}}, {}, "at least 1"),
        ({RATE: {"values": [0.1, 0.1]}}, {}, "there twice"),
        ({BATCH: {"values": [2, 2.0]}}, {}, "there twice"),
        ({RATE: {"min": 0.2, "max": 0.1}}, {"method": "random", "num_jobs": 2}, "must be below"),
        ({RATE: {"min": 0.1, "max": 0.1}}, {"method": "random", "num_jobs": 2}, "must be below"),
        ({RATE: {"min": 0, "max": 1.0, "scale": "log"}}, {"method": "random", "num_jobs": 2}, "log scale needs"),
        ({RATE: {"min": -1.0, "max": 1.0, "scale": "log"}}, {"method": "random", "num_jobs": 2}, "log scale needs"),
        ({RATE: {"min": math.nan, "max": 1.0}}, {"method": "random", "num_jobs": 2}, "finite|greater|NaN|nan"),
        ({RATE: {"min": 0.0, "max": math.inf}}, {"method": "random", "num_jobs": 2}, "finite|less"),
        ({RATE: {"min": 0.1, "max": 0.2}}, {}, "needs `values`"),
        ({RATE: {"values": [0.1]}}, {"method": "random"}, "needs num_jobs"),
        ({RATE: {"values": [0.1]}}, {"method": "halving", "num_jobs": 1}, "min_steps"),
        ({RATE: {"values": [0.1]}}, {"halving": {"min_steps": 1}}, "method=halving"),
        ({RATE: {"values": [0.1]}}, {"method": "tpe"}, "needs num_jobs"),
        ({RATE: {"values": [0.1]}}, {"method": "tpe", "num_jobs": 1}, "needs max_running"),
        ({"priority": {"values": [1]}}, {"method": "tpe", "num_jobs": 1, "max_running": 1}, "cannot vary priority"),
        ({"training.seed": {"values": [1]}}, {"repeats": 2}, "leave one of them out"),
        ({RATE: {"values": [0.1]}}, {"goal": "max"}, "minimize"),
        ({RATE: {"values": [0.1]}}, {"metric": ""}, "at least 1"),
        ({RATE: {"values": [0.1]}}, {"max_running": 0}, "greater"),
        ({"training..x": {"values": [0.1]}}, {}, "pattern"),
        ({RATE: {"values": [0.1]}}, {"nope": 1}, "Extra"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(parameters: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        sweep(parameters, **fields)


def test_a_sweep_may_have_as_many_jobs_as_the_limit() -> None:
    assert len(plan_settings(sweep({"training.seed": {"values": list(range(MAX_JOBS))}}))) == MAX_JOBS


def test_rungs_grow_by_the_factor_and_end_before_the_last_step() -> None:
    assert rung_steps(Halving(min_steps=10), 1_000) == [10, 30, 90, 270, 810]
    assert rung_steps(Halving(min_steps=10, reduction_factor=10), 100) == [10]


def test_the_interval_of_a_mean_is_students() -> None:
    score = score_of([1.0, 2.0, 3.0])
    assert score is not None
    assert score.mean == 2.0
    assert score.interval == pytest.approx((2.0 - 4.303 / math.sqrt(3), 2.0 + 4.303 / math.sqrt(3)))


@pytest.mark.parametrize("values", [[], [None], [1.0, math.nan], [math.inf]])
def test_what_is_not_finite_scores_nothing(values: list[float | None]) -> None:
    assert score_of(values) is None


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0, 1), st.integers(2, 5))
def test_one_of_the_factor_goes_on(others: list[float], value: float, factor: int) -> None:
    place = sum(other < value for other in others)
    expected = place < math.ceil((len(others) + 1) / factor)
    assert is_promoted(value, others, factor, is_minimized=True) == expected
    assert is_promoted(-value, [-other for other in others], factor, is_minimized=False) == expected
    assert not is_promoted(math.nan, others, factor, is_minimized=True)
    assert is_promoted(value, [], factor, is_minimized=True)
