"""What an agent can do with a service: look at jobs, plan and submit them, cancel them.

Submitting is a dry run unless the agent says otherwise. A repeated call has the same `Idempotency-Key`, made from what
it asks for, so that an agent that calls twice submits once; another key submits the same again.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field, ValidationError

from apt_jobs.agents.bounded import bounded
from apt_jobs.client.client import Client
from apt_jobs.errors import AptJobsError
from apt_jobs.jobs.sweeps import SweepSpec, plan_jobs

MAX_WAIT_S = 60.0
MAX_COMPARED, MIN_POINTS = 20, 1  # jobs; points of the curves, which are left out
POLL_S = 0.5
NUM_SHOWN = 10  # settings of a planned sweep, and rows of its table
ENDED = ("succeeded", "failed", "cancelled", "dead")
_ROW = ("id", "name", "kind", "state", "reason", "queue", "labels", "step", "num_steps", "created_at", "sweep_id")
_CURVE = ("train_loss", "val_loss", "learning_rate", "tokens_per_s")

OpenClient = Callable[[Context], AbstractContextManager[Client]]
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
JobId = Annotated[str, Field(description="Id of a job, as job_01kb8r3mzt2x4v6w8y0a.", max_length=40)]
SweepId = Annotated[str, Field(description="Id of a sweep, as sweep_01kb8r3mzt2x4v6w8y0a.", max_length=40)]
Wait = Annotated[float, Field(description="Wait up to so many seconds for the end.", ge=0, le=MAX_WAIT_S)]
DryRun = Annotated[bool, Field(description="true (default): check and plan only; false: submit.")]
Key = Annotated[
    str | None,
    Field(description="Default: made from what is submitted. Another one submits the same again.", max_length=200),
]


def sentences(tool: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Let what goes wrong reach the agent as a sentence."""

    @functools.wraps(tool)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        try:
            return tool(*args, **kwargs)
        except (AptJobsError, ValidationError) as exc:
            raise ToolError(str(exc)[:4_000]) from exc

    return call


class Tools:
    """The tools, each over a client that is opened for the call."""

    def __init__(self, open_client: OpenClient) -> None:
        self._open = open_client

    @sentences
    def list_jobs(
        self,
        ctx: Context,
        filter: Annotated[str, Field(description="As `state:running label:team=a lr>1e-3`.", max_length=2_000)] = "",
        sort: Annotated[str, Field(description="created_at, priority, step or name; `-` before it: descending.")] = (
            "-created_at"
        ),
        limit: Annotated[int, Field(ge=1, le=50)] = 20,
    ) -> dict[str, Any]:
        """List jobs, newest first, with their state and progress."""
        asked = {"filter": filter} if filter else {}
        with self._open(ctx) as client:
            rows = client.list_jobs(sort=sort, limit=limit, **asked)
        return bounded({"jobs": [_row(dict(row)) for row in rows]})

    @sentences
    def get_job(self, ctx: Context, job_id: JobId, wait_s: Wait = 0.0) -> dict[str, Any]:
        """Get all about one job: its spec, state, reason, error, progress, attempts, what it waits for."""
        with self._open(ctx) as client:
            return bounded(_polled(lambda: dict(client.get(job_id)), wait_s))

    @sentences
    def get_metrics(
        self,
        ctx: Context,
        job_id: JobId,
        points: Annotated[int, Field(description="At most so many steps.", ge=2, le=200)] = 50,
    ) -> dict[str, Any]:
        """Get the curves of a training by step: losses, learning rate, and what its script logged (`custom`)."""
        with self._open(ctx) as client:
            curves = client.metrics(job_id, points)
        kept = {name: curves[name] for name in ("steps", *_CURVE, "custom") if name in curves}
        return bounded(kept)

    @sentences
    def compare(
        self,
        ctx: Context,
        job_ids: Annotated[list[JobId], Field(min_length=2, max_length=MAX_COMPARED)],
        metrics: Annotated[list[str] | None, Field(description="Only these; default: all.", max_length=20)] = None,
        baseline: Annotated[str | None, Field(description="Id of the job that the others are set against.")] = None,
    ) -> dict[str, Any]:
        """Compare trainings: settings in which they differ, last and best values; lists are in the order of `jobs`."""
        with self._open(ctx) as client:
            found: dict[str, Any] = {**client.compare(job_ids, metrics=metrics, baseline=baseline, points=MIN_POINTS)}
        return bounded({name: value for name, value in found.items() if name not in ("points", "series", "x")})

    @sentences
    def get_logs(
        self,
        ctx: Context,
        job_id: JobId,
        lines: Annotated[int, Field(ge=1, le=200)] = 50,
        before: Annotated[int | None, Field(description="Lines before this `first_seq` of an earlier answer.")] = None,
    ) -> dict[str, Any]:
        """Get the last lines that a job printed."""
        with self._open(ctx) as client:
            events = client.log_lines(job_id, limit=lines, before=before)
        shown = [f"{event.get('source', '')} {event.get('message', '')}".strip() for event in events]
        return bounded({"lines": shown, "first_seq": events[0]["seq"] if events else None})

    @sentences
    def submit_job(
        self,
        ctx: Context,
        job: Annotated[dict[str, Any], Field(description="As `POST /api/jobs` takes it, as {'kind': 'train'}.")],
        dry_run: DryRun = True,
        idempotency_key: Key = None,
    ) -> dict[str, Any]:
        """Check a job and say what it would take; with `dry_run=false` submit it, once however often this is called."""
        with self._open(ctx) as client:
            if dry_run:
                return bounded({"submitted": False, "preflight": client.preflight(job)})
            key = idempotency_key or _key_of("job", job)
            return bounded({"submitted": True, "job": _row(dict(client.submit(job, key))), "idempotency_key": key})

    @sentences
    def create_sweep(
        self,
        ctx: Context,
        sweep: Annotated[dict[str, Any], Field(description="As `POST /api/sweeps` takes it.")],
        dry_run: DryRun = True,
        idempotency_key: Key = None,
    ) -> dict[str, Any]:
        """Plan a sweep over settings; with `dry_run=false` submit its jobs, once however often this is called."""
        with self._open(ctx) as client:
            if dry_run:
                planned = plan_jobs(SweepSpec.model_validate(sweep))
                preflight = client.preflight(planned[0].spec.model_dump(mode="json", exclude_unset=True))
                settings = [dict(one.setting) for one in planned[:NUM_SHOWN]]
                plan = {"num_jobs": len(planned), "first_settings": settings, "preflight_of_first": preflight}
                return bounded({"submitted": False, **plan})
            key = idempotency_key or _key_of("sweep", sweep)
            made = client.create_sweep(sweep, key)
        return bounded({"submitted": True, "sweep": _sweep(made), "idempotency_key": key})

    @sentences
    def get_sweep(self, ctx: Context, sweep_id: SweepId, wait_s: Wait = 0.0) -> dict[str, Any]:
        """Get a sweep: its state, progress, best setting with its `job_id`, and the ten settings that are ahead."""
        with self._open(ctx) as client:
            return bounded(_sweep(_polled(lambda: client.sweep(sweep_id), wait_s)))

    @sentences
    def list_sweeps(self, ctx: Context, limit: Annotated[int, Field(ge=1, le=50)] = 20) -> dict[str, Any]:
        """List sweeps, newest first."""
        with self._open(ctx) as client:
            return bounded({"sweeps": [_sweep(row) for row in client.sweeps(limit=limit)]})

    @sentences
    def cancel(
        self, ctx: Context, kind: Literal["job", "sweep"], id: Annotated[str, Field(max_length=40)]
    ) -> dict[str, Any]:
        """Cancel a job, or all jobs of a sweep that have not ended. Repeating it changes nothing."""
        with self._open(ctx) as client:
            if kind == "job":
                return bounded({"job": _row(dict(client.cancel(id)))})
            return bounded({"sweep": _sweep(client.steer_sweep(id, "cancel"))})


def add_tools(server: MCPServer[Any], tools: Tools) -> None:
    """Let a server offer the tools."""
    known = {"openWorldHint": False, "idempotentHint": True}
    reads = ToolAnnotations.model_validate({**known, "readOnlyHint": True})
    adds = ToolAnnotations.model_validate({**known, "readOnlyHint": False, "destructiveHint": False})
    ends = ToolAnnotations.model_validate({**known, "readOnlyHint": False, "destructiveHint": True})
    offered: list[tuple[Callable[..., Any], ToolAnnotations]] = [
        *((tool, reads) for tool in (tools.list_jobs, tools.get_job, tools.get_metrics, tools.get_logs)),
        *((tool, reads) for tool in (tools.compare, tools.get_sweep, tools.list_sweeps)),
        *((tool, adds) for tool in (tools.submit_job, tools.create_sweep)),
        (tools.cancel, ends),
    ]
    for tool, annotations in offered:
        server.add_tool(tool, annotations=annotations)


def _row(job: dict[str, Any]) -> dict[str, Any]:
    progress = job.get("progress") or {}
    return {**{name: job.get(name) for name in _ROW}, "train_loss": progress.get("train_loss")}


def _sweep(sweep: dict[str, Any]) -> dict[str, Any]:
    """Return a sweep with the first rows of its table, without the spec of its jobs."""
    shown = {name: value for name, value in sweep.items() if name not in ("spec", "table", "object")}
    if sweep.get("table") is not None:
        shown["first_settings"] = sweep["table"][:NUM_SHOWN]
    return shown


def _polled(get: Callable[[], dict[str, Any]], wait_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + wait_s
    while (answer := get())["state"] not in ENDED and time.monotonic() < deadline:
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    return answer


def _key_of(what: str, asked: dict[str, Any]) -> str:
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return f"mcp-{what}-{hashlib.sha256(canonical.encode()).hexdigest()[:40]}"
