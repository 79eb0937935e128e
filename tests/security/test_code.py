"""Code that a job brings: refused without the operator's consent, by every door, and to roles that it does not name."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_jobs.artifacts.code import add_code
from apt_jobs.client.packing import pack_folder
from apt_jobs.db.access import Role, create_key
from apt_jobs.settings import Settings
from tests.integration.web.served import Served


def packed(folder: Path) -> tuple[str, bytes]:
    folder.mkdir()
    (folder / "a.py").write_text("print(1)")
    with pack_folder(folder) as code:
        return code.sha256, code.file.read()


@pytest.fixture
def served(
    request: pytest.FixtureRequest, sqlite_url: str, valkey_server_url: str, make_settings: Callable[..., Settings]
) -> Iterator[Served]:
    """A service with the settings that the test names."""
    settings = make_settings(database_url=sqlite_url, redis_url=valkey_server_url, **request.param)
    service = Served(settings, direct=False)
    service.start()
    yield service
    service.stop()
    service.close()


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.rest_client() as client:
        yield client


@pytest.mark.parametrize("served", [{"allow_code": "off"}], indirect=True)
def test_without_consent_no_door_takes_code(served: Served, client: httpx.Client, tmp_path: Path) -> None:
    sha256, body = packed(tmp_path / "code")
    job = {"kind": "train", "code": {"sha256": sha256}, "argv": ["python", "a.py"]}
    assert client.put(f"/api/code/{sha256}", content=body).status_code == 403
    served.settings.code_dir.mkdir(parents=True)
    (served.settings.code_dir / ".upload-1").write_bytes(body)
    add_code(served.settings.code_dir, served.settings.code_dir / ".upload-1", sha256)  # of a time when it was allowed
    packages = {"kind": "train", "entry_point": "mine", "environment": {"requirements": ["six"]}}  # run code as well
    schedule = {"name": "s", "cron": "@daily", "job": job}
    for path, sent in (("/api/jobs", job), ("/api/schedules", schedule), ("/api/jobs", packages)):
        answer = client.post(path, json=sent)
        assert (answer.status_code, "APT_JOBS_ALLOW_CODE" in answer.json()["detail"]) == (403, True)


@pytest.mark.parametrize("served", [{"allow_code": "admin"}], indirect=True)
def test_consent_is_for_the_role_that_it_names(served: Served, client: httpx.Client, tmp_path: Path) -> None:
    sha256, body = packed(tmp_path / "code")
    with served.database.write() as session:
        headers = {"authorization": f"Bearer {create_key(session, 'submitter', Role.SUBMITTER)}"}
    job = {"kind": "train", "code": {"sha256": sha256}, "argv": ["python", "a.py"]}
    assert client.put(f"/api/code/{sha256}", content=body, headers=headers).status_code == 403
    assert client.put(f"/api/code/{sha256}", content=body).status_code == 201
    assert client.post("/api/jobs", json=job, headers=headers).status_code == 403
    assert client.post("/api/jobs", json=job).status_code == 202
    assert client.get(f"/api/code/{sha256}", headers=headers).json()["num_files"] == 1
    assert client.get(f"/api/code/{sha256}/download").content == body


@pytest.mark.parametrize("served", [{"allow_code": "submitter", "max_code_bytes": 100_000}], indirect=True)
def test_what_is_uploaded_is_what_it_is_called_and_bounded(
    served: Served, client: httpx.Client, tmp_path: Path
) -> None:
    sha256, body = packed(tmp_path / "code")
    assert client.put(f"/api/code/{'0' * 64}", content=body).status_code == 422
    for name in ("x", "0" * 63, "0" * 63 + "G", "..%2f..%2fjobs"):
        assert client.put(f"/api/code/{name}", content=body).status_code == 404
    large = io.BytesIO(bytes(100_001))
    name = hashlib.sha256(large.getvalue()).hexdigest()
    assert client.put(f"/api/code/{name}", content=large).status_code == 413
    name = hashlib.sha256(b"text").hexdigest()
    assert client.put(f"/api/code/{name}", content=b"text").status_code == 422
    assert client.put(f"/api/code/{sha256}", content=body, headers={"content-type": "image/png"}).status_code == 415
    assert list(served.settings.code_dir.iterdir()) == []
    assert client.put(f"/api/code/{sha256}", content=body).status_code == 201


@pytest.mark.parametrize(
    ("values", "role"),
    [
        ({}, "submitter"),
        ({"host": "0.0.0.0"}, None),
        ({"allowed_hosts": ("jobs.example",)}, None),
        ({"root_path": "/apt"}, None),
        ({"redis_url": "redis://:secret@redis.example"}, None),
        ({"redis_url": "redis://127.0.0.1"}, "submitter"),
        ({"host": "0.0.0.0", "allow_code": "true"}, "submitter"),
        ({"host": "0.0.0.0", "allow_code": "admin"}, "admin"),
        ({"allow_code": "off"}, None),
        ({"allow_code": "0"}, None),
    ],
)
def test_consent_is_given_by_default_on_loopback_only(values: dict[str, Any], role: str | None) -> None:
    assert Settings(**values).code_role == role


@pytest.mark.parametrize("served", [{"allow_code": "submitter", "git_hosts": ("git.example/team",)}], indirect=True)
def test_a_commit_is_taken_from_the_hosts_that_are_listed(served: Served, client: httpx.Client) -> None:
    answers = {}
    for url in ("https://git.example/team/a.git", "https://git.example/others/a.git", "file:///etc/a"):
        code = {"git": {"url": url, "commit": "0" * 40}}
        answers[url] = client.post("/api/jobs", json={"kind": "train", "code": code, "argv": ["python", "a.py"]})
    assert [answer.status_code for answer in answers.values()] == [202, 422, 422]
    assert answers["file:///etc/a"].json()["errors"][0]["pointer"] == "#/code/git/url"
