"""Who may reach what: every method of every route and the WebSocket, by everyone who should not."""

import httpx
import pytest
from websockets.sync.client import connect

from apt_jobs.db.access import Role
from apt_jobs.web.guard import is_open
from tests.security.attacked import METHODS, AttackedWeb, routes

OPEN = frozenset(
    {
        "/healthz",
        "/readyz",
        "/login",
        "/",
        "/favicon.svg",
        "/checkpoints",
        "/generate",
        "/schedules",
        "/compare",
        "/sweeps",
        "/workers",
    }
)
OPEN_WITH_NAME = frozenset({"/jobs/some_job_id", "/sweeps/some_sweep_id", "/assets/some_name"})
ADMIN_ONLY = frozenset(
    {
        ("DELETE", "/api/jobs/some_job_id"),
        ("POST", "/api/jobs/delete"),
        ("DELETE", "/api/checkpoints/some_checkpoint_id"),
        ("DELETE", "/api/datasets/some_name"),
        ("GET", "/api/keys"),
        ("GET", "/api/retention"),
        ("POST", "/api/retention"),
        ("PUT", "/api/queues/some_name"),
        ("PUT", "/api/secrets/some_name"),
        ("DELETE", "/api/secrets/some_name"),
        ("GET", "/api/webhooks"),
        ("POST", "/api/webhooks"),
        ("GET", "/api/webhooks/some_webhook_id"),
        ("PATCH", "/api/webhooks/some_webhook_id"),
        ("DELETE", "/api/webhooks/some_webhook_id"),
        ("POST", "/api/webhooks/some_webhook_id/test"),
        ("GET", "/api/webhooks/some_webhook_id/deliveries"),
        ("POST", "/api/webhooks/some_webhook_id/deliveries/some_delivery_id/replay"),
        ("POST", "/api/workers/some_name/drain"),
        ("POST", "/api/workers/some_name/resume"),
    }
)
VIEWERS_POST = frozenset({"/api/logout", "/api/schedules/preview"})
NOT_AUTHENTICATED = 4401
NO_SUCH_JOB = 4404


@pytest.mark.parametrize("who", ["nobody", "revoked", "expired", "wrong secret", "garbage"])
def test_no_method_of_any_closed_route_answers_a_stranger(web: AttackedWeb, who: str) -> None:
    with web.client(web.dead_keys.get(who)) as client:
        for path, _ in routes():
            for method in METHODS:
                status = client.request(method, path).status_code
                if path in OPEN | OPEN_WITH_NAME:
                    assert status != 500, (method, path)
                else:
                    assert status == 401, (method, path)


@pytest.mark.parametrize("who", ["another's id", "no secret", "longer", "upper case", "prefix"])
def test_what_is_almost_a_key_opens_nothing(web: AttackedWeb, who: str) -> None:
    with web.client(web.dead_keys[who]) as client:
        assert client.get("/api/jobs").status_code == 401


def test_what_is_open_serves_only_reading(web: AttackedWeb) -> None:
    with web.client(None) as client:
        for path in sorted(OPEN | OPEN_WITH_NAME):
            for method in set(METHODS) - {"GET", "HEAD"}:
                assert client.request(method, path).status_code == 405, (method, path)


@pytest.mark.parametrize("scheme", ["Basic", "bearer", "Token", "Bearer Bearer"])
def test_only_a_bearer_key_opens(web: AttackedWeb, scheme: str) -> None:
    with web.client(None) as client:
        answer = client.get("/api/jobs", headers={"authorization": f"{scheme} {web.keys[Role.ADMIN]}"})
    assert answer.status_code == (200 if scheme == "bearer" else 401)


def test_a_wrong_key_beside_a_good_cookie_is_refused(web: AttackedWeb) -> None:
    with web.client(None) as client:
        client.get("/login", params={"token": web.login_token()})
        assert client.get("/api/jobs").status_code == 200
        assert client.get("/api/jobs", headers={"authorization": "Bearer apt_0_0"}).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN))
def test_open_paths_are_matched_exactly(path: str) -> None:
    for other in (f"/api{path}", f"/api/jobs{path}", f"{path}/api/jobs", f"{path}/x/y", f"{path};x", f"/x/..{path}"):
        assert not is_open(other) or other == "/"


@pytest.mark.parametrize(
    "path", ["/assets/", "/assets/../api/jobs", "/assets/x/y", "/jobs/", "/jobs/x/logs", "/jobs//x", "/JOBS/x", ""]
)
def test_what_only_looks_open_is_closed(web: AttackedWeb, path: str) -> None:
    assert not is_open(path)
    assert b"401" in web.raw(f"GET {path or '//'} HTTP/1.1\r\nhost: {web.host}\r\nconnection: close\r\n\r\n".encode())


def test_a_role_may_do_what_it_says_and_no_more(web: AttackedWeb) -> None:
    for role in (Role.VIEWER, Role.SUBMITTER):
        with web.client(web.keys[role]) as client:
            for path, methods in routes():
                for method in methods - {"HEAD"}:
                    if path in OPEN | OPEN_WITH_NAME:
                        continue
                    writes = method != "GET" and path not in VIEWERS_POST
                    refused = (method, path) in ADMIN_ONLY or (writes and role is Role.VIEWER)
                    status = client.request(method, path).status_code
                    assert (status == 403) == refused, (role, method, path, status)


@pytest.mark.parametrize("who", ["nobody", "revoked", "expired", "garbage", "wrong secret"])
def test_the_websocket_is_closed_to_strangers(web: AttackedWeb, who: str) -> None:
    key = web.dead_keys.get(who)
    headers = {"authorization": f"Bearer {key}"} if key is not None else {}
    for path in ("/ws/jobs/some_job", "/ws/jobs/some_job/healthz", "/healthz", "/assets/x"):
        with connect(f"ws://{web.host}{path}", additional_headers=headers, proxy=None) as websocket:
            assert _close_code(websocket) == NOT_AUTHENTICATED, path


def test_the_websocket_opens_to_a_viewer(web: AttackedWeb) -> None:
    headers = {"authorization": f"Bearer {web.keys[Role.VIEWER]}"}
    with connect(f"ws://{web.host}/ws/jobs/some_job", additional_headers=headers, proxy=None) as websocket:
        assert _close_code(websocket) == NO_SUCH_JOB


def test_wrong_keys_of_strangers_lock_nobody_out(web: AttackedWeb) -> None:
    with web.client("apt_0000000000000000_" + "0" * 64) as stranger:
        assert {stranger.get("/api/jobs").status_code for _ in range(300)} == {401}
    with web.client(web.keys[Role.VIEWER]) as client:
        assert client.get("/api/jobs").status_code == 200


def test_a_login_link_opens_one_session_once(web: AttackedWeb) -> None:
    token = web.login_token()
    with web.client(None) as browser, web.client(None) as thief:
        answer = browser.get("/login", params={"token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        attributes = {part.strip().partition("=")[0].lower() for part in cookie.split(";")}
        assert {"httponly", "samesite", "path", "max-age"} <= attributes
        assert "samesite=strict" in cookie.lower()
        assert "domain" not in attributes
        assert token not in cookie
        assert browser.get("/api/jobs").status_code == 200
        assert thief.get("/login", params={"token": token}).status_code == 401
        assert thief.get("/api/jobs").status_code == 401


def test_a_preview_of_a_login_link_does_not_use_it_up(web: AttackedWeb) -> None:
    token = web.login_token()
    with web.client(None) as browser:
        assert browser.head("/login", params={"token": token}).status_code == 405
        assert browser.get("/login", params={"token": token}).status_code == 303


def test_a_session_ends_with_the_logout(web: AttackedWeb) -> None:
    with web.client(None) as browser:
        browser.get("/login", params={"token": web.login_token()})
        cookies = dict(browser.cookies)
        assert browser.post("/api/logout", headers={"origin": f"http://{web.host}"}).status_code == 204
        assert httpx.get(f"http://{web.host}/api/jobs", cookies=cookies, trust_env=False).status_code == 401


@pytest.mark.parametrize(
    "cookie", ["apt_session=", "apt_session=x", "apt_session=\x01", 'apt_session="', "a" * 5000, "apt_session=\xff"]
)
def test_a_rubbish_cookie_opens_nothing(web: AttackedWeb, cookie: str) -> None:
    head = f"GET /api/jobs HTTP/1.1\r\nhost: {web.host}\r\nconnection: close\r\ncookie: {cookie}\r\n\r\n"
    assert web.raw(head.encode("latin-1")).split()[1] in (b"401", b"400")


def _close_code(websocket: "object") -> int | None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import ClientConnection

    assert isinstance(websocket, ClientConnection)
    with pytest.raises(ConnectionClosed) as caught:
        websocket.recv(timeout=10)
    return caught.value.rcvd.code if caught.value.rcvd else None
