"""Models that can generate or be trained further: from a name to an id, from an id to a folder.

An id is a checkpoint's or the name of a local model, a folder with a `config.json` in the models directory. A name is
also an alias, which somebody gave (`db/model_aliases.py`), a job's id, which is its newest checkpoint, or its best one
if it has ended and asked for that, or the id with `@best`, `@latest` or a step, which is the checkpoint that it has at
that moment.
"""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from apt_jobs.artifacts.adapters import MAX_ADAPTERS, base_model_of, is_adapter_dir
from apt_jobs.artifacts.checkpoints import complete_checkpoint_dir
from apt_jobs.artifacts.paths import inside
from apt_jobs.db.checkpoints import best_of_job, checkpoint_at_step, get_checkpoint, model_of_job, newest_of_job
from apt_jobs.db.model_aliases import alias_target
from apt_jobs.errors import InvalidCheckpoint, LostBase, NotFound
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN, JOB_ID_PATTERN, NAME_PATTERN
from apt_jobs.settings import Settings

CONFIG = "config.json"
EXTERNAL_PREFIX = "external."  # of the ids of models that an external engine has


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """Where a model is: the folder of whole weights, and those of adapters to add to it, in their order."""

    folder: Path
    adapters: tuple[Path, ...] = ()


def is_model_dir(folder: Path) -> bool:
    """Return whether a folder holds a model, as Hugging Face's libraries save one."""
    return (folder / CONFIG).is_file()


def local_model_dir(settings: Settings, name: str) -> Path | None:
    """Return the folder of a local model; None: there is none of that name in the models directory."""
    folder = inside(settings.local_models_dir, name) if NAME_PATTERN.fullmatch(name) else None
    return folder if folder is not None and is_model_dir(folder) else None


def list_local_models(settings: Settings) -> list[str]:
    """Return the names of the local models, sorted."""
    folder = settings.local_models_dir
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if local_model_dir(settings, path.name) is not None)


def resolve_model(session: Session, name: str) -> str:
    """Return the id that a name stands for now; what is neither an alias nor of a job is returned as it is.

    Raises:
        NotFound: the job has no such checkpoint.
    """
    name = alias_target(session, name) or name
    job_id, separator, which = name.partition("@")
    if not separator and not JOB_ID_PATTERN.match(name):
        return name
    if which == "best":
        row = best_of_job(session, job_id)
    elif which == "latest":
        row = newest_of_job(session, job_id)
    elif not which:
        row = model_of_job(session, job_id)
    else:
        row = checkpoint_at_step(session, job_id, int(which))
    if row is None:
        raise NotFound(
            f"job {job_id!r} has no checkpoint {which or 'yet'!r}; GET /api/checkpoints?job_id= lists what it has"
        )
    return row.id


def model_exists(session: Session, settings: Settings, name: str) -> bool:
    """Return whether a name, alias or id is one of a model."""
    try:
        model_id = resolve_model(session, name)
        if CHECKPOINT_ID_PATTERN.match(model_id):
            get_checkpoint(session, model_id)
            return True
    except NotFound:
        return False
    return local_model_dir(settings, model_id) is not None


def lost_base(session: Session, settings: Settings, model_id: str) -> str | None:
    """Return the id of a base model that a model on this machine needs and that is gone; None: there is none."""
    try:
        model_folders(session, settings, model_id)
    except LostBase as exc:
        return exc.base_model
    except (NotFound, InvalidCheckpoint):
        pass
    return None


def model_folders(session: Session, settings: Settings, model_id: str) -> ModelFolders:
    """Return where the model of an id is; of an adapter's checkpoint its base model, too.

    Raises:
        NotFound: there is no such model.
        LostBase: it is an adapter, and there is no such base model.
        InvalidCheckpoint: the checkpoint's folder is gone, incomplete or not where checkpoints are.
    """
    folder, adapters = model_dir(session, settings, model_id), list[Path]()
    while is_adapter_dir(folder):
        base = base_model_of(folder)
        if len(adapters) == MAX_ADAPTERS:
            raise InvalidCheckpoint(f"model {model_id} has more than {MAX_ADAPTERS} adapters, one upon the other")
        adapters.insert(0, folder)
        try:
            folder = model_dir(session, settings, base)
        except NotFound as exc:
            raise LostBase(model_id, base) from exc
    return ModelFolders(folder, tuple(adapters))


def model_dir(session: Session, settings: Settings, model_id: str) -> Path:
    """Return the folder of a checkpoint id, of what a job's id names or of a local model's name.

    Raises:
        NotFound: there is no such model.
        InvalidCheckpoint: the checkpoint's folder is gone, incomplete or not where checkpoints are.
    """
    if JOB_ID_PATTERN.match(model_id):
        row = model_of_job(session, model_id)
        if row is None:
            raise NotFound(f"job {model_id} has no checkpoint")
        model_id = row.id
    if CHECKPOINT_ID_PATTERN.match(model_id):
        folder = complete_checkpoint_dir(settings, get_checkpoint(session, model_id).filename)
        if folder is None:
            raise InvalidCheckpoint(f"checkpoint {model_id} is registered, but its files are not complete on this host")
        return folder
    local = local_model_dir(settings, model_id)
    if local is None:
        raise NotFound(f"no model {model_id!r}; GET /api/models lists what can generate")
    return local
