"""Submit a job: check what it refers to, insert it. Every door goes through here: REST, schedules, "run now", retry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from apt_jobs.artifacts.code import find_code, touch_code
from apt_jobs.artifacts.datasets import find_dataset
from apt_jobs.artifacts.models import EXTERNAL_PREFIX, lost_base, model_exists, resolve_model
from apt_jobs.db.checkpoints import hold_checkpoint
from apt_jobs.db.job_groups import insert_jobs
from apt_jobs.db.jobs import get_job, insert_job, new_job
from apt_jobs.db.models import Job
from apt_jobs.db.queues import require_place
from apt_jobs.db.secrets import missing_secrets
from apt_jobs.db.workers import list_workers, warm_models
from apt_jobs.errors import AptJobsError, InvalidInput, InvalidReferences, NotFound, Unavailable
from apt_jobs.git_hosts import host_of
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.parent_results import REFERENCE
from apt_jobs.jobs.spec import (
    BUILTIN_DATASET,
    BUILTIN_ENTRY_POINT,
    CHECKPOINT_ID_PATTERN,
    CODE_ENTRY_POINT,
    GenerateSpec,
    TrainSpec,
    parse_spec,
    queue_of,
)
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.operations.data_directory import require_room
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.preflight import require_fitting
from apt_jobs.settings import Settings

Spec = TrainSpec | GenerateSpec


@dataclass(frozen=True, slots=True)
class ReferenceFault:
    """A field of a job that names what does not exist, or does nothing."""

    field: str
    seen: str
    expected: str


def submit_job(session: Session, settings: Settings, spec: Spec) -> Job:
    """Check a job and insert it. The caller wakes a worker of its queue after the commit.

    Raises:
        InvalidReferences: it names what does not exist.
        InvalidInput: it fits on no GPU of its queue.
        OutOfSpace: the disk has no room for it.
        Unavailable: too many jobs wait.
    """
    require_room(settings)
    hold_model(session, model_named_by(spec))
    require_references(session, settings, spec)
    require_fitting(session, settings, spec)
    return insert_job(session, spec, max_queued_jobs=settings.max_queued_jobs)


def submit_generations(
    session: Session, settings: Settings, specs: Mapping[str, GenerateSpec]
) -> dict[str, Job | AptJobsError]:
    """Check generation jobs, given by their ids-to-be, and insert them together. One that cannot be is an error.

    Raises:
        OutOfSpace: the disk has no room.
    """
    require_room(settings)
    faults: dict[str | None, list[ReferenceFault]] = {}
    outcomes: dict[str, Job | AptJobsError] = {}
    jobs: list[Job] = []
    for job_id, spec in specs.items():
        if spec.model not in faults:
            hold_model(session, model_named_by(spec))
            faults[spec.model] = reference_faults(session, settings, spec)
        if found := faults[spec.model]:
            outcomes[job_id] = _invalid_references(found)
            continue
        try:
            require_place(session, settings.max_queued_jobs)  # counts those of this group: the session flushes first
        except Unavailable as exc:
            outcomes[job_id] = exc
            continue
        job = outcomes[job_id] = new_job(spec, job_id=job_id)
        session.add(job)
        jobs.append(job)
    insert_jobs(session, jobs)
    return outcomes


def checker(settings: Settings) -> Callable[[Session, Spec], None]:
    """Return what `db/schedules.py` calls before it inserts a job: `submit_job`'s checks, with its errors."""

    def check(session: Session, spec: Spec) -> None:
        require_room(settings)
        hold_model(session, model_named_by(spec))
        require_references(session, settings, spec)
        require_fitting(session, settings, spec)

    return check


def require_retriable(session: Session, settings: Settings, job_id: str) -> None:
    """Return if an ended job may wait again as far as what it refers to is concerned.

    Raises:
        NotFound: there is no such job.
        InvalidReferences, OutOfSpace: as `submit_job`.
    """
    spec = parse_spec(get_job(session, job_id).spec)
    require_room(settings)
    hold_model(session, model_named_by(spec))
    # It was accepted once: what does nothing in it is no reason to leave it where it is.
    faults = [
        fault for fault in reference_faults(session, settings, spec) if not fault.field.startswith(("model.", "after/"))
    ]
    if faults:
        raise _invalid_references(faults)


def model_named_by(spec: Spec) -> str | None:
    """Return what a job calls the model that it starts from, or generates with."""
    return spec.base_model if isinstance(spec, TrainSpec) else spec.model


def hold_model(session: Session, name: str | None) -> None:
    """Let the checkpoint that a name stands for be there until what refers to it is, whatever retention removes."""
    if name is None:
        return
    try:
        model_id = resolve_model(session, name)
    except NotFound:
        return
    if CHECKPOINT_ID_PATTERN.match(model_id):
        hold_checkpoint(session, model_id)


def require_references(session: Session, settings: Settings, spec: Spec) -> None:
    """Return if all that the job names exists.

    Raises:
        InvalidReferences: it does not; the error has one fault for each field.
    """
    faults = reference_faults(session, settings, spec)
    if faults:
        raise _invalid_references(faults)


def reference_faults(session: Session, settings: Settings, spec: Spec) -> list[ReferenceFault]:
    """Return every field of the job that names what does not exist, or does nothing beside the others."""
    parents = _parent_faults(session, spec)
    if isinstance(spec, GenerateSpec):
        if spec.model is not None and spec.model.startswith(EXTERNAL_PREFIX):
            return [*parents, *_external_faults(session, settings, spec.model)]
        return [*parents, *_model_faults(session, settings, "model", spec.model)]
    return [
        *parents,
        *_dataset_faults(settings, spec),
        *_model_faults(session, settings, "base_model", spec.base_model),
        *_shape_faults(spec),
        *_entry_point_faults(session, settings, spec),
        *_code_faults(settings, spec),
        *(
            ReferenceFault("secrets", repr(name), f"a name that GET /api/secrets lists: apt-jobs secrets set {name}")
            for name in missing_secrets(session, spec.secrets)
        ),
    ]


def _parent_faults(session: Session, spec: Spec) -> list[ReferenceFault]:
    """Return a fault for each job to come after that is not there, or that ended without the success it needs."""
    faults = []
    for index, after in enumerate(spec.after):
        field, parent = f"after/{index}/job", session.get(Job, after.job)
        if parent is None:
            faults.append(ReferenceFault(field, repr(after.job), "the id of a job"))
        elif after.on == "success" and parent.state in TERMINAL_STATES and parent.state != JobState.SUCCEEDED:
            expected = f"a job that can still succeed, or on: end; it is {parent.state}"
            faults.append(ReferenceFault(field, repr(after.job), expected))
    return faults


def _invalid_references(faults: Sequence[ReferenceFault]) -> InvalidReferences:
    words = "; ".join(f"{fault.field} {fault.seen}: expected {fault.expected}" for fault in faults)
    return InvalidReferences(f"the job names what does not exist, or does nothing: {words}", list(faults))


def _external_faults(session: Session, settings: Settings, model: str) -> list[ReferenceFault]:
    if model in warm_models(session, alive_within_s(settings)):
        return []
    return [ReferenceFault("model", repr(model), "a model that the external engine of a living worker lists")]


def _model_faults(session: Session, settings: Settings, field: str, model: str | None) -> list[ReferenceFault]:
    if model is None or REFERENCE.fullmatch(model):
        return []  # of a parent, whose checkpoint is there when it has ended
    if not model_exists(session, settings, model):
        return [ReferenceFault(field, repr(model), "an id that GET /api/models lists")]
    base = lost_base(session, settings, model)
    if base is None:
        return []
    return [ReferenceFault(field, repr(model), f"its base model {base!r} at its place: it was moved or deleted")]


def _shape_faults(spec: TrainSpec) -> list[ReferenceFault]:
    """Return a fault for each size that a base model brings itself, and that the job asks for otherwise."""
    if spec.base_model is None or spec.entry_point != BUILTIN_ENTRY_POINT:
        return []
    usual = APTConfig()
    return [
        ReferenceFault(f"model.{name}", repr(value), "nothing: the base model has a shape of its own; leave it out")
        for name, value in spec.model
        if name != "max_seq_len" and value != getattr(usual, name)
    ]


def _dataset_faults(settings: Settings, spec: TrainSpec) -> list[ReferenceFault]:
    given = {field: name for field, name in spec.dataset_fields.items() if name != BUILTIN_DATASET}
    return [fault for field, name in given.items() for fault in _faults_of_dataset(settings, spec, field, name)]


def _faults_of_dataset(settings: Settings, spec: TrainSpec, field: str, name: str) -> list[ReferenceFault]:
    try:
        record = find_dataset(settings.datasets_dir, name)
    except NotFound:
        return [ReferenceFault(field, repr(name), "a name that GET /api/datasets lists")]
    except OSError as exc:
        raise InvalidInput(f"the data set {name!r} cannot be read: {exc.strerror}") from exc
    if record.format.is_tokens and spec.base_model is None and spec.entry_point == BUILTIN_ENTRY_POINT:
        return [ReferenceFault("base_model", "null", f"the model whose tokenizer made the tokens of {name!r}")]
    # A token is at least one byte, a document one more; of a compressed file nothing is known.
    min_bytes = spec.model.max_seq_len + 1 if record.format is DatasetFormat.TEXT else 1
    if record.size_bytes >= min_bytes or record.filename.endswith((".gz", ".zst")):
        return []
    expected = f"a data set of at least one sequence: {min_bytes:,} bytes; this one has {record.size_bytes:,}"
    return [ReferenceFault(field, repr(name), expected)]


def _code_faults(settings: Settings, spec: TrainSpec) -> list[ReferenceFault]:
    """Return a fault if nobody may bring code, or if that of the job was not uploaded."""
    if settings.code_role is None and spec.brings_code:
        field, seen = ("environment", "packages") if spec.code is None else ("code", "a packed folder")
        return [ReferenceFault(field, seen, "the operator's consent: APT_JOBS_ALLOW_CODE")]
    if spec.code is not None and spec.code.git is not None:
        if host_of(spec.code.git.url, settings.git_hosts) is not None:
            return []
        return [ReferenceFault("code/git/url", repr(spec.code.git.url), "an address below one of APT_JOBS_GIT_HOSTS")]
    if spec.code is None or spec.code.sha256 is None:
        return []
    touch_code(settings.code_dir, spec.code.sha256)  # it is kept until the job's row holds it
    try:
        find_code(settings.code_dir, spec.code.sha256)
    except NotFound:
        return [ReferenceFault("code/sha256", spec.code.sha256, "code that was uploaded: apt-jobs run does that")]
    return []


def _entry_point_faults(session: Session, settings: Settings, spec: TrainSpec) -> list[ReferenceFault]:
    """Return a fault if workers of the queue live and none of them has the entry point registered."""
    name = spec.entry_point
    if name == BUILTIN_ENTRY_POINT or name in settings.entry_points:
        return []
    queue = queue_of(spec)
    workers = [row for row in list_workers(session, alive_within_s(settings)) if queue in row.queues]
    known = [row.entry_points for row in workers if row.kind == spec.kind]
    if not known or any(names is None or name in names for names in known):
        return []
    if name == CODE_ENTRY_POINT:
        expected = f"that a worker of the queue {queue!r} runs code of jobs: APT_JOBS_ALLOW_CODE is set there"
        return [ReferenceFault("code", "a packed folder", expected)]
    registered = sorted({BUILTIN_ENTRY_POINT, *(name for names in known for name in names or ())} - {CODE_ENTRY_POINT})
    expected = f"one that a worker of the queue {queue!r} has registered: {', '.join(registered)}"
    return [ReferenceFault("entry_point", repr(name), expected)]
