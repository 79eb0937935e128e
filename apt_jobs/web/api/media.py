"""`/api/jobs/{id}/media`: the images and tables that a job's script logged. They are shown, never run."""

import asyncio
from typing import Literal

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.media import media_file
from apt_jobs.db.access import Role
from apt_jobs.db.events import events_after
from apt_jobs.db.jobs import get_job
from apt_jobs.errors import NotFound
from apt_jobs.events.codec import LoggedEvent, decode_payload, timestamp
from apt_jobs.events.kinds import MediaLogged
from apt_jobs.jobs.limits import MAX_SEQ
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.service import service_of

BINARY = {"type": "string", "format": "binary"}
# Besides the headers of every answer, `nosniff` among them: both policies hold.
SANDBOX = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; sandbox"}


class MediaAnswer(BaseModel):
    seq: int = Field(description="Its event.")
    attempt: int
    created_at: str
    step: int
    rank: int
    name: str
    form: Literal["image", "table"]
    size_bytes: int
    caption: str | None
    num_rows: int | None = Field(description="Of a table.")
    path: str = Field(description="Where its content is.")


class MediaList(BaseModel):
    object: Literal["list"] = "list"
    data: list[MediaAnswer]
    has_more: bool


class MediaQuery(Query):
    after: int = Field(0, ge=0, le=MAX_SEQ, description="Last `seq` seen.")
    limit: int = Field(1000, ge=1, le=2000)


@endpoint(role=Role.VIEWER, tag="jobs", query=MediaQuery, answers={200: MediaList}, operation="list_media")
async def get_media(request: Request) -> Response:
    """List the images and tables that a job's script logged, oldest first."""
    query: MediaQuery = request.state.query
    service = service_of(request)
    job = await service.read(get_job, request.path_params["job_id"])
    rows = await service.read(events_after, job.id, query.after, query.limit + 1, [MediaLogged.kind])
    data = [_answer(job.id, row) for row in rows[: query.limit]]
    return JSONResponse(MediaList(data=data, has_more=len(rows) > query.limit).model_dump(mode="json"))


@endpoint(
    role=Role.VIEWER,
    tag="jobs",
    answers={200: None},
    operation="get_media_content",
    media={"application/octet-stream": BINARY},
)
async def get_media_content(request: Request) -> Response:
    """Return one image, or one table as JSON: `{"columns": [...], "rows": [[...]]}`."""
    service = service_of(request)
    job_id, text = request.path_params["job_id"], request.path_params["seq"]
    seq = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_SEQ)) else 0

    def look(session: Session) -> LoggedEvent | None:
        job = get_job(session, job_id)
        found = events_after(session, job.id, max(seq - 1, 0), 1, [MediaLogged.kind])
        return found[0] if found and found[0].seq == seq else None

    row = await service.read(look)
    if row is None:
        raise NotFound(f"job {job_id} logged no image and no table {text[:40]!r}")
    file, kind = await asyncio.to_thread(media_file, service.settings, job_id, _event(row))
    content = await asyncio.to_thread(file.read_bytes)
    disposition = f'inline; filename="{job_id}-{seq}{file.suffix}"'
    return Response(content, media_type=kind, headers={**SANDBOX, "content-disposition": disposition})


def _event(row: LoggedEvent) -> MediaLogged:
    event = decode_payload(row.kind, row.payload)
    assert isinstance(event, MediaLogged)
    return event


def _answer(job_id: str, row: LoggedEvent) -> MediaAnswer:
    event = _event(row)
    return MediaAnswer(
        seq=row.seq,
        attempt=row.attempt,
        created_at=timestamp(row.at),
        step=event.step,
        rank=event.rank,
        name=event.name,
        form=event.form,
        size_bytes=event.size_bytes,
        caption=event.caption,
        num_rows=event.num_rows,
        path=f"/api/jobs/{job_id}/media/{row.seq}",
    )
