"""Requests from pages of other sites, and under names that are not ours: refused on every method and the WebSocket."""

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from apt_jobs.db.access import Role
from tests.security.attacked import METHODS, AttackedWeb, routes, status_of

REFUSED = 4403
ORIGINS = [  # {port}: that of the service
    *("null", "", " ", "*", "file://", "about:blank", "data:text/html,x", "chrome-extension://abcdef"),
    *("http://evil.example", "https://evil.example", "http://evil.example:{port}", "//127.0.0.1:{port}"),
    *("http://127.0.0.1", "http://127.0.0.1:1", "http://127.0.0.1:{port}0", "http://127.0.0.1:0{port}"),
    *("https://127.0.0.1:{port}", "ws://127.0.0.1:{port}", "ftp://127.0.0.1:{port}", "127.0.0.1:{port}"),
    *("http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/x", "http://127.0.0.1:{port}.evil.example"),
    *("http://127.0.0.1:{port}@evil.example", "http://evil.example@127.0.0.1:{port}", "http://127.0.0.1:{port}#evil"),
    *("http://127.0.0.1.evil.example:{port}", "http://evil127.0.0.1:{port}", "http://x.localhost:{port}"),
    *("http://localhost.evil.example:{port}", "http://localhost:{port}.", "http://localhost.:{port}"),
    *("http://127.0.0.2:{port}", "http://0.0.0.0:{port}", "http://127.1:{port}", "http://2130706433:{port}"),
    *("http://[::ffff:127.0.0.1]:{port}", "http://127.0.0.1:{port}, http://evil.example", "http://127.0.0.1:{port} x"),
    "http://127.0.0.1:{port}\thttp://evil.example",
]
HOSTS = [
    *("", "evil.example", "evil.example:{port}", "127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.1:{port}0"),
    *("127.0.0.1:0{port}", "127.0.0.1:{port}.", "127.0.0.1.:{port}", "127.0.0.1.evil.example:{port}"),
    *("localhost.evil.example:{port}", "evil.example#127.0.0.1:{port}", "evil.example/127.0.0.1:{port}"),
    *("127.0.0.1:{port}@evil.example", "evil.example@127.0.0.1:{port}", "127.1:{port}", "0.0.0.0:{port}"),
    *("127.0.0.1:{port}, evil.example", "[::ffff:127.0.0.1]:{port}"),
]


def test_there_are_as_many_as_the_checklist_asks_for() -> None:
    assert (len(set(ORIGINS)), len(set(HOSTS))) == (40, 20)


@pytest.mark.parametrize("origin", ORIGINS)
def test_another_origin_is_refused_on_every_method(web: AttackedWeb, origin: str) -> None:
    value = origin.format(port=web.settings.port)
    for method in METHODS:
        for path in ("/api/jobs", "/healthz"):
            answer = web.raw(web.request_head(method, path, {"origin": value, "user-agent": "curl/8"}))
            assert status_of(answer) == 403, (method, path)


@pytest.mark.parametrize("host", HOSTS)
def test_another_host_is_refused_on_every_method(web: AttackedWeb, host: str) -> None:
    value = host.format(port=web.settings.port)
    for method in METHODS:
        for path in ("/api/jobs", "/login", "/", "/healthz/", "/readyz/x"):
            answer = web.raw(web.request_head(method, path, {"host": value}))
            assert status_of(answer) == 403, (method, path)


@pytest.mark.parametrize("host", HOSTS)
def test_probes_answer_whatever_they_are_called(web: AttackedWeb, host: str) -> None:
    value = host.format(port=web.settings.port)
    for path in ("/healthz", "/readyz"):
        assert status_of(web.raw(web.request_head("GET", path, {"host": value}))) == 200


def test_no_route_forgets_the_origin(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        for path, methods in routes():
            for method in methods:
                assert client.request(method, path, headers={"origin": "http://evil"}).status_code == 403


def test_no_or_two_hosts_are_refused(web: AttackedWeb) -> None:
    key = web.keys[Role.ADMIN]
    for lines in ("", f"host: {web.host}\r\nhost: {web.host}\r\n", f"host: {web.host}\r\nhost: evil\r\n"):
        head = f"GET /api/jobs HTTP/1.1\r\n{lines}authorization: Bearer {key}\r\nconnection: close\r\n\r\n"
        assert status_of(web.raw(head.encode())) in (400, 403)


def test_a_host_in_the_request_line_does_not_count(web: AttackedWeb) -> None:
    answer = web.raw(web.request_head("GET", f"http://{web.host}/api/jobs", {"host": "evil.example"}))
    assert status_of(answer) == 403


@pytest.mark.parametrize("origin", ORIGINS)
def test_another_origin_gets_no_websocket(web: AttackedWeb, origin: str) -> None:
    if "\t" in origin or not origin.strip():
        return _raw_websocket_is_refused(web, "origin", origin.format(port=web.settings.port))
    headers = {"authorization": f"Bearer {web.keys[Role.ADMIN]}", "origin": origin.format(port=web.settings.port)}
    with (
        connect(f"ws://{web.host}/ws/jobs/some_job", additional_headers=headers, proxy=None) as websocket,
        pytest.raises(ConnectionClosed) as caught,
    ):
        websocket.recv(timeout=10)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == REFUSED
    return None


@pytest.mark.parametrize("host", HOSTS)
def test_another_host_gets_no_websocket(web: AttackedWeb, host: str) -> None:
    _raw_websocket_is_refused(web, "host", host.format(port=web.settings.port))


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
def test_our_own_names_are_answered(web: AttackedWeb, name: str) -> None:
    host = f"{name}:{web.settings.port}"
    answer = web.raw(web.request_head("GET", "/api/jobs", {"host": host, "origin": f"http://{host}"}))
    assert status_of(answer) == 200


@pytest.mark.parametrize(
    ("headers", "is_ours"),
    [
        ({}, False),
        ({"origin": "http://{host}"}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"origin": "http://{host}", "sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": ""}, False),
        ({"origin": "http://{host}", "sec-fetch-site": "cross-site"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"referer": "http://{host}/"}, False),
    ],
)
def test_a_session_changes_something_only_from_our_own_pages(
    web: AttackedWeb, headers: dict[str, str], is_ours: bool
) -> None:
    filled = {name: value.format(host=web.host) for name, value in headers.items()}
    form = {"content-type": "application/x-www-form-urlencoded", **filled}
    with web.client(None) as browser:
        browser.get("/login", params={"token": web.login_token()})
        for path, methods in routes():
            for method in methods - {"GET", "HEAD"}:
                if path == "/api/logout":  # it would end the session
                    continue
                assert (browser.request(method, path, headers=form).status_code == 403) != is_ours, (method, path)
        assert (browser.post("/api/logout", headers=form).status_code == 204) == is_ours


def test_a_key_needs_no_origin(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        assert client.post("/api/logout", headers={"sec-fetch-site": "cross-site"}).status_code == 204


def _raw_websocket_is_refused(web: AttackedWeb, header: str, value: str) -> None:
    handshake = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        header: value,
    }
    with web.connect() as connection:
        connection.sendall(web.request_head("GET", "/ws/jobs/some_job", handshake))
        answer = b""
        while part := connection.recv(4096):
            answer += part
            if b"\x11\x33" in answer:  # 4403, the close code
                return
    assert status_of(answer) in (400, 403)
