"""`/api/generate`, `/api/batch_generate`, `/api/models`: text in, text out, through the queue like every other job."""

import asyncio
import time
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.models import list_local_models
from apt_jobs.db.access import Role
from apt_jobs.db.checkpoints import list_checkpoints, newest_checkpoint
from apt_jobs.db.idempotency import IdempotencyKey, known_resource
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value
from apt_jobs.db.workers import list_workers
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.spec import GenerateSpec, Name, SamplingOptions, Text
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import made_job, replay_headers
from apt_jobs.web.api.jobs import require_references, submit
from apt_jobs.web.live.streams import LiveStreams, streams_of
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import JobAnswer, job_answer
from apt_jobs.web.service import Service, service_of

POLL_S = 1.0  # between two looks at the row, should the live wire be down
MAX_MODELS = 200

FinishReason = Literal["stop", "length"]  # an end of its own or a stop string; or no more room or tokens


class Sampling(SamplingOptions):
    """How to continue a text, and with which model."""

    model: Name | None = Field(None, description="Id of `GET /api/models`; default: the loaded or newest checkpoint.")


class GenerateRequest(Sampling):
    text: Text


class BatchGenerateRequest(Sampling):
    texts: list[Text] = Field(min_length=1, max_length=64)


class Usage(BaseModel):
    """Tokens read and added."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateAnswer(BaseModel):
    generated_text: str
    input_text: str
    generation_time_ms: float
    finish_reason: FinishReason
    truncated: bool
    usage: Usage
    model: str
    job_id: str


class BatchItem(BaseModel):
    input: str
    output: str
    finish_reason: FinishReason
    truncated: bool


class BatchAnswer(BaseModel):
    results: list[BatchItem]
    total_time_ms: float
    batch_size: int
    usage: Usage
    model: str
    job_id: str


class ModelAnswer(BaseModel):
    id: str
    source: Literal["checkpoint", "local"]
    name: str
    job_id: str | None
    step: int | None
    val_loss: float | None
    created_at: str | None
    is_default: bool


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]
    has_more: bool


@endpoint(
    role=Role.SUBMITTER,
    tag="generation",
    body=GenerateRequest,
    answers={200: GenerateAnswer, 202: JobAnswer},
    creates=True,
    problems={504},
)
async def generate(request: Request) -> Response:
    """Continue one text. `Prefer: respond-async` answers 202 with the job at once."""
    body: GenerateRequest = request.state.body
    job, is_replay = await _submitted(request, [body.text], body)
    if _wants_no_wait(request):
        return _accepted(job, is_replay)
    result = await _result(service_of(request), streams_of(request), job)
    answer = GenerateAnswer(
        generated_text=result["outputs"][0],
        input_text=body.text,
        generation_time_ms=result["generation_time_ms"],
        finish_reason=result["finish_reasons"][0],
        truncated=result["truncated"][0],
        usage=Usage(**result["usage"]),
        model=result["model"],
        job_id=job.id,
    )
    return JSONResponse(answer.model_dump(mode="json"), headers=replay_headers(is_replay))


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
    job, is_replay = await _submitted(request, list(body.texts), body)
    if _wants_no_wait(request):
        return _accepted(job, is_replay)
    result = await _result(service_of(request), streams_of(request), job)
    answer = BatchAnswer(
        results=[
            BatchItem(input=text, output=output, finish_reason=reason, truncated=truncated)
            for text, output, reason, truncated in zip(
                body.texts, result["outputs"], result["finish_reasons"], result["truncated"], strict=True
            )
        ],
        total_time_ms=(time.monotonic() - started) * 1000.0,
        batch_size=len(body.texts),
        usage=Usage(**result["usage"]),
        model=result["model"],
        job_id=job.id,
    )
    return JSONResponse(answer.model_dump(mode="json"), headers=replay_headers(is_replay))


@endpoint(role=Role.VIEWER, tag="generation", answers={200: ModelList}, operation="list_models")
async def get_models(request: Request) -> Response:
    """Return the checkpoints and local models that can generate, the newest first."""
    service = service_of(request)
    local = await asyncio.to_thread(list_local_models, service.settings)

    def read(session: Session) -> ModelList:
        rows, has_more = list_checkpoints(session, limit=MAX_MODELS)
        newest = newest_checkpoint(session)
        default = get_value(session, DEFAULT_MODEL) or (newest.id if newest else None)
        models = [
            ModelAnswer(
                id=row.id,
                source="checkpoint",
                name=f"{get_job(session, row.job_id).name or row.job_id} at step {row.step}",
                job_id=row.job_id,
                step=row.step,
                val_loss=row.val_loss,
                created_at=timestamp(row.created_at),
                is_default=row.id == default,
            )
            for row in rows
        ]
        models += [
            ModelAnswer(
                id=name,
                source="local",
                name=name,
                job_id=None,
                step=None,
                val_loss=None,
                created_at=None,
                is_default=name == default,
            )
            for name in local
        ]
        return ModelList(data=models, has_more=has_more)

    return JSONResponse((await service.read(read)).model_dump(mode="json"))


async def _submitted(request: Request, texts: list[str], sampling: Sampling) -> tuple[Job, bool]:
    service = service_of(request)
    key: IdempotencyKey | None = request.state.idempotency_key
    if key is not None and (known := await service.read(known_resource, key)) is not None:
        return await made_job(service, key, known), True
    spec = GenerateSpec(
        kind="generate",
        texts=texts,
        **sampling.model_dump(exclude={"text", "texts"}),
        priority=10,  # someone waits for it
    )
    await require_references(service, spec)
    alive = await service.read(list_workers, alive_within_s(service.settings))
    if not any(spec.kind in worker.queues for worker in alive) and not _wants_no_wait(request):
        raise ProblemError(503, "no generation worker is running; start one: apt-jobs worker generate")
    return await submit(service, spec, key)


async def _result(service: Service, streams: LiveStreams, job: Job) -> dict[str, Any]:
    """Wait for the job's end: woken by the live wire, and looking at the row now and then.

    Raises:
        ProblemError: 504 when it takes too long, 422 with the job's reason when it failed.
    """
    deadline = time.monotonic() + service.settings.generate_wait_s
    async with streams.watch(job.id) as stream:
        cursor = 0
        while time.monotonic() < deadline:
            now = await service.read(get_job, job.id)
            if now.state in TERMINAL_STATES:
                break
            cursor = max(cursor, now.last_seq)
            await stream.changed(cursor, POLL_S)
        else:
            waited = service.settings.generate_wait_s
            raise ProblemError(
                504, f"job {job.id} is not done after {waited:.0f} s; it goes on: GET /api/jobs/{job.id}"
            )
    if now.state != JobState.SUCCEEDED or now.result is None:
        raise ProblemError(422, f"job {job.id} {now.state}: {now.reason or 'no reason was given'}", kind="job-failed")
    return now.result


def _wants_no_wait(request: Request) -> bool:
    return "respond-async" in request.headers.get("prefer", "").lower()


def _accepted(job: Job, is_replay: bool) -> Response:
    headers = {
        "location": f"/api/jobs/{job.id}",
        "preference-applied": "respond-async",
        **replay_headers(is_replay),
    }
    return JSONResponse(job_answer(job).model_dump(mode="json"), 202, headers=headers)
