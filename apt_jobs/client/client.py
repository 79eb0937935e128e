"""The Python client: submit, follow, fetch, generate.

with Client() as client:
    job = client.submit({"kind": "train"})
    for event in client.events(job["id"]): ...
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from apt_jobs.errors import AptJobsError, Conflict, Denied, InvalidInput, NotFound, Unavailable
from apt_jobs.events.binary import SUBPROTOCOL, decode_binary

TIMEOUT_S = 30.0
GENERATE_TIMEOUT_S = 660.0
RECONNECT_MAX_S = 5.0
MAX_RECONNECTS = 60  # in a row without an event
MAX_FRAME_BYTES = 64 << 20
ENDED = ("succeeded", "failed", "cancelled", "dead")
NO_SUCH_JOB, NOT_AUTHENTICATED = 4404, 4401  # close codes of the WebSocket
_ERROR_OF: dict[int, type[AptJobsError]] = {401: Denied, 403: Denied, 404: NotFound, 409: Conflict, 503: Unavailable}


class Client:
    """One service. Address and key: the arguments, else APT_JOBS_URL and APT_JOBS_API_KEY, else what `up` wrote.

    Every call raises the `AptJobsError` that the service's problem stands for; `Unavailable` if it cannot be reached.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, data_dir: Path = Path(".apt_jobs")) -> None:
        local = _local_access(data_dir)
        self.url = (url or os.environ.get("APT_JOBS_URL") or local.get("url") or "").rstrip("/")
        named = url or os.environ.get("APT_JOBS_URL")  # whoever named an address uses it in the browser, too
        self.browser_url = self.url if named else local.get("browser_url", self.url)
        key = api_key or os.environ.get("APT_JOBS_API_KEY") or local.get("api_key")
        if not self.url or not key:
            raise Unavailable(
                f"no service is known: start one with `apt-jobs up` (nothing is running on {data_dir}), "
                "or set APT_JOBS_URL and APT_JOBS_API_KEY"
            )
        self._headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=self.url, headers=self._headers, timeout=TIMEOUT_S, trust_env=False)

    def submit(self, job: dict[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a job; with a key, repeating the call returns the same job."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        return self._json("POST", "/api/jobs", json=job, headers=headers)

    def get(self, job_id: str) -> dict[str, Any]:
        """One job."""
        return self._json("GET", f"/api/jobs/{job_id}")

    def list_jobs(self, **filters: Any) -> list[dict[str, Any]]:
        """Jobs, newest first: one page. Filters are those of `GET /api/jobs`."""
        rows: list[dict[str, Any]] = self._json("GET", "/api/jobs", params=filters)["data"]
        return rows

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job."""
        return self._json("POST", f"/api/jobs/{job_id}/cancel")

    def pause(self, job_id: str) -> dict[str, Any]:
        """Pause a job; a running training saves first."""
        return self._json("POST", f"/api/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> dict[str, Any]:
        """Let a paused job go on."""
        return self._json("POST", f"/api/jobs/{job_id}/resume")

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue a failed, cancelled or dead job again, from its last checkpoint."""
        return self._json("POST", f"/api/jobs/{job_id}/retry")

    def wait(self, job_id: str) -> dict[str, Any]:
        """Follow a job to its end and return it."""
        job = self.get(job_id)
        while job["state"] not in ENDED:  # it may be retried as soon as it has ended
            for event in self.events(job_id, after=job["last_seq"]):
                if event["kind"] == "state" and event["state"] in ENDED:
                    break
            job = self.get(job_id)
        return job

    def events(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """Every event of a job after `after`, once and in order, then live ones, through restarts of the service."""
        cursor, failures = after, 0
        while True:
            try:
                for event in self._connection_events(job_id, cursor):
                    cursor, failures = event["seq"], 0
                    yield event
            except (OSError, WebSocketException) as exc:
                failures += 1
                if failures > MAX_RECONNECTS:
                    raise Unavailable(f"{self.url} cannot be reached: {exc}") from exc
                time.sleep(min(0.1 * 2**failures, RECONNECT_MAX_S))

    def metrics(self, job_id: str, points: int = 1000) -> dict[str, Any]:
        """Curves by step: `steps`, `train_loss`, `learning_rate` and more."""
        curves: dict[str, Any] = self._json("GET", f"/api/jobs/{job_id}/metrics", params={"points": points})
        return dict(curves["training_history"])

    def checkpoints(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """Checkpoints, newest first: one page."""
        params = {"job_id": job_id} if job_id else {}
        rows: list[dict[str, Any]] = self._json("GET", "/api/checkpoints", params=params)["data"]
        return rows

    def download(self, checkpoint_id: str, target: Path) -> None:
        """Write a checkpoint's tar file."""
        self._download(f"/api/checkpoints/{checkpoint_id}/download", {}, target)

    def export(self, job_id: str, form: str, target: Path) -> None:
        """Write a job's full histories: `csv`, `json`, `parquet`, `tensorboard` or `wandb`."""
        self._download(f"/api/jobs/{job_id}/export", {"format": form}, target)

    def generate(self, text: str, **options: Any) -> dict[str, Any]:
        """Continue a text; options are those of `POST /api/generate`."""
        body = {"text": text, **{name: value for name, value in options.items() if value is not None}}
        return self._json("POST", "/api/generate", json=body, timeout=GENERATE_TIMEOUT_S)

    def workers(self) -> list[dict[str, Any]]:
        """The workers, with `alive`."""
        rows: list[dict[str, Any]] = self._json("GET", "/api/workers")["data"]
        return rows

    def steer_worker(self, name: str, action: Literal["drain", "resume"]) -> dict[str, Any]:
        """Drain a worker, or let it claim jobs again."""
        return self._json("POST", f"/api/workers/{quote(name)}/{action}")

    def queues(self) -> list[dict[str, Any]]:
        """The queues with their depths and limits."""
        rows: list[dict[str, Any]] = self._json("GET", "/api/queues")["data"]
        return rows

    def configure_queue(self, name: str, *, max_running: int | None = None, paused: bool = False) -> dict[str, Any]:
        """Limit how many jobs of a queue run at once, or pause it."""
        return self._json("PUT", f"/api/queues/{quote(name)}", json={"max_running": max_running, "paused": paused})

    def schedules(self) -> list[dict[str, Any]]:
        """All schedules, by name."""
        rows: list[dict[str, Any]] = self._json("GET", "/api/schedules")["data"]
        return rows

    def schedule(self, schedule_id: str) -> dict[str, Any]:
        """One schedule with its newest runs."""
        return self._json("GET", f"/api/schedules/{schedule_id}")

    def create_schedule(self, **values: Any) -> dict[str, Any]:
        """Add a schedule; values are those of `POST /api/schedules`."""
        return self._json("POST", "/api/schedules", json=values)

    def steer_schedule(self, schedule_id: str, action: Literal["pause", "resume", "run"]) -> dict[str, Any]:
        """Pause or resume a schedule, or run its job now (which returns the job)."""
        return self._json("POST", f"/api/schedules/{schedule_id}/{action}")

    def delete_schedule(self, schedule_id: str) -> None:
        """Delete a schedule; its jobs stay."""
        self._json("DELETE", f"/api/schedules/{schedule_id}")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _connection_events(self, job_id: str, after: int) -> Iterator[dict[str, Any]]:
        """Events of one WebSocket, until it breaks."""
        address = self.url.replace("http", "ws", 1)
        try:
            with connect(
                f"{address}/ws/jobs/{job_id}?after={after}",
                additional_headers=self._headers,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                max_size=MAX_FRAME_BYTES,
                proxy=None,
            ) as socket:
                for message in socket:
                    frame = decode_binary(message) if isinstance(message, bytes) else json.loads(message)
                    yield from frame.get("events", ())
        except ConnectionClosed as exc:
            code = exc.rcvd.code if exc.rcvd else None
            if code == NO_SUCH_JOB:
                raise NotFound(f"no job {job_id!r}") from exc
            if code == NOT_AUTHENTICATED:
                raise Denied("the API key is not valid") from exc
            raise
        except InvalidStatus as exc:
            raise ConnectionError(str(exc)) from exc

    def _download(self, path: str, params: dict[str, str], target: Path) -> None:
        """Write an answer to a file, which is there when all of it has come."""
        partial = target.with_name(f"{target.name}.partial")
        try:
            with self._http.stream("GET", path, params=params) as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                with partial.open("wb") as file:
                    for part in response.iter_bytes():
                        file.write(part)
            partial.replace(target)
        except httpx.HTTPError as exc:
            raise Unavailable(f"{self.url} cannot be reached: {exc}") from exc
        finally:
            partial.unlink(missing_ok=True)

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            raise Unavailable(f"{self.url} cannot be reached: {exc}") from exc
        if response.is_error:
            raise _error(response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer


def _local_access(data_dir: Path) -> dict[str, str]:
    try:
        access: dict[str, str] = json.loads((data_dir / "local.json").read_text())
    except (OSError, ValueError):
        return {}
    return access


def _error(response: httpx.Response) -> AptJobsError:
    try:
        problem = response.json()
        faults = "".join(f"\n  {fault['pointer']}: {fault['detail']}" for fault in problem.get("errors", []))
        text = f"{problem['detail']}{faults}"
    except (ValueError, KeyError, TypeError):
        text = f"{response.status_code} {response.reason_phrase}"
    return _ERROR_OF.get(response.status_code, InvalidInput)(text)
