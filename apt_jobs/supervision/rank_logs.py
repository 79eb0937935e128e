"""What the ranks print, as `log` events: the bytes of their files framed into lines, and bounded.

Of a flood the first and the last lines are kept, see `line_gate.py`. The files are bounded as well, see
`output_file.py`.
"""

import re
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from apt_jobs.events.kinds import Event, LineLogged
from apt_jobs.supervision.line_framing import LineFramer, shown_lines
from apt_jobs.supervision.line_gate import Line, LineGate
from apt_jobs.supervision.rank_log_file import OutputFile

SET_UP_LOG = "set-up.log"  # what an attempt printed before its command: the build of its environment
TAIL_BYTES = 1 << 18
TAIL_LINES = 20
MAX_LAST_READS = 100  # of each file, when the ranks have ended: far more than `output_file.MAX_BEHIND_BYTES` needs
_RANK_FILE = re.compile(r"/node-(\d+)/.*/(\d+)/(stdout|stderr)\.log$")


class _Followed:
    """One file, and whose it is."""

    def __init__(self, path: Path, source: str) -> None:
        self.file, self.framer, self.source = OutputFile(path), LineFramer(), source


class RankLogs:
    """Follows what torchrun and the ranks of all nodes of one attempt print. Used by one thread."""

    def __init__(
        self,
        run_dir: Path,
        ranks_per_node: int,
        num_ranks: int = 1,
        clock: Callable[[], float] = time.monotonic,
        mask: Callable[[str], str] = str,
    ) -> None:
        """Follow the files of a folder.

        Args:
            run_dir: Folder of the attempt.
            ranks_per_node: By which files name their rank.
            num_ranks: Of the attempt; they share the limits.
            clock: Seconds, CLOCK_MONOTONIC.
            mask: Hides the secrets of the job.
        """
        self._mask = mask
        self._folder, self._run_dir, self._ranks_per_node = run_dir / "torchrun", run_dir, ranks_per_node
        self._num_ranks, self._clock = num_ranks, clock
        self._followed: dict[Path, _Followed] = {}
        self._gates: dict[str, LineGate] = {}  # by source: a rank has two files
        self._waiting: deque[tuple[datetime, Event]] = deque()
        self.last_output_s = clock()  # when a process last printed a byte: for the watchdog

    def add(self, event: LineLogged) -> None:
        """Put a line of the service's own into the log."""
        self._waiting.append((datetime.now(UTC), event))

    def read(self, max_lines: int) -> list[tuple[datetime, Event]]:
        """Return new lines, oldest first within a file."""
        if not self._waiting:
            self._look()
        return [self._waiting.popleft() for _ in range(min(max_lines, len(self._waiting)))]

    def end(self) -> None:
        """Take in all that is left, now that the processes have ended: `read` returns it. Shorten their files."""
        for _ in range(MAX_LAST_READS):
            if not self._look():
                break
        for followed in self._followed.values():
            self._add(followed, followed.framer.end())
        for source, gate in self._gates.items():
            self._log(source, gate.end())
        for followed in self._followed.values():
            followed.file.compact()

    def tail(self) -> str:
        """Return the last lines that any rank wrote to stderr: what a process that was killed can still say."""
        lines: list[str] = []
        for path in sorted(self._folder.glob("**/stderr.log")):
            lines += [f"[{self._source(path)}] {line}" for line in _last_lines(path)]
        return self._mask("\n".join(lines or [line for path in self._torchrun_logs() for line in _last_lines(path)]))

    def _look(self) -> int:
        """Read on in each file; how many bytes there were."""
        now_s, num_bytes = self._clock(), 0
        set_up = self._run_dir.glob(SET_UP_LOG)
        for path in [*set_up, *self._folder.glob("**/std*.log"), *self._torchrun_logs()]:
            followed = self._followed.get(path)
            if followed is None:
                followed = self._followed[path] = _Followed(path, self._source(path))
            num_bytes += self._read_on(followed, now_s)
        if num_bytes:
            self.last_output_s = now_s
        for source, gate in self._gates.items():
            self._log(source, gate.release(now_s))
        return num_bytes

    def _read_on(self, followed: _Followed, now_s: float) -> int:
        chunk, num_skipped = followed.file.read()
        if num_skipped:
            followed.framer.skip()
            self._gate(followed.source).skip(num_skipped)
            rest = chunk.partition(b"\n")[2]  # a line of which the beginning is missing is none
            chunk = rest or chunk
        self._add(followed, followed.framer.feed(chunk, now_s) if chunk else followed.framer.poll(now_s))
        return num_skipped + len(chunk)

    def _add(self, followed: _Followed, lines: list[str]) -> None:
        at, gate = datetime.now(UTC), self._gate(followed.source)
        for text in lines:
            gate.add(Line(at, self._mask(text)))

    def _gate(self, source: str) -> LineGate:
        if source not in self._gates:
            self._gates[source] = LineGate(self._num_ranks)
        return self._gates[source]

    def _log(self, source: str, lines: list[Line]) -> None:
        for line in lines:
            event = (
                LineLogged("warning", "supervisor", f"{source}: {line.text}")
                if line.is_note
                else LineLogged("info", source, line.text)
            )
            self._waiting.append((line.at, event))

    def _torchrun_logs(self) -> list[Path]:
        return sorted(self._run_dir.glob("torchrun-*.log"))

    def _source(self, path: Path) -> str:
        """Return who writes to a file. Which of a process's two streams it is does not tell how grave a line is."""
        if path.name == SET_UP_LOG:
            return "set-up"
        found = _RANK_FILE.search(str(path))
        if found is None:
            return "torchrun"
        return f"rank {int(found[1]) * self._ranks_per_node + int(found[2])}"


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            return shown_lines(file.read())[-TAIL_LINES:]
    except OSError:
        return []
