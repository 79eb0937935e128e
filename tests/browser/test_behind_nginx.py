"""The whole product behind a real nginx, as docs/how-to/proxy.md sets it up: TLS, a host name and a path."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from websockets.sync.client import connect

from apt_jobs.client.client import Client
from tests.browser.conftest import CHROMIUM_NAMES, CHROMIUM_OPTIONS, START_DEADLINE_S, STOP_DEADLINE_S, wait_until
from tests.conftest import some_port

ROOT = Path(__file__).parents[2]
HOST, PATH = "jobs.example", "/apt"
TRAINING = {
    "kind": "train",
    "name": "behind a proxy",
    "model": {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32},
    "training": {"max_steps": 20, "batch_size": 2, "validate_every_steps": 10},
}
WAITING: dict[str, Any] = {"kind": "generate", "texts": ["a"], "max_length": 1, "queue": "nobody"}
TRAIN_DEADLINE_S = 600.0  # a machine that runs eight test suites needs minutes to load torch
UPLOAD_BYTES = 24 << 20  # nginx's own limit is 1 MiB


@dataclass(frozen=True, slots=True)
class Site:
    """The service as those beyond the proxy see it."""

    url: str  # https://jobs.example:PORT/apt
    proxy_port: int
    web_port: int
    data_dir: Path
    api_key: str
    tls: ssl.SSLContext

    def http(self) -> httpx.Client:
        """A client beyond the proxy, with a key."""
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.proxy_port}{PATH}",
            headers={"Host": f"{HOST}:{self.proxy_port}", "Authorization": f"Bearer {self.api_key}"},
            verify=self.tls,
            timeout=60.0,
            trust_env=False,
        )

    def login_link(self) -> str:
        """What the command prints."""
        environment = {**os.environ, "APT_JOBS_DATA_DIR": str(self.data_dir)}
        command = [sys.executable, "-m", "apt_jobs", "login-link"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`apt-jobs up` and nginx, both with what docs/how-to/proxy.md says."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.fail("this test needs nginx: run `make setup-dev`, or apt-get install nginx-light")
    subprocess.run([sys.executable, "hatch_build.py"], cwd=ROOT, check=True)
    folder = tmp_path_factory.mktemp("site")
    web_port, proxy_port = some_port(), some_port()
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(folder / "data"),
        "APT_JOBS_PORT": str(web_port),
        "APT_JOBS_ALLOWED_HOSTS": json.dumps([f"{HOST}:{proxy_port}"]),
        "APT_JOBS_HTTPS": "true",
        "APT_JOBS_ROOT_PATH": PATH,
        "APT_JOBS_TRUSTED_PROXIES": '["127.0.0.1"]',
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    tls = make_certificate(folder)
    configuration = write_configuration(folder, web_port, proxy_port)
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen([sys.executable, "-m", "apt_jobs", "up"], env=environment, stdout=log, stderr=log)
        proxy = subprocess.Popen([nginx, "-p", str(folder), "-c", str(configuration), "-e", "stderr"], stderr=log)
    try:
        local = folder / "data" / "local.json"
        wait_until(lambda: local.exists() or up.poll() is not None, START_DEADLINE_S, "up")
        site = Site(
            f"https://{HOST}:{proxy_port}{PATH}",
            proxy_port,
            web_port,
            folder / "data",
            json.loads(local.read_text())["api_key"],
            tls,
        )
        wait_until(lambda: is_ready(site), START_DEADLINE_S, "ready beyond the proxy")
        yield site
    finally:
        for process in (proxy, up):
            process.terminate()
        for process in (proxy, up):
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_DEADLINE_S)
            process.kill()


def make_certificate(folder: Path) -> ssl.SSLContext:
    """A certificate for the host, and what trusts it."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    command += ["-addext", f"subjectAltName=DNS:{HOST},IP:127.0.0.1"]
    command += ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return ssl.create_default_context(cafile=str(folder / "tls.pem"))


def write_configuration(folder: Path, web_port: int, proxy_port: int) -> Path:
    """The recipe of docs/how-to/proxy.md with this test's ports and files, in the frame that nginx.conf gives it."""
    recipe = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "how-to" / "proxy.md").read_text(), re.DOTALL)
    assert recipe is not None
    text = recipe.group(1)
    for written, here in (
        ("listen 443 ssl", f"listen 127.0.0.1:{proxy_port} ssl"),
        ("127.0.0.1:8000", f"127.0.0.1:{web_port}"),
        ("/etc/ssl/jobs.example.pem", str(folder / "tls.pem")),
        ("/etc/ssl/private/jobs.example.key", str(folder / "tls.key")),
    ):
        assert text.count(written) == 1
        text = text.replace(written, here)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    file = folder / "nginx.conf"
    file.write_text(
        f"{user}daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{text}}}\n"
    )
    return file


def is_ready(site: Site) -> bool:
    with suppress(httpx.HTTPError), site.http() as http:
        workers = http.get("/api/workers")
        kinds = {row["kind"] for row in workers.json()["data"]} if workers.is_success else set()
        return kinds >= {"train", "generate"}
    return False


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    """A Chromium that finds the host here and takes its certificate."""
    path = next((found for name in CHROMIUM_NAMES if (found := shutil.which(name))), None)
    assert path is not None, "browser tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        options = [*CHROMIUM_OPTIONS, f"--host-resolver-rules=MAP {HOST} 127.0.0.1"]
        browser: Browser = playwright.chromium.launch(executable_path=path, args=options)
        context = browser.new_context(ignore_https_errors=True)
        context.set_default_timeout(30_000)
        yield context
        browser.close()


def links_of(page: Page) -> list[str]:
    links: list[str] = page.eval_on_selector_all("a[href]", "(links) => links.map((link) => link.href)")
    return links


@pytest.mark.timeout(900)
def test_the_page_lives_below_its_path(site: Site, context: BrowserContext) -> None:
    expect.set_options(timeout=40_000)
    page = context.new_page()
    requested: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("websocket", lambda opened: requested.append(opened.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    link = site.login_link()
    assert link.startswith(f"{site.url}/login?token=")
    page.goto(link)
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    assert page.url == f"{site.url}/"
    (cookie,) = context.cookies()
    assert (cookie["path"], cookie["secure"], cookie["httpOnly"]) == (PATH, True, True)

    with site.http() as http:
        job_id = http.post("/api/jobs", json=TRAINING).raise_for_status().json()["id"]
    found = page.get_by_role("link", name="behind a proxy").first
    found.click()
    expect(page).to_have_url(f"{site.url}/jobs/{job_id}")
    expect(page.get_by_text("succeeded").first).to_be_visible(timeout=TRAIN_DEADLINE_S * 1000)
    page.reload()
    expect(page.get_by_text("succeeded").first).to_be_visible()
    for name in ("Schedules", "Checkpoints", "Generate", "Workers", "Jobs"):
        page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("heading", name=name, exact=True).first).to_be_visible()
        outside = [link for link in links_of(page) if not link.startswith(f"{site.url}/")]
        assert outside == []
    assert complaints == []
    page.goto(f"{site.url}/docs")
    page.get_by_role("link", name="openapi.json").click()
    assert page.url == f"{site.url}/openapi.json"

    own = (f"{site.url}/", f"{site.url}/".replace("https", "wss", 1))
    assert [url for url in requested if not url.startswith(own)] == []
    assert any(url.startswith(f"wss://{HOST}:{site.proxy_port}{PATH}/ws/jobs/{job_id}") for url in requested)


def test_redirects_locations_and_servers_are_below_the_path(site: Site) -> None:
    with site.http() as http:
        answer = http.get(f"https://127.0.0.1:{site.proxy_port}{PATH}")
        assert answer.headers["location"].endswith(f"{PATH}/")
        assert http.get("/docs/").headers["location"] == f"{PATH}/docs"
        job = http.post("/api/jobs", json=WAITING)
        assert job.headers["location"] == f"{PATH}/api/jobs/{job.json()['id']}"
        assert [server["url"] for server in http.get("/openapi.json").json()["servers"]] == [PATH]
        assert http.post(f"/api/jobs/{job.json()['id']}/cancel").is_success


def test_a_service_below_a_path_answers_without_it_on_its_own_machine(site: Site) -> None:
    for prefix in ("", PATH):  # a proxy may strip the path
        with Client(f"http://127.0.0.1:{site.web_port}{prefix}", site.api_key) as client:
            assert {row["kind"] for row in client.workers()} == {"train", "generate"}
            job = client.submit(WAITING)
            first = next(client.events(job["id"]))  # over a WebSocket
            assert (first["kind"], first["state"]) == ("state", "queued")
            client.cancel(job["id"])
    local = json.loads((site.data_dir / "local.json").read_text())
    assert local["url"] == f"http://127.0.0.1:{site.web_port}{PATH}"
    assert httpx.get(f"{local['url']}/readyz", trust_env=False).status_code == 200


def test_streams_pass_the_proxy_at_once(site: Site) -> None:
    with site.http() as http:
        job = http.post(
            "/api/jobs", json={"kind": "generate", "texts": ["a"], "max_length": 1, "queue": "nobody"}
        ).json()
        path = f"/api/jobs/{job['id']}/events"
        began = time.monotonic()
        with http.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            assert any(line.startswith("data:") for line in lines)  # the stream itself goes on
        assert time.monotonic() - began < 20
        socket_url = f"wss://{HOST}:{site.proxy_port}{PATH}/ws/jobs/{job['id']}?after=0"
        headers = {"Authorization": f"Bearer {site.api_key}"}
        raw = socket.create_connection(("127.0.0.1", site.proxy_port))
        with connect(socket_url, sock=raw, ssl=site.tls, additional_headers=headers, proxy=None) as opened:
            assert opened.recv(timeout=20)
        http.post(f"/api/jobs/{job['id']}/cancel").raise_for_status()


def test_uploads_larger_than_the_proxys_own_limit_pass(site: Site) -> None:
    line = b"A line of text, written again and again until it is large enough to matter here.\n"
    text = line * (UPLOAD_BYTES // len(line))
    with site.http() as http:
        answer: Any = http.post("/api/datasets", params={"name": "large"}, content=text).raise_for_status().json()
        assert answer["size_bytes"] == len(text)
        http.delete("/api/datasets/large").raise_for_status()


def test_only_its_own_origin_and_host_pass_the_proxy(site: Site) -> None:
    origin = f"https://{HOST}:{site.proxy_port}"
    with site.http() as http:
        assert http.get("/api/jobs", headers={"Origin": origin}).status_code == 200
        assert http.get("/api/jobs", headers={"Origin": "https://evil.example"}).status_code == 403
        assert http.get("/api/jobs", headers={"Host": "evil.example"}).status_code == 403
        assert http.get("/healthz", headers={"Host": "evil.example"}).status_code == 200
