"""JSON lines on stderr, one per record, for each process of the service."""

import json
import logging
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "data"}
_LEAKY_LOGGERS = ("websockets", "uvicorn", "httpcore", "hpack")  # on level DEBUG they log headers, keys included


class JsonFormatter(logging.Formatter):
    """One JSON object per record: `at`, `level`, `logger`, `message`, then what `extra=` carried."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send all records of `level` and above to stderr as JSON lines. Called once per process, by its entry."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _LEAKY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request, which the other side's access log has


def rotate_log(path: Path, max_bytes: int) -> bool:
    """Move what a log file holds to `NAME.1` when it has more than `max_bytes`; returns whether it did.

    Whoever writes to it appends, and goes on in the emptied file. A line that is written meanwhile may be lost.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
        copy = path.with_name(f".{path.name}.1")
        shutil.copyfile(path, copy)
        copy.chmod(0o600)
        copy.replace(path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)
    except OSError:  # it is gone, or the disk is full: it is tried again
        return False
    return True
