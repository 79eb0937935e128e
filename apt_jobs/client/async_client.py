"""The client for asyncio: what `Client` does, with the same names.

async with AsyncClient() as client:
    job = await client.submit({"kind": "train"})
    async for event in job.events(): ...
"""

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from apt_jobs.client import calls
from apt_jobs.client.access import find_access
from apt_jobs.client.answers import JobAnswer
from apt_jobs.client.async_data_calls import AsyncDataCalls
from apt_jobs.client.calls import Call
from apt_jobs.client.comparison import AsyncCompareCalls
from apt_jobs.client.following import Event, Follower
from apt_jobs.client.model_calls import AsyncModelCalls
from apt_jobs.client.retry import MAX_RETRIES
from apt_jobs.client.sweep_calls import AsyncSweepCalls
from apt_jobs.client.webhook_calls import AsyncWebhookCalls


class AsyncJob(JobAnswer):
    """One job as it was when it was asked for: a dictionary, with what can be done about it."""

    def __init__(self, values: Mapping[str, Any], client: "AsyncClient") -> None:
        super().__init__(values)
        self._client = client

    async def refresh(self) -> "AsyncJob":
        """Get the job as it is now."""
        return await self._client.get(self.id)

    async def wait(self, timeout_s: float | None = None) -> "AsyncJob":
        """Follow the job to its end; see `AsyncClient.wait`."""
        return await self._client.wait(self.id, timeout_s)

    def events(self, after: int = 0, kinds: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Follow the job's events; see `AsyncClient.events`."""
        return self._client.events(self.id, after, kinds)

    async def metrics(self, points: int = 1000) -> dict[str, Any]:
        """Get the job's curves; see `AsyncClient.metrics`."""
        return await self._client.metrics(self.id, points)

    async def cancel(self) -> "AsyncJob":
        """Cancel the job."""
        return await self._client.cancel(self.id)


class AsyncClient(AsyncModelCalls, AsyncDataCalls, AsyncSweepCalls, AsyncWebhookCalls, AsyncCompareCalls):
    """One service.

    Every call raises the `AptJobsError` that the service's problem stands for, and `Unavailable` if the service cannot
    be reached. Requests that can safely be repeated are, up to `max_retries` times, after the time that the service's
    `Retry-After` names. Close it, or use it in `async with`.

    Args:
        url: Address of the service; default: APT_JOBS_URL, else what `apt-jobs up` wrote into `data_dir`.
        api_key: Key of the service; default: APT_JOBS_API_KEY, else the one in `data_dir`.
        data_dir: Data directory of a service on this machine.
        max_retries: Further tries of a request after the first.

    Raises:
        Unavailable: no service is known.
        InvalidInput: the address, the key or a certificate file cannot be used.

    Example:
        async with AsyncClient("https://jobs.example.com", api_key) as client:
            job = await client.submit({"kind": "train", "num_ranks": 2})
            print((await job.wait()).state)
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        data_dir: str | os.PathLike[str] = Path(".apt_jobs"),
        *,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        super().__init__(find_access(url, api_key, Path(data_dir)), max_retries)

    async def submit(self, job: Mapping[str, Any], idempotency_key: str | None = None) -> AsyncJob:
        """Submit a job.

        Args:
            job: The job, as `POST /api/jobs` takes it.
            idempotency_key: With the same key, repeating the call returns the same job, also from another process.

        Returns:
            The job, which waits in its queue.

        Raises:
            InvalidInput: the job is wrong; the error names each fault.

        Example:
            await client.submit({"kind": "train", "dataset": "mine"}, idempotency_key="nightly-2026-03-01")
        """
        return await self._job(calls.submit_job(job, idempotency_key))

    async def clone(
        self,
        job_id: str,
        patch: Mapping[str, Any] | None = None,
        *,
        exact: bool = False,
        checkpoint: Literal["best", "latest"] | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncJob:
        """Submit a job again, with changes.

        Args:
            job_id: The job.
            patch: JSON merge patch (RFC 7396) of its `spec`; None as a value takes a field out.
            exact: With the packages that its last attempt ran with, and the same content of its data set.
            checkpoint: Start from this one of the job.
            idempotency_key: As that of `submit`.

        Returns:
            The new job.

        Raises:
            InvalidInput: with the patch it is no job; the error names each fault.
            Conflict: what was asked for cannot be had again.

        Example:
            await client.clone(job.id, {"training": {"seed": 2}})
        """
        body = {"patch": dict(patch or {}), "exact": exact, "checkpoint": checkpoint}
        return await self._job(calls.clone_job(job_id, body, idempotency_key))

    async def preflight(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Check a job and get what it would take, and which workers could run it: `POST /api/jobs?dry_run=true`.

        Raises:
            InvalidInput: the job is wrong; the error names each fault.
        """
        return await self._send(calls.preflight(job))

    async def get(self, job_id: str) -> AsyncJob:
        """Get one job.

        Raises:
            NotFound: there is no such job.
        """
        return await self._job(calls.get_job(job_id))

    async def list_jobs(self, **filters: Any) -> list[AsyncJob]:
        """Get one page of jobs, newest first. Filters are those of `GET /api/jobs`."""
        return (await self._job_page(filters))[0]

    async def iter_jobs(self, **filters: Any) -> AsyncIterator[AsyncJob]:
        """Iterate over all jobs, newest first, page by page.

        Example:
            async for job in client.iter_jobs(state=["failed"], label="team=a"): ...
        """
        has_more, page = True, dict(filters)
        while has_more:
            jobs, has_more = await self._job_page(page)
            for job in jobs:
                yield job
            has_more = has_more and bool(jobs)
            page["after"] = jobs[-1].id if jobs else None

    async def cancel(self, job_id: str) -> AsyncJob:
        """Cancel a job: at once if it waits, within seconds if it runs."""
        return await self._job(calls.change_job(job_id, "cancel"))

    async def pause(self, job_id: str) -> AsyncJob:
        """Pause a job; a running training saves first."""
        return await self._job(calls.change_job(job_id, "pause"))

    async def resume(self, job_id: str) -> AsyncJob:
        """Let a paused job go on."""
        return await self._job(calls.change_job(job_id, "resume"))

    async def retry(self, job_id: str) -> AsyncJob:
        """Queue a failed, cancelled or dead job again, from its last checkpoint."""
        return await self._job(calls.change_job(job_id, "retry"))

    async def update(self, job_id: str, etag: str | None = None, **changes: Any) -> AsyncJob:
        """Change a job's `name`, `labels` (merged; None removes one) or `notes`, or while it waits `priority`, `queue`.

        Raises:
            Conflict: it does not wait, or somebody changed it since it had this ETag.
        """
        return await self._job(calls.update_job(job_id, changes, etag))

    async def steer_jobs(
        self,
        action: Literal["cancel", "pause", "resume", "retry", "delete"],
        ids: Sequence[str] | None = None,
        *,
        filter: str | None = None,
    ) -> dict[str, Any]:
        """Steer many jobs, by their ids or by a filter of `GET /api/jobs`.

        Returns:
            How many `matched` and `changed`, and the `refused` ones with the reason.

        Example:
            await client.steer_jobs("cancel", filter="state:queued label:team=a")
        """
        return await self._send(calls.steer_jobs(action, ids, filter))

    async def delete(self, job_id: str) -> None:
        """Delete an ended job with its log, its checkpoints and its files."""
        await self._send(calls.delete_job(job_id))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> AsyncJob:
        """Follow a job to its end.

        Args:
            job_id: Its id.
            timeout_s: Longest time to wait, in seconds; None: as long as it takes.

        Returns:
            The job as it ended: look at its `state`.

        Raises:
            TimeoutError: it has not ended in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = await self.get(job_id)
        while not job.is_ended:  # it may be retried as soon as it has ended
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s")
            async for _ in self._follow(Follower(job_id, job.last_seq, ("state",), left_s)):
                pass
            job = await self.get(job_id)
        return job

    def events(self, job_id: str, after: int = 0, kinds: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Follow a job: every event after `after`, once and in order, then live ones, until the job has ended.

        Restarts of the service are bridged. Where WebSockets are refused, server-sent events are used.

        Args:
            job_id: Its id.
            after: Last `seq` that was seen.
            kinds: Only events of these kinds; none: all.

        Yields:
            Events as docs/reference/events.md describes them.

        Raises:
            NotFound: there is no such job.
            Denied: the key is not valid.
            Unavailable: the service was away for some minutes.

        Example:
            async for event in client.events(job.id, kinds=["metric"]):
                print(event["step"], event["train_loss"])
        """
        return self._follow(Follower(job_id, after, kinds))

    async def stored_events(self, job_id: str, after: int = 0, kinds: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Iterate over the events that are stored now, without waiting for others."""
        has_more = True
        while has_more:
            events, has_more = await self._send(calls.stored_events(job_id, after, tuple(kinds)))
            for event in events:
                yield event
            has_more = has_more and bool(events)
            after = events[-1]["seq"] if events else after

    async def log_lines(self, job_id: str, limit: int = 200, before: int | None = None) -> list[Event]:
        """Get the newest `log` events of a job, or those before a `seq`, in order."""
        return await self._send(calls.log_lines(job_id, limit, before))

    async def metrics(self, job_id: str, points: int = 1000) -> dict[str, Any]:
        """Get curves by step, of at most `points` points: `steps`, ...; `custom`: what a script logged."""
        return await self._send(calls.get_metrics(job_id, points))

    async def checkpoints(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Get one page of checkpoints, newest first."""
        return (await self._send(calls.list_checkpoints(job_id)))[0]

    async def iter_checkpoints(self, job_id: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """Iterate over all checkpoints, newest first, page by page."""
        has_more, after = True, None
        while has_more:
            rows, has_more = await self._send(calls.list_checkpoints(job_id, after))
            for row in rows:
                yield row
            has_more = has_more and bool(rows)
            after = rows[-1]["id"] if rows else None

    async def download(
        self, checkpoint_id: str, target: str | os.PathLike[str], *, merged: bool = False, dtype: str | None = None
    ) -> int:
        """Write a checkpoint's tar file.

        Args:
            checkpoint_id: Its id.
            target: A path, which is replaced when all has come, or `-` for standard output.
            merged: The whole model alone, an adapter added to its base model, instead of the checkpoint's files.
            dtype: Type of the merged weights: `float32` (default), `bfloat16` or `float16`.

        Returns:
            How many bytes were written.

        Raises:
            InvalidInput: the target cannot be written.
            OutOfSpace: its disk is full.
        """
        return await self._download(calls.download_checkpoint(checkpoint_id, merged, dtype), target)

    async def export(self, job_id: str, form: str, target: str | os.PathLike[str]) -> int:
        """Write a job's full histories: `csv`, `json`, `parquet`, `tensorboard` or `wandb`; else as `download`."""
        return await self._download(calls.export_job(job_id, form), target)

    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        """Delete a checkpoint."""
        await self._send(calls.delete_checkpoint(checkpoint_id))

    async def workers(self) -> list[dict[str, Any]]:
        """Get the workers, with `alive`."""
        return await self._send(calls.list_of_all("workers"))

    async def steer_worker(self, name: str, action: Literal["drain", "resume"]) -> dict[str, Any]:
        """Drain a worker, or let it claim jobs again."""
        return await self._send(calls.steer_worker(name, action))

    async def queues(self) -> list[dict[str, Any]]:
        """Get the queues with their depths and limits."""
        return await self._send(calls.list_of_all("queues"))

    async def configure_queue(
        self, name: str, *, max_running: int | None = None, paused: bool = False
    ) -> dict[str, Any]:
        """Limit how many jobs of a queue run at once, or pause it."""
        return await self._send(calls.configure_queue(name, max_running, paused))

    async def schedules(self) -> list[dict[str, Any]]:
        """Get all schedules, by name."""
        return await self._send(calls.list_of_all("schedules"))

    async def schedule(self, schedule_id: str) -> dict[str, Any]:
        """Get one schedule with its newest runs."""
        return await self._send(calls.get_schedule(schedule_id))

    async def create_schedule(self, **values: Any) -> dict[str, Any]:
        """Add a schedule; values are those of `POST /api/schedules`."""
        return await self._send(calls.create_schedule(values))

    async def steer_schedule(self, schedule_id: str, action: Literal["pause", "resume", "run"]) -> dict[str, Any]:
        """Pause or resume a schedule, or run its job now (which returns the job)."""
        return await self._send(calls.steer_schedule(schedule_id, action))

    async def delete_schedule(self, schedule_id: str) -> None:
        """Delete a schedule; its jobs stay."""
        await self._send(calls.delete_schedule(schedule_id))

    async def _job(self, call: Call[JobAnswer]) -> AsyncJob:
        answer = await self._send(call)
        return AsyncJob(answer, self)

    async def _job_page(self, filters: Mapping[str, Any]) -> tuple[list[AsyncJob], bool]:
        rows, has_more = await self._send(calls.list_jobs(filters))
        return [AsyncJob(row, self) for row in rows], has_more
