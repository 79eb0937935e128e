"""One generation request and its rows: what was asked, how far each text is, and where the answer goes."""

import threading
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch

from apt_jobs.errors import AptJobsError
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.sampling import row_generator
from apt_jobs.generation.text import TextStream
from apt_jobs.generation.warm_models import ModelKey
from apt_jobs.jobs.spec import GenerateSpec

RENEWED_FRACTION = 4  # a full context gives up a quarter of itself, its oldest tokens


class Stopped(AptJobsError):
    """The request was told to stop before it was done."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What was added to each text, in the order of the texts."""

    outputs: list[str]
    num_tokens: list[int]  # without the one that ended the text
    truncated: list[bool]  # the model did not see the whole text: it is longer than its context


@dataclass(slots=True, eq=False)
class Row:
    """One text that grows."""

    request: "Request"
    index: int  # in the request's texts
    window: list[int]  # tokens that the model sees, the new ones included
    stream: TextStream
    generator: torch.Generator | None  # None: greedy
    context_tokens: int
    truncated: bool = False
    num_new: int = 0
    ended: bool = False

    def make_room(self) -> bool:
        """Drop the oldest tokens if the window is longer than the context. True: it was, and has to be read anew."""
        if len(self.window) <= self.context_tokens:
            return False
        remaining = self.request.spec.max_length - self.num_new
        room = min(remaining - 1, self.context_tokens // RENEWED_FRACTION)  # the last new token is never read
        del self.window[: len(self.window) - max(1, self.context_tokens - room)]
        self.truncated = True
        return True

    def take(self, token: int, end_tokens: frozenset[int]) -> None:
        """Add the token that the model chose."""
        if token in end_tokens:
            self.ended = True
            return
        self.window.append(token)
        self.num_new += 1
        self.stream.push(token)
        self.ended = self.stream.stopped or self.num_new >= self.request.spec.max_length


@dataclass(slots=True, eq=False)
class Request:
    """A request from `Engine.submit` to its answer. `stop` may be called from any thread."""

    key: ModelKey
    spec: GenerateSpec
    future: Future[Generated] = field(default_factory=Future)
    rows: list[Row] = field(default_factory=list)  # empty until its model is loaded
    num_admitted: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End it before its next token; its future then raises `Stopped`."""
        self._stop.set()

    def is_over(self) -> bool:
        """Whether nobody waits for its rows any more. A request that was told to stop is answered so."""
        if self._stop.is_set():
            self.fail(Stopped("the generation was stopped"))
        return self.future.done()

    def open(self, model: LoadedModel) -> None:
        """Turn its texts into rows."""
        for index, text in enumerate(self.spec.texts):
            window = model.encode(text)
            row = Row(
                request=self,
                index=index,
                window=window,
                stream=TextStream(model.tokenizer, window, self.spec.stop),
                generator=row_generator(self.spec.seed) if self.spec.temperature > 0 else None,
                context_tokens=model.context_tokens,
            )
            row.make_room()
            self.rows.append(row)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it is answered already."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass

    def answer_if_done(self) -> None:
        """Answer when the last row has ended."""
        if not self.future.done() and all(row.ended for row in self.rows):
            self.future.set_result(
                Generated(
                    outputs=[row.stream.finish() for row in self.rows],
                    num_tokens=[row.num_new for row in self.rows],
                    truncated=[row.truncated for row in self.rows],
                )
            )
