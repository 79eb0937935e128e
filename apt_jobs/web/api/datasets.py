"""`/api/datasets`: what jobs train on. An upload is streamed to disk and checked before it gets its name."""

import asyncio
import hashlib
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.datasets import DatasetRecord, add_dataset, delete_dataset, list_datasets
from apt_jobs.db.access import Role
from apt_jobs.db.dataset_pins import unfinished_job_with
from apt_jobs.db.idempotency import create_once
from apt_jobs.errors import Conflict, InvalidInput, NotFound
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat, stored_suffix
from apt_jobs.jobs.spec import BUILTIN_DATASET, Name
from apt_jobs.settings import Settings
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.api.uploads import CHECKED_BYTES, UploadCheck, receive, upload_parts
from apt_jobs.web.schemas import DatasetAnswer, DatasetList
from apt_jobs.web.service import service_of

_FILE = {"type": "string", "format": "binary", "minLength": 1}
UPLOADS = {  # of what may be text, what clients send by themselves
    "application/octet-stream": _FILE,
    "multipart/form-data": {"type": "object", "properties": {"file": _FILE}, "required": ["file"]},
}


class UploadQuery(Query):
    name: Name = Field(description="What jobs will call it.")
    format: DatasetFormat = Field(
        DatasetFormat.TEXT,
        description="text and jsonl may be compressed with gzip or zstd; uint16, uint32 and npy are token ids.",
    )
    column: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        DEFAULT_COLUMN, description="Field of JSONL or column of Parquet that holds the documents."
    )


@endpoint(role=Role.VIEWER, tag="datasets", answers={200: DatasetList}, operation="list_datasets")
async def get_datasets(request: Request) -> Response:
    """List the data sets, the built-in one first."""
    rows = await asyncio.to_thread(_rows, service_of(request).settings.datasets_dir)
    builtin = DatasetAnswer(name=BUILTIN_DATASET, size_bytes=None, is_builtin=True)
    return JSONResponse(DatasetList(data=[builtin, *rows]).model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER,
    tag="datasets",
    query=UploadQuery,
    answers={201: DatasetAnswer},
    creates=True,
    problems={507},
    body_media=UPLOADS,
)
async def upload_dataset(request: Request) -> Response:
    """Upload a data set as the body or as the file of a form; `?name=` names it. An existing name is refused."""
    service = service_of(request)
    settings, key = service.settings, request.state.idempotency_key
    name, dataset_format = request.state.query.name, request.state.query.format
    if name == BUILTIN_DATASET:
        raise InvalidInput(f"{BUILTIN_DATASET!r} is built in; choose another name")
    settings.datasets_dir.mkdir(parents=True, exist_ok=True)
    temporary = settings.datasets_dir / f".upload-{secrets.token_hex(8)}"
    try:
        parts, check = upload_parts(request), UploadCheck(dataset_format)
        sha256 = await receive(parts, temporary, settings.max_upload_bytes, "the data set", check)
        record = await asyncio.to_thread(record_of, temporary, name, dataset_format, request.state.query.column, sha256)
        if key is not None:
            key = replace(key, request_sha256=hashlib.sha256(f"{key.request_sha256} {sha256}".encode()).hexdigest())

        def publish(session: Session) -> tuple[str, bool]:
            return create_once(session, key, lambda: _publish(settings, temporary, name, record))

        _, is_replay = await service.write(publish)
    except FileExistsError as exc:
        raise taken(name) from exc
    finally:
        temporary.unlink(missing_ok=True)
    answer = dataset_answer(name, record).model_dump(mode="json")
    return JSONResponse(answer, 201, headers={"location": "/api/datasets", **replay_headers(is_replay)})


@endpoint(role=Role.ADMIN, tag="datasets", answers={204: None}, operation="delete_dataset", problems={409})
async def remove_dataset(request: Request) -> Response:
    """Delete a data set. One that an unfinished job trains on is kept: 409 names the job."""
    service, name = service_of(request), request.path_params["name"]
    datasets_dir = service.settings.datasets_dir
    rows = await asyncio.to_thread(_rows, datasets_dir)
    if name not in {row.name for row in rows}:  # compared with what is there: no path is made from what came
        raise NotFound(f"there is no uploaded data set {name!r}")

    def delete(session: Session) -> None:
        if (job_id := unfinished_job_with(session, name)) is not None:
            raise Conflict(
                f"data set {name!r} is needed by job {job_id}, which has not ended; cancel it first, or wait"
            )
        delete_dataset(datasets_dir, name)

    await service.write(delete)
    return Response(status_code=204)


def taken(name: str) -> Conflict:
    """Return the error of an upload whose name is that of a data set."""
    return Conflict(f"there is a data set {name!r} already; delete it first or choose another name")


def record_of(file: Path, name: str, dataset_format: DatasetFormat, column: str, sha256: str) -> DatasetRecord:
    """Return what is known of an upload that was checked."""
    status = file.stat()
    with file.open("rb") as opened:
        suffix = stored_suffix(dataset_format, opened.read(CHECKED_BYTES))
    return DatasetRecord(
        filename=f"{name}.{suffix}",
        format=dataset_format,
        column=column,
        sha256=sha256,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        created_at=datetime.now(UTC),
    )


def _publish(settings: Settings, temporary: Path, name: str, record: DatasetRecord) -> str:
    add_dataset(settings.datasets_dir, name, temporary, record)
    return name


def _rows(folder: Path) -> list[DatasetAnswer]:
    return [dataset_answer(name, record) for name, record in list_datasets(folder)] if folder.is_dir() else []


def dataset_answer(name: str, record: DatasetRecord) -> DatasetAnswer:
    """Show a data set as REST does."""
    return DatasetAnswer(
        name=name,
        size_bytes=record.size_bytes,
        is_builtin=False,
        format=record.format,
        column=record.column,
        sha256=record.sha256,
        created_at=timestamp(record.created_at),
    )
