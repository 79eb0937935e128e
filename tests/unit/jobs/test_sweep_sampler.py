"""Settings chosen by Optuna: within their ranges, the same from the same rows, and better than blind samples."""

import math
import statistics
from typing import Any

from apt_jobs.jobs.sweep_sampler import NUM_RANDOM, Sampler
from apt_jobs.jobs.sweeps import Setting, SweepSpec, plan_settings

RATE = "training.learning_rate"
PARAMETERS: dict[str, Any] = {
    RATE: {"min": 1e-5, "max": 1.0, "scale": "log"},
    "training.batch_size": {"min": 1, "max": 64},
    "argv": {"values": [["a"], ["b", "c"], None, {"d": 1.5}]},
}


def sweep(seed: int = 1, **parameters: Any) -> SweepSpec:
    fields = {"spec": {"kind": "train"}, "parameters": parameters or PARAMETERS, "seed": seed}
    return SweepSpec.model_validate({**fields, "method": "tpe", "num_jobs": 40, "max_running": 1})


def loss_of(setting: Setting) -> float:
    distance: float = abs(math.log10(setting[RATE]) + 3.0)
    return distance


def chosen_by(request: SweepSpec) -> list[Setting]:
    """The settings of a sweep whose jobs run one after the other; a new sampler each time, as in the service."""
    settings: list[Setting] = plan_settings(request)[:1]
    while len(settings) < 40:
        sampler = Sampler(request, is_minimized=True, number=len(settings) + 1)
        for setting in settings:
            sampler.add(setting, loss_of(setting))
        settings.append(sampler.propose())
    return settings


def test_what_is_learned_is_better_than_what_is_sampled_for_each_seed() -> None:
    for seed in (1, 2, 3):
        request = sweep(seed)
        learned = [loss_of(setting) for setting in chosen_by(request)[NUM_RANDOM:]]
        blind = [loss_of(setting) for setting in plan_settings(request)[NUM_RANDOM:]]
        assert statistics.median(learned) < 0.5 * statistics.median(blind)


def test_settings_are_within_their_ranges_and_the_same_for_a_seed() -> None:
    settings = chosen_by(sweep())
    assert settings == chosen_by(sweep())
    assert all(1e-5 <= one[RATE] <= 1.0 and 1 <= one["training.batch_size"] <= 64 for one in settings)
    assert all(type(one["training.batch_size"]) is int for one in settings)
    assert all(one["argv"] in PARAMETERS["argv"]["values"] for one in settings)


def test_settings_that_are_asked_for_at_once_differ() -> None:
    sampler = Sampler(sweep(), is_minimized=False, number=1)
    for setting in plan_settings(sweep()):
        sampler.add(setting, loss_of(setting))
    rates = [sampler.propose()[RATE] for _ in range(8)]
    assert len(set(rates)) == 8
    assert statistics.median(map(loss_of, ({RATE: rate} for rate in rates))) > 1.0  # of the two ends: it maximizes
