"""One generation request and its texts: what was asked, how far each text is, and where the answer goes."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TypeVar

from apt_jobs.errors import AptJobsError, InvalidInput
from apt_jobs.generation.chat import encode_chat
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.sequences import Delta, FinishReason, Priority, SamplingParams, Sequence
from apt_jobs.generation.text import TextStream
from apt_jobs.jobs.spec import GenerateSpec

_Number = TypeVar("_Number", int, float)

TRUNCATED_FRACTION = 4  # a truncated prompt leaves at most this part of the context to what is added


class Stopped(AptJobsError):
    """The request was told to stop before it was done."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What was added to each text, in the order of the texts."""

    outputs: list[str]
    num_prompt_tokens: list[int]
    num_tokens: list[int]  # added, without the one that ended the text
    finish_reasons: list[FinishReason]
    truncated: list[bool]  # the model did not see the whole text: it is longer than its context


@dataclass(slots=True, eq=False)
class Text:
    """One text that grows."""

    sequence: Sequence
    stream: TextStream
    truncated: bool
    finish_reason: FinishReason | None = None

    @property
    def num_new(self) -> int:
        return len(self.sequence.output_ids)


@dataclass(slots=True, eq=False)
class Request:
    """A request from `Engine.submit` to its answer. `stop` may be called from any thread."""

    spec: GenerateSpec
    future: Future[Generated] = field(default_factory=Future)
    texts: list[Text] = field(default_factory=list)  # empty until its model is loaded
    on_stop: Callable[[], None] = lambda: None  # set by the engine
    on_text: Callable[[int, str], None] | None = None  # receives what is added to a text, in the engine's thread
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def priority(self) -> Priority:
        """Somebody waits for a request that was given a priority; the others are batches."""
        return Priority.INTERACTIVE if self.spec.priority > 0 else Priority.BATCH

    def stop(self) -> None:
        """End it before its next token; its future then raises `Stopped`."""
        self.fail(Stopped("the generation was stopped"))
        self.on_stop()

    @property
    def is_over(self) -> bool:
        return self.future.done()

    def open(self, model: LoadedModel) -> list[Sequence]:
        """Turn its texts into sequences.

        Raises:
            InvalidInput: a text is longer than the model's context, and `truncate` was not asked for.
        """
        params = sampling_params(self.spec, model)
        for index, text in enumerate(self.spec.texts):
            prompt, truncated = self._prompt(model, index, text)
            sequence = Sequence(
                prompt_ids=prompt,
                params=params(),
                max_total_tokens=model.context_tokens,
                on_delta=lambda delta, index=index: self._receive(index, delta),  # type: ignore[misc]  # the loop's own
                priority=self.priority,
                group=self,
            )
            stream = TextStream(model.tokenizer, prompt, self.spec.stop, incremental=self.on_text is not None)
            self.texts.append(Text(sequence, stream, truncated))
        return [text.sequence for text in self.texts]

    def succeed(self, generated: Generated) -> None:
        """Answer it, unless it is answered already."""
        with self._lock:
            if not self.future.done():
                self.future.set_result(generated)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it is answered already."""
        with self._lock:
            try:
                self.future.set_exception(error)
            except InvalidStateError:
                pass

    def _prompt(self, model: LoadedModel, index: int, text: str) -> tuple[list[int], bool]:
        chat = self.spec.messages
        prompt = model.encode(text) if chat is None else encode_chat(model, chat)
        context = model.context_tokens
        if len(prompt) < context:
            return prompt, False
        if not self.spec.truncate:
            raise InvalidInput(
                f"text {index} has {len(prompt):,} tokens; the context of model {model.folder.name!r} has {context:,}, "
                'one of them for what is added: shorten the text, or ask for "truncate": true'
            )
        room = min(self.spec.max_new_tokens, max(1, context // TRUNCATED_FRACTION))
        return prompt[-max(1, context - room) :], True

    def _receive(self, index: int, delta: Delta) -> None:
        """Take what a step added. Called in the engine's thread."""
        text = self.texts[index]
        if delta.error is not None:
            self.fail(delta.error)
            for other in self.texts:  # nobody waits for them any more
                other.sequence.fail(delta.error)
            return
        for token in delta.token_ids:
            text.stream.push(token)
        if text.stream.stopped and text.finish_reason is None:
            text.finish_reason = "stop"
            text.sequence.finish("stop")
        elif delta.finish_reason is not None and text.finish_reason is None:
            text.finish_reason = delta.finish_reason
        if self.on_text is not None:
            if text.finish_reason is not None:
                text.stream.finish()
            if added := text.stream.pop():
                self.on_text(index, added)
        if text.finish_reason is not None:
            self._answer_if_done()

    def _answer_if_done(self) -> None:
        reasons = [text.finish_reason for text in self.texts if text.finish_reason is not None]
        if len(reasons) < len(self.spec.texts):
            return
        generated = Generated(
            outputs=[text.stream.finish() for text in self.texts],
            num_prompt_tokens=[len(text.sequence.prompt_ids) for text in self.texts],
            num_tokens=[text.num_new for text in self.texts],
            finish_reasons=reasons,
            truncated=[text.truncated for text in self.texts],
        )
        self.succeed(generated)


def sampling_params(spec: GenerateSpec, model: LoadedModel) -> Callable[[], SamplingParams]:
    """Return what makes the parameters of each text: the request's, else the model's generation config's."""
    defaults = model.defaults

    def params() -> SamplingParams:
        fields = {} if spec.seed is None else {"seed": spec.seed}
        return SamplingParams(
            max_tokens=spec.max_new_tokens,
            temperature=_chosen(spec.temperature, defaults.temperature),
            top_k=_chosen(spec.top_k, defaults.top_k),
            top_p=_chosen(spec.top_p, defaults.top_p),
            min_p=_chosen(spec.min_p, defaults.min_p),
            repetition_penalty=_chosen(spec.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=spec.presence_penalty,
            frequency_penalty=spec.frequency_penalty,
            end_tokens=model.end_tokens,
            **fields,
        )

    return params


def _chosen(asked: _Number | None, default: _Number) -> _Number:
    return default if asked is None else asked
