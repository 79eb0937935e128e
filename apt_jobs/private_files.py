"""The data directory and all that is in it belong to one user: nobody else on the machine can read it.

Every process of the service calls `keep_private` when it starts. What it starts inherits the umask: the ranks of a
training and the embedded Valkey as well.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from apt_jobs.errors import Unavailable

logger = logging.getLogger(__name__)

PRIVATE_UMASK = 0o077
OTHERS_BITS = 0o077  # of a mode: what group and others may do
OUR_NAMES = (  # in the data directory; it may hold files of others, too: somebody's home directory, say
    *(
        "apt_jobs.sqlite3*",
        "local.json*",
        "*.lock",
        "checkpoints",
        "code",
        "compile_cache",
        "datasets",
        "environments",
        "files",
        "git",
        "locks",
        "logs",
        "merged",
        "models",
        "prepared",
        "runs",
        "secrets.key",
        "valkey",
    ),
)


def keep_private(data_dir: Path) -> None:
    """Let this process and its children create private files only, and close the data directory to other users.

    The folder is made if it is missing. One of an earlier version, which others may read, is tightened once, with
    all that is ours in it; symbolic links are not followed.

    Raises:
        Unavailable: it cannot be made, or is no folder that this user may use.
    """
    os.umask(PRIVATE_UMASK)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(0, f"user {os.getuid()} may not read and write it")
        ours = [path for name in OUR_NAMES for path in data_dir.glob(name)]
        open_to_others = [path for path in (data_dir, *ours) if _tighten(path)]
    except OSError as exc:
        raise Unavailable(
            f"cannot use the data directory {data_dir}: {exc.strerror}; set APT_JOBS_DATA_DIR (--data-dir) to a folder "
            "of this user"
        ) from exc
    if open_to_others:
        num_tightened = sum(_tighten(path) for path in _inside(ours))
        logger.info(
            "closed the data directory to other users", extra={"num_files": num_tightened + len(open_to_others)}
        )


def _inside(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        if folder.is_symlink():
            continue
        for parent, names, files in os.walk(folder):
            yield from (Path(parent, name) for name in (*names, *files))


def _tighten(path: Path) -> bool:
    """Take the rights of group and others away; whether there were any. A link's target is not touched."""
    try:
        mode = path.lstat().st_mode
        if not mode & OTHERS_BITS or path.is_symlink():
            return False
        path.chmod(mode & ~OTHERS_BITS & 0o7777)
    except FileNotFoundError:
        return False  # deleted meanwhile
    except OSError as exc:  # of another user, or mounted read-only
        logger.warning("others may read a part of the data directory", extra={"path": str(path), "why": exc.strerror})
        return False
    return True
