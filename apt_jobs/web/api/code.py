"""`/api/code`: packed folders of code that jobs bring, named by their hash. Who may bring code, the operator says."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from apt_jobs.artifacts.code import CodeRecord, add_code, code_path, find_code, touch_code
from apt_jobs.db.access import Role
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec
from apt_jobs.operations.data_directory import require_room
from apt_jobs.web.api.endpoint import endpoint, require_role
from apt_jobs.web.api.uploads import RAW_TYPES, receive, upload_parts
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import service_of

CHUNK_BYTES = 1 << 18
TAR_TYPE = "application/x-tar"
BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
TAR = {TAR_TYPE: BINARY, "application/octet-stream": BINARY}  # the same bytes: some clients ask for these
NOT_ALLOWED = (
    "this service runs no code and installs no packages that jobs bring; its operator allows it by APT_JOBS_ALLOW_CODE"
)


class CodeAnswer(BaseModel):
    sha256: str
    size_bytes: int
    num_files: int
    created_at: str
    commit: str | None = Field(description="null: the folder was in no repository of git.")
    branch: str | None
    remote: str | None = Field(description="Where the repository comes from.")
    is_dirty: bool = Field(description="Files differed from the commit, or were not in it.")
    diff: str = Field(description="How tracked files differed from the commit.")


@endpoint(role=Role.VIEWER, tag="code", answers={200: CodeAnswer})
async def get_code(request: Request) -> Response:
    """Return what is known of packed code: its size, its commit, and how it differs from that."""
    code_dir, sha256 = service_of(request).settings.code_dir, _sha256(request)
    record = await asyncio.to_thread(find_code, code_dir, sha256)
    await asyncio.to_thread(touch_code, code_dir, sha256)
    return JSONResponse(code_answer(record).model_dump(mode="json"))


@endpoint(
    role=Role.SUBMITTER,
    tag="code",
    answers={201: CodeAnswer},
    problems={400, 408, 413, 415, 422, 507},
    body_media={"application/octet-stream": BINARY},
)
async def upload_code(request: Request) -> Response:
    """Keep a packed folder: a tar file of this SHA-256, as `apt-jobs run` packs it. Repeating it changes nothing."""
    require_consent(request)
    settings, sha256 = service_of(request).settings, _sha256(request)
    await asyncio.to_thread(require_room, settings)
    settings.code_dir.mkdir(parents=True, exist_ok=True)
    temporary = settings.code_dir / f".upload-{secrets.token_hex(8)}"
    try:
        parts = upload_parts(request, RAW_TYPES | {TAR_TYPE})
        found = await receive(parts, temporary, settings.max_code_bytes, "the packed code")
        if found != sha256:
            raise InvalidInput(f"the packed code has the SHA-256 {found}, and the address names {sha256}")
        record = await asyncio.to_thread(add_code, settings.code_dir, temporary, sha256)
    finally:
        temporary.unlink(missing_ok=True)
    return JSONResponse(code_answer(record).model_dump(mode="json"), 201)


@endpoint(role=Role.VIEWER, tag="code", answers={200: None}, media=TAR)
async def download_code(request: Request) -> Response:
    """Return the packed folder as it was uploaded."""
    code_dir, sha256 = service_of(request).settings.code_dir, _sha256(request)
    await asyncio.to_thread(find_code, code_dir, sha256)
    headers = {"content-disposition": f'attachment; filename="code-{sha256[:12]}.tar"'}
    media_type = "application/octet-stream" if request.headers.get("accept") == "application/octet-stream" else TAR_TYPE
    return StreamingResponse(_pieces(code_path(code_dir, sha256)), media_type=media_type, headers=headers)


def require_consent(request: Request, spec: TrainSpec | GenerateSpec | None = None) -> None:
    """Return if whoever asks may bring code, or the job brings none.

    Raises:
        ProblemError: 403.
    """
    if isinstance(spec, GenerateSpec) or (spec is not None and not spec.brings_code):
        return
    role = service_of(request).settings.code_role
    if role is None:
        raise ProblemError(403, NOT_ALLOWED)
    require_role(request, Role(role))


def code_answer(record: CodeRecord) -> CodeAnswer:
    """Show a record as REST does."""
    about = record.model_dump(include={"sha256", "size_bytes", "num_files"})
    return CodeAnswer(**about, **dict(record.origin), created_at=timestamp(record.created_at))


def _sha256(request: Request) -> str:
    sha256: str = request.path_params["sha256"]
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise NotFound("packed code is named by a SHA-256: 64 digits and letters from a to f")
    return sha256


async def _pieces(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as opened:
        while piece := await asyncio.to_thread(opened.read, CHUNK_BYTES):
            yield piece
