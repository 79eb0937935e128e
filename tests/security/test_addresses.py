"""Control characters, NUL, broken UTF-8 and lone surrogates in any path or parameter: refused with a sentence."""

import pytest
from starlette.routing import Route

from apt_jobs.db.access import Role
from apt_jobs.web.app import ROUTES
from tests.security.attacked import AttackedWeb, routes, status_of

WRONG = ["%00", "a%00b", "%1b[31m", "%0a", "%0d%0ax:a", "%7f", "%c2%85", "%ed%a0%80", "%ff", "%c0%80"]
FINE = ["%20", "%e4%bd%a0", "%F0%9F%91%8D", "a%2Bb", "%25", "%2500"]
NAMES = ("label", "text", "queue", "after", "state", "kind", "name", "job_id", "format", "token", "anything")


@pytest.mark.parametrize("wrong", WRONG)
def test_no_route_takes_a_query_that_is_no_text(web: AttackedWeb, wrong: str) -> None:
    for path, methods in routes():
        for query in (f"label=a={wrong}", f"{wrong}=1", f"x=1&name={wrong}", wrong):
            for method in sorted(methods & {"GET", "POST"}):
                answer = web.raw(web.request_head(method, f"{path}?{query}"))
                expected = 400 if path.startswith("/v1/") else 422  # as OpenAI's dialect has it
                assert status_of(answer) == expected, (method, path, query, answer[:300])
    for name in NAMES:
        answer = web.raw(web.request_head("GET", f"/api/jobs?{name}={wrong}"))
        assert (status_of(answer), name.encode() in answer.partition(b"\r\n\r\n")[2]) == (422, True)


@pytest.mark.parametrize("wrong", WRONG)
def test_no_route_takes_a_path_that_is_no_text(web: AttackedWeb, wrong: str) -> None:
    for route in ROUTES:
        if isinstance(route, Route) and "{" in route.path:
            path = route.path.replace(":path", "").replace("{", "\0").replace("}", "\0").split("\0")
            address = "".join(part if index % 2 == 0 else wrong for index, part in enumerate(path))
            for method in sorted(route.methods or ()):
                answer = web.raw(web.request_head(method, address))
                assert status_of(answer) == 400, (method, address, answer[:300])


@pytest.mark.parametrize("fine", FINE)
def test_text_of_any_language_is_taken(web: AttackedWeb, fine: str) -> None:
    answer = web.raw(web.request_head("GET", f"/api/jobs?text={fine}&label=a={fine}"))
    assert status_of(answer) == 200
    assert status_of(web.raw(web.request_head("GET", f"/api/jobs/{fine}"))) == 404


def test_a_stranger_is_told_who_they_are_first(web: AttackedWeb) -> None:
    with web.client(None) as client:
        assert client.get("/api/jobs?label=a=%00").status_code == 401


@pytest.mark.parametrize("body", ['{"text": "a\\u0000b"}', '{"text": "a", "stop": ["\\u0000"]}', '{"text": "\\ud800"}'])
def test_a_nul_in_a_text_breaks_nothing(web: AttackedWeb, body: str) -> None:
    with web.client(web.keys[Role.SUBMITTER]) as client:
        headers = {"content-type": "application/json", "prefer": "respond-async"}
        assert client.post("/api/generate", content=body, headers=headers).status_code in (202, 400, 422)
