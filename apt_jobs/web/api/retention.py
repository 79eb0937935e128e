"""`/api/retention`: what a policy would remove now, and its removal."""

import asyncio
from dataclasses import asdict

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.errors import Conflict
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.operations.retention import MAX_JOBS, Removed, apply_retention, preview
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.service import service_of


class AppliedPolicy(RetentionPolicy):
    """A policy as answers have it: with every field."""


class RetentionAnswer(BaseModel):
    """What is removed, or would be."""

    policy: AppliedPolicy | None = Field(description="What was applied; null: there is none, and nothing goes.")
    is_dry_run: bool
    num_jobs: int
    num_checkpoints: int = Field(description="Of jobs that stay.")
    num_bytes: int = Field(description="Of all checkpoints that go, with their jobs or without.")
    num_run_folders: int
    num_log_lines: int = Field(description="Whose text goes; not counted before.")
    num_workers: int
    num_keys: int
    num_sessions: int = Field(description="Browser sessions and login links that are over.")
    num_orphans: int = Field(description="Folders that no row names, older than a day; looked for once a day.")
    job_ids: list[str] = Field(description="The first 20 jobs.")
    kept: dict[str, int] = Field(description="Jobs that the policy means and that stay, by the reason.")
    is_complete: bool = Field(description="false: there is more than one run removes; repeat it.")


class RetentionBody(Strict):
    """One run."""

    dry_run: bool = Field(True, description="Remove nothing, and say what would go.")
    policy: RetentionPolicy | None = Field(None, description="null: the one of `APT_JOBS_RETENTION`.")
    max_jobs: int = Field(MAX_JOBS, ge=1, le=MAX_JOBS, description="Jobs that one run removes at most.")


@endpoint(role=Role.ADMIN, tag="service", answers={200: RetentionAnswer}, operation="preview_retention")
async def preview_retention(request: Request) -> Response:
    """Say what the policy of `APT_JOBS_RETENTION` would remove now. Nothing is removed."""
    return await _answer(request, RetentionBody(dry_run=True))


@endpoint(role=Role.ADMIN, tag="service", body=RetentionBody, answers={200: RetentionAnswer}, problems=[409])
async def run_retention(request: Request) -> Response:
    """Remove what a policy says, or say what would go: a dry run, unless `dry_run` is false.

    What is promoted, and what jobs that have not ended need, stays, however the policy is.
    """
    return await _answer(request, request.state.body)


async def _answer(request: Request, body: RetentionBody) -> Response:
    service = service_of(request)
    policy = body.policy or service.settings.retention
    if policy is None and not body.dry_run:
        raise Conflict("there is no policy: send one, or set APT_JOBS_RETENTION")
    if policy is None:
        removed = Removed()
    elif body.dry_run:
        removed = await asyncio.to_thread(preview, service.database, policy)
    else:
        removed = await asyncio.to_thread(apply_retention, service.database, service.settings, policy, body.max_jobs)
    applied = None if policy is None else AppliedPolicy.model_validate(policy.model_dump())
    answer = RetentionAnswer(policy=applied, is_dry_run=body.dry_run, **asdict(removed))
    return JSONResponse(answer.model_dump(mode="json"))
