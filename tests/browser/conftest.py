"""A whole real stack (`apt-jobs up` in a fresh folder) and a real Chromium, shared by all browser tests."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from apt_jobs.db.access import Role, create_login_token
from apt_jobs.db.engine import Database
from apt_jobs.settings import Settings

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 120.0
EXPECT_DEADLINE_S = 40.0  # for what comes at once on an idle machine
POLL_S = 0.1
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@dataclass(frozen=True, slots=True)
class RunningStack:
    """A stack that tests may use and disturb."""

    url: str
    api_key: str
    settings: Settings
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        """JSON answer of the REST API."""
        answer = httpx.get(self.url + path, headers=self.authorization, timeout=10.0, trust_env=False)
        return answer.raise_for_status().json()

    def post(self, path: str, body: object) -> Any:
        """JSON answer of the REST API."""
        answer = httpx.post(self.url + path, json=body, headers=self.authorization, timeout=10.0, trust_env=False)
        return answer.raise_for_status().json()

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    def login_link(self) -> str:
        """A link that gives one browser a session, once."""
        database = Database(self.settings.database)
        with database.write() as session:
            token = create_login_token(session, Role.ADMIN, 600.0)
        database.dispose()
        return f"{self.url}/login?token={token}"

    def web_process(self) -> psutil.Process:
        """The web process, which the stack starts again when it ends."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[-1:] == ["web"]:
                    return child
        raise AssertionError("the stack has no web process")


def wait_until(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Poll until `condition` is true."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"after {deadline_s:.0f} s still not: {what}")
        time.sleep(POLL_S)


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    subprocess.run([sys.executable, "hatch_build.py"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(prefix="apt-jobs-ui-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {
            **os.environ,
            "APT_JOBS_DATA_DIR": folder,
            "APT_JOBS_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        log = Path(folder) / "up.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "apt_jobs", "up"], cwd=folder, env=environment, stdout=output, stderr=output
            )
        try:
            yield _ready(process, Settings(data_dir=Path(folder), port=port), log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_DEADLINE_S)
            finally:
                process.kill()


def _ready(process: subprocess.Popen[bytes], settings: Settings, log: Path) -> RunningStack:
    local = settings.root / "local.json"
    end = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError, ValueError, httpx.HTTPError):
            access = orjson.loads(local.read_bytes())
            stack = RunningStack(access["url"], access["api_key"], settings, process)
            if {row["kind"] for row in stack.get("/api/workers")["data"]} >= {"train", "generate"}:
                return stack
        time.sleep(POLL_S)
    process.terminate()
    logs = [log, *(settings.root / "logs").glob("*.log")]
    ends = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs if path.is_file())
    raise AssertionError(f"`apt-jobs up` was not ready within {START_DEADLINE_S:.0f} s\n{ends}")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = next((found for name in CHROMIUM_NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(f"browser tests need Chromium (looked for {', '.join(CHROMIUM_NAMES)}): apt-get install chromium")
    expect.set_options(timeout=EXPECT_DEADLINE_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def session_state(stack: RunningStack, chromium: Browser) -> Any:
    """Cookies of a browser that came through a login link."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(stack.login_link())
    page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    state = context.storage_state()
    context.close()
    return state


@dataclass(slots=True)
class Watched:
    """A browser window, and what must not happen in it."""

    context: BrowserContext
    hosts: set[str]
    complaints: list[str]


@pytest.fixture
def open_window(chromium: Browser, session_state: Any) -> Iterator[Callable[..., Watched]]:
    """Opens signed-in windows of any size and colour scheme."""
    opened: list[BrowserContext] = []

    def open_one(width: int = 1440, height: int = 900, scheme: str = "light") -> Watched:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            storage_state=session_state,
        )
        opened.append(context)
        context.set_default_timeout(20_000)
        watched = Watched(context, set(), [])
        context.on("request", lambda request: watched.hosts.add(httpx.URL(request.url).netloc.decode()))
        context.on("weberror", lambda error: watched.complaints.append(str(error.error)))
        context.on(
            "console",
            lambda message: watched.complaints.append(message.text) if message.type in ("error", "warning") else None,
        )
        return watched

    yield open_one
    for context in opened:
        context.unroute_all(behavior="ignoreErrors")  # a route may be at work
        for page in context.pages:
            page.unroute_all(behavior="ignoreErrors")
        context.close()
