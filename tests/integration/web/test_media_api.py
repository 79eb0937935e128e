"""Images and tables of a job over REST: listed, shown as what their bytes are, never as something that runs."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from apt_jobs.events.kinds import MediaLogged
from apt_jobs.jobs.handover import Handover
from apt_jobs.run.current import Run
from tests.integration.web.served import Served

HTML = b"<!doctype html><script>alert(1)</script>"


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.rest_client() as client:
        yield client


def media_of(served: Served, job_id: str) -> Path:
    folder = served.settings.runs_dir / job_id / "media"
    folder.mkdir(parents=True)
    return folder


def media(name: str, filename: str, form: str = "image", step: int = 1) -> MediaLogged:
    return MediaLogged(step, 0, name, "table" if form == "table" else "image", filename, 10, "a caption", None)


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_what_a_script_logged_is_listed_and_shown(served: Served, client: httpx.Client) -> None:
    job_id = served.new_job()
    folder = media_of(served, job_id)
    run = Run(Handover(job_id, 1, 1, folder.parent / "attempt-1", folder.parent / "output", folder, job_id, 3), rank=0)
    run.log_image("sample", np.zeros((2, 3)), step=1)
    run.log_table("answers", [{"text": "<b>a</b>"}], step=2)
    names = sorted((file.suffix, file.name) for file in folder.iterdir())
    served.say(job_id, media("answers", names[0][1], "table", 2), media("sample", names[1][1]))
    listed = client.get(f"/api/jobs/{job_id}/media").json()
    assert [(row["name"], row["form"], row["step"]) for row in listed["data"]] == [
        ("answers", "table", 2),
        ("sample", "image", 1),
    ]
    table, image = (client.get(row["path"]) for row in listed["data"])
    assert table.json() == {"columns": ["text"], "rows": [["<b>a</b>"]]}
    assert (table.headers["content-type"], image.headers["content-type"]) == ("application/json", "image/png")
    assert image.content.startswith(b"\x89PNG")
    for answer in (table, image):
        assert "nosniff" in answer.headers["x-content-type-options"]
        assert "sandbox" in answer.headers["content-security-policy"]
    page = client.get(f"/api/jobs/{job_id}/media", params={"limit": 1}).json()
    assert (len(page["data"]), page["has_more"]) == (1, True)


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_what_is_not_what_it_says_is_not_shown(served: Served, client: httpx.Client, tmp_path: Path) -> None:
    job_id = served.new_job()
    folder = media_of(served, job_id)
    (folder / "page.png").write_bytes(HTML)
    (folder / "drawing.svg").write_bytes(b"<svg onload='alert(1)'/>")
    (folder / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(11 << 20))
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "table.json").write_bytes(HTML)
    names = ("page.png", "drawing.svg", "large.png", "link.png", "../media/page.png", "/etc/passwd", "missing.png", "")
    served.say(job_id, *(media(name or "none", name) for name in names), media("html", "table.json", "table"))
    rows = client.get(f"/api/jobs/{job_id}/media").json()["data"]
    answers = {row["name"]: client.get(row["path"]) for row in rows}
    assert {name: answer.status_code for name, answer in answers.items() if name != "html"} == dict.fromkeys(
        [name or "none" for name in names], 404
    )
    assert answers["html"].headers["content-type"] == "application/json"
    for seq in ("0", "1", "999999", "x", "-1", "9" * 40):
        assert client.get(f"/api/jobs/{job_id}/media/{seq}").status_code == 404
    assert client.get("/api/jobs/job_none/media").status_code == 404
