"""What every request handler uses: settings, database, wake-ups, live publisher. One instance a process."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from apt_jobs.db.engine import Database
from apt_jobs.db.series.sparklines import Sparklines
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.events.live import LivePublisher
from apt_jobs.job_queue import WakeUpPublisher
from apt_jobs.settings import Settings
from apt_jobs.web.admissions import Admissions
from apt_jobs.web.count_cache import CountCache
from apt_jobs.web.metrics import Metrics
from apt_jobs.web.readiness import Readiness
from apt_jobs.web.submissions import Submissions

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that handlers share."""

    settings: Settings
    database: Database
    wake_ups: WakeUpPublisher
    publisher: LivePublisher
    admissions: Admissions
    readiness: Readiness
    submissions: Submissions
    metrics: Metrics
    wake_up_now: asyncio.Event  # set when a job became due: the wake-up loop looks at once
    count_cache: CountCache = field(default_factory=CountCache)
    sparklines: Sparklines = field(default_factory=Sparklines)

    async def read(
        self,
        function: Callable[Concatenate[Session, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Answer:
        """Call a function of `db` with a session for reading, in a thread."""

        def call() -> Answer:
            with self.database.read() as session:
                return function(session, *args, **kwargs)

        return await asyncio.to_thread(call)

    async def write(
        self,
        function: Callable[Concatenate[Session, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Answer:
        """Call a function of `db` in one transaction, in a thread."""

        def call() -> Answer:
            with self.database.write() as session:
                return function(session, *args, **kwargs)

        return await asyncio.to_thread(call)

    async def publish(self, job_id: str, events: Sequence[StoredEvent]) -> None:
        """Send stored events to those who watch the job. They miss nothing if it fails: heads are checked."""
        if events:
            await asyncio.to_thread(self.publisher.publish, job_id, events)


def service_of(connection: HTTPConnection) -> Service:
    """Return the service behind a request or a WebSocket."""
    app: Starlette = connection.app
    service: Service = app.state.service
    return service
