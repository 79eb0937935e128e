"""Bodies as clients get them wrong: other encodings, broken forms, numbers that fit nowhere, unprintable names."""

import json
from typing import Any

import httpx
import pytest

from apt_jobs.db.access import Role
from tests.security.attacked import AttackedWeb

JSON_TYPE = {"content-type": "application/json"}
BOUNDARY = "a-boundary"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
POSTS_JSON = ("/api/jobs", "/api/generate", "/api/batch_generate", "/api/schedules", "/api/schedules/preview")


def _upload(client: httpx.Client, name: str, body: bytes, kind: str = "text/plain") -> httpx.Response:
    return client.post(f"/api/datasets?name={name}", content=body, headers={"content-type": kind})


def _part(headers: str, body: bytes) -> bytes:
    return f"--{BOUNDARY}\r\n{headers}\r\n\r\n".encode() + body + b"\r\n"


FILE_PART = 'Content-Disposition: form-data; name="anything"; filename="../../ü.txt"\r\nContent-Type: text/plain'
FIELD_PART = 'Content-Disposition: form-data; name="note"'
END = f"--{BOUNDARY}--\r\n".encode()


def test_the_file_of_a_form_becomes_the_data_set(web: AttackedWeb) -> None:
    text = ("Größe 你好 \r\n--a-boundar\r\n-- " * 40_000).encode()
    with web.client(web.keys[Role.ADMIN]) as client:
        form = _part(FIELD_PART, b"x" * 100) + _part(FILE_PART, text) + END
        answer = _upload(client, "of-form", form, FORM_TYPE)
        assert (answer.status_code, answer.json()["size_bytes"]) == (201, len(text)), answer.text
        answer = client.post("/api/datasets?name=of-httpx", files={"file": ("a.txt", text)})
        assert (answer.status_code, answer.json()["size_bytes"]) == (201, len(text))
    for name in ("of-form", "of-httpx"):
        assert (web.settings.datasets_dir / f"{name}.txt").read_bytes() == text


@pytest.mark.parametrize(
    ("form", "kind", "status"),
    [
        (_part(FIELD_PART, b"x") + END, FORM_TYPE, 400),
        (_part(FILE_PART, b"a") + _part(FILE_PART, b"b") + END, FORM_TYPE, 400),
        (_part(FILE_PART, b"a"), FORM_TYPE, 400),
        (_part(FILE_PART, b"") + END, FORM_TYPE, 422),
        (_part(FILE_PART, b"\0") + END, FORM_TYPE, 422),
        (_part(FIELD_PART, b"x" * 100_000) + _part(FILE_PART, b"a") + END, FORM_TYPE, 413),
        (b"no form", FORM_TYPE, 400),
        (b"", FORM_TYPE, 400),
        (END, "multipart/form-data", 400),
        (END, f"multipart/form-data; boundary={'x' * 5_000}", 400),
        (_part("x" * 10_000 + ": y", b"a") + END, FORM_TYPE, 400),
        (b"a text", "multipart/mixed; boundary=a", 415),
        (b"a text", "application/json", 415),
        (b"a text", "application/pdf", 415),
        (b"a text", "image/png", 415),
        (b"a text", "rubbish", 415),
    ],
)
def test_other_forms_and_types_are_refused(web: AttackedWeb, form: bytes, kind: str, status: int) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = _upload(client, "refused-form", form, kind)
        assert (answer.status_code, bool(answer.json()["detail"])) == (status, True), answer.text
        assert "refused-form" not in client.get("/api/datasets").text


def test_a_compressed_body_is_refused(web: AttackedWeb) -> None:
    headers = {"content-encoding": "gzip", "content-type": "text/plain"}
    with web.client(web.keys[Role.ADMIN]) as client:
        assert client.post("/api/datasets?name=gz", content=b"a", headers=headers).status_code == 415
        assert client.post("/api/jobs", content=b"{}", headers={**headers, **JSON_TYPE}).status_code == 415


@pytest.mark.parametrize("kind", ["text/plain", "text/plain; charset=utf-8", "", "application/octet-stream"])
def test_a_utf8_mark_is_taken_away(web: AttackedWeb, kind: str) -> None:
    name = f"marked-{len(kind)}"
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = _upload(client, name, b"\xef\xbb\xbfa text", kind)
    assert (answer.status_code, answer.json()["size_bytes"]) == (201, 6)
    assert (web.settings.datasets_dir / f"{name}.txt").read_bytes() == b"a text"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_other_encodings_are_named(web: AttackedWeb, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = _upload(client, "other-encoding", (mark + "a text").encode(encoding))
        assert answer.status_code == 422
        assert encoding[:6].upper() in answer.json()["detail"]
        answer = client.post("/api/jobs", content=(mark + "{}").encode(encoding), headers=JSON_TYPE)
        assert (answer.status_code, "UTF-8" in answer.json()["detail"]) == (400, True)


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        (b"abc\xffdef", "3"),
        (b"\xff", "0"),
        (b"\xef\xbb\xbfab\xe4x", "5"),
        ("ü".encode() * 5_000 + b"\xc3", "10,000"),
        (b"a" * 300_000 + b"\x80", "300,000"),
        (b"a" * 300_000 + b"\0", "300,000"),
        (b"ab\xed\xa0\x80", "2"),
    ],
)
def test_the_wrong_byte_of_a_text_is_named(web: AttackedWeb, text: bytes, offset: str) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = _upload(client, "wrong-byte", text)
    assert (answer.status_code, f"byte {offset} is" in answer.json()["detail"]) == (422, True), answer.text


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64, 10**30, 10**400])
def test_integers_beyond_64_bits_are_refused_in_jobs_and_schedules(web: AttackedWeb, number: int) -> None:
    job = {"kind": "train", "arguments": {"a": number}}
    with web.client(web.keys[Role.ADMIN]) as client:
        for path, body in (("/api/jobs", job), ("/api/schedules", {"name": "n", "cron": "@daily", "job": job})):
            status = client.post(path, content=json.dumps(body), headers=JSON_TYPE).status_code
            assert status == (422 if abs(number) < 10**300 else 400), path


def test_numbers_come_back_as_they_were_sent(web: AttackedWeb) -> None:
    arguments = (
        '{"a":9223372036854775807,"b":-9223372036854775808,"c":1e-07,"d":0.1,"e":123456789,"f":1e22,"g":1.0,"h":true}'
    )
    body = f'{{"kind":"train","arguments":{arguments},"training":{{"seed":9007199254740993,"learning_rate":0.00031}}}}'
    with web.client(web.keys[Role.ADMIN]) as client:
        job = client.post("/api/jobs", content=body, headers=JSON_TYPE).json()
        for spec in (job["spec"], client.get(f"/api/jobs/{job['id']}").json()["spec"]):
            assert repr(spec["arguments"]) == repr(json.loads(arguments))
            assert (spec["training"]["seed"], spec["training"]["learning_rate"]) == (9007199254740993, 0.00031)


@pytest.mark.parametrize("path", POSTS_JSON)
@pytest.mark.parametrize(
    "body",
    [
        *("", " ", "null", "[]", '"a"', "1", "{", "{}x", "NaN", '{"a": NaN}', '{"kind": Infinity}', '{"a": -Infinity}'),
        *('{"kind": "train", "kind": "train"}', '{"job": {"name": 1, "name": 2}}', '{"a": [{"b": 1, "c": 2, "b": 1}]}'),
        *('{"text": "\\ud800"}', "{'kind': 'train'}", '{"a": 01}', '{"a": 1e999}', "{} {}", "[" * 50 + "]" * 50),
    ],
)
def test_what_is_no_json_object_has_a_clear_answer(web: AttackedWeb, path: str, body: str) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = client.post(path, content=body, headers=JSON_TYPE)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["detail"]
    if '"kind", "' in body or body.count('"b"') == 2:
        assert "twice" in answer.json()["detail"]


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "",
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=a",
            "application/jsonx",
        ),
        *("application/json; charset=utf-16", "application/json; charset=latin-1", "text/json", "json"),
    ],
)
def test_json_of_another_type_is_refused(web: AttackedWeb, kind: str) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        for path in POSTS_JSON:
            assert client.post(path, content="{}", headers={"content-type": kind}).status_code == 415, path


def test_a_utf8_mark_before_json_is_taken(web: AttackedWeb) -> None:
    headers = {"content-type": "application/json; charset=UTF-8"}
    with web.client(web.keys[Role.ADMIN]) as client:
        assert client.post("/api/jobs", content=b'\xef\xbb\xbf{"kind": "train"}', headers=headers).status_code == 202


UNPRINTABLE = [
    *("\x00", "\x07", "\x1b[31m", "a\nb", "a\tb", "a\rb", "\x7f", "\x9b31m"),
    *("\u202e", "\u2066x", "\u200e", "\u2028", "\ufeff", "\u200b"),
]
PRINTABLE = [
    *("p [/data/x] run", "[rank0]", "Größe 你好 שלום", "👩\u200d👩\u200d👧", "<b>&"),
    *("\u0646\u0627\u0645\u0647\u200c\u0647\u0627", "a\u00a0b", "日本\u3000語"),
]


@pytest.mark.parametrize("text", UNPRINTABLE)
def test_a_name_that_acts_on_a_terminal_is_refused(web: AttackedWeb, text: str) -> None:
    jobs: list[dict[str, Any]] = [{"name": text}, {"labels": {"a": text}}, {"queue": text}, {"labels": {text: "a"}}]
    with web.client(web.keys[Role.ADMIN]) as client:
        for fields in jobs:
            for path, body in (
                ("/api/jobs", {"kind": "train", **fields}),
                ("/api/schedules", {"name": "n", "cron": "@daily", "job": {"kind": "train", **fields}}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == 422, (path, fields, answer.text)
                assert text not in answer.text
        schedule = {"name": text, "cron": "@daily", "job": {"kind": "train"}}
        assert client.post("/api/schedules", json=schedule).status_code == 422


@pytest.mark.parametrize("text", PRINTABLE)
def test_a_name_in_any_language_is_taken(web: AttackedWeb, text: str) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        answer = client.post("/api/jobs", json={"kind": "train", "name": text, "labels": {"a": text}})
        assert (answer.status_code, answer.json().get("name")) == (202, text), answer.text
