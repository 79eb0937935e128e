"""What people read of an event in a chat or mailbox: a title and a few lines, from the body that a webhook gets."""

from typing import Any

import orjson

MAX_CHARS = 1_500  # the shortest of what the services take


def alert_text(body: str, browser_url: str) -> tuple[str, str]:
    """Return title and text.

    Args:
        body: Of a delivery.
        browser_url: Where browsers find the service, for links.

    Returns:
        Both plain, without markup of any service.
    """
    message = orjson.loads(body)
    data: dict[str, Any] = message["data"]
    lines = [f"{_WORDS.get(name, name)}: {_plain(value)}" for name, value in data.items() if _is_shown(name, value)]
    if isinstance(job_id := data.get("job_id"), str):
        lines.append(f"{browser_url}/jobs/{job_id}")
    return f"apt_jobs: {_title(message['type'], data)}"[:200], "\n".join(lines)[:MAX_CHARS]


_WORDS = {"job_id": "job", "queued": "jobs that wait", "num_due_times": "due times"}
_OF_JOB = ("job_id", "name", "queue", "labels", "reason", "error", "attempt", "step", "incident")
_OF_SCHEDULE = ("schedule_id", "outcome", "first_due_at", "last_due_at", "num_due_times")
_SHOWN = (*_OF_JOB, *_OF_SCHEDULE, "worker", "hostname", "queued", "limit")


def _title(event: str, data: dict[str, Any]) -> str:
    of_job = data.get("name") or data.get("job_id")
    titles = {
        "incident.opened": f"{(data.get('incident') or {}).get('anomaly')} in job {of_job}",
        "worker.lost": f"worker {data.get('worker')} is lost",
        "queue.too_long": f"queue {data.get('queue')} is long",
        "schedule.missed": f"schedule {data.get('name')} missed a due time",
        "webhook.test": "this alert works",
    }
    return titles.get(event) or f"job {of_job} {data.get('state')}"


def _is_shown(name: str, value: Any) -> bool:
    return name in _SHOWN and value not in (None, {}, [], "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        if "message" in value:
            return str(value["message"])
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return str(value)
