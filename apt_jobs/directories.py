"""Directories that must be there and take files: one sentence when one does not, whatever is wrong with it."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_jobs.errors import InvalidInput, OutOfSpace

_PROBE_BYTES = 1 << 16
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def prepare_directory(path: Path, setting: str) -> None:
    """Make the directory if it is not there, and prove that files can be written in it.

    Args:
        path: The directory.
        setting: Name of the setting that chose it, for the message.

    Raises:
        InvalidInput: it cannot be made or written to.
        OutOfSpace: there is no room in it.
    """
    with named_os_errors(f"{setting} is {str(path)!r}, which cannot be used"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:  # to ask for permissions is not enough for root
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()


@contextmanager
def named_os_errors(what: str) -> Iterator[None]:
    """Turn the system's errors into those of this package, as `what: path: reason`.

    Raises:
        OutOfSpace: the disk or a quota is full.
        InvalidInput: any other error of the system.
    """
    try:
        yield
    except OSError as exc:
        where = "" if exc.filename is None else f"{str(exc.filename)!r}: "
        text = f"{what}: {where}{exc.strerror or exc}"
        if exc.errno in _NO_SPACE:
            raise OutOfSpace(f"{text}; free some space there") from exc
        raise InvalidInput(f"{text}; name a directory that this user may write to") from exc
