"""The relay of one attempt: from the ranks' spools to the database, and from there to the live wire.

Stored first, published second: no event is ever seen that a reload would not show. What the database cannot take now
stays in the spool, which the ranks go on filling without noticing.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

from sqlalchemy.orm import Session

from apt_jobs.artifacts.paths import is_plain_name
from apt_jobs.backoff import Backoff
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import StopRequests
from apt_jobs.diagnosis.rank_watch import RankWatch
from apt_jobs.errors import InvalidInput, OutOfSpace, Unavailable
from apt_jobs.events.kinds import (
    ActionTaken,
    CheckpointSaved,
    Event,
    LineLogged,
    RankFailed,
    StoredEvent,
    TrainingFinished,
)
from apt_jobs.events.live import LivePublisher
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.commands import write_commands
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.operations.steer import apply_policy
from apt_jobs.supervision.rank_logs import RankLogs

logger = logging.getLogger(__name__)

BATCH_EVENTS = 500  # read at once, of all ranks together; what is decided from them comes on top
MAX_FILENAME_CHARS = 300  # as the database's column
MIN_LOG_LINES = 50  # read at once, however much the ranks emit
LEAST_RANK_EVENTS = 20  # read at once of one rank: they are read in turns, so that their steps meet
RETRY = Backoff(0.2, 5.0)  # of a transaction that the database did not take


class Relay:
    """Moves events of one attempt. Used by one thread."""

    def __init__(
        self,
        database: Database,
        publisher: LivePublisher,
        run_file: RunFile,
        logs: RankLogs,
        lease_s: float,
        mask: Callable[[str], str] = str,
    ) -> None:
        """`mask` hides the secrets of the job in what it says."""
        self._mask = mask
        self._database, self._publisher = database, publisher
        self._job_id, self._attempt, self._lease_s = run_file.job_id, run_file.attempt, lease_s
        self._spools = [SpoolReader(run_file.spool_path(rank)) for rank in range(run_file.spec.num_ranks)]
        self._checkpoint_prefix = run_file.checkpoint_prefix
        self._watch = RankWatch(run_file.spec)
        self._commands_path, self._num_commands = run_file.commands_path, 0  # written so far
        self._is_over = False  # the ranks have ended and all that they said was read
        self._logs = logs
        self._batch: list[tuple[datetime, Event]] = []  # read but not stored
        self._retry_at_s = 0.0
        self._num_refused = 0  # transactions in a row
        self.failures: list[RankFailed] = []  # in the order in which they were read
        self.finished: TrainingFinished | None = None
        self.decided: str | None = None  # why a policy of the job paused or cancelled it
        self.saved_step: int | None = None  # of the last checkpoint of this attempt
        self.stop_requests = StopRequests(cancel=False, pause=False)
        self.last_event_s = time.monotonic()  # CLOCK_MONOTONIC

    @property
    def last_sign_s(self) -> float:
        """When the ranks last emitted an event or printed a byte: code without the monitor prints at most."""
        return max(self.last_event_s, self._logs.last_output_s)

    def flush(self) -> int:
        """Store and publish what is there, about `BATCH_EVENTS` at most. Returns how many events moved.

        Raises:
            Fenced: the attempt no longer owns the job.
        """
        if time.monotonic() < self._retry_at_s:
            return 0
        if not self._batch:
            self._batch = self._read()
            self._pass_on_commands()
        if not self._batch:
            return 0
        try:
            with self._database.write() as session:
                appended = append_events(session, self._job_id, self._attempt, self._batch, self._lease_s)
                stored = appended.stored + self._apply_decisions(session)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("events wait in the spool", extra={"job_id": self._job_id, "why": str(exc)})
            self._num_refused += 1
            self._retry_at_s = time.monotonic() + RETRY.wait_s(self._num_refused)
            return 0
        self._num_refused = 0
        self._batch = []
        self.stop_requests = appended.stop_requests
        self._publisher.publish(self._job_id, stored)
        return len(stored)

    def has_news(self) -> bool:
        """Return whether a rank wrote something since the last `flush`. Costs one system call a rank."""
        return any(spool.has_more() for spool in self._spools)

    def drain(self, timeout_s: float) -> None:
        """Store all that the ranks left behind; give up after `timeout_s` seconds (the spool files stay).

        Raises:
            Fenced: the attempt no longer owns the job.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.flush() == 0 and not self._batch:
                if self._is_over:
                    return
                self._is_over, self._batch = True, self._watch.end()
                self._logs.end()
            if self._batch:
                time.sleep(RETRY.first_s)

    def remove_spools(self) -> None:
        """Remove the spool files of an attempt that has ended, if all that they hold is stored."""
        if self._is_over and not self._batch:
            for spool in self._spools:
                spool.path.unlink(missing_ok=True)

    def log(self, level: str, message: str) -> None:
        """Add a line of the supervisor's own to the job's log."""
        assert level in ("info", "warning", "error")
        self._logs.add(LineLogged(level, "supervisor", message))  # type: ignore[arg-type]  # the assert narrows it

    def _read(self) -> list[tuple[datetime, Event]]:
        batch: list[tuple[datetime, Event]] = []
        for rank in range(len(self._spools)):
            batch += self._read_rank(rank)
        if batch:
            self.last_event_s = time.monotonic()
        batch.extend(self._logs.read(max(BATCH_EVENTS - len(batch), MIN_LOG_LINES)))
        return batch

    def _read_rank(self, rank: int) -> Iterator[tuple[datetime, Event]]:
        """Yield what one rank emitted, and what the join with the other ranks adds to it."""
        events = self._spools[rank].read()
        try:
            for at, event in islice(events, max(BATCH_EVENTS // len(self._spools), LEAST_RANK_EVENTS)):
                if isinstance(event, CheckpointSaved) and not self._is_own_checkpoint(event):
                    yield at, _refused(rank, event)
                    continue
                event = self._masked(event)
                self._notice(event)
                yield from self._watch.add(at, event)
        except InvalidInput as exc:
            message = f"rank {rank} wrote a line that is no event: {exc}"
            yield datetime.now(UTC), LineLogged("warning", "supervisor", message[:2000])

    def _is_own_checkpoint(self, event: CheckpointSaved) -> bool:
        """Return whether the folder is one of this job's: others read, resume from and delete what is registered."""
        is_own = event.filename.startswith(f"{self._checkpoint_prefix}/")
        return is_own and is_plain_name(event.filename) and len(event.filename) <= MAX_FILENAME_CHARS

    def _masked(self, event: Event) -> Event:
        if isinstance(event, LineLogged):
            return replace(event, message=self._mask(event.message))
        if isinstance(event, RankFailed):
            return replace(event, message=self._mask(event.message), traceback=self._mask(event.traceback))
        return event

    def _pass_on_commands(self) -> None:
        """Write what policies want of the ranks. What the disk does not take now is written with the next events."""
        commands = self._watch.commands
        if len(commands) == self._num_commands:
            return
        try:
            write_commands(self._commands_path, commands)
        except OSError as exc:
            logger.warning("commands wait for the disk", extra={"job_id": self._job_id, "why": str(exc)})
            return
        self._num_commands = len(commands)

    def _apply_decisions(self, session: Session) -> list[StoredEvent]:
        """Apply what a policy decided about the job itself, in the transaction of the event that records it."""
        changed: list[StoredEvent] = []
        for _, event in self._batch:
            if isinstance(event, ActionTaken) and event.action in ("cancel", "pause"):
                self.decided = f"{'cancelled' if event.action == 'cancel' else 'paused'} by a policy: {event.reason}"
                changed += apply_policy(session, self._job_id, event.action, self.decided)
        return changed

    def _notice(self, event: Event) -> None:
        if isinstance(event, RankFailed):
            self.failures.append(event)
        elif isinstance(event, TrainingFinished):
            self.finished = event
        elif isinstance(event, CheckpointSaved):
            self.saved_step = event.step


def _refused(rank: int, event: CheckpointSaved) -> LineLogged:
    message = f"rank {rank} reported a checkpoint in {event.filename[:200]!r}, which is no folder of this job"
    return LineLogged("warning", "supervisor", f"{message}; it is not registered")


def first_cause(failures: Sequence[RankFailed]) -> RankFailed | None:
    """Return the failure that broke the job, not the complaint of a rank that lost its peer."""
    own = [failure for failure in failures if not is_lost_peer(failure)]
    return own[0] if own else None


def is_lost_peer(failure: RankFailed) -> bool:
    """Return whether a rank failed because another one is gone."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "Timed out waiting",
    )
    distributed = failure.error.startswith("Dist") or "gloo" in failure.message or "NCCL" in failure.message
    return distributed or any(word in failure.message for word in words)
