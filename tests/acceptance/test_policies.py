"""Policies that concern the job itself, through the whole stack."""

from typing import Any

import pytest

from apt_jobs.client.client import Client
from tests.acceptance.stack import DEADLINE_S, LONG, until

EDGY = {"window_steps": 8, "arm_after_steps": 8, "spike_ratio": 1.01, "spike_mads": 0.01}  # anything is a spike to it


@pytest.mark.parametrize(("action", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_job_stops_itself(client: Client, action: str, state: str) -> None:
    monitor: dict[str, Any] = {**EDGY, "on_anomaly": [{"kinds": ["spike"], "action": action}]}
    job_id = client.submit({**LONG, "monitor": monitor})["id"]
    until(lambda: client.get(job_id)["state"] == state, DEADLINE_S)
    assert client.get(job_id)["reason"].startswith(f"{state} by a policy: spike since step ")
    if state == "paused":
        client.cancel(job_id)
