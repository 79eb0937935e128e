"""`apt_jobs.current_run()`: what a user's script has of its job, or of a local folder outside of one.

    run = apt_jobs.current_run()
    run.log({"eval/bleu": 31.2}, step=step)
    run.save_checkpoint(folder, step=step, metrics={"eval_loss": 2.1})
    if run.should_stop():
        break

It knows files only: nothing here waits for the service, and nothing raises into a training because the service, the
disk or a value is not as it should be. What is wrong is said once, in the job's log.
"""

import atexit
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apt_jobs.errors import AptJobsError, NotFound
from apt_jobs.jobs.handover import Handover, rank_of_process, read_handover
from apt_jobs.jobs.media import IMAGE_SUFFIXES, TABLE_SUFFIX
from apt_jobs.run.checkpoint_folder import ScriptCheckpoint, prune_script_checkpoints, write_script_checkpoint
from apt_jobs.run.event_file import EventFile, printable_text
from apt_jobs.run.local_run import MAX_SPOOL_BYTES, open_local_run
from apt_jobs.run.media import MediaFolder, encoded_image, encoded_table
from apt_jobs.run.metric_values import MetricValues
from apt_jobs.run.stopping import StopAgreement

PROGRESS_EVERY_S = 0.5
MAX_LOG_CHARS = 64_000  # of one call; more is cut
MAX_LINE_CHARS = 2_000
MAX_CAPTION_CHARS = 2_000
MAX_EVENTS_PER_S = 200.0  # later values wait for their turn and replace each other by name
BURST_EVENTS = 20_000
BUILTIN_DATASET = "pydoc-topics"  # as `jobs/spec.py`
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,120}")
_LEVELS = ("debug", "info", "warning", "error")


class Run:
    """One run, as one process of it sees it. Threads may share it; children that were forked may use it as well."""

    def __init__(self, handover: Handover, *, rank: int | None = None) -> None:
        self._handover = handover
        self.rank = rank_of_process() if rank is None else rank
        self.job_id, self.attempt = handover.job_id, handover.attempt
        self.num_ranks = handover.num_ranks
        self.output_dir = handover.output_dir
        self.base_model_dir, self.resume_dir = handover.base_model_dir, handover.resume_dir
        is_job = handover.job_id is not None
        self._events = EventFile(
            handover.spool_path(self.rank),
            f"rank {self.rank}",
            is_job=is_job,
            max_bytes=None if is_job else MAX_SPOOL_BYTES,
        )
        self._values = MetricValues(self._events)
        self._media = MediaFolder(handover.media_dir)
        self._stop = StopAgreement(handover.run_dir, self.rank)
        self._step = handover.resume_step  # last one that was logged
        self._has_logged = False
        self._waiting: dict[str, int | float | str] = {}  # over the rate
        self._tokens, self._refilled_s = float(BURST_EVENTS), time.monotonic()
        self._progress: tuple[int, int | None] | None = None  # not written yet
        self._progress_began: tuple[float, int] | None = None
        self._progress_s = -PROGRESS_EVERY_S
        atexit.register(self.flush)

    def __repr__(self) -> str:
        return f"<Run of {self.job_id or 'no job'}, attempt {self.attempt}, rank {self.rank}: {self.output_dir}>"

    @property
    def stop_reason(self) -> str | None:
        """Why `should_stop` was true; None before."""
        return self._stop.reason

    def dataset(self, name: str | None = None) -> Path:
        """Return the path of a data set, to be read only.

        Args:
            name: Of a data set that was uploaded; None: the one that the job names.

        Raises:
            NotFound: there is no such data set; outside of a job there is none.
        """
        given = self._handover
        if name is None:
            name = given.dataset
        if name is not None and name == given.dataset and given.dataset_file is not None:
            return given.dataset_file
        if name == BUILTIN_DATASET:
            return self._builtin_dataset()
        if name is not None and _NAME.fullmatch(name) and given.datasets_dir is not None:
            for file in (given.datasets_dir / f"{name}.txt", given.datasets_dir / name):
                if file.exists():
                    return file
        raise NotFound(f"no data set {name!r}; GET /api/datasets lists them, and outside of a job there is none")

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers by name, as `{"eval/bleu": 31.2}`; each name becomes a curve.

        Args:
            values: Finite or not, Python numbers, NumPy or torch scalars. What is no number is left out, said once.
            step: Where they stand; None: one after the last.
        """
        with self._events.lock:
            kept = self._values.checked(values)
            number = None if step is None else self._values.step(step)
            if number is None:
                number = self._step + 1
            if self._has_logged and number < self._step:
                self._events.complain(
                    "back", f"metrics of step {number} come after those of step {self._step}; they are kept"
                )
            if not kept and not self._waiting:
                return
            self._step, self._has_logged = number, True
            if self._has_token():
                kept, self._waiting = {**self._waiting, **kept}, {}
                self._events.write("metrics", {"step": number, "rank": self.rank, "values": kept})
            else:
                self._events.complain(
                    "rate", f"more than {MAX_EVENTS_PER_S:.0f} calls of log() a second: of those only the last count"
                )
                self._waiting.update(kept)

    def log_text(self, text: str, level: str = "info") -> None:
        """Add lines to the job's log; `level` is debug, info, warning or error."""
        text = text if isinstance(text, str) else str(text)
        if len(text) > MAX_LOG_CHARS:
            self._events.complain("text", f"a text of {len(text):,} characters is cut to {MAX_LOG_CHARS:,}")
        for line in text[:MAX_LOG_CHARS].splitlines():
            for start in range(0, len(line), MAX_LINE_CHARS):
                with self._events.lock:
                    if not self._has_token():
                        self._events.complain("lines", f"more than {MAX_EVENTS_PER_S:.0f} lines a second are left out")
                        return
                    shown = printable_text(line[start : start + MAX_LINE_CHARS])
                    self._events.log(level if level in _LEVELS else "info", shown)

    def log_image(self, name: str, image: Any, step: int | None = None, caption: str | None = None) -> None:
        """Keep an image of this step, which the job's page shows.

        Args:
            name: What it is, as `samples/first`; the steps of a name are shown together.
            image: A path, bytes (PNG, JPEG, GIF, WebP), a figure of Matplotlib, an image of Pillow or an array.
            step: Whose it is; None: the last one that was logged.
            caption: A line below it.
        """
        with self._noted(f"the image {name!r}"):
            content, kind = encoded_image(image)
            self._log_media(name, "image", content, IMAGE_SUFFIXES[kind], step, caption, None)

    def log_table(
        self,
        name: str,
        table: Any,
        step: int | None = None,
        *,
        columns: Sequence[str] | None = None,
        caption: str | None = None,
    ) -> None:
        """Keep a table of this step, which the job's page shows.

        Args:
            name: What it is, as `eval/answers`; the steps of a name are shown together.
            table: Rows (dictionaries, or sequences and `columns`), a dictionary of columns, or a data frame.
            step: Whose it is; None: the last one that was logged.
            columns: Names of the cells of rows that are sequences.
            caption: A line below it.
        """
        with self._noted(f"the table {name!r}"):
            content, num_rows, is_cut = encoded_table(table, columns)
            if is_cut:
                self._events.complain("rows", f"of the table {name!r} the first {num_rows:,} rows are kept")
            self._log_media(name, "table", content, TABLE_SUFFIX, step, caption, num_rows)

    def set_progress(self, done: int, total: int | None = None) -> None:
        """Say how far the run is, in steps; with `total` the page shows a bar and the time that is left."""
        checked = self._values.step(done), None if total is None else self._values.step(total)
        if checked[0] is None:
            return
        with self._events.lock:
            now_s = time.monotonic()
            if self._progress_began is None:
                self._progress_began = now_s, checked[0]
            self._progress = checked[0], checked[1]
            is_last = checked[1] is not None and checked[0] >= checked[1]
            if is_last or now_s - self._progress_s >= PROGRESS_EVERY_S:
                self._write_progress(now_s)

    def should_stop(self) -> bool:
        """Return whether to save and leave: a pause, a drained worker, the time limit. `stop_reason` says which.

        Cheap enough for each step. When all ranks call it, all get the same answer at the same call.
        """
        return self._stop.should_stop()

    def save_checkpoint(
        self,
        folder: str | os.PathLike[str],
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        *,
        move: bool = False,
    ) -> str | None:
        """Register a checkpoint: the next attempt of the job gets it as `resume_dir`.

        Rank 0 does it, other ranks return at once: let them finish writing first.

        Args:
            folder: What to keep, a folder or a file. It is copied, so that it may change afterwards.
            step: Whose it is; None: the last one that was logged.
            metrics: Of this step; `eval_loss` or `val_loss` decides which checkpoint is the best.
            move: Move the folder instead, which costs no copy.

        Returns:
            The id of the checkpoint; None where it was not saved, which the log explains, and on other ranks.
        """
        if self.rank != 0:
            return None
        number = None if step is None else self._values.step(step)
        number = self._step if number is None else number
        given = {name: _as_float(value) for name, value in (metrics or {}).items()}
        began_s = time.monotonic()
        parent = self._handover.checkpoints_dir
        try:
            saved = write_script_checkpoint(Path(folder).absolute(), parent, self.attempt, number, given, move=move)
        except (AptJobsError, OSError, ValueError, TypeError) as exc:
            self._events.log("error", f"the checkpoint of step {number} is not saved: {exc}")
            self._events.complain(f"checkpoint {exc}", f"the checkpoint of step {number} is not saved: {exc}")
            return None
        if self.job_id is None:  # nobody would find it by a registered id
            self._events.log("info", f"the checkpoint of step {number} is {parent / saved.name}")
            return saved.id
        self._report(saved, 1000.0 * (time.monotonic() - began_s))
        for old in prune_script_checkpoints(parent, self._handover.keep_checkpoints):
            self._events.write("checkpoint_removed", {"checkpoint_id": old.id, "reason": "replaced by newer ones"})
        return saved.id

    def flush(self) -> None:
        """Write what waits for its turn. Called at exit."""
        with self._events.lock:
            if self._waiting:
                self._events.write("metrics", {"step": self._step, "rank": self.rank, "values": self._waiting})
                self._waiting = {}
            if self._progress is not None:
                self._write_progress(time.monotonic())

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Let nothing that is wrong with an image or a table end a training; it is noted in the log, once."""
        try:
            yield
        except Exception as exc:  # also what a library raises that encodes it
            self._events.complain(f"{what} {type(exc).__name__}", f"{what} is left out: {exc}")

    def _log_media(
        self,
        name: str,
        form: str,
        content: bytes,
        suffix: str,
        step: int | None,
        caption: str | None,
        num_rows: int | None,
    ) -> None:
        if not self._values.is_media_name(name):
            return
        with self._events.lock:
            if not self._has_token():
                self._events.complain("media", f"more than {MAX_EVENTS_PER_S:.0f} images a second are left out")
                return
            number = None if step is None else self._values.step(step)
            payload = {
                "step": self._step if number is None else number,
                "rank": self.rank,
                "name": name,
                "form": form,
                "filename": self._media.add(content, suffix),
                "size_bytes": len(content),
                "caption": None if caption is None else printable_text(str(caption))[:MAX_CAPTION_CHARS],
                "num_rows": num_rows,
            }
            self._events.write("media", payload)

    def _report(self, saved: ScriptCheckpoint, write_ms: float) -> None:
        self._events.write(
            "checkpoint",
            {
                "checkpoint_id": saved.id,
                "filename": f"{self._handover.checkpoint_prefix}/{saved.name}",
                "step": saved.step,
                "epoch": 0,
                "val_loss": saved.val_loss,
                "train_loss": saved.train_loss,
                "size_bytes": saved.size_bytes,
                "is_best": saved.is_best,
                "stall_ms": write_ms,
                "write_ms": write_ms,
            },
        )

    def _write_progress(self, now_s: float) -> None:
        assert self._progress is not None
        assert self._progress_began is not None
        (done, total), (began_s, began) = self._progress, self._progress_began
        eta_s = None
        if total is not None and done > began:
            eta_s = (now_s - began_s) / (done - began) * max(total - done, 0)
        self._events.write("progress", {"step": done, "num_steps": total, "eta_s": eta_s})
        self._progress, self._progress_s = None, now_s

    def _has_token(self) -> bool:
        now_s = time.monotonic()
        self._tokens = min(self._tokens + (now_s - self._refilled_s) * MAX_EVENTS_PER_S, BURST_EVENTS)
        self._refilled_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _builtin_dataset(self) -> Path:
        """Write the text that is shipped with Python, once, where the script finds it."""
        from pydoc_data.topics import topics  # 0.7 MB, for those who ask for it

        file = self.output_dir / f"{BUILTIN_DATASET}.txt"
        if not file.exists():
            temporary = file.with_name(f".{file.name}-{os.getpid()}")
            temporary.write_text("\n\n".join(topics[name] for name in sorted(topics)))
            temporary.replace(file)
        return file


_current: Run | None = None


def current_run() -> Run:
    """Return the run of this process: of its job, or of a local folder below `apt_jobs_runs/`.

    Every call in a process returns the same one; forked children return theirs of the same run.
    """
    global _current
    if _current is None:
        handover = read_handover()
        if handover is None:
            world_size = os.environ.get("WORLD_SIZE", "1")
            handover = open_local_run(int(world_size) if world_size.isdecimal() else 1)
        _current = Run(handover)
    return _current


def _as_float(value: Any) -> float | None:
    try:
        return float(value)
    except Exception:  # of somebody's class
        return None
