"""Where a download or an export is written: the one room that knows what a target may be.

A regular file is replaced when all of it has come, through symbolic links, which stay; what was there before is whole
until then. Standard output (`-`, `/dev/stdout`, `/dev/fd/1`), FIFOs and devices are written to as they are: nothing is
ever put in their place.
"""

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from apt_jobs.errors import AptJobsError, InvalidInput, OutOfSpace

STANDARD_OUTPUT = "-"
MAX_LINKS = 40  # as the kernel follows
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_REPLACE = (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS)  # of the folder, perhaps not of the file


@contextmanager
def open_output(target: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a target; a regular file appears, whole, when the block ends well.

    Args:
        target: A path, or `-` for standard output.

    Yields:
        What to write to.

    Raises:
        OutOfSpace: the disk is full, or a quota.
        InvalidInput: the target cannot be written, and why.
    """
    path = os.fspath(target)
    try:
        descriptor = _descriptor_of(path)
        if descriptor is not None:
            with _written_as_it_is(descriptor) as output:
                yield output
        elif (mode := _mode_of(path)) is not None and stat.S_ISDIR(mode):
            raise InvalidInput(f"{path} is a folder; name a file in it")
        elif mode is not None and not stat.S_ISREG(mode):
            with _written_as_it_is(os.open(path, os.O_WRONLY | os.O_NOCTTY)) as output:
                yield output
        else:
            with _replaced(Path(os.path.realpath(path)), mode) as output:
                yield output
    except AptJobsError:
        raise
    except BrokenPipeError as exc:
        if path == STANDARD_OUTPUT:
            raise  # `| head` has what it wants
        raise InvalidInput(f"{path}: its reader is gone") from exc
    except OSError as exc:
        raise _error_of(path, exc) from exc
    except ValueError as exc:  # a NUL
        raise InvalidInput(f"{path!r} is no name of a file: {exc}") from exc


def is_stream(target: str | os.PathLike[str]) -> bool:
    """Return whether what is written there is read at once, as from standard output: no other words belong there."""
    path = os.fspath(target)
    with suppress(OSError, ValueError):
        return _is_descriptor(path) or not stat.S_ISREG(_mode_of(path) or stat.S_IFREG)
    return False


def _descriptor_of(path: str) -> int | None:
    """Duplicate the open descriptor that a path means; the file behind it is neither truncated nor replaced."""
    if path == STANDARD_OUTPUT:
        sys.stdout.flush()
        return os.dup(sys.stdout.fileno())
    found = _descriptor_named(path)
    if found is None:
        return None
    sys.stdout.flush()
    return os.dup(found)


def _is_descriptor(path: str) -> bool:
    return path == STANDARD_OUTPUT or _descriptor_named(path) is not None


def _descriptor_named(path: str) -> int | None:
    """Follow links by hand, as far as `/proc/self/fd/N`: behind that is a file that somebody has open."""
    own = {Path("/dev/fd"), Path("/proc/self/fd").resolve(), Path("/proc/thread-self/fd").resolve()}
    at = Path(path)
    for _ in range(MAX_LINKS):
        folder = at.parent.resolve()
        if folder in own and at.name.isdecimal():
            return int(at.name)
        try:
            at = folder / at.name
            at = folder / at.readlink()
        except OSError:
            return None
    return None


def _mode_of(path: str) -> int | None:
    """Return the kind and permissions of what a path leads to; None if there is nothing yet."""
    try:
        return Path(path).stat().st_mode
    except FileNotFoundError:
        return None


@contextmanager
def _written_as_it_is(descriptor: int) -> Iterator[IO[bytes]]:
    with os.fdopen(descriptor, "wb") as output:
        yield output


@contextmanager
def _replaced(path: Path, mode: int | None) -> Iterator[IO[bytes]]:
    """Write beside the file and rename, or into the file where its folder does not allow that."""
    if path.name == "" or not path.parent.is_dir():
        raise InvalidInput(f"the folder {path.parent} does not exist; make it first, or name another one")
    try:
        number, name = tempfile.mkstemp(prefix=".apt-jobs-", suffix=".partial", dir=path.parent)
    except OSError as exc:
        if mode is None or exc.errno not in _CANNOT_REPLACE:
            raise
        with path.open("r+b") as output:  # a file of ours in a folder of others
            yield output
            output.truncate()
        return
    temporary = Path(name)
    try:
        with os.fdopen(number, "w+b") as output:
            yield output
            output.flush()
            os.fsync(output.fileno())  # a full disk or quota may show here only
            os.fchmod(output.fileno(), stat.S_IMODE(mode) if mode is not None else 0o666 & ~_umask())
            _put_in_place(temporary, path, output)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path, written: IO[bytes]) -> None:
    try:
        temporary.replace(path)
    except OSError as exc:
        if exc.errno not in _CANNOT_REPLACE or not path.is_file():
            raise
        written.seek(0)  # a single file that is mounted, as in a container, can be written but not replaced
        with path.open("r+b") as output:
            while part := written.read(1 << 20):
                output.write(part)
            output.truncate()


def _umask() -> int:
    """Return the process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _error_of(path: str, error: OSError) -> AptJobsError:
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return OutOfSpace(f"{path} cannot be written: {why}; free some space or name another disk")
    return InvalidInput(f"{path} cannot be written: {why}")
