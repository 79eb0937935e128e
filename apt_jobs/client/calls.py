"""The core of both clients: every request of the REST interface as a value, made without doing any I/O.

`Client` and `AsyncClient` send them, each in its way. Ids become single segments of a path here, so that no id,
whatever is in it, leads to another address than the one that was meant.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from apt_jobs.client.access import require_header
from apt_jobs.client.answers import JobAnswer, list_of
from apt_jobs.errors import InvalidInput, NotFound

TIMEOUT_S = 30.0
PRUNE_TIMEOUT_S = 600.0  # a run removes up to 1,000 jobs, with their files
GENERATE_TIMEOUT_S = 660.0
UPLOAD_TIMEOUT_S = 300.0  # for the answer to an upload
MERGE_TIMEOUT_S = 930.0  # a model is loaded, merged and saved before the first byte
MAX_ID_CHARS = 300
MAX_KEY_CHARS = 255  # of an Idempotency-Key
STORED_PAGE = 1_000  # events of a page

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[Any], Answer]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = TIMEOUT_S
    is_repeatable: bool = True  # doing it twice changes nothing more


def segment(value: str, what: str, *, may_have_slashes: bool = False) -> str:
    """Quote an id as one segment of a path.

    Args:
        value: The id.
        what: What it is the id of, for the error.
        may_have_slashes: Names of workers may.

    Returns:
        The id, percent-encoded whole.

    Raises:
        NotFound: nothing has such an id, and no address could name it.
    """
    parts = value.split("/") if may_have_slashes else [value]
    is_wrong = any(part in ("", ".", "..") or "/" in part or "\\" in part for part in parts)
    if is_wrong or len(value) > MAX_ID_CHARS or any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise NotFound(f"no {what} {value[:100]!r}: an id is one word, without slashes or control characters")
    try:
        return quote(value, safe="")
    except UnicodeEncodeError as exc:  # half a surrogate pair
        raise NotFound(f"no {what} {value[:100]!r}: an id is text") from exc


def job_path(job_id: str, *rest: str) -> str:
    """Return the address of a job, or of something that it has."""
    return "/".join(["/api/jobs", segment(job_id, "job"), *rest])


def submit_job(job: Mapping[str, Any], idempotency_key: str | None) -> Call[JobAnswer]:
    """Build the submission. Without a key it gets one of its own, so that repeating it is safe."""
    return _with_json("POST", "/api/jobs", job, JobAnswer, headers=_key_header(idempotency_key))


def preflight(job: Mapping[str, Any]) -> Call[dict[str, Any]]:
    return _with_json("POST", "/api/jobs", job, dict, params={"dry_run": "true"})


def get_job(job_id: str) -> Call[JobAnswer]:
    return Call("GET", job_path(job_id), JobAnswer)


def list_jobs(filters: Mapping[str, Any]) -> Call[tuple[list[JobAnswer], bool]]:
    """Build the request of one page, and whether there are more."""
    return Call("GET", "/api/jobs", _page_of_jobs, params=_given(filters))


def change_job(job_id: str, action: Literal["cancel", "pause", "resume", "retry"]) -> Call[JobAnswer]:
    is_repeatable = action in ("cancel", "pause")
    return Call("POST", job_path(job_id, action), JobAnswer, is_repeatable=is_repeatable)


def clone_job(job_id: str, body: Mapping[str, Any], idempotency_key: str | None) -> Call[JobAnswer]:
    """Build the request; repeating it is safe, as that of a submission."""
    return _with_json("POST", job_path(job_id, "clone"), body, JobAnswer, headers=_key_header(idempotency_key))


def update_job(job_id: str, changes: Mapping[str, Any], etag: str | None) -> Call[JobAnswer]:
    headers = {} if etag is None else {"if-match": require_header(etag, "the ETag")}
    return _with_json("PATCH", job_path(job_id), changes, JobAnswer, headers=headers)


def steer_jobs(
    action: Literal["cancel", "pause", "resume", "retry", "delete"], ids: Sequence[str] | None, filter_text: str | None
) -> Call[dict[str, Any]]:
    body = _given({"ids": None if ids is None else list(ids), "filter": filter_text})
    return _with_json("POST", f"/api/jobs/{action}", body, dict, is_repeatable=action in ("cancel", "pause"))


def prune(policy: Mapping[str, Any] | None, dry_run: bool) -> Call[dict[str, Any]]:
    body = {**_given({"policy": policy}), "dry_run": dry_run}
    return _with_json("POST", "/api/retention", body, dict, timeout_s=PRUNE_TIMEOUT_S, is_repeatable=dry_run)


def delete_job(job_id: str) -> Call[None]:
    return Call("DELETE", job_path(job_id), _nothing, is_repeatable=False)


def stored_events(job_id: str, after: int, kinds: tuple[str, ...]) -> Call[tuple[list[dict[str, Any]], bool]]:
    """Build the request of one page of the log after `after`, and whether there are more."""
    params = {"after": after, "limit": STORED_PAGE, "kind": list(kinds)}
    return Call("GET", job_path(job_id, "events"), _page, params=params)


def log_lines(job_id: str, limit: int, before: int | None) -> Call[list[dict[str, Any]]]:
    return Call("GET", job_path(job_id, "logs"), list_of, params=_given({"limit": limit, "before": before}))


def get_metrics(job_id: str, points: int) -> Call[dict[str, Any]]:
    def curves(answer: Any) -> dict[str, Any]:
        return {**answer["training_history"], "custom": answer.get("custom", {})}

    return Call("GET", job_path(job_id, "metrics"), curves, params={"points": points})


def list_checkpoints(job_id: str | None, after: str | None = None) -> Call[tuple[list[dict[str, Any]], bool]]:
    return Call("GET", "/api/checkpoints", _page, params=_given({"job_id": job_id, "after": after}))


def download_checkpoint(checkpoint_id: str, merged: bool, dtype: str | None) -> Call[None]:
    params: dict[str, Any] = {"merged": "true"} if merged else {}
    if dtype is not None:
        params["dtype"] = dtype
    path = f"/api/checkpoints/{segment(checkpoint_id, 'checkpoint')}/download"
    return Call("GET", path, _nothing, params=params, timeout_s=MERGE_TIMEOUT_S if merged else TIMEOUT_S)


def delete_checkpoint(checkpoint_id: str) -> Call[None]:
    return Call("DELETE", f"/api/checkpoints/{segment(checkpoint_id, 'checkpoint')}", _nothing, is_repeatable=False)


def export_job(job_id: str, form: str) -> Call[None]:
    return Call("GET", job_path(job_id, "export"), _nothing, params={"format": form})


def generate(text: str, options: Mapping[str, Any]) -> Call[dict[str, Any]]:
    body = {"text": text, **_given(options)}
    return _with_json("POST", "/api/generate", body, dict, timeout_s=GENERATE_TIMEOUT_S, is_repeatable=False)


def chat(messages: Sequence[Mapping[str, str]], model: str, options: Mapping[str, Any]) -> Call[dict[str, Any]]:
    body = {"model": model, "messages": [dict(message) for message in messages], **_given(options)}
    return _with_json("POST", "/v1/chat/completions", body, dict, timeout_s=GENERATE_TIMEOUT_S, is_repeatable=False)


def promote_model(alias: str, model: str) -> Call[dict[str, Any]]:
    return _with_json("PUT", f"/api/models/aliases/{segment(alias, 'alias')}", {"model": model}, dict)


def delete_alias(alias: str) -> Call[None]:
    return Call("DELETE", f"/api/models/aliases/{segment(alias, 'alias')}", _nothing, is_repeatable=False)


def set_secret(name: str, value: str) -> Call[dict[str, Any]]:
    return _with_json("PUT", f"/api/secrets/{segment(name, 'secret')}", {"value": value}, dict)


def delete_secret(name: str) -> Call[None]:
    return Call("DELETE", f"/api/secrets/{segment(name, 'secret')}", _nothing, is_repeatable=False)


def list_of_all(
    what: Literal["workers", "queues", "schedules", "datasets", "models", "secrets", "webhooks"],
) -> Call[list[dict[str, Any]]]:
    return Call("GET", f"/api/{what}", list_of)


def get_webhook(webhook_id: str) -> Call[dict[str, Any]]:
    return Call("GET", _webhook_path(webhook_id), dict)


def create_webhook(body: Mapping[str, Any], idempotency_key: str | None) -> Call[dict[str, Any]]:
    """Build the request. Not repeated by itself: only the first answer has the key of the signatures."""
    headers = {} if idempotency_key is None else _key_header(idempotency_key)
    return _with_json("POST", "/api/webhooks", body, dict, headers=headers, is_repeatable=False)


def update_webhook(webhook_id: str, changes: Mapping[str, Any]) -> Call[dict[str, Any]]:
    return _with_json("PATCH", _webhook_path(webhook_id), changes, dict)


def delete_webhook(webhook_id: str) -> Call[None]:
    return Call("DELETE", _webhook_path(webhook_id), _nothing, is_repeatable=False)


def test_webhook(webhook_id: str) -> Call[dict[str, Any]]:
    return Call("POST", f"{_webhook_path(webhook_id)}/test", dict, is_repeatable=False)


def list_webhook_deliveries(
    webhook_id: str, state: str | None, after: str | None, limit: int
) -> Call[list[dict[str, Any]]]:
    params = _given({"state": state, "after": after, "limit": limit})
    return Call("GET", f"{_webhook_path(webhook_id)}/deliveries", list_of, params=params)


def replay_webhook_delivery(webhook_id: str, delivery_id: str) -> Call[dict[str, Any]]:
    path = f"{_webhook_path(webhook_id)}/deliveries/{segment(delivery_id, 'delivery')}/replay"
    return Call("POST", path, dict)


def _webhook_path(webhook_id: str) -> str:
    return f"/api/webhooks/{segment(webhook_id, 'webhook')}"


def steer_worker(name: str, action: Literal["drain", "resume"]) -> Call[dict[str, Any]]:
    return Call("POST", f"/api/workers/{segment(name, 'worker', may_have_slashes=True)}/{action}", dict)


def configure_queue(name: str, max_running: int | None, paused: bool) -> Call[dict[str, Any]]:
    body = {"max_running": max_running, "paused": paused}
    return _with_json("PUT", f"/api/queues/{segment(name, 'queue')}", body, dict)


def get_schedule(schedule_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/api/schedules/{segment(schedule_id, 'schedule')}", dict)


def create_schedule(values: Mapping[str, Any]) -> Call[dict[str, Any]]:
    return _with_json("POST", "/api/schedules", values, dict, is_repeatable=False)


def steer_schedule(schedule_id: str, action: Literal["pause", "resume", "run"]) -> Call[dict[str, Any]]:
    path = f"/api/schedules/{segment(schedule_id, 'schedule')}/{action}"
    return Call("POST", path, dict, is_repeatable=action != "run")


def delete_schedule(schedule_id: str) -> Call[None]:
    return Call("DELETE", f"/api/schedules/{segment(schedule_id, 'schedule')}", _nothing, is_repeatable=False)


def create_sweep(sweep: Mapping[str, Any], idempotency_key: str | None) -> Call[dict[str, Any]]:
    """Build the submission of a sweep."""
    return _with_json("POST", "/api/sweeps", sweep, dict, headers=_key_header(idempotency_key))


def get_sweep(sweep_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/api/sweeps/{segment(sweep_id, 'sweep')}", dict)


def list_sweeps(after: str | None, limit: int) -> Call[list[dict[str, Any]]]:
    return Call("GET", "/api/sweeps", list_of, params=_given({"after": after, "limit": limit}))


def steer_sweep(sweep_id: str, action: Literal["cancel", "pause", "resume"]) -> Call[dict[str, Any]]:
    return Call("POST", f"/api/sweeps/{segment(sweep_id, 'sweep')}/{action}", dict, is_repeatable=action != "resume")


def is_over(sweep: Mapping[str, Any]) -> bool:
    """Return whether all jobs of a sweep have ended."""
    return sweep["state"] in ("succeeded", "failed", "cancelled")


def not_over(sweep: Mapping[str, Any], timeout_s: float | None) -> str:
    """Return what to say of a sweep that takes longer."""
    progress = sweep["progress"]
    return f"{sweep['id']} has ended {progress['ended']} of {progress['total']} jobs after {timeout_s:g} s"


def upload_parameters(name: str, dataset_format: str, column: str) -> dict[str, str]:
    """Return the query of an upload. What is as usual is left out, for a server of an earlier version."""
    usual = {"format": "text", "column": "text"}
    given = {"name": name, "format": dataset_format, "column": column}
    return {key: value for key, value in given.items() if usual.get(key) != value}


def begin_upload(name: str, dataset_format: str, column: str, size_bytes: int, sha256: str) -> Call[dict[str, Any]]:
    """Build the beginning of an upload in parts; repeating it finds the same one."""
    body = {"name": name, "format": dataset_format, "column": column, "size_bytes": size_bytes, "sha256": sha256}
    return _with_json("POST", "/api/uploads", body, dict)


def get_upload(upload_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/api/uploads/{segment(upload_id, 'upload')}", dict)


def add_part(upload_id: str, offset: int, part: bytes) -> Call[dict[str, Any]]:
    path, headers = f"/api/uploads/{segment(upload_id, 'upload')}", {"content-type": "application/octet-stream"}
    return Call("PUT", path, dict, {"offset": offset}, part, headers, UPLOAD_TIMEOUT_S, is_repeatable=False)


def complete_upload(upload_id: str) -> Call[dict[str, Any]]:
    path = f"/api/uploads/{segment(upload_id, 'upload')}/complete"
    return Call("POST", path, dict, timeout_s=UPLOAD_TIMEOUT_S, is_repeatable=False)


def preview_dataset(name: str, rows: int, model: str | None) -> Call[dict[str, Any]]:
    path = f"/api/datasets/{segment(name, 'data set')}/preview"
    return Call("GET", path, dict, params=_given({"rows": rows, "model": model}))


def delete_dataset(name: str) -> Call[None]:
    return Call("DELETE", f"/api/datasets/{segment(name, 'data set')}", _nothing, is_repeatable=False)


def get_code(sha256: str) -> Call[dict[str, Any]]:
    return Call("GET", code_path(sha256), dict)


def code_path(sha256: str) -> str:
    """Return the address of packed code."""
    return f"/api/code/{segment(sha256, 'packed code')}"


def _with_json(
    method: str,
    path: str,
    body: Mapping[str, Any],
    read: Callable[[Any], Answer],
    *,
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
    is_repeatable: bool = True,
) -> Call[Answer]:
    """Build a request with a JSON body.

    Raises:
        InvalidInput: the body holds what JSON has no form for.
    """
    try:
        encoded = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as exc:  # a set, NaN, half a surrogate pair, a loop
        raise InvalidInput(f"the body of {method} {path} has no form in JSON: {exc}") from exc
    all_headers = {"content-type": "application/json", **(headers or {})}
    return Call(method, path, read, params or {}, encoded, all_headers, timeout_s, is_repeatable)


def _key_header(idempotency_key: str | None) -> dict[str, str]:
    """Return the header of a submission. Without a key it gets one of its own, so that repeating it is safe."""
    key = idempotency_key or f"client-{secrets.token_hex(16)}"
    if len(key) > MAX_KEY_CHARS:
        raise InvalidInput(f"the idempotency key has {len(key):,} characters; at most {MAX_KEY_CHARS} are allowed")
    return {"idempotency-key": require_header(key, "the idempotency key")}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _page(answer: Any) -> tuple[list[dict[str, Any]], bool]:
    return list_of(answer), bool(answer.get("has_more"))


def _page_of_jobs(answer: Any) -> tuple[list[JobAnswer], bool]:
    rows, has_more = _page(answer)
    return [JobAnswer(row) for row in rows], has_more


def _nothing(_answer: Any) -> None:
    return None
