"""No path is made from what came: 200 traversals, up to three times URL-encoded, and file names that a rank made up."""

import io
import itertools
import os
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

from apt_jobs.db.access import Role
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim_next, finish, insert_job
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from tests.security.attacked import AttackedWeb, status_of

UPS = ["../", "..\\", "....//", "..;/", "./../", ".../", "..//", "%2e%2e/", "..%2f", "..%5c", "%c0%ae%c0%ae/", "..\0/"]
TARGETS = ["canary.txt", "data/canary.txt", "etc/passwd", "apt_jobs.sqlite3"]
WHOLE = ["..", ".", "~", "~root", "/etc/passwd", "//etc/passwd", "file:///etc/passwd", "C:\\canary.txt"]
TRAVERSALS = [
    *(up * depth + target for up, depth, target in itertools.product(UPS, (1, 2, 5, 12), TARGETS)),
    *WHOLE,
]
ROOTS = {  # the addresses to read and to delete
    "checkpoints": ("/api/checkpoints/{}/download", "/api/checkpoints/{}"),
    "datasets": ("/api/datasets/{}", "/api/datasets/{}"),
    "assets": ("/assets/{}", "/assets/{}"),
}
CANARY = "the canary sings"


@pytest.fixture(scope="module", autouse=True)
def canaries(web: AttackedWeb) -> list[Path]:
    """Files that nobody may read or delete, in the folders that the traversals aim at."""
    folders = (web.settings.root, web.settings.root / "data", web.settings.root.parent, web.settings.datasets_dir)
    files = []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / ("canary.txt" if folder != web.settings.datasets_dir else ".canary"))
        files[-1].write_text(CANARY)
    return files


def test_there_are_as_many_as_the_checklist_asks_for() -> None:
    assert len(set(TRAVERSALS)) == 200


@pytest.mark.parametrize("times_encoded", range(4))
@pytest.mark.parametrize("root", ROOTS)
def test_a_traversal_reads_and_deletes_nothing(
    web: AttackedWeb, canaries: list[Path], root: str, times_encoded: int
) -> None:
    for traversal in TRAVERSALS:
        name = traversal
        for _ in range(times_encoded):
            name = quote(name, safe="")
        for method, address in zip(("GET", "DELETE"), ROOTS[root], strict=True):
            answer = web.raw(web.request_head(method, address.format(name)))
            assert status_of(answer) in (307, 400, 401, 404, 405), (method, name, answer[:300])
            assert CANARY.encode() not in answer
            assert b"root:" not in answer
    assert [file.read_text() for file in canaries] == [CANARY] * len(canaries)
    assert Path(web.settings.root / "apt_jobs.sqlite3").exists()


def test_a_name_of_an_upload_is_only_a_name(web: AttackedWeb) -> None:
    before = set(web.settings.datasets_dir.iterdir()) if web.settings.datasets_dir.is_dir() else set()
    with web.client(web.keys[Role.ADMIN]) as client:
        for traversal in TRAVERSALS:
            for name in (traversal, quote(traversal, safe="")):
                answer = client.post("/api/datasets", params={"name": name}, content=b"text")
                assert answer.status_code == 422, (name, answer.text)
    assert set(web.settings.datasets_dir.iterdir()) - before == set()


@pytest.mark.parametrize("filename", ["../outside", "/{outside}", "x/../../outside", "..", ".", "link", "link/inner"])
def test_a_folder_that_a_rank_made_up_is_neither_read_nor_deleted(web: AttackedWeb, filename: str) -> None:
    outside = web.settings.checkpoints_dir.parent / "outside"
    (outside / "inner").mkdir(parents=True, exist_ok=True)
    (outside / "canary.txt").write_text(CANARY)
    link = web.settings.checkpoints_dir / "link"
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(outside)
    checkpoint_id = _checkpoint(web, filename.format(outside=str(outside).lstrip("/")))
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = client.get(f"/api/checkpoints/{checkpoint_id}/download")
        assert (answer.status_code, CANARY in answer.text) == (422, False)
        assert client.post("/api/checkpoints/load", json={"checkpoint_id": checkpoint_id}).status_code == 422
        assert client.delete(f"/api/checkpoints/{checkpoint_id}").status_code == 204
    assert (outside / "canary.txt").read_text() == CANARY
    assert web.settings.checkpoints_dir.is_dir()


def test_a_download_follows_no_link_out_of_its_folder(web: AttackedWeb) -> None:
    folder = web.settings.checkpoints_dir / "honest"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "linked.txt").symlink_to(web.settings.root / "canary.txt")
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe")
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = client.get(f"/api/checkpoints/{_checkpoint(web, 'honest')}/download")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert [Path(name).name for name in tar.getnames()] == ["model.safetensors"]


def _checkpoint(web: AttackedWeb, filename: str) -> str:
    """A checkpoint of an ended job, in the folder that its training process told."""
    checkpoint_id = new_checkpoint_id()
    with web.database.write() as session:
        insert_job(session, TrainSpec(kind="train", queue="traversal"))
    with web.database.write() as session:
        claimed = claim_next(session, "traversal", "worker", 60.0)
        assert claimed is not None
        job = claimed.job
        saved = CheckpointSaved(checkpoint_id, filename, 1, 0, 1.0, 1.0, 10, is_best=True)
        append_events(session, job.id, job.attempt, [(datetime.now(UTC), saved)], 60.0)
        finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    return checkpoint_id
