"""The client for programs without asyncio, and for the command line.

with Client() as client:
    job = client.submit({"kind": "train"})
    for event in job.events(): ...
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from apt_jobs.client import calls
from apt_jobs.client.access import find_access
from apt_jobs.client.answers import JobAnswer
from apt_jobs.client.calls import Call
from apt_jobs.client.comparison import CompareCalls
from apt_jobs.client.data_calls import DataCalls
from apt_jobs.client.following import Event, Follower
from apt_jobs.client.model_calls import ModelCalls
from apt_jobs.client.retry import MAX_RETRIES
from apt_jobs.client.sweep_calls import SweepCalls
from apt_jobs.client.webhook_calls import WebhookCalls


class Job(JobAnswer):
    """One job as it was when it was asked for: a dictionary, with what can be done about it."""

    def __init__(self, values: Mapping[str, Any], client: "Client") -> None:
        super().__init__(values)
        self._client = client

    def refresh(self) -> "Job":
        """Get the job as it is now."""
        return self._client.get(self.id)

    def wait(self, timeout_s: float | None = None) -> "Job":
        """Follow the job to its end; see `Client.wait`."""
        return self._client.wait(self.id, timeout_s)

    def events(self, after: int = 0, kinds: Sequence[str] = ()) -> Iterator[Event]:
        """Follow the job's events; see `Client.events`."""
        return self._client.events(self.id, after, kinds)

    def metrics(self, points: int = 1000) -> dict[str, Any]:
        """Get the job's curves; see `Client.metrics`."""
        return self._client.metrics(self.id, points)

    def cancel(self) -> "Job":
        """Cancel the job."""
        return self._client.cancel(self.id)


class Client(ModelCalls, DataCalls, SweepCalls, WebhookCalls, CompareCalls):
    """One service.

    Every call raises the `AptJobsError` that the service's problem stands for, and `Unavailable` if the service cannot
    be reached. Requests that can safely be repeated are, up to `max_retries` times, after the time that the service's
    `Retry-After` names. A client may be used by several threads.

    Args:
        url: Address of the service; default: APT_JOBS_URL, else what `apt-jobs up` wrote into `data_dir`.
        api_key: Key of the service; default: APT_JOBS_API_KEY, else the one in `data_dir`.
        data_dir: Data directory of a service on this machine.
        max_retries: Further tries of a request after the first.

    Raises:
        Unavailable: no service is known.
        InvalidInput: the address, the key or a certificate file cannot be used.

    Example:
        with Client("https://jobs.example.com", api_key) as client:
            job = client.submit({"kind": "train", "num_ranks": 2})
            print(job.wait().state)
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

    def submit(self, job: Mapping[str, Any], idempotency_key: str | None = None) -> Job:
        """Submit a job.

        Args:
            job: The job, as `POST /api/jobs` takes it.
            idempotency_key: With the same key, repeating the call returns the same job, also from another process.

        Returns:
            The job, which waits in its queue.

        Raises:
            InvalidInput: the job is wrong; the error names each fault.

        Example:
            client.submit({"kind": "train", "dataset": "mine", "num_ranks": 2}, idempotency_key="nightly-2026-03-01")
        """
        return self._job(calls.submit_job(job, idempotency_key))

    def clone(
        self,
        job_id: str,
        patch: Mapping[str, Any] | None = None,
        *,
        exact: bool = False,
        checkpoint: Literal["best", "latest"] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
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
            client.clone(job.id, {"training": {"seed": 2}})
        """
        body = {"patch": dict(patch or {}), "exact": exact, "checkpoint": checkpoint}
        return self._job(calls.clone_job(job_id, body, idempotency_key))

    def preflight(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Check a job and get what it would take, and which workers could run it: `POST /api/jobs?dry_run=true`.

        Raises:
            InvalidInput: the job is wrong; the error names each fault.
        """
        return self._send(calls.preflight(job))

    def get(self, job_id: str) -> Job:
        """Get one job.

        Raises:
            NotFound: there is no such job.
        """
        return self._job(calls.get_job(job_id))

    def list_jobs(self, **filters: Any) -> list[Job]:
        """Get one page of jobs, newest first. Filters are those of `GET /api/jobs`."""
        return self._job_page(filters)[0]

    def iter_jobs(self, **filters: Any) -> Iterator[Job]:
        """Iterate over all jobs, newest first, page by page.

        Example:
            for job in client.iter_jobs(state=["failed"], label="team=a"): ...
        """
        has_more, page = True, dict(filters)
        while has_more:
            jobs, has_more = self._job_page(page)
            yield from jobs
            has_more = has_more and bool(jobs)
            page["after"] = jobs[-1].id if jobs else None

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once if it waits, within seconds if it runs."""
        return self._job(calls.change_job(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        """Pause a job; a running training saves first."""
        return self._job(calls.change_job(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on."""
        return self._job(calls.change_job(job_id, "resume"))

    def retry(self, job_id: str) -> Job:
        """Queue a failed, cancelled or dead job again, from its last checkpoint."""
        return self._job(calls.change_job(job_id, "retry"))

    def update(self, job_id: str, etag: str | None = None, **changes: Any) -> Job:
        """Change a job's `name`, `labels` (merged; None removes one) or `notes`, or while it waits `priority`, `queue`.

        Raises:
            Conflict: it does not wait, or somebody changed it since it had this ETag.
        """
        return self._job(calls.update_job(job_id, changes, etag))

    def steer_jobs(
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
            client.steer_jobs("cancel", filter="state:queued label:team=a")
        """
        return self._send(calls.steer_jobs(action, ids, filter))

    def delete(self, job_id: str) -> None:
        """Delete an ended job with its log, its checkpoints and its files."""
        self._send(calls.delete_job(job_id))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
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
        job = self.get(job_id)
        while not job.is_ended:  # it may be retried as soon as it has ended
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:g} s")
            for _ in self._follow(Follower(job_id, job.last_seq, ("state",), left_s)):
                pass
            job = self.get(job_id)
        return job

    def events(self, job_id: str, after: int = 0, kinds: Sequence[str] = ()) -> Iterator[Event]:
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
            for event in client.events(job.id, kinds=["metric"]):
                print(event["step"], event["train_loss"])
        """
        return self._follow(Follower(job_id, after, kinds))

    def stored_events(self, job_id: str, after: int = 0, kinds: Sequence[str] = ()) -> Iterator[Event]:
        """Iterate over the events that are stored now, without waiting for others."""
        has_more = True
        while has_more:
            events, has_more = self._send(calls.stored_events(job_id, after, tuple(kinds)))
            yield from events
            has_more = has_more and bool(events)
            after = events[-1]["seq"] if events else after

    def log_lines(self, job_id: str, limit: int = 200, before: int | None = None) -> list[Event]:
        """Get the newest `log` events of a job, or those before a `seq`, in order."""
        return self._send(calls.log_lines(job_id, limit, before))

    def metrics(self, job_id: str, points: int = 1000) -> dict[str, Any]:
        """Get curves by step, of at most `points` points: `steps`, ...; `custom`: what a script logged."""
        return self._send(calls.get_metrics(job_id, points))

    def checkpoints(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Get one page of checkpoints, newest first."""
        return self._send(calls.list_checkpoints(job_id))[0]

    def iter_checkpoints(self, job_id: str | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over all checkpoints, newest first, page by page."""
        has_more, after = True, None
        while has_more:
            rows, has_more = self._send(calls.list_checkpoints(job_id, after))
            yield from rows
            has_more = has_more and bool(rows)
            after = rows[-1]["id"] if rows else None

    def download(
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
        return self._download(calls.download_checkpoint(checkpoint_id, merged, dtype), target)

    def export(self, job_id: str, form: str, target: str | os.PathLike[str]) -> int:
        """Write a job's full histories: `csv`, `json`, `parquet`, `tensorboard` or `wandb`; else as `download`."""
        return self._download(calls.export_job(job_id, form), target)

    def delete_checkpoint(self, checkpoint_id: str) -> None:
        """Delete a checkpoint."""
        self._send(calls.delete_checkpoint(checkpoint_id))

    def workers(self) -> list[dict[str, Any]]:
        """Get the workers, with `alive`."""
        return self._send(calls.list_of_all("workers"))

    def steer_worker(self, name: str, action: Literal["drain", "resume"]) -> dict[str, Any]:
        """Drain a worker, or let it claim jobs again."""
        return self._send(calls.steer_worker(name, action))

    def queues(self) -> list[dict[str, Any]]:
        """Get the queues with their depths and limits."""
        return self._send(calls.list_of_all("queues"))

    def configure_queue(self, name: str, *, max_running: int | None = None, paused: bool = False) -> dict[str, Any]:
        """Limit how many jobs of a queue run at once, or pause it."""
        return self._send(calls.configure_queue(name, max_running, paused))

    def schedules(self) -> list[dict[str, Any]]:
        """Get all schedules, by name."""
        return self._send(calls.list_of_all("schedules"))

    def schedule(self, schedule_id: str) -> dict[str, Any]:
        """Get one schedule with its newest runs."""
        return self._send(calls.get_schedule(schedule_id))

    def create_schedule(self, **values: Any) -> dict[str, Any]:
        """Add a schedule; values are those of `POST /api/schedules`."""
        return self._send(calls.create_schedule(values))

    def steer_schedule(self, schedule_id: str, action: Literal["pause", "resume", "run"]) -> dict[str, Any]:
        """Pause or resume a schedule, or run its job now (which returns the job)."""
        return self._send(calls.steer_schedule(schedule_id, action))

    def delete_schedule(self, schedule_id: str) -> None:
        """Delete a schedule; its jobs stay."""
        self._send(calls.delete_schedule(schedule_id))

    def _job(self, call: Call[JobAnswer]) -> Job:
        answer = self._send(call)
        return Job(answer, self)

    def _job_page(self, filters: Mapping[str, Any]) -> tuple[list[Job], bool]:
        rows, has_more = self._send(calls.list_jobs(filters))
        return [Job(row, self) for row in rows], has_more
