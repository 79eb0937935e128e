"""The progress of a job in the terminal: one line that is redrawn; without a terminal, a line every few seconds.

`follow` is what `submit`, `watch` and `demo` show; `ProgressLine` is the line, for any width.
"""

import _thread
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from apt_jobs.client.client import Client, Job
from apt_jobs.commands.terminal import BLOCK, console, echo, printable

LINE_EVERY_S = 5.0  # without a terminal
ANOMALIES_EVERY_S = 1.0
REFRESH_PER_S = 4
NARROW = 60  # columns below which parts are shorter and stand closer
MIN_BAR, MAX_BAR = 8, 40  # columns
_UNKNOWN = "--:--"


def follow(client: Client, job_id: str) -> Job:
    """Show a job's progress until it ends, and why if it did not succeed.

    Args:
        client: The service.
        job_id: The job.

    Returns:
        The job as it ended.
    """
    job = client.get(job_id)
    while not job.is_ended:  # it may be retried as soon as it has ended
        line = ProgressLine(job)
        with _shown(line):
            for event in client.events(job_id, after=job.last_seq):
                line.update(event)
        job = client.get(job_id)
    _print_end(job)
    return job


class ProgressLine:
    """What is known of a job, as one line of any width."""

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = job.state
        self._waiting_for = str(job.get("waiting_for") or "")
        self._step: int | None = job.get("step")
        self._num_steps: int | None = job.get("num_steps")
        self._metric: dict[str, Any] | None = None
        self._clock = clock
        self._began_at = clock()
        self._num_anomalies = 0
        self._anomalies_shown_at = -math.inf

    def update(self, event: dict[str, Any]) -> None:
        """Take what an event of the job says."""
        kind = event["kind"]
        if kind == "state":
            self.state, self._waiting_for = str(event["state"]), str(event.get("reason") or "")
        elif kind == "started":
            self._num_steps, self._step = event["num_steps"], event["resumed_from_step"]
        elif kind == "metric":
            self._metric, self._step = event, event["step"]
        elif kind == "anomaly":
            self._print_anomaly(event)

    def text(self, width: int | None = None) -> str:
        """Build the line.

        Args:
            width: Columns that there are; None: as many as it takes, and no bar.

        Returns:
            The most important parts that fit, in their usual order.
        """
        is_narrow = width is not None and width < NARROW
        parts = self._parts(is_narrow)
        if width is None:
            return "  ".join(part for part, _ in parts)
        gap = " " if is_narrow else "  "
        kept = {0}
        for _, number in sorted((priority, number) for number, (_, priority) in enumerate(parts)):
            trial = gap.join(part for index, (part, _) in enumerate(parts) if index in kept | {number})
            if len(trial) <= width:
                kept.add(number)
        chosen = [part for index, (part, _) in enumerate(parts) if index in kept]
        room = min(width - len(gap.join(chosen)) - len(gap), MAX_BAR)
        if self._share is not None and room >= MIN_BAR:
            chosen.insert(1, _bar(self._share, room))
        return gap.join(chosen)[:width]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(options.max_width), no_wrap=True, overflow="crop")

    @property
    def _share(self) -> float | None:
        """How much of it is done, from 0 to 1; None: nobody said how long it is."""
        if not self._num_steps or self._step is None:
            return None
        return min(max(self._step / self._num_steps, 0.0), 1.0)

    def _parts(self, is_narrow: bool) -> list[tuple[str, int]]:
        """Return text and priority of each part (0: most important), in the order of the line."""
        parts = [(self.state, 0)]
        if self._step is not None:
            where = place(self._step, self._num_steps)
            parts.append((where if is_narrow else f"step {where}", 1))
        if self._metric is not None:
            parts += self._metric_parts(self._metric)
        if self._waiting_for and self._metric is None:
            parts.append((printable(self._waiting_for), 3))
        parts.append((f"elapsed {duration(self._clock() - self._began_at)}", 6))
        return parts

    def _metric_parts(self, metric: dict[str, Any]) -> list[tuple[str, int]]:
        parts = [(f"epoch {metric['epoch'] + 1}", 5), (f"loss {float(metric['train_loss']):.3f}", 3)]
        tokens_per_s = float(metric["tokens_per_s"])  # a number that is not finite comes as a word
        if tokens_per_s > 0 and math.isfinite(tokens_per_s):
            parts.append((f"{tokens_per_s:,.0f} tokens/s", 4))
        if self._num_steps is not None:
            left_s = (self._num_steps - metric["step"]) * float(metric["step_time_ms"]) / 1000.0
            parts.append((f"ETA {duration(left_s)}", 2))
        return parts

    def _print_anomaly(self, event: dict[str, Any]) -> None:
        self._num_anomalies += 1
        now = self._clock()
        if now - self._anomalies_shown_at < ANOMALIES_EVERY_S:
            return
        others = f"; {self._num_anomalies - 1} steps before it" if self._num_anomalies > 1 else ""
        echo(f"anomaly at step {event['step']}: {len(event['layers'])} layers{others}", style="red")
        self._num_anomalies, self._anomalies_shown_at = 0, now


def duration(seconds: float) -> str:
    """Write a time as `mm:ss`, or `h:mm:ss` from an hour on; `--:--` if it is not known."""
    if not math.isfinite(seconds):
        return _UNKNOWN
    minutes, whole_s = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_s:02}" if hours else f"{minutes:02}:{whole_s:02}"


def place(step: int, num_steps: float | None) -> str:
    """Write where a job is. Own training code does not echo how many steps it will take."""
    return f"{step}" if num_steps is None else f"{step}/{int(num_steps)}"


@contextmanager
def _shown(line: ProgressLine) -> Iterator[None]:
    """Draw the line on a terminal, else print it every few seconds."""
    if console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty():
        with Live(line, console=console, refresh_per_second=REFRESH_PER_S):
            yield
        return
    with _printed(line):
        yield


@contextmanager
def _printed(line: ProgressLine) -> Iterator[None]:
    ended = threading.Event()
    failures: list[OSError] = []

    def print_lines() -> None:
        try:
            while not ended.wait(LINE_EVERY_S):
                echo(line.text())
        except OSError as exc:  # nobody reads any more
            failures.append(exc)
            _thread.interrupt_main()

    thread = threading.Thread(target=print_lines, name="progress", daemon=True)
    echo(line.text())  # here, so that a reader who has left already ends the command without an interrupt
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if failures:
            raise failures[0] from None
        raise
    finally:
        ended.set()
        thread.join()


def _bar(share: float, width: int) -> str:
    full = round(share * (width - 2))
    return "[" + "#" * full + "-" * (width - 2 - full) + "]"


def _print_end(job: Job) -> None:
    if job.state == "succeeded":
        echo("succeeded", style="green")
        return
    echo(f"{job.state}: {job.reason or 'no reason was given'}", style="red", keep=BLOCK)
    traceback = (job.get("error") or {}).get("traceback")
    if traceback:
        echo(str(traceback), keep=BLOCK)
