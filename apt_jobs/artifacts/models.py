"""Models that can generate or be trained further: from an id to a folder.

An id is a checkpoint's or the name of a local model, a folder with a `config.json` in the models directory.
"""

from pathlib import Path

from sqlalchemy.orm import Session

from apt_jobs.artifacts.checkpoints import complete_checkpoint_dir
from apt_jobs.artifacts.paths import inside
from apt_jobs.db.checkpoints import get_checkpoint
from apt_jobs.errors import InvalidCheckpoint, NotFound
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN, NAME_PATTERN
from apt_jobs.settings import Settings

CONFIG = "config.json"


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


def model_exists(session: Session, settings: Settings, model_id: str) -> bool:
    """Return whether `GET /api/models` would list it."""
    if not CHECKPOINT_ID_PATTERN.match(model_id):
        return local_model_dir(settings, model_id) is not None
    try:
        get_checkpoint(session, model_id)
    except NotFound:
        return False
    return True


def model_dir(session: Session, settings: Settings, model_id: str) -> Path:
    """Return the folder of a checkpoint id or of a local model's name.

    Raises:
        NotFound: there is no such model.
        InvalidCheckpoint: the checkpoint's folder is gone, incomplete or not where checkpoints are.
    """
    if CHECKPOINT_ID_PATTERN.match(model_id):
        folder = complete_checkpoint_dir(settings, get_checkpoint(session, model_id).filename)
        if folder is None:
            raise InvalidCheckpoint(f"checkpoint {model_id} is registered, but its files are not complete on this host")
        return folder
    local = local_model_dir(settings, model_id)
    if local is None:
        raise NotFound(f"no model {model_id!r}; GET /api/models lists what can generate")
    return local
