"""`/api/uploads`: data sets in parts. Of a part that breaks off what arrived is kept, and the next goes on there."""

import asyncio
import secrets
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.dataset_uploads import (
    DatasetUpload,
    begin_upload,
    cancel_upload,
    checked_copy,
    expires_at,
    find_upload,
    received_bytes,
    writing,
)
from apt_jobs.artifacts.datasets import add_dataset, find_dataset
from apt_jobs.db.access import Role
from apt_jobs.errors import Conflict, InvalidInput, NotFound, OutOfSpace
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.code import Sha256
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat
from apt_jobs.jobs.spec import BUILTIN_DATASET, Name
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.operations.data_directory import require_room
from apt_jobs.settings import Settings
from apt_jobs.web.api.datasets import dataset_answer, record_of, taken
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.api.uploads import RAW_TYPES, UploadCheck, receive
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import DatasetAnswer
from apt_jobs.web.service import service_of

PART = {"application/octet-stream": {"type": "string", "format": "binary", "minLength": 1}}


class UploadRequest(Strict):
    name: Name = Field(description="What jobs will call it.")
    format: Annotated[DatasetFormat, Field(strict=False)] = DatasetFormat.TEXT
    column: Annotated[str, StringConstraints(min_length=1, max_length=200)] = DEFAULT_COLUMN
    size_bytes: int = Field(ge=1, description="Of the whole file.")
    sha256: Sha256 = Field(description="Of the whole file.")


class UploadAnswer(BaseModel):
    id: str
    name: str
    offset: int = Field(description="Bytes that have arrived: where the next part begins.")
    size_bytes: int
    expires_at: str = Field(description="When it is forgotten if nothing more arrives.")


class PartQuery(Query):
    offset: int = Field(ge=0, description="Where in the file the part begins.")


@endpoint(
    role=Role.SUBMITTER,
    tag="datasets",
    body=UploadRequest,
    answers={201: UploadAnswer},
    operation="begin_upload",
    problems={409, 503, 507},
)
async def post_upload(request: Request) -> Response:
    """Begin to upload a data set in parts, or find the upload of the same file that broke off."""
    settings, body = service_of(request).settings, request.state.body
    upload = DatasetUpload.model_validate(body.model_dump())
    if upload.name == BUILTIN_DATASET:
        raise InvalidInput(f"{BUILTIN_DATASET!r} is built in; choose another name")
    if upload.size_bytes > settings.max_upload_bytes:
        raise ProblemError(413, f"the data set is larger than {settings.max_upload_bytes:,} bytes")

    def begin() -> UploadAnswer:
        require_room(settings)
        try:
            find_dataset(settings.datasets_dir, upload.name)
        except NotFound:
            begin_upload(settings, upload)
            return _answer(settings, upload.id)
        raise taken(upload.name)

    answer = await asyncio.to_thread(begin)
    return JSONResponse(answer.model_dump(mode="json"), 201, headers={"location": f"/api/uploads/{answer.id}"})


@endpoint(role=Role.VIEWER, tag="datasets", answers={200: UploadAnswer}, operation="get_upload")
async def get_upload(request: Request) -> Response:
    """Return how far an upload is."""
    answer = await asyncio.to_thread(_answer, service_of(request).settings, request.path_params["upload_id"])
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER,
    tag="datasets",
    query=PartQuery,
    answers={200: UploadAnswer},
    operation="add_part",
    problems={408, 409, 413, 415, 507},
    body_media=PART,
)
async def put_part(request: Request) -> Response:
    """Add a part, which begins where the upload is. Of one that breaks off what arrived is kept."""
    settings, upload_id = service_of(request).settings, request.path_params["upload_id"]
    upload = await asyncio.to_thread(find_upload, settings, upload_id)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in RAW_TYPES:
        raise ProblemError(415, "a part is sent as application/octet-stream")
    with writing(settings, upload_id) as content:
        offset = received_bytes(settings, upload_id)
        if request.state.query.offset != offset:
            raise Conflict(f"the upload has {offset:,} bytes, and the part begins at {request.state.query.offset:,}")
        await receive(request.stream(), content, upload.size_bytes - offset, "the part", appends=True)
    answer = await asyncio.to_thread(_answer, settings, upload_id)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER,
    tag="datasets",
    answers={201: DatasetAnswer},
    operation="complete_upload",
    problems={409, 422, 507},
)
async def complete_upload(request: Request) -> Response:
    """Check what arrived by its SHA-256 and its format, and make it the data set."""
    settings, upload_id = service_of(request).settings, request.path_params["upload_id"]

    def complete() -> DatasetAnswer:
        upload = find_upload(settings, upload_id)
        temporary = settings.datasets_dir / f".upload-{secrets.token_hex(8)}"
        try:
            with writing(settings, upload_id) as content:
                sha256 = checked_copy(content, upload, temporary, UploadCheck(upload.format).feed)
                record = record_of(temporary, upload.name, upload.format, upload.column, sha256)
                add_dataset(settings.datasets_dir, upload.name, temporary, record)
            cancel_upload(settings, upload_id)
        except FileExistsError as exc:
            raise taken(upload.name) from exc
        except OSError as exc:
            raise OutOfSpace(f"the data set cannot be written: {exc.strerror}") from exc
        finally:
            temporary.unlink(missing_ok=True)
        return dataset_answer(upload.name, record)

    answer = await asyncio.to_thread(complete)
    return JSONResponse(answer.model_dump(mode="json"), 201, headers={"location": "/api/datasets"})


@endpoint(role=Role.SUBMITTER, tag="datasets", answers={204: None}, operation="cancel_upload")
async def delete_upload(request: Request) -> Response:
    """Forget an upload and what arrived of it."""
    settings, upload_id = service_of(request).settings, request.path_params["upload_id"]
    await asyncio.to_thread(find_upload, settings, upload_id)
    await asyncio.to_thread(cancel_upload, settings, upload_id)
    return Response(status_code=204)


def _answer(settings: Settings, upload_id: str) -> UploadAnswer:
    upload = find_upload(settings, upload_id)
    return UploadAnswer(
        id=upload.id,
        name=upload.name,
        offset=received_bytes(settings, upload_id),
        size_bytes=upload.size_bytes,
        expires_at=timestamp(expires_at(settings, upload_id)),
    )
