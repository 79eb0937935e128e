"""A checkpoint of a user's script: its folder copied to those of the job, sealed by a manifest, named by one rename.

What is in the manifest besides sums and sizes says which checkpoint it is: the next attempt knows those of earlier
ones by it, for the best one and for pruning.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_jobs.errors import InvalidInput, OutOfSpace
from apt_jobs.jobs.ids import new_checkpoint_id

MANIFEST = "manifest.json"
RESERVE_BYTES = 16 << 20  # left free on the disk besides the checkpoint
MAX_FILES = 100_000
VAL_LOSS_NAMES = ("val_loss", "eval_loss", "val/loss", "eval/loss", "validation_loss")
TRAIN_LOSS_NAMES = ("train_loss", "loss", "train/loss")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ScriptCheckpoint:
    """A complete checkpoint."""

    id: str
    name: str
    step: int
    val_loss: float | None
    train_loss: float | None
    is_best: bool
    size_bytes: int


def write_script_checkpoint(
    source: Path, parent: Path, attempt: int, step: int, metrics: Mapping[str, Any], *, move: bool
) -> ScriptCheckpoint:
    """Copy or move `source`, a folder or one file, to a new folder below `parent`.

    Raises:
        InvalidInput: there is no such folder, or it holds what a checkpoint cannot.
        OutOfSpace: the disk has no room; nothing is left behind.
    """
    files = list(_files_of(source))
    if not files:
        raise InvalidInput(f"{source} has no file: write the checkpoint first, then register it")
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    size_bytes = sum(size for _, size in files)
    is_move = move and _same_disk(source, parent)
    free = shutil.disk_usage(parent).free
    if not is_move and free < size_bytes + RESERVE_BYTES:
        raise OutOfSpace(f"the checkpoint needs {size_bytes:,} bytes and {free:,} are free in {parent}")
    name = _unused_name(parent, step, attempt)
    temporary = parent / f".tmp-{name}"
    try:
        sums = _collect(source, temporary, [file for file, _ in files], is_move=is_move)
        checkpoint = _described(parent, name, step, metrics, size_bytes)
        _seal(temporary, checkpoint, sums, attempt)
        temporary.rename(parent / name)
        _sync(parent)
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutOfSpace(f"the checkpoint {name!r} cannot be written: {exc}") from exc
    if move and not is_move:
        shutil.rmtree(source, ignore_errors=True) if source.is_dir() else source.unlink(missing_ok=True)
    return checkpoint


def prune_script_checkpoints(parent: Path, num_kept: int) -> list[ScriptCheckpoint]:
    """Remove all but the newest `num_kept` and the best one; returns what was removed, once its name is gone."""
    known = sorted(_known(parent), key=lambda one: one.id)
    best = _best(known)
    doomed = [one for one in known[: -max(num_kept, 1)] if best is None or one.id != best.id]
    for checkpoint in doomed:
        hidden = parent / f".del-{checkpoint.name}"
        try:
            (parent / checkpoint.name).rename(hidden)
        except OSError:
            continue  # a user removed it meanwhile
        shutil.rmtree(hidden, ignore_errors=True)
    return doomed


def _files_of(source: Path) -> Iterator[tuple[Path, int]]:
    """Yield each file relative to `source` with its size. Links inside the folder are followed, others refused."""
    if source.is_file():
        yield Path(source.name), source.stat().st_size
        return
    if not source.is_dir():
        raise InvalidInput(f"there is no folder {source}: save_checkpoint takes the folder of a checkpoint")
    root = source.resolve()
    num_files = 0
    for folder, folders, names in os.walk(source):
        for name in [*folders, *names]:
            path = Path(folder, name)
            if path.is_symlink() and root not in path.resolve().parents:
                raise InvalidInput(f"{path} is a link out of the checkpoint: copy what it names into the folder")
        for name in sorted(names):
            path = Path(folder, name)
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                raise InvalidInput(f"{path} is no regular file")
            num_files += 1
            if num_files > MAX_FILES:
                raise InvalidInput(f"{source} has more than {MAX_FILES:,} files")
            if Path(folder) != source or name != MANIFEST:  # of a copied checkpoint; ours takes its place
                yield path.relative_to(source), path.stat().st_size


def _collect(source: Path, target: Path, files: list[Path], *, is_move: bool) -> dict[str, dict[str, Any]]:
    """Bring the files to `target`; returns sum and size of each. A file that changes meanwhile fails its sum later."""
    if is_move and source.is_dir():
        source.rename(target)
    sums = {}
    target.mkdir(exist_ok=True)
    for relative in files:
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            origin = source if source.is_file() else source / relative
            origin.replace(path) if is_move else shutil.copyfile(origin, path)
        _sync(path)
        sums[relative.as_posix()] = {"sha256": _sha256(path), "size_bytes": path.stat().st_size}
    return sums


def _seal(folder: Path, checkpoint: ScriptCheckpoint, sums: dict[str, dict[str, Any]], attempt: int) -> None:
    document = {
        "files": sums,
        "checkpoint_id": checkpoint.id,
        "step": checkpoint.step,
        "attempt": attempt,
        "val_loss": checkpoint.val_loss,
        "train_loss": checkpoint.train_loss,
        "is_best": checkpoint.is_best,
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(document, indent=1))
    _sync(manifest)
    _sync(folder)


def _described(parent: Path, name: str, step: int, metrics: Mapping[str, Any], size_bytes: int) -> ScriptCheckpoint:
    val_loss = _first_number(metrics, VAL_LOSS_NAMES)
    best = _best(_known(parent))
    is_best = val_loss is not None and (best is None or best.val_loss is None or val_loss < best.val_loss)
    train_loss = _first_number(metrics, TRAIN_LOSS_NAMES)
    return ScriptCheckpoint(new_checkpoint_id(), name, step, val_loss, train_loss, is_best, size_bytes)


def _known(parent: Path) -> list[ScriptCheckpoint]:
    """Return the checkpoints of this job that a script saved."""
    known = []
    for manifest in parent.glob(f"*/{MANIFEST}"):
        try:
            document = json.loads(manifest.read_text())
            known.append(
                ScriptCheckpoint(
                    id=document["checkpoint_id"],
                    name=manifest.parent.name,
                    step=document["step"],
                    val_loss=document["val_loss"],
                    train_loss=document["train_loss"],
                    is_best=document["is_best"],
                    size_bytes=0,
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not ours, or being deleted
    return known


def _best(known: list[ScriptCheckpoint]) -> ScriptCheckpoint | None:
    losses = [(one.val_loss, one.id, one) for one in known if one.val_loss is not None]
    return min(losses)[2] if losses else None


def _first_number(metrics: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        value = metrics.get(name)
        if isinstance(value, int | float) and value - value == 0:  # finite
            return float(value)
    return None


def _unused_name(parent: Path, step: int, attempt: int) -> str:
    name, number = f"step-{step:08d}-a{attempt}", 2
    while (parent / name).exists():
        name, number = f"step-{step:08d}-a{attempt}-{number}", number + 1
    return name


def _sweep(parent: Path) -> None:
    """Remove what a save or a deletion left behind when it was killed."""
    for folder in [*parent.glob(".tmp-*"), *parent.glob(".del-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def _same_disk(source: Path, parent: Path) -> bool:
    return source.stat().st_dev == parent.stat().st_dev and not source.is_symlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
