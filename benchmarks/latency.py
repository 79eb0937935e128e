"""How long a line of rank 0's spool takes until a browser has painted it: real stack, real training, real Chromium.

Painted: the first task after the animation frame that follows the drawing. The peer is what no live page can beat: a
bare WebSocket that sends one number to an empty page, which draws it in its next animation frame, seen the same way.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from websockets.sync.server import ServerConnection, serve

from apt_jobs.client.client import Client
from apt_jobs.db.access import Role, create_login_token
from apt_jobs.db.engine import Database
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.settings import Settings
from benchmarks.rows import Row
from benchmarks.stored_steps import stored_steps
from tests.acceptance.stack import DEADLINE_S, Stack, has_both_workers, until
from tests.browser.conftest import CHROMIUM_NAMES, CHROMIUM_OPTIONS

SCRIPT = Path(__file__).parent / "latency_training.py"
NUM_STEPS, GAPS_S = 220, (0.05, 0.35)
NUM_RARE_STEPS, RARE_GAPS_S = 14, (2.2, 3.2)  # longer than the supervisor thinks that events flow
NUM_UNSEEN = 3  # steps while the page still loads
NUM_ECHOES = 40  # before each training and after it

OBSERVE = """
(selector) => {
  const host = document.querySelector(selector);
  window.painted = [];
  new MutationObserver(() => {
    const number = Number(host.dataset.lastStep);
    requestAnimationFrame(() => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => window.painted.push([number, performance.timeOrigin + performance.now()]);
      port2.postMessage(0);
    });
  }).observe(host, { attributes: true, attributeFilter: ["data-last-step"] });
}
"""
ECHO_PAGE = "<canvas width=300 height=200 id=host></canvas>"
ECHO = """
(port) => {
  const host = document.getElementById("host");
  const brush = host.getContext("2d");
  new WebSocket(`ws://127.0.0.1:${port}`).onmessage = (message) => requestAnimationFrame(() => {
    brush.fillRect(Number(message.data) % 300, 0, 1, 200);
    host.dataset.lastStep = message.data;
  });
}
"""
LOSS_CHART = "[aria-label='Training and validation loss by step']"
Painted = tuple[int, float]  # step and milliseconds since 1970
PEER = "a bare WebSocket to an empty page, painted in its next frame"


def rows() -> Iterator[Row]:
    """`latency/paint` (median) and `latency/paint-p99` in milliseconds; `latency/paint-rare` for steps of seconds."""
    path = next(found for name in CHROMIUM_NAMES if (found := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        names = json.dumps({"latency": str(SCRIPT)})
        stack = Stack(Path(folder), APT_JOBS_ENTRY_POINTS=names, APT_JOBS_LEASE_S="60", APT_JOBS_HEARTBEAT_S="10")
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
        try:
            until(lambda: (stack.data_dir / "local.json").exists())
            with stack.client() as client:
                until(lambda: has_both_workers(client))
                page = _signed_in(browser, stack)
                often, echoes = _measured(browser, page, client, stack, NUM_STEPS, GAPS_S)
                rarely, more_echoes = _measured(browser, page, client, stack, NUM_RARE_STEPS, RARE_GAPS_S)
        finally:
            browser.close()
            stack.process.send_signal(signal.SIGINT)
            stack.process.communicate(timeout=DEADLINE_S)
    echoes += more_echoes
    print(f"{len(often)} steps, {len(rarely)} rare steps, {len(echoes)} echoes", file=sys.stderr)
    for name, ours, share in (("paint", often, 0.5), ("paint-p99", often, 0.99), ("paint-rare", rarely, 0.5)):
        mine, other = _quantile(ours, share), _quantile(echoes, share)
        yield Row(f"latency/{name}", mine, other, PEER, mine / other, "ms")


def _measured(
    browser: Browser, page: Page, client: Client, stack: Stack, num_steps: int, gaps_s: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """Return delays of a training's steps, and of the peer before and after it, in milliseconds."""
    echoes = _echoes(browser)
    arguments = {"steps": num_steps, "shortest-s": gaps_s[0], "longest-s": gaps_s[1]}
    spec = {"kind": "train", "entry_point": "latency", "num_ranks": 1, "arguments": arguments}
    job_id: str = client.submit(spec)["id"]
    page.bring_to_front()
    page.goto(f"http://127.0.0.1:{stack.port}/jobs/{job_id}")
    page.locator(LOSS_CHART).wait_for(timeout=DEADLINE_S * 1000)
    page.evaluate(OBSERVE, LOSS_CHART)
    deadline = time.monotonic() + DEADLINE_S + num_steps * gaps_s[1]
    while (state := client.get(job_id)["state"]) not in TERMINAL_STATES:
        assert time.monotonic() < deadline, "the training did not end"
        page.wait_for_timeout(2000)
    assert state == JobState.SUCCEEDED, f"the training ended as {state}"
    painted: list[Painted] = page.evaluate("window.painted")
    assert painted, "the page painted no step"
    appended_ms = {
        step["step"]: datetime.fromisoformat(step["at"]).timestamp() * 1000.0 for step in stored_steps(client, job_id)
    }
    first = max(min(appended_ms) + NUM_UNSEEN, painted[0][0])
    seen_ms = {step: at_ms for step, at_ms in appended_ms.items() if step > first}
    return _delays_ms(painted, seen_ms), echoes + _echoes(browser)


def _delays_ms(painted: Sequence[Painted], sent_ms: dict[int, float]) -> list[float]:
    """From each number to the first painting that has it."""
    return [next(at_ms for shown, at_ms in painted if shown >= number) - sent_ms[number] for number in sent_ms]


def _echoes(browser: Browser) -> list[float]:
    sent_ms: dict[int, float] = {}

    def send(connection: ServerConnection) -> None:
        chance = random.Random(2)
        for number in range(NUM_ECHOES):
            time.sleep(chance.uniform(*GAPS_S))
            sent_ms[number] = time.time() * 1000.0
            connection.send(str(number))

    with serve(send, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.set_content(ECHO_PAGE)
        page.evaluate(OBSERVE, "#host")
        page.bring_to_front()
        page.evaluate(ECHO, server.socket.getsockname()[1])
        page.wait_for_function(f"window.painted.at(-1)?.[0] === {NUM_ECHOES - 1}", timeout=DEADLINE_S * 1000)
        painted: list[Painted] = page.evaluate("window.painted")
        page.close()
        server.shutdown()
    return _delays_ms(painted, sent_ms)


def _signed_in(browser: Browser, stack: Stack) -> Page:
    database = Database(Settings(data_dir=stack.data_dir).database)
    with database.write() as session:
        token = create_login_token(session, Role.ADMIN, 600.0)
    database.dispose()
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"http://127.0.0.1:{stack.port}/login?token={token}")
    page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    return page


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]
