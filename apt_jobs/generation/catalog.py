"""Which model generates: from an id to a folder.

Ids come from requests and file names from training processes: neither is trusted with a path.
"""

import re
from pathlib import Path

from apt_jobs.artifacts.paths import inside
from apt_jobs.db.checkpoints import get_checkpoint, newest_checkpoint
from apt_jobs.db.engine import Database
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value
from apt_jobs.errors import InvalidCheckpoint, InvalidInput, NotFound
from apt_jobs.generation.models import MANIFEST
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN
from apt_jobs.settings import Settings

LOCAL_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def choose_model(database: Database, asked: str | None) -> str:
    """Return the id of the model to use: the one asked for, else the service's default, else the newest checkpoint.

    Raises:
        InvalidInput: there is none.
        NotFound: the default was deleted. Which model takes its place is for a person to say.
    """
    if asked is not None:
        return asked
    with database.read() as session:
        default = get_value(session, DEFAULT_MODEL)
        if default is None:
            newest = newest_checkpoint(session)
            if newest is None:
                raise InvalidInput("no model can generate yet: train one first, or name a local model")
            return newest.id
        if CHECKPOINT_ID_PATTERN.match(default):
            try:
                get_checkpoint(session, default)
            except NotFound as exc:
                raise NotFound(
                    f"the default model, checkpoint {default}, was deleted; choose another one "
                    "(POST /api/checkpoints/load), or name a model in the request"
                ) from exc
    return default


def find_model(settings: Settings, database: Database, model_id: str) -> Path:
    """Return the folder of a checkpoint id or of a local model's name.

    Raises:
        NotFound: there is no such model.
        InvalidCheckpoint: the checkpoint's folder is gone, incomplete or not where checkpoints are.
    """
    if CHECKPOINT_ID_PATTERN.match(model_id):
        with database.read() as session:
            filename = get_checkpoint(session, model_id).filename
        folder = inside(settings.checkpoints_dir, filename)
        if folder is None or not (folder / MANIFEST).is_file():
            raise InvalidCheckpoint(f"checkpoint {model_id} is registered, but its files are not complete on this host")
        return folder
    local = inside(settings.local_models_dir, model_id) if LOCAL_NAME_PATTERN.fullmatch(model_id) else None
    if local is None or not (local / "config.json").is_file():
        raise NotFound(f"no model {model_id!r}; GET /api/models lists what can generate")
    return local
