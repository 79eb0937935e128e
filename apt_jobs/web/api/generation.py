"""`/api/generate`, `/api/batch_generate`: text in, text out, through the queue like every other job."""

import itertools
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.errors import AptJobsError
from apt_jobs.events.tokens import TokenLogprob
from apt_jobs.jobs.sampling_options import MAX_SEQUENCES, SamplingOptions
from apt_jobs.jobs.spec import GenerateSpec, ModelName, Text
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.generation_requests import CLIENT_LEFT, ClientLeft, Generation, begin, streamed, succeeded
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.live.generation_streams import Added, Ended, Restarted, Silence, Update
from apt_jobs.web.live.server_sent_events import wants_event_stream
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import JobAnswer, job_answer

INTERACTIVE_PRIORITY = 10  # of a job that someone waits for

FinishReason = Literal["stop", "length"]  # an end of its own or a stop string; or no more room or tokens


class Sampling(SamplingOptions):
    """How to continue a text, and with which model."""

    model: ModelName | None = Field(
        None,
        description="Id or alias of `GET /api/models`, or a job's `job_...@best`, `@latest` or `@step`; default: the "
        "loaded or newest checkpoint.",
    )


class GenerateRequest(Sampling):
    text: Text


class BatchGenerateRequest(Sampling):
    texts: list[Text] = Field(min_length=1, max_length=MAX_SEQUENCES)


class Usage(BaseModel):
    """Tokens read and added."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = Field(0, description="Of the prompts: known from another text that began with them.")


class Choice(BaseModel):
    """One draw of a text."""

    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = Field(None, description="Of each token, if they were asked for.")


class GenerateAnswer(BaseModel):
    generated_text: str = Field(description="That of the first choice, as `finish_reason`.")
    input_text: str
    generation_time_ms: float
    finish_reason: FinishReason
    truncated: bool
    choices: list[Choice] = Field(description="`n` of them.")
    usage: Usage
    model: str
    job_id: str


class BatchItem(BaseModel):
    input: str
    output: str = Field(description="That of the first choice, as `finish_reason`.")
    finish_reason: FinishReason
    truncated: bool
    choices: list[Choice] = Field(description="`n` of them.")


class BatchAnswer(BaseModel):
    results: list[BatchItem]
    total_time_ms: float
    batch_size: int
    usage: Usage
    model: str
    job_id: str


@endpoint(
    role=Role.SUBMITTER,
    tag="generation",
    body=GenerateRequest,
    answers={200: GenerateAnswer, 202: JobAnswer},
    creates=True,
    problems={504},
)
async def generate(request: Request) -> Response:
    """Continue one text. `Prefer: respond-async` answers 202 with the job at once.

    `choices` has `n` draws, the first is `generated_text`. With `"stream": true` or `Accept: text/event-stream` the
    answer is server-sent events: `delta` with the added `text` of the choice at `index`, `restarted` when all begin
    again, then one `end` (or `error`). Their `number` is contiguous.
    """
    body: GenerateRequest = request.state.body
    is_stream = not _wants_no_wait(request) and (body.stream or wants_event_stream(request))
    generation = await begin(
        request, _spec([body.text], body, stream=is_stream), is_waited_for=not _wants_no_wait(request)
    )
    headers = dict(replay_headers(generation.is_replay))
    is_handed_over = False
    try:
        if _wants_no_wait(request):
            return _accepted(generation)
        if is_stream:
            headers["location"] = f"/api/jobs/{generation.job.id}"
            response = await streamed(request, generation, partial(_events, generation.job.id, body.text), headers)
            is_handed_over = True
            return response
        result = await generation.result(request)
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    finally:
        if not is_handed_over:
            generation.close()
    return JSONResponse(_answer(result, body.text, generation.job.id).model_dump(mode="json"), headers=headers)


@endpoint(
    role=Role.SUBMITTER,
    tag="generation",
    body=BatchGenerateRequest,
    answers={200: BatchAnswer, 202: JobAnswer},
    creates=True,
    problems={504},
)
async def batch_generate(request: Request) -> Response:
    """Continue many texts in one batch. `Prefer: respond-async` answers 202 with the job at once."""
    body: BatchGenerateRequest = request.state.body
    started = time.monotonic()
    generation = await begin(
        request, _spec(list(body.texts), body, stream=False), is_waited_for=not _wants_no_wait(request)
    )
    try:
        if _wants_no_wait(request):
            return _accepted(generation)
        result = await generation.result(request)
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    finally:
        generation.close()
    answer = BatchAnswer(
        results=[
            BatchItem(
                input=text,
                output=choices[0].text,
                finish_reason=choices[0].finish_reason,
                truncated=truncated,
                choices=choices,
            )
            for text, choices, truncated in zip(
                body.texts, _choices(result, len(body.texts)), result["truncated"], strict=True
            )
        ],
        total_time_ms=(time.monotonic() - started) * 1000.0,
        batch_size=len(body.texts),
        usage=Usage(**result["usage"]),
        model=result["model"],
        job_id=generation.job.id,
    )
    return JSONResponse(answer.model_dump(mode="json"), headers=replay_headers(generation.is_replay))


def _spec(texts: list[str], sampling: Sampling, *, stream: bool) -> GenerateSpec:
    options = sampling.model_dump(exclude={"text", "texts", "stream"})
    return GenerateSpec(kind="generate", texts=texts, **options, stream=stream, priority=INTERACTIVE_PRIORITY)


def _answer(result: dict[str, Any], text: str, job_id: str) -> GenerateAnswer:
    choices = _choices(result, 1)[0]
    return GenerateAnswer(
        generated_text=choices[0].text,
        input_text=text,
        generation_time_ms=result["generation_time_ms"],
        finish_reason=choices[0].finish_reason,
        truncated=result["truncated"][0],
        choices=choices,
        usage=Usage(**result["usage"]),
        model=result["model"],
        job_id=job_id,
    )


def _choices(result: dict[str, Any], num_texts: int) -> list[list[Choice]]:
    """Return the choices of each text."""
    outputs = result["outputs"]
    logprobs = result.get("logprobs") or [None] * len(outputs)
    choices = [
        Choice(text=text, finish_reason=reason, logprobs=tokens)
        for text, reason, tokens in zip(outputs, result["finish_reasons"], logprobs, strict=True)
    ]
    size = len(choices) // num_texts
    return [choices[start : start + size] for start in range(0, len(choices), size)]


async def _events(job_id: str, text: str, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
    """Turn updates into server-sent events; the last one is `end` or `error`."""
    numbers = itertools.count()

    def event(kind: str, data: dict[str, Any]) -> bytes:
        number = next(numbers)
        encoded = orjson.dumps({"number": number, **data})
        return b"event: %b\nid: %d\ndata: %b\n\n" % (kind.encode(), number, encoded)

    try:
        async for update in updates:
            match update:
                case Added(index, added, logprobs):
                    more = {"logprobs": logprobs} if logprobs else {}
                    yield event("delta", {"index": index, "text": added, **more})
                case Restarted():
                    yield event("restarted", {"detail": "the worker was lost; the text begins again"})
                case Ended():
                    yield event("end", _answer(succeeded(job_id, update), text, job_id).model_dump(mode="json"))
                case Silence():
                    yield b": the job goes on\n\n"
    except ProblemError as exc:
        yield event("error", {"status": exc.status, "detail": exc.detail, "job_id": job_id})
    except AptJobsError as exc:
        yield event("error", {"status": 503, "detail": str(exc), "job_id": job_id})


def _wants_no_wait(request: Request) -> bool:
    return "respond-async" in request.headers.get("prefer", "").lower()


def _accepted(generation: Generation) -> Response:
    job = generation.job
    headers = {
        "location": f"/api/jobs/{job.id}",
        "preference-applied": "respond-async",
        **replay_headers(generation.is_replay),
    }
    return JSONResponse(job_answer(job).model_dump(mode="json"), 202, headers=headers)
