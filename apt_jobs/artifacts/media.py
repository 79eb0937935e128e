"""Images and tables that a job logged: from an event to its file. What a file is, its bytes say, not its script."""

from pathlib import Path

from apt_jobs.artifacts.paths import inside
from apt_jobs.artifacts.runs import runs_of_job
from apt_jobs.errors import NotFound
from apt_jobs.events.kinds import MediaLogged
from apt_jobs.jobs.media import HEAD_BYTES, MAX_IMAGE_BYTES, MAX_TABLE_BYTES, MEDIA_FOLDER, image_type
from apt_jobs.settings import Settings


def media_file(settings: Settings, job_id: str, event: MediaLogged) -> tuple[Path, str]:
    """Return the file of an event, and the media type by which it may be shown.

    Raises:
        NotFound: it is not there, leads out of the job's folder, or is not what the event calls it.
    """
    file = inside(runs_of_job(settings, job_id) / MEDIA_FOLDER, event.filename)
    try:
        if file is not None and file.is_file():
            is_image = event.form == "image"
            if file.stat().st_size > (MAX_IMAGE_BYTES if is_image else MAX_TABLE_BYTES):
                raise NotFound(f"the {event.form} is larger than any that a job may log")
            with file.open("rb") as opened:
                kind = image_type(opened.read(HEAD_BYTES)) if is_image else "application/json"
            if kind is not None:
                return file, kind
    except OSError:
        pass
    raise NotFound(f"the {event.form} is not there any more, or is none")
