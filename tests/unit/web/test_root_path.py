"""The layer that adds and takes the path below which a proxy shows the service."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from apt_jobs.web.pages import _below
from apt_jobs.web.root_path import RootPath


async def show(request: Request) -> Response:
    return JSONResponse({"path": request.scope["path"], "root_path": request.scope["root_path"]})


async def redirect(request: Request) -> Response:
    return RedirectResponse(request.query_params["to"])


def client(root_path: str) -> TestClient:
    routes = [Route("/jobs", show), Route("/aptitude", show), Route("/to", redirect)]
    app = Starlette(routes=routes, middleware=[Middleware(RootPath, root_path=root_path)])
    return TestClient(app, base_url="http://jobs.example", follow_redirects=False)


@pytest.mark.parametrize("path", ["/jobs", "/apt/jobs"])
def test_a_request_arrives_with_and_without_the_path(path: str) -> None:
    assert client("/apt").get(path).json() == {"path": "/apt/jobs", "root_path": "/apt"}


def test_a_path_that_only_begins_alike_is_not_below() -> None:
    assert client("/apt").get("/aptitude").json()["path"] == "/apt/aptitude"


def test_a_service_with_a_host_of_its_own_has_no_path() -> None:
    assert client("").get("/jobs").json() == {"path": "/jobs", "root_path": ""}
    assert client("").get("/apt/jobs").status_code == 404


def test_the_bare_path_leads_to_the_page() -> None:
    answer = client("/apt").get("/apt")
    assert (answer.status_code, answer.headers["location"]) == (308, "/apt/")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/", "/apt/"),
        ("/api/jobs/1", "/apt/api/jobs/1"),
        ("/apt/docs", "/apt/docs"),
        ("http://jobs.example/apt/docs", "/apt/docs"),  # as Starlette writes it: a proxy may have ended TLS
        ("https://jobs.example/docs", "/apt/docs"),
        ("http://jobs.example//elsewhere.example", "/apt/elsewhere.example"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
        ("//elsewhere.example/x", "//elsewhere.example/x"),
        ("docs", "docs"),
    ],
)
def test_redirects_stay_where_the_browser_is(location: str, expected: str) -> None:
    assert client("/apt").get("/to", params={"to": location}).headers["location"] == expected


def test_a_trailing_slash_is_redirected_without_scheme_and_host() -> None:
    assert client("/apt").get("/apt/jobs/").headers["location"] == "/apt/jobs"
    assert client("").get("/jobs/").headers["location"] == "/jobs"


def test_the_page_names_its_assets_below_the_path() -> None:
    page = '<head><script src="./assets/a.js"></script>'
    assert _below(page, "/apt") == (
        '<head>\n    <meta name="root-path" content="/apt" /><script src="/apt/assets/a.js"></script>'
    )
    assert 'src="/assets/a.js"' in _below(page, "")


@pytest.mark.parametrize(("trusted", "scheme"), [(["10.0.0.0/8"], "https"), (["192.168.0.1"], "http"), ([], "http")])
def test_a_forwarded_scheme_is_believed_of_trusted_proxies_only(trusted: list[str], scheme: str) -> None:
    async def show_scheme(request: Request) -> Response:
        return JSONResponse(request.url.scheme)

    app: Any = ProxyHeadersMiddleware(Starlette(routes=[Route("/", show_scheme)]), trusted)  # type: ignore[arg-type]  # the same protocol under two names
    answer = TestClient(app, client=("10.1.2.3", 1)).get("/", headers={"X-Forwarded-Proto": "https"})
    assert answer.json() == scheme
