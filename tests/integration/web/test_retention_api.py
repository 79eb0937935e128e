"""`/api/retention` and `apt-jobs prune`: dry first, bounded, for admins."""

from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner

from apt_jobs.cli import app
from apt_jobs.client import Client
from apt_jobs.db.access import Role, create_key
from apt_jobs.errors import AptJobsError
from apt_jobs.operations.data_directory import mark_data_directory
from tests.integration.operations.kept_jobs import kept_job
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    mark_data_directory(served.settings, served.database)
    with Client(f"http://127.0.0.1:{served.settings.port}", served.key) as client:
        yield client


def test_a_dry_run_says_what_a_run_then_removes(served: Served, client: Client) -> None:
    old = kept_job(served.database, served.settings, days=100)
    kept_job(served.database, served.settings, days=1)
    dry = client.prune({"days": 90})
    assert (dry["num_jobs"], dry["job_ids"], dry["is_dry_run"]) == (1, [old], True)
    assert client.get(old)["id"] == old
    done = client.prune({"days": 90}, dry_run=False)
    assert {**done, "is_dry_run": True} == dry
    with pytest.raises(AptJobsError, match="no job"):
        client.get(old)


def test_without_a_policy_nothing_goes(served: Served, client: Client) -> None:
    kept_job(served.database, served.settings, days=5_000)
    assert client.prune()["policy"] is None
    with pytest.raises(AptJobsError, match="set APT_JOBS_RETENTION"):
        client.prune(dry_run=False)
    base = f"http://127.0.0.1:{served.settings.port}/api/retention"
    for body in ({"policy": {"days": 0}}, {"policy": {"day": 1}}, {"policy": {"days": "1"}}, {"max_jobs": 0}):
        answer = httpx.post(base, json=body, headers=served.headers, trust_env=False)
        assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    with served.database.write() as session:
        submitter = create_key(session, "s", Role.SUBMITTER)
    answer = httpx.get(base, headers={"authorization": f"Bearer {submitter}"}, trust_env=False)
    assert answer.status_code == httpx.codes.FORBIDDEN


def test_the_command_says_what_it_did(served: Served, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_job(served.database, served.settings, days=100)
    monkeypatch.setenv("APT_JOBS_URL", f"http://127.0.0.1:{served.settings.port}")
    monkeypatch.setenv("APT_JOBS_API_KEY", served.key)
    run = CliRunner().invoke
    assert "would remove 1 jobs" in run(app, ["prune", "--dry-run", "--days", "90"]).output
    assert "removed 1 jobs" in run(app, ["prune", "--days", "90", "--label", "keep=yes:0"]).output
    assert "removed nothing" in run(app, ["prune", "--days", "90"]).output
    assert "no label with days" in str(run(app, ["prune", "--label", "x"]).exception)
