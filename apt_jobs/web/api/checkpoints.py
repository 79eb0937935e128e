"""`/api/checkpoints`: list, look, load for generation, download, delete. By id only: no path comes from outside."""

import asyncio
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, StringConstraints, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from apt_jobs.artifacts.checkpoints import checkpoint_dir, delete_checkpoint, delete_checkpoint_files
from apt_jobs.artifacts.models import model_folders
from apt_jobs.db.access import Role
from apt_jobs.db.checkpoints import get_checkpoint, list_checkpoints
from apt_jobs.db.models import Checkpoint
from apt_jobs.db.service_values import DEFAULT_MODEL, set_value
from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.api.jobs import Query, submit
from apt_jobs.web.api.merged_models import DType, merged_tar
from apt_jobs.web.schemas import CheckpointAnswer, CheckpointList, checkpoint_answer
from apt_jobs.web.service import Service, service_of

CHUNK_BYTES = 1 << 18
TAR_TYPE, BYTES_TYPE = "application/x-tar", "application/octet-stream"  # the same bytes: some clients ask for these
TAR: dict[str, Any] = {kind: {"type": "string", "format": "binary"} for kind in (TAR_TYPE, BYTES_TYPE)}


class CheckpointsQuery(Query):
    job_id: Annotated[str, StringConstraints(max_length=40)] | None = None
    after: Annotated[str, StringConstraints(max_length=40)] | None = Field(None, description="Last id seen.")
    limit: int = Field(100, ge=1, le=200)


class DownloadQuery(Query):
    merged: bool = Field(
        False,
        description="The whole model alone: an adapter added to its base model, without the optimizer; else all files "
        "of the checkpoint.",
    )
    dtype: DType | None = Field(None, description="Type of the merged weights; default: float32.")

    @model_validator(mode="after")
    def _only_of_merged(self) -> Self:
        if self.dtype is not None and not self.merged:
            raise ValueError(f"dtype={self.dtype} is a type of merged weights: it needs merged=true")
        return self


class LoadRequest(Strict):
    checkpoint_id: Annotated[str, StringConstraints(max_length=40)]


class LoadAnswer(BaseModel):
    loaded: bool
    model: str
    checkpoint: CheckpointAnswer
    job_id: str = Field(description="The generate job that warms it.")


@endpoint(
    role=Role.VIEWER,
    tag="checkpoints",
    query=CheckpointsQuery,
    answers={200: CheckpointList},
    operation="list_checkpoints",
)
async def get_checkpoints(request: Request) -> Response:
    """List checkpoints, newest first."""
    query: CheckpointsQuery = request.state.query
    rows, has_more = await service_of(request).read(
        list_checkpoints, job_id=query.job_id, after=query.after, limit=query.limit
    )
    answer = CheckpointList(data=[checkpoint_answer(row) for row in rows], has_more=has_more)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.VIEWER, tag="checkpoints", answers={200: CheckpointAnswer}, operation="get_checkpoint")
async def get_one_checkpoint(request: Request) -> Response:
    """Return one checkpoint."""
    row = await service_of(request).read(get_checkpoint, request.path_params["checkpoint_id"])
    return JSONResponse(checkpoint_answer(row).model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER, tag="checkpoints", body=LoadRequest, answers={200: LoadAnswer}, creates=True, problems={404}
)
async def load_checkpoint(request: Request) -> Response:
    """Make a checkpoint the default model of generation, and warm it with a one-token job."""
    service = service_of(request)
    body: LoadRequest = request.state.body
    row = await service.read(get_checkpoint, body.checkpoint_id)
    _folder(service, row)
    await service.write(set_value, DEFAULT_MODEL, row.id)
    warm_up = GenerateSpec(kind="generate", name="warm up", texts=["\n"], max_length=1, model=row.id)
    job, is_replay = await submit(service, warm_up, request.state.idempotency_key)
    answer = LoadAnswer(loaded=True, model=row.id, checkpoint=checkpoint_answer(row), job_id=job.id)
    return JSONResponse(answer.model_dump(mode="json"), headers=replay_headers(is_replay))


@endpoint(role=Role.VIEWER, tag="checkpoints", query=DownloadQuery, answers={200: None}, media=TAR, problems={503})
async def download_checkpoint(request: Request) -> Response:
    """Return the checkpoint's folder, or the whole model that it stands for, as a tar file, streamed."""
    service = service_of(request)
    query: DownloadQuery = request.state.query
    row = await service.read(get_checkpoint, request.path_params["checkpoint_id"])
    folder = _folder(service, row)
    content = _tar(folder, row.id)
    if query.merged:
        folders = await service.read(model_folders, service.settings, row.id)
        content = await merged_tar(service.settings, row.id, folders, query.dtype or "float32")
    headers = {"content-disposition": f'attachment; filename="{row.id}.tar"'}
    media_type = BYTES_TYPE if request.headers.get("accept") == BYTES_TYPE else TAR_TYPE
    return StreamingResponse(content, media_type=media_type, headers=headers)


@endpoint(role=Role.ADMIN, tag="checkpoints", answers={204: None}, operation="delete_checkpoint", problems={409})
async def remove_checkpoint(request: Request) -> Response:
    """Delete a checkpoint. The last one of a job that has not ended is kept: the job resumes from it."""
    service = service_of(request)
    row = await service.write(delete_checkpoint, request.path_params["checkpoint_id"])
    await asyncio.to_thread(delete_checkpoint_files, service.settings, row.filename)
    return Response(status_code=204)


def _folder(service: Service, row: Checkpoint) -> Path:
    folder = checkpoint_dir(service.settings, row.filename)
    if folder is None or not folder.is_dir():
        raise InvalidCheckpoint(f"the files of checkpoint {row.id} are not on this machine")
    return folder


def _regular_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())


async def _tar(folder: Path, name: str) -> AsyncIterator[bytes]:
    """Yield the folder as a tar stream, read in pieces, without a temporary copy."""
    for path in await asyncio.to_thread(_regular_files, folder):
        with path.open("rb") as file:
            info = tarfile.TarInfo(f"{name}/{path.name}")
            info.size = os.fstat(file.fileno()).st_size
            info.mtime = int(os.fstat(file.fileno()).st_mtime)
            yield info.tobuf()
            sent = 0
            while chunk := await asyncio.to_thread(file.read, min(CHUNK_BYTES, info.size - sent)):
                sent += len(chunk)
                yield chunk
            yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
