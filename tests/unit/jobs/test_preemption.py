"""Which jobs yield: those with the least work lost among those whose end makes room."""

import pytest
from pydantic import ValidationError

from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Gpu, Held, Offer
from apt_jobs.jobs.preemption import choose_victims
from apt_jobs.jobs.spec import TrainSpec

OFFER = Offer(gpus=tuple(Gpu(index, "NVIDIA H100", 85.0) for index in range(8)), cpus=64, memory_gb=512.0, max_jobs=16)
HELD = {
    "half": Held(gpus=(0, 1, 2, 3)),
    "pair": Held(gpus=(4, 5)),
    "one": Held(gpus=(6,)),
    "other": Held(gpus=(7,)),
}


@pytest.mark.parametrize(
    ("num_gpus", "lost_s", "victims"),
    [
        (1, {"half": 9.0, "pair": 8.0, "one": 7.0, "other": 6.0}, ("other",)),
        (2, {"half": 9.0, "pair": 8.0, "one": 3.0, "other": 4.0}, ("one", "other")),
        (2, {"half": 9.0, "pair": 5.0, "one": 3.0, "other": 4.0}, ("pair",)),  # less than both together
        (4, {"half": 9.0, "one": 1.0, "other": 2.0}, ("half",)),  # what is too small stays
        (3, {"pair": 1.0, "one": 2.0, "other": 3.0}, ("pair", "one")),
        (8, {"half": 1.0, "pair": 1.0, "one": 1.0, "other": 1.0}, ("half", "one", "other", "pair")),
        (8, {"half": 1.0, "pair": 1.0, "one": 1.0}, None),  # one may not yield
        (1, {}, None),
        (9, {"half": 1.0, "pair": 1.0, "one": 1.0, "other": 1.0}, None),  # never fits
    ],
)
def test_the_least_work_is_lost(num_gpus: int, lost_s: dict[str, float], victims: tuple[str, ...] | None) -> None:
    assert choose_victims(OFFER, HELD, Needs(num_ranks=num_gpus), lost_s) == victims


def test_slots_and_memory_are_room_as_well() -> None:
    offer = Offer(cpus=8, memory_gb=16.0, max_jobs=2)
    held = {"small": Held(cpus=1, memory_gb=1.0), "large": Held(cpus=1, memory_gb=12.0)}
    assert choose_victims(offer, held, Needs(), {"small": 1.0, "large": 2.0}) == ("small",)
    assert choose_victims(offer, held, Needs(memory_gb=8.0), {"small": 1.0, "large": 2.0}) == ("large",)


def test_own_scripts_yield_only_if_they_say_so() -> None:
    script = {"kind": "train", "entry_point": "mine"}
    assert TrainSpec(kind="train").is_preemptible
    assert not TrainSpec(kind="train", preemptible=False).is_preemptible
    assert not TrainSpec.model_validate(script).is_preemptible
    assert TrainSpec.model_validate({**script, "preemptible": True}).is_preemptible


@pytest.mark.parametrize("grace", [0, -1, 1e9, float("nan"), float("inf"), "soon"])
def test_a_grace_period_is_a_length_of_time(grace: object) -> None:
    with pytest.raises(ValidationError, match="grace_period_s"):
        TrainSpec.model_validate({"kind": "train", "grace_period_s": grace})
