"""The steps of a job that has ended, as its event log has them."""

from typing import Any

from apt_jobs.client.client import Client


def stored_steps(client: Client, job_id: str) -> list[dict[str, Any]]:
    """Its `metric` events, in order."""
    last_seq = client.get(job_id)["last_seq"]
    steps = []
    for event in client.events(job_id):  # goes on without end
        if event["kind"] == "metric":
            steps.append(event)
        if event["seq"] >= last_seq:
            break
    return steps
