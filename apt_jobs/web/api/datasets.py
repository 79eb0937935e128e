"""`/api/datasets`: texts to train on. An upload is streamed to disk and checked before it gets its name."""

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from pydantic import Field
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.datasets import dataset_file, delete_dataset, list_datasets, publish_dataset
from apt_jobs.db.access import Role
from apt_jobs.db.idempotency import create_once
from apt_jobs.errors import Conflict, InvalidDataset, OutOfSpace
from apt_jobs.jobs.spec import BUILTIN_DATASET, Name
from apt_jobs.settings import Settings
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.api.uploads import TextCheck, upload_parts
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import DatasetAnswer, DatasetList
from apt_jobs.web.service import service_of

IDLE_TIMEOUT_S = 30.0  # between two pieces of an upload
_FILE = {"type": "string", "format": "binary", "minLength": 1}
UPLOADS = {  # of what may be text, what clients send by themselves
    "application/octet-stream": _FILE,
    "multipart/form-data": {"type": "object", "properties": {"file": _FILE}, "required": ["file"]},
}
MIN_BYTES_PER_S = 1_000  # of an upload as a whole, after the first `IDLE_TIMEOUT_S`


class UploadQuery(Query):
    name: Name = Field(description="What jobs will call it.")


@endpoint(role=Role.VIEWER, tag="datasets", answers={200: DatasetList}, operation="list_datasets")
async def get_datasets(request: Request) -> Response:
    """List the data sets, the built-in one first."""
    rows = await asyncio.to_thread(_rows, service_of(request).settings)
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
    """Upload UTF-8 text as the body or as the file of a form; `?name=` names it. An existing name is refused."""
    service = service_of(request)
    settings, key = service.settings, request.state.idempotency_key
    name = request.state.query.name
    dataset_file(settings, name)  # refuses a name that no upload can have
    settings.datasets_dir.mkdir(parents=True, exist_ok=True)
    temporary = settings.datasets_dir / f".upload-{secrets.token_hex(8)}"
    try:
        size, sha256 = await _receive(upload_parts(request), temporary, settings)
        if key is not None:
            key = replace(key, request_sha256=hashlib.sha256(f"{key.request_sha256} {sha256}".encode()).hexdigest())

        def publish(session: Session) -> tuple[str, bool]:
            return create_once(session, key, lambda: _publish(settings, name, temporary))

        _, is_replay = await service.write(publish)
    except FileExistsError as exc:
        raise Conflict(f"there is a data set {name!r} already; delete it first or choose another name") from exc
    finally:
        temporary.unlink(missing_ok=True)
    answer = DatasetAnswer(name=name, size_bytes=size, is_builtin=False)
    return JSONResponse(
        answer.model_dump(mode="json"), 201, headers={"location": "/api/datasets", **replay_headers(is_replay)}
    )


@endpoint(role=Role.ADMIN, tag="datasets", answers={204: None}, operation="delete_dataset")
async def remove_dataset(request: Request) -> Response:
    """Delete a data set. Jobs that train on it keep what they have read."""
    await asyncio.to_thread(delete_dataset, service_of(request).settings, request.path_params["name"])
    return Response(status_code=204)


async def _receive(parts: AsyncIterator[bytes], file: Path, settings: Settings) -> tuple[int, str]:
    """Stream a text into a file, checking it on the way; returns its size in bytes and its SHA-256."""
    check, digest = TextCheck(), hashlib.sha256()
    num_received = size = 0
    began_s = time.monotonic()
    try:
        with file.open("wb") as opened:
            is_over = False
            while not is_over:
                part = await asyncio.wait_for(anext(parts, None), IDLE_TIMEOUT_S)
                is_over = part is None
                num_received += len(part or b"")
                if num_received > settings.max_upload_bytes:
                    raise ProblemError(413, f"the data set is larger than {settings.max_upload_bytes:,} bytes")
                if time.monotonic() - began_s > IDLE_TIMEOUT_S + num_received / MIN_BYTES_PER_S:
                    raise ProblemError(408, f"the data set comes with less than {MIN_BYTES_PER_S:,} bytes a second")
                text = check.feed(part or b"", final=is_over)
                size += len(text)
                digest.update(text)
                await asyncio.to_thread(opened.write, text)
            opened.flush()
            os.fsync(opened.fileno())
    except TimeoutError as exc:
        raise ProblemError(408, f"nothing more of the data set came for {IDLE_TIMEOUT_S:.0f} s") from exc
    except ClientDisconnect as exc:
        raise ProblemError(400, "the connection ended within the data set") from exc
    except OSError as exc:
        raise OutOfSpace(f"the data set cannot be written: {exc.strerror}") from exc
    if size == 0:
        raise InvalidDataset("the data set is empty; send its text as the body, or as the file of a form")
    return size, digest.hexdigest()


def _publish(settings: Settings, name: str, uploaded: Path) -> str:
    publish_dataset(settings, name, uploaded)
    return name


def _rows(settings: Settings) -> list[DatasetAnswer]:
    return [
        DatasetAnswer(name=row.name, size_bytes=row.size_bytes, is_builtin=False) for row in list_datasets(settings)
    ]
