"""Recipes of the documentation, run as they stand there."""

import json
import os
import re
import subprocess
from pathlib import Path

from apt_jobs.client.client import Client
from tests.acceptance.stack import Stack

SCHEDULES = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "schedules.md"


def test_another_scheduler_that_calls_twice_submits_one_job(stack: Stack, client: Client, tmp_path: Path) -> None:
    [script] = re.findall(r"```sh\n(#!/bin/sh\n.*?)```", SCHEDULES.read_text(), re.DOTALL)
    (tmp_path / "nightly.sh").write_text(script)
    job = {"kind": "generate", "texts": ["a"], "max_length": 1, "labels": {"from": "cron"}}
    (tmp_path / "nightly.json").write_text(json.dumps(job))
    local = json.loads((stack.data_dir / "local.json").read_text())
    environment = {**os.environ, "APT_JOBS_URL": local["url"], "APT_JOBS_API_KEY": local["api_key"]}

    def call() -> "subprocess.CompletedProcess[str]":
        command = ["sh", str(tmp_path / "nightly.sh"), str(tmp_path / "nightly.json")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    first, second = call(), call()
    assert first.returncode == second.returncode == 0, first.stderr
    assert json.loads(first.stdout)["id"] == json.loads(second.stdout)["id"]
    assert len(client.list_jobs(label="from=cron")) == 1
    (tmp_path / "nightly.json").write_text(json.dumps({**job, "max_length": 2}))
    refused = call()
    assert refused.returncode == 22  # curl: an HTTP error
    assert "was used on /api/jobs with another body" in refused.stdout
