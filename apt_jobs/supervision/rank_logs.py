"""What the ranks print, as `log` events: bounded in line length, lines a second and lines a job."""

import re
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

from apt_jobs.events.kinds import Event, LineLogged

MAX_LINE_CHARS = 2_000
MAX_LINES = 20_000  # of one attempt; the files keep all
MAX_LINES_PER_S = 200
READ_BYTES = 1 << 18
TAIL_LINES = 20
_RANK_FILE = re.compile(r"/node-(\d+)/.*/(\d+)/(stdout|stderr)\.log$")


class RankLogs:
    """Follows what torchrun and the ranks of all nodes of one attempt print."""

    def __init__(self, run_dir: Path, ranks_per_node: int) -> None:
        self._folder, self._run_dir, self._ranks_per_node = run_dir / "torchrun", run_dir, ranks_per_node
        self._offsets: dict[Path, int] = {}
        self._waiting: deque[tuple[datetime, Event]] = deque()
        self._num_lines = 0
        self._second, self._num_this_second = 0, 0
        self.last_line_s = time.monotonic()  # for the watchdog

    def add(self, event: LineLogged) -> None:
        """Put a line of the service's own into the log."""
        self._waiting.append((datetime.now(UTC), event))

    def read(self, max_lines: int) -> list[tuple[datetime, Event]]:
        """New lines, oldest first within a file."""
        if not self._waiting:
            self._look()
        return [self._waiting.popleft() for _ in range(min(max_lines, len(self._waiting)))]

    def tail(self) -> str:
        """The last lines that any rank wrote to stderr: what a process that was killed can still say."""
        lines: list[str] = []
        for path in sorted(self._folder.glob("**/stderr.log")):
            rank, _ = self._origin(path)
            lines += [f"[{rank}] {line}" for line in _last_lines(path)]
        return "\n".join(lines or [line for path in self._torchrun_logs() for line in _last_lines(path)])

    def _look(self) -> None:
        for path in [*self._folder.glob("**/std*.log"), *self._torchrun_logs()]:
            source, level = self._origin(path)
            for line in self._new_lines(path):
                self._take(source, level, line)

    def _torchrun_logs(self) -> list[Path]:
        return sorted(self._run_dir.glob("torchrun-*.log"))

    def _origin(self, path: Path) -> tuple[str, str]:
        """Who writes to a file, and the level of its lines."""
        found = _RANK_FILE.search(str(path))
        if found is None:
            return "torchrun", "info"
        rank = int(found[1]) * self._ranks_per_node + int(found[2])
        return f"rank {rank}", "warning" if found[3] == "stderr" else "info"

    def _new_lines(self, path: Path) -> list[str]:
        offset = self._offsets.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                chunk = file.read(READ_BYTES)
        except OSError:
            return []
        end = len(chunk) if len(chunk) == READ_BYTES and b"\n" not in chunk else chunk.rfind(b"\n") + 1
        self._offsets[path] = offset + end
        if end:
            self.last_line_s = time.monotonic()
        return chunk[:end].decode("utf-8", "replace").splitlines()

    def _take(self, source: str, level: str, line: str) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._num_this_second = second, 0
        self._num_this_second += 1
        self._num_lines += 1
        if self._num_lines > MAX_LINES or self._num_this_second > MAX_LINES_PER_S:
            if self._num_lines == MAX_LINES + 1 or self._num_this_second == MAX_LINES_PER_S + 1:
                self._log(
                    "warning", "supervisor", f"{source} prints too much; lines are left out here, not in its file"
                )
            return
        text = line if len(line) <= MAX_LINE_CHARS else line[:MAX_LINE_CHARS] + " [cut]"
        if text.strip():
            self._log(level, source, text)

    def _log(self, level: str, source: str, message: str) -> None:
        event = LineLogged("warning" if level == "warning" else "info", source, message)
        self._waiting.append((datetime.now(UTC), event))


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - READ_BYTES, 0))
            return file.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []
