"""What answers carry besides their body: nothing is cached, HTTPS stays, no server path, and pages for people."""

from pathlib import Path

import pytest

from apt_jobs.db.access import Role
from apt_jobs.jobs.messages import without_server_paths
from apt_jobs.web.guard import session_cookie
from tests.security.attacked import AttackedWeb, attacked_web, routes

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_no_answer_but_the_page_and_its_parts_is_kept_by_a_cache(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        for path, methods in routes():
            for method in sorted(methods):
                answer = client.request(method, path)
                kept = answer.headers.get("cache-control")
                assert kept == "no-store" or (kept == "no-cache" and not path.startswith("/api")), (method, path, kept)
                assert "strict-transport-security" not in answer.headers


def test_https_is_kept_and_its_cookie_is_secure(valkey_server_url: str, tmp_path: Path) -> None:
    with attacked_web(tmp_path, valkey_server_url, APT_JOBS_HTTPS="true") as secure:
        with secure.client(secure.keys[Role.VIEWER]) as client:
            for path in ("/api/jobs", "/", "/healthz", "/api/jobs/nothing", "/nowhere"):
                assert client.get(path).headers["strict-transport-security"].startswith("max-age=")
        with secure.client(None) as browser:
            cookie = browser.get("/login", params={"token": secure.login_token()}).headers["set-cookie"]
        assert "secure" in cookie.lower()


@pytest.mark.parametrize("path", ["/metric", "/nowhere", "/x/y", "/api/nothing", "/index.html", "/.git/config"])
def test_an_unknown_word_is_not_the_page(web: AttackedWeb, path: str) -> None:
    with web.client(web.keys[Role.VIEWER]) as client:
        answer = client.get(path)
        page = client.get(path, headers=BROWSER)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "nothing at this address" in page.text


def test_a_used_login_link_gives_a_browser_a_page(web: AttackedWeb) -> None:
    token = web.login_token()
    with web.client(None) as browser:
        assert browser.get("/login", params={"token": token}, headers=BROWSER).status_code == 303
    with web.client(None) as browser:
        for used in (token, "", "x" * 300):
            answer = browser.get("/login", params={"token": used}, headers=BROWSER)
            assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
            assert "apt-jobs login-link" in answer.text
            assert token not in answer.text
        assert browser.get("/login", params={"token": token}).headers["content-type"] == "application/problem+json"


def test_a_lost_session_gives_a_browser_a_page_and_a_program_json(web: AttackedWeb) -> None:
    cookie = {"cookie": f"{session_cookie(web.settings)}=over"}
    with web.client(None) as browser:
        page = browser.get("/docs", headers={**BROWSER, **cookie})
        data = browser.get("/api/jobs", headers=cookie)
    assert (page.status_code, "You are not logged in" in page.text) == (401, True)
    assert (data.status_code, data.json()["status"]) == (401, 401)


def test_a_page_shows_what_came_as_text(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.VIEWER]) as client:
        page = client.get("/api/jobs/%3Cscript%3Ealert(1)%3C%2Fscript%3E", headers=BROWSER)
    assert (page.status_code, "<script>" in page.text) == (404, False)


def test_cookies_of_other_installations_on_the_host_do_no_harm(web: AttackedWeb) -> None:
    name = session_cookie(web.settings)
    with web.client(None) as browser:
        browser.get("/login", params={"token": web.login_token()})
        mine = browser.cookies[name]
        others = f'apt_session=old; apt_session_0123456789ab=another; broken="; {name}={mine}; x="y'
        assert browser.get("/api/jobs", headers={"cookie": others}).status_code == 200
    other_place = web.settings.model_copy(update={"data_dir": Path("/elsewhere")})
    assert session_cookie(other_place) != name != "apt_session"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /srv/data/runs/job_1/rank-0.spool", "cannot read rank-0.spool"),
        ("[Errno 28] No space left: '/home/My User/ckpt/x.pt'", "[Errno 28] No space left: 'x.pt'"),
        ('File "/usr/lib/python3/site.py", line 3', 'File "site.py", line 3'),
        ("(/srv/data/runs/a.txt, /srv/b/c.txt)", "(a.txt, c.txt)"),
        ("path=/etc/passwd:", "path=passwd:"),
        ("sqlite:////srv/data/apt_jobs.sqlite3 is locked", "sqlite:apt_jobs.sqlite3 is locked"),
        ("unix:///run/user/0/valkey.sock refuses", "unix:valkey.sock refuses"),
        ("ask GET /api/jobs/job_1 or see '/docs'", "ask GET /api/jobs/job_1 or see '/docs'"),
        ("http://127.0.0.1:8000/api/jobs", "http://127.0.0.1:8000/api/jobs"),
        ("model org/name, 3/4 ranks, exit 1/2, a/b/c", "model org/name, 3/4 ranks, exit 1/2, a/b/c"),
    ],
)
def test_a_message_names_files_and_not_where_the_server_keeps_them(text: str, shown: str) -> None:
    assert without_server_paths(text) == shown
