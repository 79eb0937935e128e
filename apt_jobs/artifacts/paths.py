"""The one rule for a path made from a name that somebody else chose: a rank, a request, a row of the database."""

from pathlib import Path, PurePosixPath


def inside(root: Path, name: str) -> Path | None:
    """Return `root/name` with all links resolved, or None where that is not strictly below `root`.

    A name is a relative path of plain parts: not empty, not absolute, no `.` or `..`, no NUL, and nothing that the file
    system cannot hold. Links may not lead out of `root`; `root` itself may be one. What the path names need not exist.
    """
    if not is_plain_name(name):
        return None
    try:
        resolved_root = root.resolve()
        path = (resolved_root / name).resolve()
        path.exists()  # raises for what is too long to be a name
    except (OSError, RuntimeError, ValueError):  # also a loop of links, and a lone surrogate
        return None
    return path if resolved_root in path.parents else None


def is_plain_name(name: str) -> bool:
    """Return whether a name is a relative path that goes down only, whatever is on the disk."""
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and "\0" not in name and not {"", ".", ".."}.intersection(parts)
