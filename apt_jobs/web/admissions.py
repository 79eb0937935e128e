"""Who is inside: requests and WebSockets that came with a key or a session, looked up again while they last.

A key that is revoked or expires, and a session that ends, close what they opened within two rounds
of `RECHECK_EVERY_S`. Each key is asked for once, however many streams it has open.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.orm import Session

from apt_jobs.db.access import Principal, note_use
from apt_jobs.db.engine import Database
from apt_jobs.errors import AptJobsError, Denied

logger = logging.getLogger(__name__)

RECHECK_EVERY_S = 5.0
NOTE_USE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Credential:
    """A secret that was sent, and how it is looked up."""

    look_up: Callable[[Session, str], Principal]
    secret: str

    def __repr__(self) -> str:
        return "Credential(...)"


def _ignore(_reason: str) -> None:
    """End nothing."""


@dataclass(slots=True, eq=False)
class Admission:
    """One request or WebSocket. `revoke` ends it with a reason."""

    credential: Credential
    principal: Principal
    revoke: Callable[[str], None] = _ignore


class Admissions:
    """All admissions of a process. Run `recheck_loop()` in a task."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._open: set[Admission] = set()
        self._num_open: Counter[str] = Counter()  # by owner
        self._used: set[str] = set()  # owners since the last note
        self._noted_at_s = float("-inf")

    def num_open(self, owner: str) -> int:
        """Return how many requests and WebSockets of this owner are open."""
        return self._num_open[owner]

    @contextmanager
    def admitted(self, admission: Admission) -> Iterator[None]:
        """Keep an admission in the books while it lasts."""
        owner = admission.principal.owner
        self._open.add(admission)
        self._num_open[owner] += 1
        self._used.add(owner)
        try:
            yield
        finally:
            self._open.discard(admission)
            self._num_open[owner] -= 1
            if not self._num_open[owner]:
                del self._num_open[owner]

    async def recheck_loop(self) -> None:
        """Look up again who has been inside since the last time, without end."""
        known: set[Admission] = set()
        while True:
            await asyncio.sleep(RECHECK_EVERY_S)
            try:
                await self._recheck(known & self._open)
                await self._note_use()
            except AptJobsError as exc:  # nobody is sent away because the database is
                logger.warning("keys will be looked up again", extra={"why": str(exc)})
            except Exception:  # a loop that ended would leave revoked keys inside for good
                logger.exception("keys will be looked up again")
            known = set(self._open)

    async def _recheck(self, admissions: set[Admission]) -> None:
        by_credential: dict[Credential, list[Admission]] = {}
        for admission in admissions:
            by_credential.setdefault(admission.credential, []).append(admission)
        if not by_credential:
            return
        for credential, reason in (await asyncio.to_thread(self._denied, list(by_credential))).items():
            for admission in by_credential[credential]:
                if admission in self._open:
                    admission.revoke(reason)

    def _denied(self, credentials: list[Credential]) -> dict[Credential, str]:
        denied: dict[Credential, str] = {}
        with self._database.read() as session:
            for credential in credentials:
                try:
                    credential.look_up(session, credential.secret)
                except Denied as exc:
                    denied[credential] = str(exc)
        return denied

    async def _note_use(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._noted_at_s < NOTE_USE_EVERY_S or not self._used:
            return
        used, self._used = self._used, {admission.principal.owner for admission in self._open}
        self._noted_at_s = now_s

        def write() -> None:
            with self._database.write() as session:
                note_use(session, used)

        await asyncio.to_thread(write)
