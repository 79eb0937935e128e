"""Comparisons by both clients and the command line, at 80 columns and in a pipe."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.client.async_client import AsyncClient
from apt_jobs.client.client import Client
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.events.kinds import MetricsLogged
from tests.integration.client.jobs import alter_job, url_of
from tests.integration.db.steps import running, started, store, trained
from tests.integration.web.served import Served


@pytest.fixture(scope="module")
def ids(served: Served) -> list[str]:
    made = []
    for number in range(6):
        job = running(served.database, name=f"run {number}", training={"learning_rate": 0.1 / (number + 1)})
        store(served.database, job, started(), *(trained(step, 3.0 - number / 10) for step in range(1, 11)))
        store(served.database, job, MetricsLogged(10, 0, {"eval/accuracy": number / 10}))
        made.append(job.id)
    alter_job(served, made[0], name="[bold]\x1b[2J")
    return made


def shown(served: Served, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "APT_JOBS_URL": url_of(served),
        "APT_JOBS_API_KEY": served.key,
        "APT_JOBS_DATA_DIR": str(tmp_path),
        "COLUMNS": "80",
    }
    command = [sys.executable, "-m", "apt_jobs", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_both_clients_compare(served: Served, ids: list[str]) -> None:
    with Client(url_of(served), served.key) as client:
        found = client.compare(ids[:2], metrics=["eval/accuracy"], baseline=ids[0], x="epoch")
        with pytest.raises(InvalidInput, match="comma"):
            client.compare(["a,b"])
        with pytest.raises(NotFound, match="no training job"):
            client.compare(["job_gone"])
    assert found["settings"] == {"training.learning_rate": [0.1, 0.05]}
    assert found["metrics"]["train_loss"]["last_delta"] == [0.0, pytest.approx(-0.1)]
    assert (found["series"]["eval/accuracy"], found["points"]) == ([[0.0], [0.1]], [1.0])

    async def asked() -> list[str]:
        async with AsyncClient(url_of(served), served.key) as client:
            return [job["id"] for job in (await client.compare(filter="run"))["jobs"]]

    assert asyncio.run(asked()) == ids[:0:-1]


def test_two_jobs_stand_side_by_side(served: Served, ids: list[str], tmp_path: Path) -> None:
    answer = shown(served, tmp_path, *ids[:2], "--baseline", ids[0])
    assert (answer.returncode, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert "\x1b" not in answer.stdout
    assert lines[1].split() == ["#1*", ids[0], "running", "10/100", "[bold]\\x1b[2J"]
    table = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in lines[4:])}
    assert table["training.learning_rate"] == ["0.1", "0.05"]
    assert table["train_loss last"] == ["3", "2.9 (-0.1)"]
    assert table["eval/accuracy best"] == ["0", "0.1 (+0.1)"]
    assert max(map(len, lines)) <= 80


def test_many_jobs_are_rows_and_json_has_all(served: Served, ids: list[str], tmp_path: Path) -> None:
    answer = shown(served, tmp_path, *ids, ids[0], "--metric", "train_loss")
    lines = answer.stdout.splitlines()
    assert lines[0].split() == ["job", "state", "train_loss", "last", "train_loss", "best", "settings"]
    assert lines[2].split() == [ids[1], "running", "2.9", "2.9", "training.learning_rate=0.05"]
    assert lines[-1] == f"not compared: {ids[0]}: it was named twice, and is there once"
    found = json.loads(shown(served, tmp_path, *ids[:2], "--json").stdout)
    assert found["series"]["train_loss"] == [[3.0] * 10, [2.9] * 10]
    wrong = shown(served, tmp_path, ids[0], "--metric", "nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "no job has a metric 'nothing'; they have train_loss" in wrong.stderr
    assert "name jobs" in shown(served, tmp_path).stderr
