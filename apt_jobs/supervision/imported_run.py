"""A run that was recorded outside of any job becomes a job that has ended: `apt-jobs import FOLDER`.

Its spools are checked whole before anything is stored. Then they take the way of a job's spools: ranks joined by step,
incidents found, events appended by an attempt. The job is claimed in the transaction that inserts it, so that no
worker ever sees it wait; an import that breaks off leaves a dead job, never one that runs.
"""

import hashlib
import shutil
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, finish, insert_job
from apt_jobs.diagnosis.rank_watch import RankWatch
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.events.codec import MAX_EVENT_BYTES, decode_spooled
from apt_jobs.events.kinds import (
    EVENT_TYPES,
    Event,
    LayersNamed,
)
from apt_jobs.jobs.limits import MAX_ROLLBACKS, MAX_STEP
from apt_jobs.jobs.media import MAX_JOB_FILES, MEDIA_FOLDER
from apt_jobs.jobs.printable import escaped
from apt_jobs.jobs.retry import IMPORT_WORKER
from apt_jobs.jobs.run_file import spool_name
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState

QUEUE = "imported"  # no worker serves it
LEASE_S = 600.0  # between two batches; afterwards the import is dead
BATCH_EVENTS = 500
RANK_EVENTS = 20  # read of one rank at a time: ranks are read in turns, so that their steps meet
MAX_RANKS = 512  # as `TrainSpec.num_ranks`
# What the monitor writes; anything else could claim checkpoints or states that are not there.
MONITORED = tuple(cls for cls in EVENT_TYPES if cls.is_monitored)
Timed = tuple[datetime, Event]


def import_run(
    database: Database, folder: Path, name: str | None = None, runs_dir: Path | None = None
) -> tuple[str, bool]:
    """Store a run, its images and tables below `runs_dir`; returns its job's id, and whether it is new.

    The same spools always give the same job.

    Raises:
        InvalidInput: the folder is no run; the message names file and line.
        Conflict: another import of it is going on or broke off.
    """
    folder = folder.resolve()
    spools = _spools(folder)
    key = f"import:{_checked(spools)}"
    spec = TrainSpec(
        kind="train",
        name=escaped(name or folder.name)[:200],
        queue=QUEUE,
        labels={"imported": escaped(folder.name)[:200]},
        max_attempts=1,
        num_ranks=len(spools),
    )
    with database.write() as session:
        job = insert_job(session, spec, import_key=key)
        job_id, state = job.id, job.state
        is_new = job.attempt == 0 and claim(session, job_id, IMPORT_WORKER, LEASE_S) is not None
    if is_new:
        if runs_dir is not None:
            _copy_media(folder / MEDIA_FOLDER, runs_dir / job_id / MEDIA_FOLDER)
        _store(database, job_id, spec, folder, spools)
    elif state != JobState.SUCCEEDED:
        raise Conflict(f"an earlier import of this run is {state}: job {job_id}; delete that job to import it again")
    return job_id, is_new


def _copy_media(source: Path, target: Path) -> None:
    """Copy images and tables, as many as a job may have; a link is none."""
    files = sorted(file for file in source.glob("[!.]*") if file.is_file() and not file.is_symlink())
    if files:
        target.mkdir(parents=True, exist_ok=True)
    for file in files[:MAX_JOB_FILES]:
        shutil.copyfile(file, target / file.name)


def _spools(folder: Path) -> list[Path]:
    """Return the spools of all ranks, by rank."""
    found = sorted(folder.glob("rank-*.spool")) if folder.is_dir() else []
    if not found:
        raise InvalidInput(f"{folder} has no spool: name the folder of one run, which has rank-0.spool")
    if len(found) > MAX_RANKS:
        raise InvalidInput(f"{folder} has {len(found)} spools; at most {MAX_RANKS}")
    spools = [folder / spool_name(rank) for rank in range(len(found))]
    missing = [path.name for path in spools if not path.is_file()]
    if missing:
        raise InvalidInput(f"{folder} has {len(found)} spools, and {missing[0]} is not among them")
    return spools


def _checked(spools: list[Path]) -> str:
    """Return SHA-256 of all that will be stored.

    Raises:
        InvalidInput: a line is not an event that the monitor writes for this rank.
    """
    digest, num_layers = hashlib.sha256(), 0
    for rank, path in enumerate(spools):
        for number, line in enumerate(_lines(path), start=1):
            digest.update(b"%d " % rank + line)
            try:
                event = decode_spooled(line)[1]
                if isinstance(event, LayersNamed):
                    num_layers = len(event.names)
                _check(event, rank, num_layers)
            except InvalidInput as exc:
                remedy = "if a full disk cut it, remove it"
                raise InvalidInput(f"{path.name}, line {number}: {exc}; {remedy}"[:1000]) from exc
    return digest.hexdigest()


def _check(event: Event, rank: int, num_layers: int) -> None:
    if not isinstance(event, MONITORED):
        raise InvalidInput(f"a run outside of a job has no {event.kind!r} event")
    counts = getattr(event, "step", 0) / MAX_STEP, getattr(event, "num_rollbacks", 0) / MAX_ROLLBACKS
    if not (0 <= min(counts) <= max(counts) <= 1 and getattr(event, "num_samples", 1) > 0):
        raise InvalidInput("its step or another of its counts is out of bounds")
    if getattr(event, "rank", rank) != rank:
        raise InvalidInput(f"the event is of another rank than {rank}")
    for norms in (getattr(event, field, ()) for field in ("norms", "weight_norms", "update_ratios")):
        if len(norms) > num_layers:
            raise InvalidInput(f"the event has {len(norms)} layers, and only {num_layers} were named")
    for index in (*getattr(event, "anomalous", ()), *getattr(event, "order", ())):
        if not 0 <= index < num_layers:
            raise InvalidInput(f"the event has a layer {index}, and only {num_layers} were named")


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines, each with its end; a last one that a killed rank left without is not an event."""
    with path.open("rb") as file:
        while line := file.readline(MAX_EVENT_BYTES + 2):
            if line != b"\n" and (line.endswith(b"\n") or len(line) > MAX_EVENT_BYTES):
                yield line


def _store(database: Database, job_id: str, spec: TrainSpec, folder: Path, spools: list[Path]) -> None:
    """Store what the watch makes of the spools, batch by batch, and end the job.

    Raises:
        Fenced: it took so long that the attempt was given up.
    """
    events = _watched(spec, spools)
    while batch := list(islice(events, BATCH_EVENTS)):
        with database.write() as session:
            append_events(session, job_id, 1, batch, LEASE_S)
    with database.write() as session:
        finish(session, job_id, 1, JobState.SUCCEEDED, reason=f"imported from {folder.name}")


def _watched(spec: TrainSpec, spools: list[Path]) -> Iterator[Timed]:
    watch = RankWatch(spec)
    waiting = [map(decode_spooled, _lines(path)) for path in spools]
    while waiting:
        for events in list(waiting):
            batch = list(islice(events, RANK_EVENTS))
            if not batch:
                waiting.remove(events)
            for at, event in batch:
                yield from watch.add(at, event)
    yield from watch.end()
