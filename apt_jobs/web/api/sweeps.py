"""`/api/sweeps`: many training jobs as one: planned, inserted, watched, cancelled, paused and resumed together."""

import asyncio
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.idempotency import IdempotencyKey, create_once, known_resource
from apt_jobs.db.sweep_models import Sweep
from apt_jobs.db.sweeps import count_states, get_sweep, list_sweeps, rungs_of, trials_of, want_cancelled, want_paused
from apt_jobs.jobs.sweeps import InvalidSweep, SweepSpec, plan_jobs
from apt_jobs.operations.sweeps import advance_sweep, create_sweep
from apt_jobs.web.api.code import require_consent
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.problems import Fault, ProblemError
from apt_jobs.web.service import Service, service_of
from apt_jobs.web.sweep_answers import SweepAnswer, SweepList, sweep_answer, whole_sweep_answer


class SweepsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[str, StringConstraints(max_length=40)] | None = Field(None, description="Last id seen.")
    limit: int = Field(50, ge=1, le=200)


@endpoint(role=Role.VIEWER, tag="sweeps", query=SweepsQuery, answers={200: SweepList}, operation="list_sweeps")
async def get_sweeps(request: Request) -> Response:
    """List sweeps, newest first."""
    query: SweepsQuery = request.state.query

    def read(session: Session) -> SweepList:
        rows, has_more = list_sweeps(session, after=query.after, limit=query.limit)
        counts = count_states(session, [row.id for row in rows])
        return SweepList(data=[sweep_answer(row, counts[row.id]) for row in rows], has_more=has_more)

    answer = await service_of(request).read(read)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER,
    tag="sweeps",
    body=SweepSpec,
    answers={202: SweepAnswer},
    creates=True,
    operation="create_sweep",
)
async def add_sweep(request: Request) -> Response:
    """Submit a sweep with all of its jobs, or none of them. The answer is durable, as that of a job."""
    spec: SweepSpec = request.state.body
    service = service_of(request)
    key: IdempotencyKey | None = request.state.idempotency_key
    try:
        sweep_id, is_replay = await _submit(request, service, spec, key)
    except InvalidSweep as exc:
        faults = [
            Fault(pointer="#/" + "/".join(fault.path), seen=fault.seen, detail=fault.detail) for fault in exc.faults
        ]
        detail = f"{len(faults)} fault{'s' * (len(faults) > 1)} in the sweep; see `errors`"
        raise ProblemError(422, detail, kind="invalid-request", errors=faults) from exc
    service.wake_up_now.set()
    answer = await _whole(service, sweep_id)
    headers = {"location": f"/api/sweeps/{sweep_id}", **replay_headers(is_replay)}
    return JSONResponse(answer.model_dump(mode="json"), 202, headers=headers)


@endpoint(role=Role.VIEWER, tag="sweeps", answers={200: SweepAnswer}, operation="get_sweep")
async def get_one_sweep(request: Request) -> Response:
    """Return one sweep: its progress, its settings by what they reached, the best one."""
    answer = await _whole(service_of(request), request.path_params["sweep_id"])
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.SUBMITTER, tag="sweeps", answers={200: SweepAnswer}, problems={409})
async def cancel_sweep(request: Request) -> Response:
    """Cancel all jobs of a sweep that have not ended. Repeating it changes nothing."""
    return await _steered(request, want_cancelled)


@endpoint(role=Role.SUBMITTER, tag="sweeps", answers={200: SweepAnswer}, problems={409})
async def pause_sweep(request: Request) -> Response:
    """Pause all jobs of a sweep: those that run save first. Repeating it changes nothing."""
    return await _steered(request, lambda session, sweep_id: want_paused(session, sweep_id, paused=True))


@endpoint(role=Role.SUBMITTER, tag="sweeps", answers={200: SweepAnswer}, problems={409})
async def resume_sweep(request: Request) -> Response:
    """Let a paused sweep go on. Jobs that were paused one by one stay paused."""
    return await _steered(request, lambda session, sweep_id: want_paused(session, sweep_id, paused=False))


async def _submit(request: Request, service: Service, spec: SweepSpec, key: IdempotencyKey | None) -> tuple[str, bool]:
    if key is not None and (known := await service.read(known_resource, key)) is not None:
        return known, True  # whatever of its references is gone by now
    planned = await asyncio.to_thread(plan_jobs, spec)
    for one in planned:
        require_consent(request, one.spec)

    def insert(session: Session) -> tuple[str, bool]:
        return create_once(session, key, lambda: create_sweep(session, service.settings, spec, planned).id)

    return await service.write(insert)


async def _steered(request: Request, want: Callable[[Session, str], Sweep]) -> Response:
    """Note what is wanted, and bring the jobs there. What this process does not get done, the loops do."""
    service, sweep_id = service_of(request), request.path_params["sweep_id"]
    await service.write(lambda session: want(session, sweep_id).id)
    events, _ = await asyncio.to_thread(advance_sweep, service.database, sweep_id)
    for event in events:
        await service.publish(event.job_id, [event])
    service.wake_up_now.set()
    answer = await _whole(service, sweep_id)
    return JSONResponse(answer.model_dump(mode="json"))


async def _whole(service: Service, sweep_id: str) -> SweepAnswer:
    def read(session: Session) -> SweepAnswer:
        sweep = get_sweep(session, sweep_id)
        return whole_sweep_answer(sweep, trials_of(session, sweep_id), rungs_of(session, sweep_id))

    return await service.read(read)
