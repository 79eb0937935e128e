"""What a sweep is: one training job with some fields varied. Pure: from the request to the planned jobs.

The settings of a request are always the same ones, so that what was planned can be looked at again: a sample depends on
the request and its seed alone.
"""

import copy
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.spec import Title, TrainSpec
from apt_jobs.jobs.strict_model import Strict

MAX_JOBS = 1_000  # of a sweep
MAX_PARAMETERS = 50
MAX_REPEATS = 20
SEED_FIELD = "training.seed"
SAMPLED = ("random", "halving", "tpe")  # methods that take ranges
EDITED = frozenset({"name", "labels", "priority", "queue"})
_WHOLE_KEYS = ("arguments", "labels", "env")  # objects whose keys may have dots: the rest of a path is one key
_MAX_DRAWS = 100  # for each setting that has to differ from those before

ParameterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=200)]
Setting = dict[str, Any]
End = Annotated[int, Field(ge=-(2**53), le=2**53)] | Annotated[float, Field(ge=-1e300, le=1e300)]


@dataclass(frozen=True, slots=True)
class SweepFault:
    """A part of a sweep's request that is wrong; `path` is where, from the root of the body."""

    path: tuple[str, ...]
    seen: str
    detail: str


class InvalidSweep(InvalidInput):
    """The request plans no jobs, too many, or jobs that cannot be submitted."""

    def __init__(self, faults: Sequence[SweepFault]) -> None:
        super().__init__("; ".join(f"{'.'.join(fault.path)}: {fault.detail}" for fault in faults))
        self.faults = list(faults)


class Values(Strict):
    """Values to try."""

    values: list[Any] = Field(min_length=1, max_length=MAX_JOBS)

    @model_validator(mode="after")
    def _differ(self) -> Self:
        seen: dict[str, Any] = {}
        for value in self.values:
            if (key := _key_of(value)) in seen:
                raise ValueError(f"the value {value!r} is there twice; repeats over seeds are asked for by `repeats`")
            seen[key] = value
        return self


class Range(Strict):
    """A range to sample from; of integers if both ends are integers."""

    min: End
    max: End
    scale: Literal["linear", "log"] = Field("linear", description="log: every order of magnitude alike.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"min={self.min} must be below max={self.max}")
        if self.scale == "log" and self.min <= 0:
            raise ValueError(f"a log scale needs min above 0; got {self.min}")
        return self

    def draw(self, chance: random.Random) -> int | float:
        """Return a number of the range, both ends included."""
        if isinstance(self.min, int) and isinstance(self.max, int):
            if self.scale == "linear":
                return chance.randint(self.min, self.max)
            # Each integer has the share of the log scale that rounds to it.
            drawn = math.exp(chance.uniform(math.log(self.min - 0.5), math.log(self.max + 0.5)))
            return min(max(round(drawn), self.min), self.max)
        if self.scale == "linear":
            return chance.uniform(self.min, self.max)
        return min(max(math.exp(chance.uniform(math.log(self.min), math.log(self.max))), self.min), self.max)


class Halving(Strict):
    """When jobs are compared, and how many of them go on (ASHA, Li et al. 2018, in its form that stops jobs)."""

    min_steps: int = Field(ge=1, description="Steps before the first comparison.")
    reduction_factor: int = Field(
        3, ge=2, le=10, description="One of so many goes on; each comparison is so many times later."
    )
    max_steps: int | None = Field(None, ge=2, description="Steps of a whole job; default: what it reports.")


class SweepSpec(Strict):
    """A sweep: jobs that differ in `parameters`."""

    name: Title | None = Field(None, description="Shown in lists; default: the job's name.")
    spec: dict[str, Any] = Field(description="The training job, as `POST /api/jobs` takes it.")
    parameters: dict[ParameterName, Values | Range] = Field(
        min_length=1, max_length=MAX_PARAMETERS, description="By field of the job, as `training.learning_rate`."
    )
    method: Literal["grid", "random", "list", "halving", "tpe"] = Field(
        "grid",
        description="grid: all combinations; list: the first values of all, the second ones, ...; random: `num_jobs` "
        "samples; halving: the same, of which those that fall short are stopped early; tpe: the same, each chosen by "
        "what those before it reached.",
    )
    num_jobs: int | None = Field(None, ge=1, description="How many settings random, halving and tpe sample.")
    seed: int = Field(1, ge=0, le=2**63 - 1, description="Of the samples.")
    repeats: int = Field(1, ge=1, le=MAX_REPEATS, description="Jobs of each setting, which differ in training.seed.")
    metric: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        "val_loss",
        description="train_loss, val_loss, best_val_loss, grad_norm, tokens_per_s, or a name that the script logs.",
    )
    goal: Literal["minimize", "maximize"] | None = Field(None, description="Default: what the metric's name suggests.")
    max_running: int | None = Field(None, ge=1, le=MAX_JOBS, description="Most of its jobs at once; null: no limit.")
    halving: Halving | None = Field(None, description="Of the method halving.")

    @model_validator(mode="after")
    def _fits_its_method(self) -> Self:
        samples = self.method in SAMPLED
        if samples and self.num_jobs is None:
            raise ValueError(f"method={self.method} needs num_jobs: how many settings to sample")
        if not samples and any(isinstance(one, Range) for one in self.parameters.values()):
            raise ValueError(f"method={self.method} needs `values`; a range is for {', '.join(SAMPLED)}")
        if self.method == "tpe":
            self._require_learning()
        if (self.method == "halving") != (self.halving is not None):
            raise ValueError("`halving` goes with method=halving: it has min_steps")
        if self.method == "halving" and self.repeats > 1:
            raise ValueError(f"halving compares single jobs: repeats={self.repeats} must be 1")
        if self.repeats > 1 and SEED_FIELD in self.parameters:
            raise ValueError(f"repeats sets {SEED_FIELD}, which is a parameter, too: leave one of them out")
        return self

    def _require_learning(self) -> None:
        if self.max_running is None:
            raise ValueError("method=tpe needs max_running: a job is chosen by what those before it reached")
        if fixed := sorted(self.parameters.keys() & EDITED):
            raise ValueError(f"method=tpe cannot vary {fixed[0]}, which people edit while a job waits")

    @property
    def is_minimized(self) -> bool:
        """Whether the smaller value of the metric is better; needs a `goal`."""
        return self.goal == "minimize"


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job of a sweep."""

    number: int  # of its setting, from 1
    repeat: int  # from 0
    setting: Setting
    spec: TrainSpec


def plan_jobs(sweep: SweepSpec) -> list[PlannedJob]:
    """Return all jobs of a sweep, in order.

    Raises:
        InvalidSweep: there are none or too many, or one of them is no training job.
    """
    _require_separate(list(sweep.parameters))
    settings = plan_settings(sweep)
    planned = []
    for number, setting in enumerate(settings, start=1):
        for repeat in range(sweep.repeats):
            spec = spec_of(sweep, setting, repeat)
            suffix = f" #{number}" + (f".{repeat + 1}" if sweep.repeats > 1 else "")
            name = sweep.name or spec.name or "sweep"
            titled = spec.model_copy(update={"name": f"{name[: 200 - len(suffix)]}{suffix}"})
            planned.append(PlannedJob(number, repeat, setting, titled))
    if sweep.halving is not None:
        whole = sweep.halving.max_steps or planned[0].spec.training.max_steps
        if whole is not None and not rung_steps(sweep.halving, whole):
            raise _fault(("halving", "min_steps"), sweep.halving.min_steps, f"less than the {whole} steps of a job")
    return planned


def single_changes(sweep: SweepSpec, planned: Sequence[PlannedJob]) -> list[TrainSpec]:
    """Return the first job with each value of each parameter, to be checked where settings are chosen later.

    Raises:
        InvalidSweep: one of them is no training job.
    """
    lists = {name: one.values for name, one in sweep.parameters.items() if isinstance(one, Values)}
    first = planned[0].setting
    return [spec_of(sweep, {**first, name: value}, 0) for name, values in lists.items() for value in values]


def plan_settings(sweep: SweepSpec) -> list[Setting]:
    """Return the settings to try, all different.

    Raises:
        InvalidSweep: there are too many, or not as many as were asked for.
    """
    names = list(sweep.parameters)
    if sweep.method in SAMPLED:
        assert sweep.num_jobs is not None  # the model asks for it
        _require_number(sweep.num_jobs * sweep.repeats)
        return _sampled(sweep, sweep.num_jobs)
    columns = [parameter.values for parameter in sweep.parameters.values() if isinstance(parameter, Values)]
    if sweep.method == "list":
        lengths = {len(column) for column in columns}
        if len(lengths) > 1:
            counts = ", ".join(f"{name} {len(column)}" for name, column in zip(names, columns, strict=True))
            raise _fault(("parameters",), counts, "as many values of each parameter: method=list takes them together")
        number = lengths.pop()
    else:
        number = math.prod(map(len, columns))
    _require_number(number * sweep.repeats)
    if sweep.num_jobs not in (None, number):
        raise _fault(("num_jobs",), sweep.num_jobs, f"leave it out: these values make {number} settings")
    rows = zip(*columns, strict=True) if sweep.method == "list" else itertools.product(*columns)
    return [dict(zip(names, row, strict=True)) for row in rows]


def rung_steps(halving: Halving, num_steps: int) -> list[int]:
    """Return the steps at which jobs are compared: all below `num_steps`, those of a whole job."""
    steps, step = [], halving.min_steps
    while step < num_steps:
        steps.append(step)
        step *= halving.reduction_factor
    return steps


def _sampled(sweep: SweepSpec, number: int) -> list[Setting]:
    chance = random.Random(sweep.seed)  # noqa: S311  # a sample, not a secret
    lists = [parameter.values for parameter in sweep.parameters.values() if isinstance(parameter, Values)]
    if len(lists) == len(sweep.parameters) and number > (size := math.prod(map(len, lists))):
        raise _fault(("num_jobs",), number, f"at most {size}: there are no more different settings")
    found: dict[str, Setting] = {}
    for _ in range(_MAX_DRAWS * number):
        setting = {
            name: parameter.draw(chance) if isinstance(parameter, Range) else chance.choice(parameter.values)
            for name, parameter in sweep.parameters.items()
        }
        found.setdefault(_key_of(setting), setting)
        if len(found) == number:
            return list(found.values())
    raise _fault(("num_jobs",), number, f"about {len(found)}: there are hardly more different settings")


def spec_of(sweep: SweepSpec, setting: Setting, repeat: int) -> TrainSpec:
    """Return the job of a setting.

    Raises:
        InvalidSweep: it is no training job.
    """
    values = copy.deepcopy(sweep.spec)
    for name, value in setting.items():
        _set(values, name, value)
    if sweep.repeats > 1:
        training = values.get("training")
        first = training.get("seed", 1) if isinstance(training, dict) else 1
        if not isinstance(first, int):
            raise _fault(("spec", *SEED_FIELD.split(".")), first, "an integer")
        _set(values, SEED_FIELD, first + repeat)
    try:
        return TrainSpec.model_validate_json(json.dumps(values))
    except ValidationError as exc:
        raise InvalidSweep([_fault_of(sweep, error) for error in exc.errors(include_url=False)[:100]]) from exc


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    parts = _parts(name)
    for part in parts[:-1]:
        inner = values.get(part)
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise _fault(("parameters", name), inner, f"a field of the job: {part!r} has no fields")
        values = inner
    values[parts[-1]] = value


def _parts(name: str) -> list[str]:
    first = name.partition(".")[0]
    return name.split(".", 1) if first in _WHOLE_KEYS else name.split(".")


def _fault_of(sweep: SweepSpec, error: Mapping[str, Any]) -> SweepFault:
    """Return a fault at the parameter that made it, else at the field of the job."""
    where = tuple(str(part) for part in error["loc"])
    seen = repr(error["input"])[:200]
    for name in sweep.parameters:
        parts = tuple(_parts(name))
        if where[: len(parts)] == parts or (where and parts[: len(where)] == where and error["type"] != "missing"):
            return SweepFault(("parameters", name), seen, error["msg"])
    return SweepFault(("spec", *where), seen, error["msg"])


def _require_separate(names: Sequence[str]) -> None:
    for outer, inner in itertools.permutations(names, 2):
        if inner.startswith(f"{outer}."):
            raise _fault(("parameters", inner), inner, f"{outer!r} holds it already: leave one of them out")


def _require_number(number: int) -> None:
    if number > MAX_JOBS:
        raise _fault(("parameters",), f"{number:,} jobs", f"at most {MAX_JOBS:,} jobs: try fewer values, or sample")


def _key_of(value: Any) -> str:
    """Return the same text for values that are the same for a job, as 1 and 1.0."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _fault(path: tuple[str, ...], seen: object, detail: str) -> InvalidSweep:
    return InvalidSweep([SweepFault(path, repr(seen)[:200], f"expected {detail}; got {str(seen)[:100]}")])
