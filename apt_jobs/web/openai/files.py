"""`/v1/files`: what batches and fine-tunings read and write. An upload is checked before it has an id."""

import asyncio
import hashlib
import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from apt_jobs.artifacts.files import delete_file, file_path, publish_file, temporary_path
from apt_jobs.db.access import Role
from apt_jobs.db.dialect_models import FileRow
from apt_jobs.db.files import delete_file_row, get_file, list_files
from apt_jobs.db.idempotency import create_once
from apt_jobs.errors import NotFound
from apt_jobs.jobs.ids import new_file_id
from apt_jobs.jobs.printable import escaped
from apt_jobs.operations.data_directory import require_room
from apt_jobs.settings import Settings
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.api.uploads import Form, TextCheck, file_of_form, form_of, receive
from apt_jobs.web.openai.endpoint import Identified, dialect, ends_of, owner_of, seconds, seen_by
from apt_jobs.web.openai.json_lines import check_json_lines
from apt_jobs.web.openai.training_files import delete_published
from apt_jobs.web.problems import Fault, ProblemError
from apt_jobs.web.service import service_of

MAX_FILENAME_CHARS = 200
MAX_BATCH_LINES = 50_000
MAX_BATCH_BYTES = 200 << 20
MAX_TRAINING_LINES = 10_000_000
BATCH: Final = "batch"
FINE_TUNE: Final = "fine-tune"
BATCH_OUTPUT: Final = "batch_output"

Purpose = Literal["batch", "fine-tune"]
Lifetime = Annotated[int, Field(ge=3_600, le=30 * 86_400)]
_FILE = {"type": "string", "format": "binary"}
_FORM = {
    "multipart/form-data": {
        "type": "object",
        "properties": {"file": _FILE, "purpose": {"type": "string", "enum": [BATCH, FINE_TUNE]}},
        "required": ["file", "purpose"],
    }
}


class FileAnswer(Identified):
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output", "fine-tune"]
    status: Literal["processed"] = "processed"


class FileAnswerList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FilesQuery(Query):
    purpose: Annotated[str, StringConstraints(max_length=40)] | None = Field(None, description="Only of this purpose.")
    after: Annotated[str, StringConstraints(max_length=100)] | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = Field("desc", description="By time.")


@dialect(
    role=Role.SUBMITTER,
    answers={200: FileAnswer},
    creates=True,
    problems={507},
    body_media=_FORM,
    operation="upload_file",
)
async def upload_file(request: Request) -> Response:
    """Upload JSON lines for a batch or a fine-tuning; a line that is wrong is named before anything is kept."""
    service = service_of(request)
    settings, key = service.settings, request.state.idempotency_key
    require_room(settings)
    form = form_of(request)
    file_id = new_file_id()
    temporary = await asyncio.to_thread(temporary_path, settings, secrets.token_hex(8))
    try:
        parts, limit = file_of_form(request, form), settings.max_upload_bytes
        sha256 = await receive(parts, temporary, limit, "the file", TextCheck("file"))
        purpose, expires_at = _purpose(form), _expires_at(form)
        await asyncio.to_thread(_check, temporary, purpose)
        if key is not None:
            asked = f"{key.request_sha256} {sha256} {purpose} {form.fields}"
            key = replace(key, request_sha256=hashlib.sha256(asked.encode()).hexdigest())
        row = FileRow(
            id=file_id,
            owner=owner_of(request),
            filename=_filename(form),
            purpose=purpose,
            size_bytes=temporary.stat().st_size,
            expires_at=expires_at,
        )

        def publish(session: Session) -> tuple[FileRow, bool]:
            made_id, is_replay = create_once(session, key, lambda: _publish(session, temporary, row, service.settings))
            return get_file(session, made_id, None), is_replay

        stored, is_replay = await service.write(publish)
    finally:
        temporary.unlink(missing_ok=True)
    return JSONResponse(file_answer(stored).model_dump(), headers=replay_headers(is_replay))


@dialect(role=Role.VIEWER, query=FilesQuery, answers={200: FileAnswerList}, operation="list_files")
async def get_files(request: Request) -> Response:
    """List files, the newest first."""
    query: FilesQuery = request.state.query
    rows, has_more = await service_of(request).read(
        list_files,
        seen_by(request),
        purpose=query.purpose,
        after=query.after,
        limit=query.limit,
        is_descending=query.order == "desc",
    )
    answers = [file_answer(row) for row in rows]
    return JSONResponse(FileAnswerList(data=answers, has_more=has_more, **ends_of(answers)).model_dump())


@dialect(role=Role.VIEWER, answers={200: FileAnswer}, operation="get_file")
async def get_one_file(request: Request) -> Response:
    """Return what is known about a file."""
    row = await service_of(request).read(get_file, request.path_params["file_id"], seen_by(request))
    return JSONResponse(file_answer(row).model_dump())


@dialect(
    role=Role.VIEWER,
    answers={200: None},
    operation="get_file_content",
    media={"application/octet-stream": _FILE},
)
async def get_content(request: Request) -> Response:
    """Return the content of a file."""
    service = service_of(request)
    row = await service.read(get_file, request.path_params["file_id"], seen_by(request))
    path = file_path(service.settings, row.id)
    if not path.is_file():
        raise NotFound(f"the content of file {row.id} is not on this machine")
    return FileResponse(path, media_type="application/octet-stream")


@dialect(role=Role.SUBMITTER, answers={200: FileDeleted}, operation="delete_file", problems={409})
async def remove_file(request: Request) -> Response:
    """Delete a file. One that an unfinished batch or training reads is kept: 409 names it."""
    service = service_of(request)
    row = await service.write(delete_file_row, request.path_params["file_id"], seen_by(request))
    await asyncio.to_thread(delete_file, service.settings, row.id)
    if row.purpose == FINE_TUNE:
        await asyncio.to_thread(delete_published, service.settings, row.id)
    return JSONResponse(FileDeleted(id=row.id).model_dump())


def file_answer(row: FileRow) -> FileAnswer:
    """Return a row as the dialect shows it."""
    return FileAnswer.model_validate(
        {
            "id": row.id,
            "bytes": row.size_bytes,
            "created_at": seconds(row.created_at),
            "expires_at": seconds(row.expires_at),
            "filename": row.filename,
            "purpose": row.purpose,
        }
    )


def field_error(field: str, detail: str, seen: str | None = None) -> ProblemError:
    """Return the refusal of one field of a request."""
    fault = Fault(pointer=f"#/{field}", seen=seen, detail=detail)
    return ProblemError(400, f"{field}: {detail}", kind="invalid-request", errors=[fault])


def _publish(session: Session, temporary: Path, row: FileRow, settings: Settings) -> str:
    publish_file(temporary, settings, row.id)
    session.add(row)
    session.flush()
    return row.id


def _purpose(form: Form) -> Purpose:
    seen = form.fields.get("purpose")
    if seen == BATCH:
        return BATCH
    if seen == FINE_TUNE:
        return FINE_TUNE
    raise field_error("purpose", f"it is {(seen or 'missing')[:40]!r}; expected {BATCH!r} or {FINE_TUNE!r}", seen)


def _expires_at(form: Form) -> datetime | None:
    given = {name: value for name, value in form.fields.items() if name.startswith("expires_after")}
    if not given:
        return None
    if form.fields.get("expires_after[anchor]") != "created_at":
        raise field_error("expires_after", "expected the anchor 'created_at'")
    try:
        lifetime_s = TypeAdapter(Lifetime).validate_python(form.fields.get("expires_after[seconds]", ""))
    except ValidationError as exc:
        raise field_error("expires_after", "expected 3,600 to 2,592,000 seconds") from exc
    return datetime.now(UTC) + timedelta(seconds=lifetime_s)


def _filename(form: Form) -> str:
    return escaped(form.filename)[:MAX_FILENAME_CHARS] or "file"


def _check(file: Path, purpose: Purpose) -> None:
    if purpose == FINE_TUNE:
        check_json_lines(file, MAX_TRAINING_LINES)
        return
    if (size := file.stat().st_size) > MAX_BATCH_BYTES:
        raise ProblemError(413, f"the file of a batch has at most {MAX_BATCH_BYTES:,} bytes; this one has {size:,}")
    check_json_lines(file, MAX_BATCH_LINES)
