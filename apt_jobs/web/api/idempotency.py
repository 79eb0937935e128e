"""The `Idempotency-Key` header: checked on every route that creates something, and what a repeated request answers."""

import asyncio
import hashlib
import logging
import re
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import Request

from apt_jobs.db.access import Principal
from apt_jobs.db.idempotency import IdempotencyKey, sweep_expired
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.errors import AptJobsError, Conflict, NotFound
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import Service

logger = logging.getLogger(__name__)

MAX_KEY_CHARS = 255
MAX_ROUTE_CHARS = 300
REPLAYED = {"idempotent-replayed": "true"}
SWEEP_EVERY_S = 600.0
_PRINTABLE = re.compile(r"[!-~]([ -~]*[!-~])?")


def idempotency_key_of(request: Request, asked: Any) -> IdempotencyKey | None:
    """Return the key that a request came with. `asked` is all that it asks for, as what JSON can hold.

    Raises:
        ProblemError: 400, the key is no key.
    """
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1:
        raise ProblemError(400, f"there are {len(keys)} Idempotency-Key headers; send one")
    if not 1 <= len(keys[0]) <= MAX_KEY_CHARS or not _PRINTABLE.fullmatch(keys[0]):
        raise ProblemError(
            400,
            f"Idempotency-Key {keys[0][:40]!r} has {len(keys[0]):,} characters; "
            f"expected 1 to {MAX_KEY_CHARS} printable ASCII characters, for instance a UUID",
        )
    principal: Principal = request.state.principal
    digest = hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return IdempotencyKey(principal.owner, request.url.path[:MAX_ROUTE_CHARS], keys[0], digest)


async def made_job(service: Service, key: IdempotencyKey, job_id: str) -> Job:
    """Return the job that a key made.

    Raises:
        Conflict: it was deleted.
    """
    try:
        return await service.read(get_job, job_id)
    except NotFound as exc:
        raise Conflict(
            f"Idempotency-Key {key.key!r} made job {job_id}, which was deleted; use a new key for a new job"
        ) from exc


def replay_headers(is_replay: bool) -> Mapping[str, str]:
    """Return the headers that mark the answer to a repeated request."""
    return REPLAYED if is_replay else {}


async def sweep_loop(service: Service) -> None:
    """Delete expired keys now and then."""
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        try:
            await service.write(sweep_expired)
        except AptJobsError as exc:
            logger.warning("expired idempotency keys stay for now", extra={"why": str(exc)})
