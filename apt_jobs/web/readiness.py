"""Whether this web process can take a job now. `/readyz` asks without a key, so that it must be cheap under load.

One check at a time, its result kept for a second: any number of requests share it. No check scans a table.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import redis

from apt_jobs.db.engine import Database
from apt_jobs.errors import AptJobsError
from apt_jobs.operations.data_directory import require_room
from apt_jobs.settings import Settings

KEPT_S = 1.0
TIMEOUT_S = 2.0  # of all checks together


class Readiness:
    """The latest answer. Used from one event loop."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._redis = redis.Redis.from_url(
            settings.redis, socket_timeout=TIMEOUT_S / 2, socket_connect_timeout=TIMEOUT_S / 2, retry=None
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="readiness")  # a check that hangs holds up only the next
        self._lock = asyncio.Lock()
        self._running: asyncio.Future[str | None] | None = None
        self._reason: str | None = None
        self._asked_s = float("-inf")

    async def why_not_ready(self) -> str | None:
        """Return what is missing, at most `KEPT_S` seconds old; None: nothing."""
        async with self._lock:
            if time.monotonic() - self._asked_s > KEPT_S:
                self._reason = await self._ask()
                self._asked_s = time.monotonic()
            return self._reason

    def close(self) -> None:
        """Close the connection. A check that hangs is left to itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._redis.close()

    async def _ask(self) -> str | None:
        if self._running is None:
            self._running = asyncio.get_running_loop().run_in_executor(self._pool, self._check)
        done, _ = await asyncio.wait([self._running], timeout=TIMEOUT_S)
        if not done:
            return f"its checks take longer than {TIMEOUT_S:.0f} s"
        running, self._running = self._running, None
        return running.result()

    def _check(self) -> str | None:
        try:
            require_room(self._settings)
            self._database.ping()
            self._redis.ping()
        except AptJobsError as exc:
            return str(exc)
        except OSError as exc:
            return f"the data directory cannot be read: {exc.strerror}"
        except redis.RedisError as exc:
            return f"the broker does not answer: {exc}"
        return None
