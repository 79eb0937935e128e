"""A service behind TLS whose authority is a company's own, and behind a proxy: REST, WebSocket, server-sent events."""

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from apt_jobs.client import Client
from apt_jobs.client.access import find_access
from apt_jobs.client.trust import trust_for
from apt_jobs.errors import InvalidInput, Unavailable
from tests.integration.client.conftest import Serve
from tests.integration.client.jobs import Follow, end_job, follow_async, follow_sync, url_of
from tests.integration.client.tunnel import tunnel_to
from tests.integration.web.served import Served

NAME = "jobs.example.com"
VARIABLES = ["SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module", params=["websocket", "server-sent events"])
def service(
    request: pytest.FixtureRequest, serve: Serve, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A service behind TLS, and one that refuses to upgrade to WebSockets."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    authority.issue_cert("127.0.0.1", NAME).private_key_and_cert_chain_pem.write_to_path(file)
    options = {"ssl_certfile": str(file), **({} if request.param == "websocket" else {"ws": "none"})}
    with serve({"https": True, "allowed_hosts": (NAME,)}, **options) as started:
        yield started


@pytest.fixture(params=[follow_sync, follow_async], ids=["sync", "async"])
def follow(request: pytest.FixtureRequest) -> Follow:
    function: Follow = request.param
    return function


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> Path:
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(file)
    return file


def ended_job(service: Served) -> tuple[str, int]:
    """A job that ended, and the number of its events."""
    job_id = service.new_job()
    last_seq = service.say_lines(job_id, 10)
    end_job(service, job_id)
    return job_id, last_seq + 1


def test_an_own_authority_is_trusted_by_file(
    service: Served, follow: Follow, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    job_id, num_events = ended_job(service)
    assert len(follow(url_of(service, "https"), service.key, job_id)) == num_events


def test_an_own_authority_is_trusted_by_folder(
    service: Served, follow: Follow, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "hashed"
    folder.mkdir()
    (folder / "authority.pem").write_bytes(certificate.read_bytes())
    subprocess.run(["openssl", "rehash", str(folder)], check=True)
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}:{folder}")
    job_id, num_events = ended_job(service)
    assert len(follow(url_of(service, "https"), service.key, job_id)) == num_events


def test_an_authority_that_nobody_trusts_is_one_sentence_at_once(service: Served, follow: Follow) -> None:
    with pytest.raises(Unavailable, match="SSL_CERT_FILE"):
        follow(url_of(service, "https"), service.key, service.new_job())
    with Client(url_of(service, "https"), service.key) as client, pytest.raises(Unavailable, match="not trusted"):
        client.list_jobs()


def test_another_name_than_the_certificate_s_is_refused(
    service: Served, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    url = f"https://localhost:{service.settings.port}"
    with Client(url, service.key) as client, pytest.raises(Unavailable, match="not trusted"):
        client.list_jobs()


def test_a_proxy_leads_to_a_service_elsewhere(
    service: Served, follow: Follow, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    job_id, num_events = ended_job(service)
    with tunnel_to(service.settings.port) as tunnel:
        monkeypatch.setenv("HTTPS_PROXY", tunnel.url)
        assert len(follow(f"https://{NAME}", service.key, job_id)) == num_events
        assert set(tunnel.targets) == {f"{NAME}:443"}


def test_no_proxy_is_asked_for_this_machine(
    service: Served, follow: Follow, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    job_id, num_events = ended_job(service)
    assert len(follow(url_of(service, "https"), service.key, job_id)) == num_events


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        ("https://jobs.example.com", {"https_proxy": "http://p:1"}, "http://p:1"),
        ("http://jobs.example.com", {"HTTPS_PROXY": "http://p:1"}, None),
        ("http://jobs.example.com", {"ALL_PROXY": "p:1"}, "http://p:1"),
        ("https://jobs.example.com", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".example.com"}, None),
        ("https://jobs.example.com", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ("https://[::1]:8000", {"HTTPS_PROXY": "http://p:1"}, None),
    ],
)
def test_the_environment_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, variables: dict[str, str], proxy: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert trust_for(find_access(url, "apt_k_s", tmp_path)).proxy == proxy


@pytest.mark.parametrize("proxy", ["http://", "socks9://u:pa55word@p:1", "http://u:pa55word@p:99999999", "http://[::1"])
def test_a_proxy_that_is_none_is_one_sentence_without_its_password(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(InvalidInput, match="NO_PROXY") as raised:
        Client(f"https://{NAME}", "apt_k_s")
    assert "pa55word" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "name", "words"),
    [
        ("SSL_CERT_FILE", "missing.pem", "cannot be read"),
        ("SSL_CERT_FILE", "empty.pem", "no certificate"),
        ("SSL_CERT_FILE", "", "cannot be read"),
        ("SSL_CERT_DIR", "missing", "no such folder"),
        ("SSL_CERT_DIR", "empty.pem", "no such folder"),
    ],
)
def test_certificates_that_cannot_be_read_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, name: str, words: str
) -> None:
    (tmp_path / "empty.pem").write_text("no certificate")
    monkeypatch.setenv(variable, str(tmp_path / name))
    with pytest.raises(InvalidInput, match=words):
        Client(f"https://{NAME}", "apt_k_s")


def test_the_context_checks_names_and_chains(tmp_path: Path) -> None:
    context = trust_for(find_access(f"https://{NAME}", "apt_k_s", tmp_path)).context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
