"""Uploads in parts: they go on where they broke off, and only what was announced becomes a data set."""

import asyncio
import hashlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_jobs.artifacts import dataset_uploads
from apt_jobs.artifacts.datasets import find_dataset
from apt_jobs.client import upload_plan
from apt_jobs.client.async_client import AsyncClient
from apt_jobs.client.client import Client
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.folder_lock import FolderLock
from tests.integration.web.served import Served, until

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
TEXT = "words and 文字 and more words\n".encode() * 400


def url(served: Served) -> str:
    return f"http://127.0.0.1:{served.settings.port}"


@pytest.fixture
def http(served: Served) -> Any:
    with httpx.Client(base_url=url(served), headers=served.headers, trust_env=False, timeout=60) as client:
        yield client


def announced(content: bytes, **fields: Any) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"name": "mine", "size_bytes": len(content), "sha256": digest, **fields}


def begun(http: httpx.Client, content: bytes, **fields: Any) -> str:
    answer = http.post("/api/uploads", json=announced(content, **fields))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def sent(http: httpx.Client, upload: str, offset: int, part: bytes) -> httpx.Response:
    kind = {"content-type": "application/octet-stream"}
    return http.put(f"/api/uploads/{upload}?offset={offset}", content=part, headers=kind)


def test_a_part_that_breaks_off_is_gone_on_with_by_another_process(served: Served, http: httpx.Client) -> None:
    upload = begun(http, TEXT)
    assert sent(http, upload, 0, TEXT[:1_000]).json()["offset"] == 1_000
    head = f"PUT /api/uploads/{upload}?offset=1000 HTTP/1.1\r\nHost: 127.0.0.1:{served.settings.port}\r\n"
    head += f"Authorization: Bearer {served.key}\r\nContent-Type: application/octet-stream\r\nContent-Length: 5000\r\n"
    with socket.create_connection(("127.0.0.1", served.settings.port)) as connection:
        connection.sendall(f"{head}\r\n".encode() + TEXT[1_000:3_000])
        until(lambda: (served.settings.datasets_dir / ".uploads" / upload / "content").stat().st_size >= 1_000)
        time.sleep(0.2)
    until(lambda: sent(http, upload, 0, b"x").json()["detail"].startswith("the upload has"))  # nobody writes any more
    assert not (served.settings.datasets_dir / "mine.txt").exists()
    seen: list[tuple[int, int]] = []
    file = served.settings.datasets_dir.parent / "mine.txt"
    file.write_bytes(TEXT)
    with Client(url(served), api_key=served.key) as client:
        row = client.upload_dataset_file("mine", file, on_progress=lambda *values: seen.append(values))
    assert 1_000 <= seen[0][0] <= 3_000
    assert row["sha256"] == hashlib.sha256(TEXT).hexdigest()
    assert find_dataset(served.settings.datasets_dir, "mine").file(served.settings.datasets_dir).read_bytes() == TEXT
    assert http.get(f"/api/uploads/{upload}").status_code == 404


def test_both_clients_send_in_parts(
    served: Served, http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_plan, "PART_BYTES", 1_000)
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT)  # a byte order mark is not stored
    seen: list[tuple[int, int]] = []
    with Client(url(served), api_key=served.key) as client:
        client.upload_dataset_file("one", file, on_progress=lambda *values: seen.append(values))
        assert seen == [(at, len(TEXT) + 3) for at in range(0, len(TEXT) + 3, 1_000)]
        with pytest.raises(Conflict, match="there is a data set 'one' already"):
            client.upload_dataset_file("one", file)
        file.write_bytes(b"")
        with pytest.raises(InvalidInput, match="is empty"):
            client.upload_dataset_file("empty", file)
        with pytest.raises(InvalidInput, match="cannot be read"):
            client.upload_dataset_file("absent", tmp_path / "absent")
    file.write_bytes(TEXT)

    async def upload() -> dict[str, Any]:
        async with AsyncClient(url(served), api_key=served.key) as client:
            return await client.upload_dataset_file("two", file)

    assert asyncio.run(upload())["size_bytes"] == len(TEXT)
    assert (served.settings.datasets_dir / "one.txt").read_bytes() == TEXT


def test_only_what_was_announced_becomes_a_data_set(served: Served, http: httpx.Client) -> None:
    upload = begun(http, TEXT)
    incomplete = http.post(f"/api/uploads/{upload}/complete")
    assert (incomplete.status_code, f"0 of {len(TEXT):,} bytes" in incomplete.text) == (422, True)
    assert sent(http, upload, 5, TEXT[5:]).status_code == 409
    assert sent(http, upload, 0, b"").status_code == 422
    assert sent(http, upload, 0, TEXT + b"more").status_code == 413
    offset = http.get(f"/api/uploads/{upload}").json()["offset"]
    assert sent(http, upload, offset, bytes(len(TEXT) - offset)).status_code == 200
    other = http.post(f"/api/uploads/{upload}/complete")
    assert (other.status_code, "was announced" in other.text or "is binary" in other.text) == (422, True)
    assert http.delete(f"/api/uploads/{upload}").status_code == 204
    for method in ("GET", "DELETE"):
        assert http.request(method, f"/api/uploads/{upload}").status_code == 404
    assert not list(served.settings.datasets_dir.glob("mine*"))
    assert not list(served.settings.datasets_dir.glob(".upload-*"))


@pytest.mark.parametrize(
    ("content", "fields", "words"),
    [
        (b"\xff\xfe text", {}, "UTF-16"),
        (b"abc", {"format": "uint16"}, "no whole number of uint16"),
        (b"a,b", {"format": "parquet"}, "does not begin as parquet"),
    ],
)
def test_the_format_is_checked_when_all_has_arrived(
    served: Served, http: httpx.Client, content: bytes, fields: dict[str, Any], words: str
) -> None:
    upload = begun(http, content, **fields)
    assert sent(http, upload, 0, content).status_code == 200
    answer = http.post(f"/api/uploads/{upload}/complete")
    assert (answer.status_code, words in answer.text) == (422, True), answer.text


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"name": "../mine"}, 422),
        ({"name": "pydoc-topics"}, 422),
        ({"size_bytes": 0}, 422),
        ({"size_bytes": -1}, 422),
        ({"size_bytes": 1 << 60}, 413),
        ({"sha256": "abc"}, 422),
        ({"format": "docx"}, 422),
        ({"offset": 1}, 422),
    ],
)
def test_a_wrong_beginning_is_refused(served: Served, http: httpx.Client, fields: dict[str, Any], status: int) -> None:
    assert http.post("/api/uploads", json=announced(TEXT, **fields)).status_code == status


def test_open_uploads_are_bounded_in_number_and_age(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_uploads, "MAX_OPEN", 2)
    first, second = begun(http, TEXT), begun(http, TEXT, name="second")
    assert begun(http, TEXT) == first  # the same one again
    refused = http.post("/api/uploads", json=announced(TEXT, name="third"))
    assert (refused.status_code, "2 uploads are open" in refused.text) == (503, True)
    folder = served.settings.datasets_dir / ".uploads" / second
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    begun(http, TEXT, name="third")
    assert http.get(f"/api/uploads/{second}").status_code == 404
    assert http.get(f"/api/uploads/{first}").status_code == 200


def test_one_part_arrives_at_a_time(served: Served, http: httpx.Client) -> None:
    upload = begun(http, TEXT)
    lock = FolderLock(served.settings.datasets_dir / ".uploads" / upload / "lock")
    assert lock.try_exclusive()
    assert "another part" in sent(http, upload, 0, TEXT).text
    assert http.post(f"/api/uploads/{upload}/complete").status_code == 409
    lock.close()
    assert sent(http, upload, 0, TEXT).status_code == 200


@pytest.mark.parametrize("name", ["upl_", "upl_..", "upl_x%2F..%2F..", "..", "%00", "about.json", "x" * 300])
def test_ids_that_nobody_gave_lead_nowhere(served: Served, http: httpx.Client, name: str) -> None:
    for answer in (http.get(f"/api/uploads/{name}"), sent(http, name, 0, b"a"), http.delete(f"/api/uploads/{name}")):
        assert answer.status_code in (400, 404, 405), answer.text
    assert not (served.settings.datasets_dir / ".uploads").exists()
