"""What each process of the service begins with, before it does anything else."""

from contextlib import suppress

from apt_jobs.directories import prepare_directory
from apt_jobs.errors import OutOfSpace
from apt_jobs.logs import configure_logging
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings


def prepare_process(settings: Settings) -> None:
    """Configure logging, and make the data directory usable and private.

    On a full disk the process starts all the same: what is there can be read.

    Raises:
        InvalidInput, Unavailable: the data directory cannot be used.
    """
    configure_logging(settings.log_level)
    with suppress(OutOfSpace):
        prepare_directory(settings.root, "APT_JOBS_DATA_DIR")
    keep_private(settings.root)
