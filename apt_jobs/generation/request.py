"""One generation request and its texts: what was asked, how far each text is, and where the answer goes."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import TypeVar

from llguidance import LLMatcher

from apt_jobs.errors import AptJobsError, InvalidInput
from apt_jobs.events.tokens import LikelyToken, TokenLogprob
from apt_jobs.generation.adapter_bank import Adapter, AdapterKey
from apt_jobs.generation.chat import encode_chat
from apt_jobs.generation.constraints import Constraint, Vocabulary
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.sequences import Delta, FinishReason, Priority, SamplingParams, Sequence, TokenChances
from apt_jobs.generation.text import TextStream
from apt_jobs.jobs.spec import GenerateSpec

OnText = Callable[[int, str, list[TokenLogprob]], None]  # index of the output, what was added to it, its tokens
_Number = TypeVar("_Number", int, float)

TRUNCATED_FRACTION = 4  # a truncated prompt leaves at most this part of the context to what is added


class Stopped(AptJobsError):
    """The request was told to stop before it was done."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What was added to each text. Several draws of a text are neighbours."""

    outputs: list[str]
    num_prompt_tokens: list[int]  # of each text of the request
    num_tokens: list[int]  # added to each output, without the one that ended it
    finish_reasons: list[FinishReason]
    truncated: list[bool]  # the model did not see the whole text of the request: it is longer than its context
    logprobs: list[list[TokenLogprob]] | None = None  # of each output
    num_reused: int = 0  # tokens of the prompts that were not read, since another text began with them


@dataclass(slots=True, eq=False)
class Text:
    """One output that grows."""

    sequence: Sequence
    stream: TextStream
    truncated: bool
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_shown: int = 0  # of the logprobs

    def pop(self) -> tuple[str, list[TokenLogprob]]:
        """Return what was added since the last time."""
        added = self.stream.pop()
        start, self.num_shown = self.num_shown, self.stream.num_shown() if self.logprobs else 0
        return added, self.logprobs[start : self.num_shown]

    @property
    def num_new(self) -> int:
        return len(self.sequence.output_ids)


@dataclass(slots=True, eq=False)
class Request:
    """A request from `Engine.submit` to its answer. `stop` may be called from any thread."""

    spec: GenerateSpec
    future: Future[Generated] = field(default_factory=Future)
    texts: list[Text] = field(default_factory=list)  # one for each draw; empty until its model is loaded
    vocabulary: Vocabulary | None = None  # of its model
    on_stop: Callable[[], None] = lambda: None  # set by the engine
    on_text: OnText | None = None  # receives what is added to an output, in the engine's thread
    grammar: LLMatcher | None = None  # once it is compiled
    adapter_key: AdapterKey | None = None  # of the adapter that it asks for, beside other requests' adapters
    adapter: Adapter | None = None  # once it is read
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

    @property
    def is_at_work(self) -> bool:
        """Say whether a step may still compute any of its texts."""
        return not self.is_over or any(not text.sequence.is_finished for text in self.texts)

    @property
    def needs_grammar(self) -> bool:
        """Say whether `compile` has to come before `open`."""
        return self.grammar is None and (self.spec.json_schema is not None or self.spec.regex is not None)

    def compile(self, model: LoadedModel) -> None:
        """Compile the grammar of its texts, in any thread.

        Raises:
            InvalidInput: the model has no text of it.
        """
        self.grammar = model.vocabulary.matcher(self.spec.json_schema, self.spec.regex)

    def open(self, model: LoadedModel) -> list[Sequence]:
        """Turn its texts into sequences.

        Raises:
            InvalidInput: a text is longer than the model's context, and `truncate` was not asked for, or a token is
                none of the model's.
        """
        self.vocabulary = model.vocabulary
        for index, text in enumerate(self.spec.texts):
            prompt, truncated = self._prompt(model, index, text)
            for draw in range(self.spec.n):
                self.texts.append(self._text(model, prompt, draw, truncated=truncated))
        return [text.sequence for text in self.texts]

    def _text(self, model: LoadedModel, prompt: list[int], draw: int, *, truncated: bool) -> Text:
        spec, index = self.spec, len(self.texts)
        params = sampling_params(spec, model, draw)
        if self.grammar is not None:
            params = replace(params, end_tokens=params.end_tokens | model.vocabulary.grammar_end_tokens)
        constraint = None
        if self.grammar is not None or spec.min_tokens:
            constraint = Constraint(
                model.vocabulary_size,
                None if self.grammar is None else self.grammar.deep_copy(),
                min_tokens=spec.min_tokens,
                never=params.end_tokens,
            )
        sequence = Sequence(
            prompt_ids=prompt,
            params=params,
            max_total_tokens=model.context_tokens,
            on_delta=lambda delta: self._receive(index, delta),
            priority=self.priority,
            constraint=constraint,
            group=self,
            adapter=self.adapter,
        )
        incremental = self.on_text is not None or spec.logprobs is not None
        stream = TextStream(model.tokenizer, prompt, spec.stop, min_tokens=spec.min_tokens, incremental=incremental)
        return Text(sequence, stream, truncated)

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
        text.logprobs += [self._logprob(chances) for chances in delta.chances]
        if text.stream.stopped and text.finish_reason is None:
            text.finish_reason = "stop"
            text.sequence.finish("stop")
        elif delta.finish_reason is not None and text.finish_reason is None:
            text.finish_reason = delta.finish_reason
        if self.on_text is not None:
            if text.finish_reason is not None:
                text.stream.finish()
            added, logprobs = text.pop()
            if added or logprobs:
                self.on_text(index, added, logprobs)
        if text.finish_reason is not None:
            self._answer_if_done()

    def _logprob(self, chances: TokenChances) -> TokenLogprob:
        assert self.vocabulary is not None
        likeliest = chances.likeliest[: self.spec.logprobs]
        return {
            **_likely(self.vocabulary, chances.token, chances.logprob),
            "top_logprobs": [_likely(self.vocabulary, token, logprob) for token, logprob in likeliest],
        }

    def _answer_if_done(self) -> None:
        reasons = [text.finish_reason for text in self.texts if text.finish_reason is not None]
        if len(reasons) < len(self.texts):
            return
        firsts = self.texts[:: self.spec.n]
        generated = Generated(
            outputs=[text.stream.finish() for text in self.texts],
            num_prompt_tokens=[len(text.sequence.prompt_ids) for text in firsts],
            num_tokens=[text.num_new for text in self.texts],
            finish_reasons=reasons,
            truncated=[text.truncated for text in firsts],
            logprobs=None if self.spec.logprobs is None else [_shown(text) for text in self.texts],
            num_reused=sum(min(text.sequence.num_reused, len(text.sequence.prompt_ids)) for text in firsts),
        )
        self.succeed(generated)


def sampling_params(spec: GenerateSpec, model: LoadedModel, draw: int = 0) -> SamplingParams:
    """Return the parameters of one draw: the request's, else the model's generation config's.

    Raises:
        InvalidInput: a token is none of the model's.
    """
    for field_name, tokens in (("logit_bias", spec.logit_bias), ("stop_token_ids", spec.stop_token_ids)):
        if unknown := [token for token in tokens if token >= model.vocabulary_size]:
            raise InvalidInput(
                f"{field_name} names token {unknown[0]}; model {model.folder.name!r} has tokens 0 to "
                f"{model.vocabulary_size - 1}"
            )
    defaults = model.defaults
    params = SamplingParams(
        max_tokens=spec.max_new_tokens,
        temperature=_chosen(spec.temperature, defaults.temperature),
        top_k=_chosen(spec.top_k, defaults.top_k),
        top_p=_chosen(spec.top_p, defaults.top_p),
        min_p=_chosen(spec.min_p, defaults.min_p),
        repetition_penalty=_chosen(spec.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        logit_bias=spec.logit_bias,
        num_logprobs=spec.logprobs,
        sequence=draw,
        end_tokens=model.end_tokens.union(spec.stop_token_ids),
    )
    return params if spec.seed is None else replace(params, seed=spec.seed)


def _shown(text: Text) -> list[TokenLogprob]:
    text.pop()
    return text.logprobs[: text.num_shown]


def _likely(vocabulary: Vocabulary, token: int, logprob: float) -> LikelyToken:
    raw = vocabulary.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def _chosen(asked: _Number | None, default: _Number) -> _Number:
    return default if asked is None else asked
