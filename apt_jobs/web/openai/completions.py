"""`/v1/completions` and `/v1/chat/completions`, whole or as a stream."""

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.errors import AptJobsError
from apt_jobs.events.tokens import LikelyToken, TokenLogprob
from apt_jobs.web.api.generation_requests import CLIENT_LEFT, ClientLeft, JobFailed, streamed, succeeded
from apt_jobs.web.api.jobs import EVENT_STREAM
from apt_jobs.web.live.generation_streams import Added, Ended, Restarted, Silence, Update
from apt_jobs.web.openai.answers import ChatAnswer, CompletionAnswer
from apt_jobs.web.openai.endpoint import dialect
from apt_jobs.web.openai.generation_jobs import begin_job, job_of, refusal
from apt_jobs.web.openai.requests import ChatRequest, CompletionRequest
from apt_jobs.web.openai_errors import error_body, openai_status
from apt_jobs.web.problems import ProblemError


@dialect(
    role=Role.SUBMITTER,
    body=CompletionRequest,
    answers={200: CompletionAnswer},
    operation="create_completion",
    problems={404, 409, 504},
    media=EVENT_STREAM,
)
async def complete(request: Request) -> Response:
    """Continue prompts. With `"stream": true` the answer is server-sent events, the last one `[DONE]`."""
    return await _completed(request, request.state.body, is_chat=False)


@dialect(
    role=Role.SUBMITTER,
    body=ChatRequest,
    answers={200: ChatAnswer},
    operation="create_chat_completion",
    problems={404, 409, 504},
    media=EVENT_STREAM,
)
async def chat(request: Request) -> Response:
    """Add the assistant's message to a chat. With `"stream": true` the answer is server-sent events."""
    return await _completed(request, request.state.body, is_chat=True)


async def _completed(request: Request, body: CompletionRequest | ChatRequest, *, is_chat: bool) -> Response:
    spec = job_of(body)
    generation = await begin_job(request, spec, body.model)
    is_handed_over = False
    head = _Head(generation.job.id, body.model, is_chat=is_chat)
    try:
        if body.stream:
            response = await streamed(
                request, generation, partial(_events, head, spec.num_sequences, body.include_usage)
            )
            is_handed_over = True
            return response
        result = await generation.result(request)
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    except JobFailed as exc:
        raise refusal(exc) from exc
    finally:
        if not is_handed_over:
            generation.close()
    return JSONResponse(answer_of(generation.job.id, body.model, result, is_chat=is_chat))


def answer_of(job_id: str, model: str, result: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """Return the whole answer that a job's result is."""
    head = _Head(job_id, model, is_chat=is_chat)
    tokens = result.get("logprobs") or [None] * len(result["outputs"])
    choices = [
        head.choice(index, text, reason, logprobs)
        for index, (text, reason, logprobs) in enumerate(
            zip(result["outputs"], result["finish_reasons"], tokens, strict=True)
        )
    ]
    return {**head.fields(is_chunk=False), "choices": choices, "usage": _usage(result)}


class _Head:
    """What all chunks of an answer share, and how its choices are written."""

    def __init__(self, job_id: str, model: str, *, is_chat: bool) -> None:
        self._is_chat, self._model = is_chat, model
        self.job_id = job_id
        self._created = int(time.time())

    def fields(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {"id": f"{prefix}-{self.job_id}", "object": kind, "created": self._created, "model": self._model}

    def choice(self, index: int, text: str, reason: str, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        if not self._is_chat:
            return {**choice, "text": text}
        return {**choice, "message": {"role": "assistant", "content": text, "refusal": None}}

    def chunk(
        self,
        index: int,
        text: str | None,
        reason: str | None = None,
        *,
        is_first: bool = False,
        tokens: Sequence[TokenLogprob] = (),
        offset: int = 0,
    ) -> bytes:
        logprobs = self._logprobs(tokens or None, offset)
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        if self._is_chat:
            choice["delta"] = ({"role": "assistant"} if is_first else {}) | ({} if text is None else {"content": text})
        else:
            choice["text"] = text or ""
        return self.event([choice])

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None, offset: int = 0) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {"content": tokens, "refusal": None} if self._is_chat else _completion_logprobs(tokens, offset)

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        return _data({**self.fields(is_chunk=True), "choices": choices, "usage": usage})


async def _events(
    head: _Head, num_choices: int, include_usage: bool, updates: AsyncIterator[Update]
) -> AsyncIterator[bytes]:
    """Turn updates into chunks. A text that has begun cannot begin again here: then the stream ends with an error."""
    begun: set[int] = set()
    num_characters: defaultdict[int, int] = defaultdict(int)  # of the tokens sent
    try:
        async for update in updates:
            match update:
                case Added(index, text, tokens):
                    offset = num_characters[index]
                    yield head.chunk(index, text, is_first=index not in begun, tokens=tokens, offset=offset)
                    num_characters[index] += sum(len(one["token"]) for one in tokens)
                    begun.add(index)
                case Restarted():
                    if begun:
                        raise ProblemError(503, f"the worker was lost; job {head.job_id} begins again: GET /api/jobs")
                case Ended():
                    result = succeeded(head.job_id, update)
                    for index in range(num_choices):
                        reason = result["finish_reasons"][index]
                        yield head.chunk(index, None, reason, is_first=index not in begun)
                    if include_usage:
                        yield head.event([], _usage(result))
                    yield b"data: [DONE]\n\n"
                case Silence():
                    yield b": the job goes on\n\n"
    except JobFailed as exc:
        refused = refusal(exc)
        yield _data(error_body(openai_status(refused.status), refused.detail))
    except ProblemError as exc:
        yield _data(error_body(openai_status(exc.status), exc.detail))
    except AptJobsError as exc:
        yield _data(error_body(503, str(exc)))


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Write log-probabilities as `/v1/completions` does. `offset`: where the first token begins, in characters."""
    ends = list(accumulate((len(one["token"]) for one in tokens), initial=offset))
    return {
        "tokens": [one["token"] for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [{_written(like): like["logprob"] for like in one["top_logprobs"]} for one in tokens],
        "text_offset": ends[:-1],
    }


def _usage(result: dict[str, Any]) -> dict[str, Any]:
    usage = dict(result["usage"])
    cached = usage.pop("cached_tokens", 0)
    return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


def _written(token: LikelyToken) -> str:
    """Return a token as a key; bytes that are no character are written as OpenAI does, so that they differ."""
    if "\N{REPLACEMENT CHARACTER}" not in token["token"]:
        return token["token"]
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token["bytes"])


def _data(document: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(document)
