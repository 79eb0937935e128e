"""Which model generates: from an id to a folder.

Ids come from requests and file names from training processes: neither is trusted with a path.
"""

from apt_jobs.artifacts.models import ModelFolders, model_folders, resolve_model
from apt_jobs.db.checkpoints import get_checkpoint, newest_checkpoint
from apt_jobs.db.engine import Database
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN
from apt_jobs.settings import Settings


def choose_model(database: Database, asked: str | None) -> str:
    """Return the id of the model to use: the one asked for, else the service's default, else the newest checkpoint.

    Raises:
        InvalidInput: there is none.
        NotFound: the job that was asked for has no such checkpoint, or the default was deleted. Which model takes its
            place is for a person to say.
    """
    with database.read() as session:
        if asked is not None:
            return resolve_model(session, asked)
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


def find_model(settings: Settings, database: Database, model_id: str) -> ModelFolders:
    """Return the folders of a checkpoint id, a job's id or a local model's name.

    Raises:
        NotFound: there is no such model, or it is an adapter whose base model is gone.
        InvalidCheckpoint: the checkpoint's folder is gone, incomplete or not where checkpoints are.
    """
    with database.read() as session:
        return model_folders(session, settings, model_id)
