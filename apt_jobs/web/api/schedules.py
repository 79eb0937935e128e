"""`/api/schedules`: jobs that come due by a cron expression in a time zone."""

from collections.abc import Callable
from datetime import datetime
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.idempotency import create_once
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Schedule, ScheduleRun
from apt_jobs.db.schedules import (
    ScheduleValues,
    change_schedule,
    create_schedule,
    database_now,
    delete_schedule,
    get_schedule,
    last_runs,
    list_schedules,
    pause_schedule,
    run_now,
)
from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.cron import MAX_CHARS, due_after, require_due
from apt_jobs.jobs.spec import AnyJobSpec, Title
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.operations.submit import checker
from apt_jobs.web.api.code import require_consent
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import made_job, replay_headers
from apt_jobs.web.api.jobs import require_references
from apt_jobs.web.problems import Fault, ProblemError
from apt_jobs.web.schemas import JobAnswer, ScheduleAnswer, ScheduleList, ScheduleRunAnswer, job_answer
from apt_jobs.web.service import service_of

NUM_NEXT = 5  # due times shown
NUM_RUNS = 50

Cron = Annotated[str, StringConstraints(max_length=MAX_CHARS)]
TimeZone = Annotated[str, StringConstraints(max_length=100)]


class DueBody(Strict):
    cron: Cron = Field(description="Five fields (minute hour day month weekday), or @hourly, @daily, @nightly, ...")
    time_zone: TimeZone = Field("UTC", description="IANA name, as Europe/Berlin.")


class ScheduleBody(DueBody):
    """A schedule as users set it."""

    name: Title
    job: AnyJobSpec
    overlap: Literal["skip", "queue", "cancel"] = Field(
        "skip", description="When a job of an earlier run has not ended: skip this run, queue another, cancel the old."
    )
    catch_up: Literal["skip", "latest", "all"] = Field(
        "latest", description="Which of the due times that were missed while the service was down are run late."
    )
    paused: bool = False


class DueTimes(Strict):
    next_runs: list[str]


@endpoint(role=Role.VIEWER, tag="schedules", answers={200: ScheduleList}, operation="list_schedules")
async def get_schedules(request: Request) -> Response:
    """List schedules by name, each with its next due times and its last run."""

    def read(session: Session) -> list[ScheduleAnswer]:
        now = database_now(session)
        return [_answer(session, schedule, now) for schedule in list_schedules(session)]

    answer = ScheduleList(data=await service_of(request).read(read))
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER,
    tag="schedules",
    body=ScheduleBody,
    answers={201: ScheduleAnswer},
    creates=True,
    operation="create_schedule",
)
async def add_schedule(request: Request) -> Response:
    """Add a schedule. Its first run is the first due time from now on."""
    values = await _values(request)
    service, key = service_of(request), request.state.idempotency_key

    def write(session: Session) -> tuple[ScheduleAnswer, bool]:
        schedule_id, is_replay = create_once(session, key, lambda: create_schedule(session, values).id)
        return _answer(session, get_schedule(session, schedule_id), database_now(session)), is_replay

    answer, is_replay = await service.write(write)
    headers = {"location": f"/api/schedules/{answer.id}", **replay_headers(is_replay)}
    return JSONResponse(answer.model_dump(mode="json"), 201, headers=headers)


@endpoint(role=Role.VIEWER, tag="schedules", body=DueBody, answers={200: DueTimes})
async def preview_schedule(request: Request) -> Response:
    """Return the next due times of an expression, without a schedule."""
    body: DueBody = request.state.body
    now = await service_of(request).read(database_now)
    times = _checked(body, now, NUM_NEXT)
    return JSONResponse(DueTimes(next_runs=[timestamp(time) for time in times]).model_dump(mode="json"))


@endpoint(role=Role.VIEWER, tag="schedules", answers={200: ScheduleAnswer}, operation="get_schedule")
async def get_one_schedule(request: Request) -> Response:
    """Return one schedule with its newest runs."""

    def read(session: Session) -> ScheduleAnswer:
        schedule = get_schedule(session, request.path_params["schedule_id"])
        answer = _answer(session, schedule, database_now(session))
        answer.runs = [_run(run, state) for run, state in last_runs(session, schedule.id, NUM_RUNS)]
        return answer

    answer = await service_of(request).read(read)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.SUBMITTER, tag="schedules", body=ScheduleBody, answers={200: ScheduleAnswer})
async def replace_schedule(request: Request) -> Response:
    """Set all of a schedule again. Its next run is the first due time from now on."""
    values = await _values(request)
    schedule_id = request.path_params["schedule_id"]
    return await _answered(request, lambda session: change_schedule(session, schedule_id, values))


@endpoint(role=Role.SUBMITTER, tag="schedules", answers={204: None}, operation="delete_schedule")
async def remove_schedule(request: Request) -> Response:
    """Delete a schedule and its history. Its jobs stay."""
    await service_of(request).write(delete_schedule, request.path_params["schedule_id"])
    return Response(status_code=204)


@endpoint(role=Role.SUBMITTER, tag="schedules", answers={200: ScheduleAnswer}, operation="pause_schedule")
async def pause_one_schedule(request: Request) -> Response:
    """Stop firing. Repeating it changes nothing."""
    schedule_id = request.path_params["schedule_id"]
    return await _answered(request, lambda session: pause_schedule(session, schedule_id, paused=True))


@endpoint(role=Role.SUBMITTER, tag="schedules", answers={200: ScheduleAnswer})
async def resume_schedule(request: Request) -> Response:
    """Fire again, from the next due time on. What was due meanwhile is not caught up."""
    schedule_id = request.path_params["schedule_id"]
    return await _answered(request, lambda session: pause_schedule(session, schedule_id, paused=False))


@endpoint(role=Role.SUBMITTER, tag="schedules", answers={202: JobAnswer}, creates=True)
async def run_schedule(request: Request) -> Response:
    """Submit the schedule's job now."""
    service, key = service_of(request), request.state.idempotency_key
    settings, schedule_id = service.settings, request.path_params["schedule_id"]

    def write(session: Session) -> tuple[str, bool]:
        return create_once(
            session, key, lambda: run_now(session, schedule_id, settings.max_queued_jobs, checker(settings)).id
        )

    job_id, is_replay = await service.write(write)
    job = await (made_job(service, key, job_id) if is_replay else service.read(get_job, job_id))
    service.wake_up_now.set()
    headers = {"location": f"/api/jobs/{job.id}", **replay_headers(is_replay)}
    return JSONResponse(job_answer(job).model_dump(mode="json"), 202, headers=headers)


async def _values(request: Request) -> ScheduleValues:
    """Return what the body sets, if it can come due and names only what exists."""
    body: ScheduleBody = request.state.body
    require_consent(request, body.job)
    service = service_of(request)
    _checked(body, await service.read(database_now), 1)
    await require_references(service, body.job, under="#/job")
    return ScheduleValues(body.name, body.cron, body.time_zone, body.job, body.overlap, body.catch_up, body.paused)


def _checked(body: DueBody, now: datetime, count: int) -> list[datetime]:
    """Return the next due times; a wrong expression or zone is named as the field that it is."""
    faults = []
    times: list[datetime] = []
    for pointer, value, cron, time_zone in (
        ("#/time_zone", body.time_zone, "@daily", body.time_zone),
        ("#/cron", body.cron, body.cron, "UTC"),
    ):
        try:
            require_due(cron, time_zone, now)
        except InvalidInput as exc:
            faults.append(Fault(pointer=pointer, seen=repr(value)[:100], detail=str(exc)))
    if faults:
        raise ProblemError(422, "the schedule cannot come due; see `errors`", kind="invalid-request", errors=faults)
    times.extend(require_due(body.cron, body.time_zone, now, count))
    return times


async def _answered(request: Request, change: Callable[[Session], Schedule]) -> Response:
    def write(session: Session) -> ScheduleAnswer:
        return _answer(session, change(session), database_now(session))

    answer = await service_of(request).write(write)
    return JSONResponse(answer.model_dump(mode="json"))


def _answer(session: Session, schedule: Schedule, now: datetime) -> ScheduleAnswer:
    times = [] if schedule.paused_at else list(islice(due_after(schedule.cron, schedule.time_zone, now), NUM_NEXT))
    newest = last_runs(session, schedule.id, 1)
    return ScheduleAnswer(
        id=schedule.id,
        name=schedule.name,
        cron=schedule.cron,
        time_zone=schedule.time_zone,
        job=schedule.spec,
        overlap=schedule.overlap,
        catch_up=schedule.catch_up,
        paused=schedule.paused_at is not None,
        created_at=timestamp(schedule.created_at),
        next_run_at=timestamp(times[0]) if times else None,
        next_runs=[timestamp(time) for time in times],
        last_run=_run(*newest[0]) if newest else None,
    )


def _run(run: ScheduleRun, job_state: str | None) -> ScheduleRunAnswer:
    return ScheduleRunAnswer(
        due_at=timestamp(run.due_at),
        fired_at=timestamp(run.fired_at),
        outcome=run.outcome,
        job_id=run.job_id,
        job_state=job_state,
        reason=run.reason,
    )
