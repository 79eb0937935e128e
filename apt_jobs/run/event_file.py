"""Events that a user's script writes: lines appended to the spool of its rank.

A line is one system call on a file opened for appending, so children and threads of a rank share the file with its own
writer. No thread and no lock between processes: it works after a fork. Nothing here raises.
"""

import contextlib
import json
import math
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20  # as `codec.MAX_EVENT_BYTES`: a longer line would be refused
MAX_COMPLAINTS = 100  # different ones of a process
MAX_MESSAGE_CHARS = 2_000


class EventFile:
    """Appends events. `is_job`: the log of a job shows complaints; else they go to stderr."""

    def __init__(self, path: Path, source: str, *, is_job: bool, max_bytes: int | None = None) -> None:
        self._path, self._source, self._is_job = path, source, is_job
        self._bytes_left = max_bytes
        self._fd: int | None = None
        self._warned: set[str] = set()
        self.lock = threading.RLock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        """Another thread may have held it when this process was forked."""
        self.lock = threading.RLock()

    def write(self, kind: str, payload: dict[str, Any]) -> bool:
        """Append one event; returns whether the disk took it."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        line = json.dumps({"at": at, "kind": kind, "payload": payload}, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            self.complain("large", f"an event of {len(line):,} bytes is left out; at most {MAX_LINE_BYTES:,}")
            return False
        with self.lock:
            if self._bytes_left is not None:
                if len(line) > self._bytes_left:
                    self._bytes_left = 0
                    self._print_once("full", "this run has written its share of events; later ones are left out")
                    return False
                self._bytes_left -= len(line)
            return self._append(line)

    def complain(self, key: str, message: str) -> None:
        """Say once in this process what was wrong; `key` tells complaints apart."""
        with self.lock:
            if key in self._warned or len(self._warned) >= MAX_COMPLAINTS:
                return
            self._warned.add(key)
        message = f"apt_jobs: {message}"
        if not self._is_job:
            print_error(message)
        self.log("warning", message)

    def log(self, level: str, message: str) -> None:
        """Append a line of the job's log."""
        message = printable_text(message[:MAX_MESSAGE_CHARS])
        self.write("log", {"level": level, "source": self._source, "message": message})

    def _append(self, line: bytes) -> bool:
        try:
            if self._fd is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            written = os.write(self._fd, line)
            if written < len(line):  # a full disk can cut a line short: end it, so that the next one is whole
                os.write(self._fd, b"\n")
        except OSError as exc:
            self._print_once("disk", f"events cannot be written to {self._path}: {exc}")
            return False
        return written == len(line)

    def _print_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            print_error(f"apt_jobs: {message}")


def print_error(message: str) -> None:
    """Write a line to stderr, where there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


def json_number(value: int | float) -> int | float | str:
    """Return `value` as events have it: JSON has no NaN and no Infinity, so they are strings."""
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def printable_text(text: str) -> str:
    """Return text that every reader of JSON takes: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode()
