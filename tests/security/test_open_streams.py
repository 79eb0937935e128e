"""What a key or a session opened is closed soon after it ended, and a refused upgrade says at once what it lacks."""

import time

import httpx
import orjson
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from apt_jobs.db.access import Role, create_key, end_session, revoke_key
from apt_jobs.db.jobs import insert_job
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.web.guard import session_cookie
from tests.security.attacked import AttackedWeb

CLOSED_WITHIN_S = 30.0
DENIED = 4401


@pytest.fixture
def job_id(web: AttackedWeb) -> str:
    with web.database.write() as session:
        return insert_job(session, TrainSpec(kind="train")).id


def test_a_revoked_key_closes_its_sockets_and_streams_and_no_others(web: AttackedWeb, job_id: str) -> None:
    with web.database.write() as session:
        revoked, other = (create_key(session, name, Role.VIEWER) for name in ("leaver", "stayer"))
    of_revoked, of_other = ({"authorization": f"Bearer {key}"} for key in (revoked, other))
    stream = httpx.Client(base_url=f"http://{web.host}", timeout=CLOSED_WITHIN_S, trust_env=False)
    accept = {"accept": "text/event-stream"}
    with (
        _connected(web, f"/ws/jobs/{job_id}", of_revoked) as one_job,
        _connected(web, "/ws/jobs", of_revoked) as many_jobs,
        _connected(web, f"/ws/jobs/{job_id}", of_other) as stays,
        stream,
        stream.stream("GET", f"/api/jobs/{job_id}/events", headers={**of_revoked, **accept}) as events,
    ):
        assert "head" in one_job.recv(timeout=10)
        assert "head" in stays.recv(timeout=10)
        lines = events.iter_lines()
        next(lines)
        with web.database.write() as session:
            revoke_key(session, revoked.split("_")[1])
        began_s = time.monotonic()
        for websocket in (one_job, many_jobs):
            close = _close_of(websocket)
            assert (close.code, "not valid" in close.reason) == (DENIED, True)
        rest = list(lines)
        assert "event: denied" in rest
        assert time.monotonic() - began_s < CLOSED_WITHIN_S
        stays.recv(timeout=10)  # the next heartbeat


def test_the_sockets_of_a_session_end_with_it(web: AttackedWeb, job_id: str) -> None:
    with web.client(None) as browser:
        browser.get("/login", params={"token": web.login_token()})
        secret = browser.cookies[session_cookie(web.settings)]
    cookie = {"cookie": f"{session_cookie(web.settings)}={secret}", "origin": f"http://{web.host}"}
    with _connected(web, f"/ws/jobs/{job_id}", cookie) as websocket:
        websocket.recv(timeout=10)
        with web.database.write() as session:
            end_session(session, secret)
        assert _close_of(websocket).code == DENIED


def test_a_key_shows_when_it_was_used(web: AttackedWeb) -> None:
    with web.database.write() as session:
        key = create_key(session, "used", Role.ADMIN)
    deadline = time.monotonic() + 90.0
    with web.client(key) as client:
        while True:
            (row,) = [row for row in client.get("/api/keys").json()["data"] if row["name"] == "used"]
            if row["last_used_at"] is not None:
                break
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.mark.parametrize("path", ["/ws/jobs", "/ws/jobs/some_job"])
def test_a_request_without_its_upgrade_says_what_it_lacks(web: AttackedWeb, path: str) -> None:
    with web.client(web.keys[Role.VIEWER]) as client:
        answer = client.get(path)
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
    assert "text/event-stream" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/ws", "/ws/jobs/x/y", "/api/jobs", "/nothing"])
def test_a_websocket_at_another_address_is_closed_with_a_reason(web: AttackedWeb, path: str) -> None:
    with _connected(web, path, {"authorization": f"Bearer {web.keys[Role.VIEWER]}"}) as websocket:
        close = _close_of(websocket)
    assert (close.code, "no WebSocket at this address" in close.reason) == (4404, True)


def test_the_address_of_a_websocket_is_text(web: AttackedWeb) -> None:
    headers = {"authorization": f"Bearer {web.keys[Role.VIEWER]}"}
    for path in ("/ws/jobs/%00", "/ws/jobs/x?after=%00", "/ws/jobs/%ed%a0%80"):
        with _connected(web, path, headers) as websocket:
            assert _close_of(websocket).code == 4400, path


def _connected(web: AttackedWeb, path: str, headers: dict[str, str]) -> ClientConnection:
    return connect(f"ws://{web.host}{path}", additional_headers=headers, proxy=None)


class _Close:
    def __init__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason


def _close_of(websocket: ClientConnection) -> _Close:
    """How the server closes it, whatever it says before."""
    deadline = time.monotonic() + CLOSED_WITHIN_S

    def receive() -> None:
        while True:
            orjson.loads(websocket.recv(timeout=deadline - time.monotonic()))

    with pytest.raises(ConnectionClosed) as caught:
        receive()
    assert caught.value.rcvd is not None
    return _Close(caught.value.rcvd.code, caught.value.rcvd.reason)
