"""Who waits for a generation in this process: what its texts become, from the token wire, else from its row.

A listener is registered before its job is stored, so it misses nothing. One that has lost a message, or came late, gets
the rest of the text in the end; a new attempt begins again.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.errors import Unavailable
from apt_jobs.events.tokens import TokenLogprob, TokenMessage, decode_message, token_messages
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.web.service import Service

POLL_S = 1.0  # without a message; then the row is read
MAX_PENDING = 10_000  # messages for a client that does not read; then it gets the rest in the end


@dataclass(frozen=True, slots=True)
class Added:
    """What was added to an output, and its tokens where they were asked for."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Restarted:
    """The worker was lost or drained: the texts begin again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The job has ended. `result` if it succeeded, else `reason` and `error`, as the row has them."""

    state: str
    result: dict[str, Any] | None
    reason: str | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing happened for `POLL_S`."""


Update = Added | Restarted | Ended | Silence


@dataclass(slots=True, eq=False)
class Listener:
    """Messages of one job."""

    job_id: str
    _messages: deque[TokenMessage] = field(default_factory=lambda: deque(maxlen=MAX_PENDING))
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def receive(self, message: TokenMessage) -> None:
        """Add a message; the oldest one goes when there are too many, and is missed by its number."""
        self._messages.append(message)
        self._arrived.set()

    async def messages(self, timeout_s: float) -> list[TokenMessage]:
        """Return what arrived; nothing after `timeout_s`."""
        if not self._messages:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        messages = list(self._messages)
        self._messages.clear()
        return messages


class GenerationStreams:
    """All listeners of a process. Run `follow()` in a task."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._listeners: defaultdict[str, list[Listener]] = defaultdict(list)

    def listen(self, job_id: str) -> Listener:
        """Return a listener that receives the messages of a job from now on. Close it with `forget`."""
        listener = Listener(job_id)
        self._listeners[job_id].append(listener)
        return listener

    def forget(self, listener: Listener) -> None:
        """Listen no more."""
        listeners = self._listeners.get(listener.job_id, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(listener.job_id, None)

    async def follow(self) -> None:
        """Feed the listeners, without end."""
        async for job_id, raw in token_messages(self._redis_url):
            if job_id in self._listeners and (message := decode_message(raw)) is not None:
                for listener in self._listeners[job_id]:
                    listener.receive(message)


async def updates(service: Service, listener: Listener, *, look_first: bool = False) -> AsyncIterator[Update]:
    """Yield what happens to a job until it has ended. A silence is reported every `POLL_S`.

    Args:
        service: of the process.
        listener: of the job.
        look_first: the job may have begun before the listener listened.
    """
    texts = _Texts()
    is_first = look_first
    while True:
        messages = [] if is_first else await listener.messages(POLL_S)
        is_first = False
        for message in messages:
            for update in texts.receive(message):
                yield update
            if message.end is not None and (message.attempt >= texts.attempt):
                if message.end.state == JobState.SUCCEEDED and message.end.result is not None:
                    for update in texts.end(message.end.result.model_dump()):
                        yield update
                    return
                messages = []  # the row says why
        if messages:
            continue
        try:
            job = await service.read(get_job, listener.job_id)
        except Unavailable:
            yield Silence()
            continue
        for update in texts.look(job):
            yield update
            if isinstance(update, Ended):
                return


class _Texts:
    """How far the texts of a job are, as the client knows them."""

    def __init__(self) -> None:
        self.attempt = 0  # 0: not known yet
        self._next_number = 0
        self._is_lost = False  # a message is missing: the rest comes in the end
        self._num_sent: defaultdict[int, int] = defaultdict(int)  # characters, by output
        self._num_logprobs_sent: defaultdict[int, int] = defaultdict(int)

    def receive(self, message: TokenMessage) -> Iterator[Update]:
        if message.attempt < self.attempt:
            return
        yield from self._enter(message.attempt)
        if message.number < self._next_number:
            return
        self._is_lost |= message.number > self._next_number
        self._next_number = message.number + 1
        if not self._is_lost:
            for place, (index, text) in enumerate(message.deltas):
                logprobs = message.logprobs[place] if message.logprobs else []
                self._num_sent[index] += len(text)
                self._num_logprobs_sent[index] += len(logprobs)
                yield Added(index, text, logprobs)

    def look(self, job: Job) -> Iterator[Update]:
        """Compare with the row as it is now."""
        if job.state in TERMINAL_STATES:
            if job.state == JobState.SUCCEEDED and job.result is not None:
                if job.attempt >= self.attempt:
                    yield from self._enter(job.attempt)
                yield from self.end(job.result)
            else:
                yield Ended(job.state, None, job.reason, job.error)
            return
        if job.state == JobState.QUEUED and job.attempt and job.attempt >= self.attempt > 0:
            yield from self._enter(job.attempt + 1)
        elif job.attempt > self.attempt:
            yield from self._enter(job.attempt)
        yield Silence()

    def end(self, result: dict[str, Any]) -> Iterator[Update]:
        """Yield what the client has not got, then the end."""
        logprobs = result.get("logprobs") or [[]] * len(result["outputs"])
        for index, output in enumerate(result["outputs"]):
            rest, tokens = output[self._num_sent[index] :], logprobs[index][self._num_logprobs_sent[index] :]
            if rest or tokens:
                yield Added(index, rest, tokens)
        yield Ended(JobState.SUCCEEDED, result)

    def _enter(self, attempt: int) -> Iterator[Update]:
        if attempt == self.attempt:
            return
        is_new = self.attempt > 0
        self.attempt, self._next_number, self._is_lost = attempt, 0, False
        self._num_sent.clear()
        self._num_logprobs_sent.clear()
        if is_new:
            yield Restarted()


def generations_of(connection: HTTPConnection) -> GenerationStreams:
    """Return the generation streams of the process that serves a request."""
    app: Starlette = connection.app
    streams: GenerationStreams = app.state.generations
    return streams
