"""What the page says is so: exact values, real reasons, the newest lines, whole layouts; and a session that is lost."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, WebSocketRoute, expect

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.events.kinds import Event, LineLogged, StepTrained
from apt_jobs.jobs.spec import TrainSpec
from tests.browser.conftest import RunningStack, Watched, wait_until

OpenWindow = Callable[..., Watched]
NUM_LINES = 12_500
IDLE = {"kind": "train", "queue": "nobody", "training": {"max_steps": 2, "seed": 123456789}}
HOSTILE_NAMES = [
    "<img src=x onerror=\"document.title='broken'\">",
    "exe.\u202egnp.live\u202c after",
    "W" * 200,
    "\N{ROCKET}" * 60,
    "{{7*7}} ${7*7} &amp; </script><script>document.title='broken'</script>",
    "שלום עולם run 7",
]


def stored_job(stack: RunningStack, events: list[Event], name: str) -> str:
    """Store a running job of an idle queue with these events."""
    database = Database(stack.settings.database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", queue="stored", name=name)).id
        assert claim(session, job_id, "test", 600.0)
        append_events(session, job_id, 1, [(datetime.now(UTC), event) for event in events], 600.0)
    database.dispose()
    return job_id


def named_job(stack: RunningStack, name: str) -> str:
    """Store a job under any name, also one that would be refused at submission."""
    database = Database(stack.settings.database)
    spec = TrainSpec(kind="train", queue="nobody", labels={"w" * 60: "v" * 60}).model_copy(update={"name": name})
    with database.write() as session:
        job = insert_job(session, spec)
    database.dispose()
    return job.id


def changed(route: Route, change: Callable[[Any], object]) -> None:
    """Fulfil a request with the service's answer after a change."""
    answer = route.fetch()
    body = answer.json()
    change(body)
    route.fulfill(response=answer, body=json.dumps(body))


def overflow_px(page: Page) -> int:
    width: int = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return width


def test_a_configuration_is_shown_digit_by_digit(stack: RunningStack, open_window: OpenWindow) -> None:
    training = {**IDLE["training"], "learning_rate": 0.00012345678901, "weight_decay": 1.0}  # type: ignore[dict-item]  # the value is a dict
    job = stack.post("/api/jobs", {**IDLE, "training": training, "arguments": {"tokens": 2**53 + 1}})
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{job['id']}")
    options = page.get_by_role("region", name="Training", exact=True)
    for name, value in {"seed": "123456789", "learning rate": "0.00012345678901", "weight decay": "1.0"}.items():
        row = options.locator("div", has=page.get_by_text(name, exact=True)).last
        expect(row.locator("dd")).to_have_text(value)
    page.get_by_text("As JSON").click()
    shown = page.get_by_test_id("spec").inner_text()
    assert '"tokens": 9007199254740993' in shown
    assert '"weight_decay": 1.0' in shown
    assert json.loads(shown) == job["spec"]
    assert window.complaints == []


def test_the_reason_for_waiting_is_the_service_s(stack: RunningStack, open_window: OpenWindow) -> None:
    job = stack.post("/api/jobs", {**IDLE, "name": "waits for a reason"})
    page = open_window().context.new_page()
    reason = "back-off until 12:00 UTC after a lost worker"
    page.route(
        re.compile(r"/api/jobs\?"),
        lambda route: changed(route, lambda body: [row.update(waiting_for=reason) for row in body["data"]]),
    )
    page.goto(f"{stack.url}/?text=waits for a reason")
    expect(page.get_by_role("row").filter(has=page.locator(".badge"))).to_contain_text(reason)
    page.goto(f"{stack.url}/jobs/{job['id']}")
    waiting_for = stack.get(f"/api/jobs/{job['id']}")["waiting_for"]
    expect(page.get_by_test_id("waiting")).to_contain_text(waiting_for)

    stack.post(f"/api/jobs/{job['id']}/cancel", {})
    expect(page.get_by_text("No attempt: the job was cancelled before one began.")).to_be_visible()
    expect(page.get_by_test_id("waiting")).to_have_count(0)
    assert page.get_by_text("waits in the queue").count() == 0


def test_of_a_long_log_the_newest_lines_are_shown_and_older_ones_on_demand(
    stack: RunningStack, open_window: OpenWindow
) -> None:
    lines: list[Event] = [LineLogged("info", "rank 0", f"line {index}") for index in range(1, NUM_LINES + 1)]
    job_id = stored_job(stack, lines, "talkative")
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{job_id}#log")
    log = page.get_by_role("log")
    expect(log.get_by_text(f"line {NUM_LINES}", exact=True)).to_be_visible()
    assert log.get_by_text("line 1", exact=True).count() == 0
    older = log.get_by_role("button", name="Show older lines")
    wanted = log.get_by_text(f"line {NUM_LINES - 2_500}", exact=True)
    for _ in range(6):
        if wanted.count():
            break
        older.click()
        expect(older).to_be_enabled()
    expect(wanted).to_have_count(1)
    expect(log.get_by_text(f"line {NUM_LINES}", exact=True)).to_have_count(1)
    assert window.complaints == []


def test_values_that_a_script_does_not_give_are_not_shown(stack: RunningStack, open_window: OpenWindow) -> None:
    steps: list[Event] = [StepTrained(step, 0, 2.0 / step, 1e-3, 1.0, 10.0, 1000.0) for step in range(1, 5)]
    job_id = stored_job(stack, steps, "own script")

    def without_the_rest(body: Any) -> None:
        """Do as the service does for a script that reports its loss alone."""
        body["spec"].update(model=None, entry_point="mine")
        body["progress"] = {"step": 4, "train_loss": 0.5, "tokens_per_s": None, "learning_rate": None}

    def without_curves(body: Any) -> None:
        history = body["training_history"]
        for name in ("learning_rate", "grad_norm", "tokens_per_s"):
            history[name] = [None] * len(history["steps"])

    window = open_window()
    page = window.context.new_page()
    page.route(re.compile(rf"/api/jobs/{job_id}$"), lambda route: changed(route, without_the_rest))
    page.route(re.compile(r"/metrics\?"), lambda route: changed(route, without_curves))
    page.route_web_socket(re.compile("/ws/jobs/"), lambda _socket: None)  # it stays silent
    page.goto(f"{stack.url}/jobs/{job_id}")
    expect(page.get_by_role("region", name="Loss")).to_be_visible()
    expect(page.get_by_text("Training loss", exact=True)).to_be_visible()
    for absent in ("Tokens/s", "Learning rate", "Throughput", "Validation loss"):
        assert page.get_by_text(absent, exact=True).count() == 0, absent
    assert page.get_by_role("region", name="Model", exact=True).count() == 0


def test_an_end_frame_ends_the_live_connection(stack: RunningStack, open_window: OpenWindow) -> None:
    job = stack.post("/api/jobs", {**IDLE, "name": "ends"})
    opened: list[str] = []

    def end_at_once(socket: WebSocketRoute) -> None:
        opened.append(socket.url)
        socket.send(json.dumps({"head": 1, "job": stack.get(f"/api/jobs/{job['id']}"), "layers": []}))
        socket.send(json.dumps({"kind": "end", "state": "cancelled"}))
        socket.close(code=1000)

    page = open_window().context.new_page()
    page.route_web_socket(re.compile("/ws/jobs/"), end_at_once)
    stack.post(f"/api/jobs/{job['id']}/cancel", {})
    page.goto(f"{stack.url}/jobs/{job['id']}")
    expect(page.locator("[data-status=ended]")).to_have_text("Up to date")
    page.wait_for_timeout(1_500)  # the first reconnect would come within 400 ms
    assert len(opened) == 1
    expect(page.locator("[data-status=ended]")).to_be_visible()


@pytest.mark.parametrize("width", [390, 1440])
def test_hostile_names_are_text_and_fit(stack: RunningStack, open_window: OpenWindow, width: int) -> None:
    jobs = [{"id": named_job(stack, name), "name": name} for name in HOSTILE_NAMES]
    window = open_window(width=width)
    page = window.context.new_page()
    page.goto(stack.url)
    expect(page.locator("[data-index] .badge").first).to_be_visible()
    assert overflow_px(page) <= 0
    for job in jobs:
        page.goto(f"{stack.url}/jobs/{job['id']}")
        heading = page.get_by_role("heading", level=1)
        expect(heading).to_have_text(job["name"])
        box = heading.bounding_box()
        assert box is not None
        assert box["height"] < 130, job["name"]
        assert overflow_px(page) <= 0, job["name"]
        assert "broken" not in page.title() or job["name"] in page.title()
    assert window.complaints == []


def test_a_lost_session_is_said_on_the_page_and_comes_back(
    stack: RunningStack, open_window: OpenWindow, chromium: Browser, session_state: Any
) -> None:
    window = open_window()
    form, listing = window.context.new_page(), window.context.new_page()
    form.goto(f"{stack.url}/jobs/new")
    form.get_by_label("Name", exact=True).fill("half written")
    listing.goto(stack.url)
    expect(listing.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    window.context.clear_cookies()
    form.bring_to_front()
    form.get_by_role("button", name="Submit job").click()
    for page in (form, listing):
        page.bring_to_front()
        expect(page.get_by_test_id("signed-out")).to_contain_text("apt-jobs login-link")
    assert form.get_by_label("Name", exact=True).input_value() == "half written"

    window.context.add_cookies(session_state["cookies"])
    for page in (listing, form):
        page.bring_to_front()
        expect(page.get_by_test_id("signed-out")).to_be_hidden()
    form.get_by_role("button", name="Submit job").click()
    form.wait_for_url(re.compile(r"/jobs/job_"))

    context = chromium.new_context()
    stranger = context.new_page()
    stranger.goto(f"{stack.url}/jobs/new")
    expect(stranger.get_by_role("heading", name="Sign in with a link")).to_be_visible()
    stranger.get_by_role("button", name="I have signed in").click()
    expect(stranger.get_by_role("status")).to_contain_text("No session yet")
    context.add_cookies(session_state["cookies"])
    expect(stranger.get_by_role("heading", name="New training job")).to_be_visible()
    context.close()


def test_what_is_chosen_is_in_the_address(stack: RunningStack, open_window: OpenWindow) -> None:
    steps: list[Event] = [StepTrained(step, 0, 9.0 / step, 1e-3, 1.0, 10.0, 1000.0) for step in range(1, 401)]
    job_id = stored_job(stack, steps, "chosen")
    window = open_window()
    page = window.context.new_page()
    page.goto(stack.url)
    page.get_by_role("button", name="Failed").click()
    expect(page).to_have_url(re.compile(r"\?filter=state%3Afailed%2Cdead$"))
    page.go_back()
    everything = page.get_by_role("group", name="State").get_by_role("button", name=re.compile("^All "))
    expect(everything).to_have_attribute("aria-pressed", "true")

    page.goto(f"{stack.url}/jobs/{job_id}?zoom=100-200&smooth=0.5&log=loss")
    loss = page.get_by_role("region", name="Loss")
    expect(loss.get_by_role("button", name="Reset zoom")).to_be_visible()
    expect(loss.get_by_label("Log scale")).to_be_checked()
    expect(page.get_by_label("Smoothing")).to_have_value("0.5")
    expect(loss.locator(".u-legend")).to_contain_text("200")  # without a cursor: the last step in view
    loss.get_by_label("Log scale").uncheck()
    page.get_by_role("tab", name="Log").click()
    expect(page).to_have_url(re.compile(r"\?zoom=100-200&smooth=0\.5&log=#log$"))
    page.go_back()
    page.go_back()
    expect(loss.get_by_label("Log scale")).to_be_checked()
    loss.get_by_role("button", name="Reset zoom").click()
    expect(page).not_to_have_url(re.compile("zoom="))
    assert window.complaints == []


def test_one_value_far_off_is_left_out_of_the_scale_and_can_be_shown(
    stack: RunningStack, open_window: OpenWindow
) -> None:
    steps: list[Event] = [
        StepTrained(step, 0, 1_100.0 if step == 2 else 2.0 + 1.0 / step, 1e-3, 1.0, 10.0, 1000.0)
        for step in range(1, 301)
    ]
    page = open_window().context.new_page()
    page.goto(f"{stack.url}/jobs/{stored_job(stack, steps, 'one spike')}?smooth=0")
    loss = page.get_by_role("region", name="Loss")
    loss.get_by_role("button", name="Show 1 off scale").click()
    expect(loss.get_by_role("button", name="Hide outliers")).to_be_visible()


def test_a_chosen_scheme_holds_against_the_system_s(stack: RunningStack, open_window: OpenWindow) -> None:
    page = open_window(scheme="dark").context.new_page()
    page.goto(stack.url)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_label("Color scheme").select_option("Light")
    wait_until(lambda: page.evaluate(background) != dark, 5.0, "light")
    light = page.evaluate(background)
    page.reload()
    expect(page.get_by_label("Color scheme")).to_have_value("light")
    assert page.evaluate(background) == light


def test_a_worker_that_stopped_claiming_says_why_and_is_resumed(stack: RunningStack, open_window: OpenWindow) -> None:
    page = open_window().context.new_page()
    reason = "3 jobs in a row were handed back: no space left in the data directory"
    page.route(
        "**/api/workers",
        lambda route: changed(route, lambda body: [row.update(paused_reason=reason) for row in body["data"]]),
    )
    page.goto(f"{stack.url}/workers")
    row = page.get_by_role("row").filter(has=page.get_by_text(re.compile("^train-")))
    expect(row).to_contain_text("paused")
    expect(page.get_by_text(reason).first).to_be_visible()
    with page.expect_response(re.compile(r"/api/workers/train-.*/resume$")) as answer:
        row.get_by_role("button", name="Resume").click()
    assert answer.value.ok


def test_ticked_jobs_are_compared_and_a_link_shows_the_same(stack: RunningStack, open_window: OpenWindow) -> None:
    ids = []
    for number in range(2):
        losses = [5.0 - number, 3.0 - number, 2.0 - number]
        steps: list[Event] = [StepTrained(step, 0, loss, 1e-3, 1.0, 100.0, 0.0) for step, loss in enumerate(losses, 1)]
        ids.append(stored_job(stack, steps, f"compared {number}"))
    window = open_window(390, 844)
    page = window.context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/api/compare" in request.url else None)
    page.goto(f"{stack.url}/?text=compared")
    for name in ("compared 0", "compared 1"):
        page.get_by_role("checkbox", name=f"Select {name}").check()
    page.get_by_role("link", name="Compare 2").click()
    expect(page.get_by_role("heading", name="Compare 2 runs")).to_be_visible()
    chart = page.get_by_role("region", name="train_loss", exact=True).locator("[data-points]")
    expect(chart).to_have_attribute("data-points", "3")
    page.get_by_role("button", name="Pin compared 1 as the baseline").click()
    cell = page.get_by_role("row", name="compared 0").locator("[data-label='train_loss last']")
    expect(cell).to_have_text(re.compile(r"2\s*\+1"))
    page.get_by_role("checkbox", name="grad_norm", exact=True).uncheck()
    expect(page.get_by_role("region", name="grad_norm", exact=True)).to_have_count(0)
    page.get_by_role("checkbox", name="Show compared 0").uncheck()
    page.get_by_role("button", name="Epoch").click()
    expect(page.get_by_text("it does not say how many steps make epoch").first).to_be_visible()
    page.get_by_role("button", name="Step").click()
    assert overflow_px(page) <= 0

    other = open_window(1440, 900, "dark").context.new_page()
    other.goto(page.url)
    expect(other.get_by_role("row", name="compared 1")).to_contain_text("baseline")
    expect(other.get_by_role("checkbox", name="Show compared 0")).not_to_be_checked()
    expect(other.get_by_role("region", name="grad_norm", exact=True)).to_have_count(0)
    expect(other.get_by_role("region", name="train_loss", exact=True).locator("[data-points]")).to_be_visible()
    stack.post(f"/api/jobs/{ids[0]}/cancel", {})
    other.goto(f"{stack.url}/compare?jobs=job_gone,{ids[1]}")
    expect(other.get_by_role("list", name="Not compared")).to_contain_text("there is no such job")
    num_asked = len(asked)
    assert num_asked <= 6, "a running comparison is asked for every ten seconds"
    assert window.complaints == []
