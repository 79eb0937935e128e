"""`GET /api/jobs`: jobs by any filter in any order, any part of the list, with counts by state and curves in small."""

from collections.abc import Collection, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import ColumnElement
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.job_filters import conditions, in_ranges, is_range
from apt_jobs.db.listing import DEFAULT_SORT, count_by_state, list_jobs, search_conditions
from apt_jobs.db.models import Job
from apt_jobs.jobs.job_filter import Term, WordTerm, parse_filter
from apt_jobs.jobs.states import JobState
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.waiting import waiting_of_page
from apt_jobs.settings import Settings
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.job_queries import Fields, FilterText, Sort, chosen
from apt_jobs.web.schemas import JobAnswer, JobList, at, job_answer
from apt_jobs.web.service import Service, service_of

MAX_OFFSET = 1_000_000


class ListQuery(BaseModel):
    """Query parameters: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: list[JobState] = Field(default_factory=list, description="May be repeated.")
    kind: list[Literal["train", "generate"]] = Field(default_factory=list, description="May be repeated.")
    queue: Annotated[str, StringConstraints(max_length=100)] | None = None
    label: Annotated[str, StringConstraints(pattern=r"^[^=]+=.*$", max_length=301)] | None = Field(
        None, description="`key=value`."
    )
    text: Annotated[str, StringConstraints(max_length=200)] | None = Field(None, description="Part of name or id.")
    filter: FilterText | None = Field(
        None,
        description='Terms that all hold, as `state:running,queued label:team=a lr>1e-3 -kind:generate "text"`.',
    )
    sort: Sort = Field(
        DEFAULT_SORT,
        description="created_at, priority, step, name, queue, metrics.NAME.last or metrics.NAME.best; with a minus the "
        "largest first. `active`: what runs first, then what waits, is paused, has ended, the newest of each first.",
    )
    fields: Fields | None = Field(
        None,
        description="Only these fields of each job, with commas between; `sparkline` and `expected_start_at` in no "
        "other way.",
    )
    after: Annotated[str, StringConstraints(max_length=40)] | None = Field(None, description="Last id seen.")
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="Jobs to pass over; with `after` from there on.")
    limit: int = Field(50, ge=1, le=200)
    counts: bool = Field(False, description="Also count the jobs: `counts` and `total`.")


@endpoint(role=Role.VIEWER, tag="jobs", query=ListQuery, answers={200: JobList}, operation="list_jobs")
async def get_jobs(request: Request) -> Response:
    """List jobs, newest first if nothing else is asked for."""
    query: ListQuery = request.state.query
    service = service_of(request)
    answer = await service.read(_listed, service, query)
    rows = [chosen(row, query.fields) for row in answer.data]
    return JSONResponse({**answer.model_dump(mode="json", exclude={"data"}), "data": rows})


def _listed(session: Session, service: Service, query: ListQuery) -> JobList:
    terms = parse_filter(query.filter or "")
    ranges = in_ranges(terms, query.state, query.kind, query.queue)
    others = conditions(
        [term for term in terms if not is_range(term)], is_sqlite=session.get_bind().dialect.name == "sqlite"
    )
    label = None if query.label is None else (query.label.partition("=")[0], query.label.partition("=")[2])
    rows: list[Job] = []
    has_more = False
    if not ranges.is_empty:
        rows, has_more = list_jobs(
            session,
            states=ranges.states,
            kinds=ranges.kinds,
            queue=ranges.queue,
            sweepless=ranges.is_sweepless,
            label=label,
            text=query.text,
            terms=others,
            sort=query.sort,
            after=query.after,
            offset=query.offset,
            limit=query.limit,
        )
    fields = frozenset() if query.fields is None else frozenset(query.fields.split(","))
    answer = JobList(data=listed_answers(session, rows, service.settings, fields), has_more=has_more)
    if "sparkline" in fields:
        curves = service.sparklines.of_jobs(session, rows)
        for row in answer.data:
            row.sparkline = list(curves[row.id]) if row.id in curves else None
    if query.counts:
        found = [*others, *search_conditions(session, label, query.text)]
        counts = _counts(session, service, query, terms, found)
        states = [] if ranges.is_empty else [JobState(state) for state in ranges.states or JobState]
        answer.counts, answer.total = counts, sum(counts[state] for state in states)
    return answer


def _counts(
    session: Session, service: Service, query: ListQuery, terms: Sequence[Term], others: Sequence[ColumnElement[bool]]
) -> dict[JobState, int]:
    """Count what the list would have if no state were asked for."""
    stateless = [term for term in terms if not (isinstance(term, WordTerm) and term.field == "state")]
    ranges = in_ranges(stateless, (), query.kind, query.queue)
    if ranges.is_empty:
        return dict.fromkeys(JobState, 0)
    question = (tuple(stateless), ranges.kinds, ranges.queue, query.label, query.text)

    def count() -> dict[str, int]:
        return count_by_state(
            session, kinds=ranges.kinds, queue=ranges.queue, sweepless=ranges.is_sweepless, others=others
        )

    counted = service.count_cache.get(question, count)
    return {state: counted.get(state, 0) for state in JobState}


def listed_answers(
    session: Session, rows: Sequence[Job], settings: Settings, fields: Collection[str] = ()
) -> list[JobAnswer]:
    """Return rows as a list shows them, with what the waiting ones wait for."""
    has_starts = "expected_start_at" in fields
    waiting = waiting_of_page(session, rows, alive_within_s(settings), has_starts=has_starts)
    answers = [job_answer(row) for row in rows]
    for answer in answers:
        if (found := waiting.get(answer.id)) is not None:
            answer.queue_position, answer.waiting_for = found.position, found.reason
            answer.expected_start_at = at(found.expected_start_at)
    return answers
