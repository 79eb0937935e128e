"""A job again, with changes: its own spec patched, from its checkpoint or exactly as it ran if that is asked for."""

import json
from typing import Any, Literal

from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from apt_jobs.db.attempt_facts import last_facts
from apt_jobs.db.checkpoints import best_of_job, newest_of_job
from apt_jobs.db.dataset_pins import pin_dataset
from apt_jobs.db.models import Job
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.jobs.attempt_facts import AttemptFacts
from apt_jobs.jobs.merge_patch import merge_patch
from apt_jobs.jobs.python_environment import MAX_REQUIREMENTS
from apt_jobs.jobs.spec import BUILTIN_ENTRY_POINT, AnyJobSpec, GenerateSpec, TrainSpec

Which = Literal["best", "latest"]
_SPEC: TypeAdapter[TrainSpec | GenerateSpec] = TypeAdapter(AnyJobSpec)


def cloned_spec(
    session: Session, job: Job, patch: dict[str, Any], *, exact: bool = False, checkpoint: Which | None = None
) -> TrainSpec | GenerateSpec:
    """Return the spec of a job to submit again.

    Args:
        session: Of the database.
        job: What is cloned.
        patch: RFC 7396 merge patch of its spec.
        exact: Hold it to the packages that its last attempt ran with.
        checkpoint: Start from that one of the job.

    Raises:
        ValidationError: with the patch it is no job.
        InvalidInput: the patch changes what a clone keeps.
        Conflict: what was asked for is not known, or cannot be had again.
    """
    merged = merge_patch(job.spec, patch)
    if merged.get("kind") != job.kind:
        raise InvalidInput(f"a clone is a job of the same kind, {job.kind!r}; got {merged.get('kind')!r}")
    if checkpoint is not None:
        merged = _from_checkpoint(session, job, merged, checkpoint)
    if exact:
        merged = _exact(session, job, merged)
    return _SPEC.validate_json(json.dumps(merged))  # as a request is


def hold_to_data(session: Session, job: Job, clone: Job) -> None:
    """Let the clone train on the content of the data set that the job trained on, or not at all."""
    if job.dataset_sha256 is not None:
        pin_dataset(session, clone.id, job.dataset_sha256)


def _from_checkpoint(session: Session, job: Job, spec: dict[str, Any], which: Which) -> dict[str, Any]:
    if job.kind != "train":
        raise InvalidInput(f"a {job.kind} job has no checkpoints to start from: leave checkpoint out")
    found = best_of_job(session, job.id) if which == "best" else newest_of_job(session, job.id)
    if found is None:
        raise Conflict(f"job {job.id} has no {which} checkpoint: clone it without one")
    shape = spec.get("model") or {}
    kept = {"model": {"max_seq_len": shape["max_seq_len"]}} if "max_seq_len" in shape else {}
    return {**{key: value for key, value in spec.items() if key != "model"}, **kept, "base_model": found.id}


def _exact(session: Session, job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the spec with the packages of the last attempt."""
    facts = last_facts(session, job.id)
    if facts is None:
        raise Conflict(f"of job {job.id} nobody noted what it ran with: clone it without exact")
    if spec.get("entry_point") == BUILTIN_ENTRY_POINT:
        raise Conflict(
            "the built-in trainer is that of the service, whose version a job does not choose: leave exact out"
        )
    if spec.get("code") is None:
        raise Conflict(
            f"entry point {spec.get('entry_point')!r} is a file of the worker, which may have changed: leave exact out"
        )
    environment = spec.get("environment") or {}
    if environment.get("name") is not None:
        raise Conflict(
            f"environment {environment['name']!r} is the operator's, who may have changed it: leave exact out"
        )
    if environment.get("lock") is not None:
        return spec
    return {**spec, "environment": {"python": _minor(facts), "requirements": _pins(facts)}}


def _minor(facts: AttemptFacts) -> str:
    return ".".join(facts.python.split(".")[:2])


def _pins(facts: AttemptFacts) -> list[str]:
    """Return the packages that an index may have: not this service, whose part for scripts is there anyway."""
    pins = [package for package in facts.packages if "==" in package and not package.startswith("apt-jobs==")]
    if len(pins) > MAX_REQUIREMENTS:
        raise Conflict(f"it ran with {len(pins):,} packages; at most {MAX_REQUIREMENTS} can be listed: leave exact out")
    return pins
