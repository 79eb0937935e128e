"""Keys, login tokens and browser sessions on real databases."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text, update

from apt_jobs.db import access
from apt_jobs.db.access import Principal, Role
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.models import ApiKey, Base, BrowserSession, LoginToken
from apt_jobs.errors import Denied, NotFound


def authenticate(database: Database, key: str) -> Principal:
    with database.read() as session:
        return access.authenticate_key(session, key)


def make_key(database: Database, name: str = "ci", role: Role = Role.SUBMITTER, lifetime_s: float | None = None) -> str:
    expires_at = None if lifetime_s is None else datetime.now(UTC) + timedelta(seconds=lifetime_s)
    with database.write() as session:
        return access.create_key(session, name, role, expires_at)


def redeem(database: Database, token: str) -> str:
    with database.write() as session:
        return access.redeem_login_token(session, token, session_hours=1)


def login_token(database: Database, role: Role = Role.ADMIN, lifetime_s: float = 60) -> str:
    with database.write() as session:
        return access.create_login_token(session, role, lifetime_s)


def everything_stored(database: Database) -> str:
    with database.read() as session:
        rows = [session.execute(text(f"SELECT * FROM {name}")).all() for name in Base.metadata.tables]
    return repr(rows)


@pytest.mark.parametrize("role", list(Role))
def test_a_key_names_its_owner_and_role(database: Database, role: Role) -> None:
    assert authenticate(database, make_key(database, "nightly", role)) == Principal("nightly", role)


def test_a_key_lives_until_it_is_revoked(database: Database) -> None:
    key, other = make_key(database, "a"), make_key(database, "b")
    with database.write() as session:
        access.revoke_key(session, key.split("_")[1])
        access.revoke_key(session, key.split("_")[1])
    with pytest.raises(Denied, match="not valid"):
        authenticate(database, key)
    assert authenticate(database, other).name == "b"
    with database.read() as session:
        assert [(row.name, row.revoked_at is not None) for row in access.list_keys(session)] == [
            ("a", True),
            ("b", False),
        ]


def test_revoking_an_unknown_key_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound, match="no API key"), database.write() as session:
        access.revoke_key(session, "0123456789abcdef")


def test_a_key_ends_when_it_expires(database: Database) -> None:
    assert authenticate(database, make_key(database, lifetime_s=60)).name == "ci"
    with pytest.raises(Denied):
        authenticate(database, make_key(database, lifetime_s=-1))


def test_anything_but_the_whole_key_is_denied(database: Database) -> None:
    key = make_key(database)
    _, key_id, secret = key.split("_")
    other_secret = make_key(database).split("_")[2]
    bad = [
        "",
        "apt_",
        key_id,
        secret,
        key[:-1],
        key + "0",
        key + "\n",
        " " + key,
        key.upper(),
        f"apt_{key_id}_",
        f"apt_{key_id}_{other_secret}",
        f"apt_{key_id}_{'0' * 64}",
        f"apt_{'0' * 16}_{secret}",
        f"apt_%_{secret}",
        "apt_\0_\0",
        "apt_\ud800_x",
        "x" * 100_000,
        "' OR 1=1 --",
    ]
    for wrong in bad:
        with pytest.raises(Denied):
            authenticate(database, wrong)
    assert authenticate(database, key)


def test_a_login_token_opens_one_session(database: Database) -> None:
    token = login_token(database, Role.VIEWER)
    secret = redeem(database, token)
    with database.read() as session:
        assert access.authenticate_session(session, secret) == Principal("browser", Role.VIEWER)
    with pytest.raises(Denied, match="apt-jobs login-link"):
        redeem(database, token)


def test_of_many_who_use_one_token_at_once_one_gets_in(database: Database) -> None:
    token = login_token(database)
    start = threading.Barrier(8)

    def attempt(_: int) -> bool:
        start.wait()
        try:
            redeem(database, token)
        except Denied:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


@pytest.mark.parametrize("token", ["", "wrong", "\0", "\ud800", "x" * 100_000])
def test_an_unknown_token_or_session_is_denied(database: Database, token: str) -> None:
    login_token(database)
    with pytest.raises(Denied):
        redeem(database, token)
    with pytest.raises(Denied), database.read() as session:
        access.authenticate_session(session, token)


def test_an_expired_token_is_denied_and_swept(database: Database) -> None:
    token = login_token(database, lifetime_s=-1)
    with pytest.raises(Denied):
        redeem(database, token)
    login_token(database)
    with database.read() as session:
        assert session.query(LoginToken).count() == 1


def test_a_session_ends_by_logout_or_by_time(database: Database) -> None:
    first, second = redeem(database, login_token(database)), redeem(database, login_token(database))
    with database.write() as session:
        access.end_session(session, first)
        access.end_session(session, first)
    with pytest.raises(Denied), database.read() as session:
        access.authenticate_session(session, first)
    with database.write() as session:
        access.authenticate_session(session, second)
        session.execute(update(BrowserSession).values(expires_at=now_plus(-1)))
    with pytest.raises(Denied, match="over"), database.read() as session:
        access.authenticate_session(session, second)
    redeem(database, login_token(database))
    with database.read() as session:
        assert session.query(BrowserSession).count() == 1


def test_no_secret_is_stored_or_shown(database: Database) -> None:
    key, token = make_key(database), login_token(database)
    secret = redeem(database, token)
    stored = everything_stored(database)
    for canary in (key, key.split("_")[2], token, secret):
        assert canary not in stored
    with database.read() as session:
        rows = [*session.query(ApiKey), *session.query(LoginToken), *session.query(BrowserSession)]
        assert all("sha256" not in repr(row) for row in rows)


def test_the_use_of_a_key_is_noted(database: Database) -> None:
    key, unused = make_key(database, "used"), make_key(database, "unused")
    owner = authenticate(database, key).owner
    assert key.split("_")[2] not in owner
    with database.write() as session:
        access.note_use(session, {owner, "session:0123"})
    with database.read() as session:
        assert [(row.name, row.last_used_at is not None) for row in access.list_keys(session)] == [
            ("used", True),
            ("unused", False),
        ]
    assert authenticate(database, unused).owner != owner


def test_the_keys_of_a_name_end_together(database: Database) -> None:
    first, second, other = (make_key(database, name) for name in ("up", "up", "upper"))
    with database.write() as session:
        access.revoke_keys_named(session, "up")
    for key in (first, second):
        with pytest.raises(Denied):
            authenticate(database, key)
    assert authenticate(database, other).name == "upper"
