"""A job submitted in the page, watched live, generated from; on a phone, in the dark, across a restart of the web."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from playwright.sync_api import Browser, Page, expect

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, finish, insert_job
from apt_jobs.events.kinds import Event, GradientsRecorded, LayersNamed, StepTrained
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from tests.browser.conftest import RunningStack, Watched, wait_until

TRAIN_DEADLINE_S = 240.0
OpenWindow = Callable[..., Watched]

# Pixels of a canvas that have the colour of `--alarm`.
COUNT_ALARM_PIXELS = """
(canvas) => {
  const span = document.body.appendChild(document.createElement("span"));
  span.style.color = "var(--alarm)";
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(span).color;
  span.remove();
  probe.fillRect(0, 0, 1, 1);
  const [red, green, blue] = probe.getImageData(0, 0, 1, 1).data;
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let index = 0; index < data.length; index += 4) {
    if (data[index] === red && data[index + 1] === green && data[index + 2] === blue) count += 1;
  }
  return count;
}
"""
OUTPUTS = ("Generated text", "Generated text of the other model")
NUM_STEPS = 200  # so many that a busy machine shows some of them before the last one
SHORT_TRAINING = {
    "kind": "train",
    "name": "short",
    "model": {"d_model": 32, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "max_seq_len": 32},
    "training": {"max_steps": NUM_STEPS, "batch_size": 8},
    "monitor": {"exploding_above": 1e-3},
}
ENDLESS_TRAINING = {
    "kind": "train",
    "name": "endless",
    "model": {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 16},
    "training": {"max_steps": 20_000, "epochs": 1_000, "batch_size": 1, "validate_every_steps": 20_000},
}


def loss_chart(page: Page) -> tuple[int, int]:
    """Number of points of the loss curve, and the step of its last one."""
    chart = page.get_by_role("img", name="Training and validation loss by step")
    if chart.count() == 0:
        return 0, 0
    points, step = chart.evaluate("(host) => [Number(host.dataset.points ?? 0), Number(host.dataset.lastStep ?? 0)]")
    return points, step


@pytest.fixture(scope="module")
def submitted_jobs() -> list[str]:
    """Ids of jobs that were trained to the end."""
    return []


@pytest.fixture
def trained_job(stack: RunningStack, submitted_jobs: list[str]) -> str:
    """A job with gradients, anomalies and a checkpoint: the first test's, or a new one when that did not run."""
    if not submitted_jobs:
        job_id: str = stack.post("/api/jobs", SHORT_TRAINING)["id"]
        wait_until(lambda: stack.get(f"/api/jobs/{job_id}")["state"] == "succeeded", TRAIN_DEADLINE_S, "trained")
        submitted_jobs.append(job_id)
    return submitted_jobs[0]


def test_a_job_submitted_in_the_form_is_seen_live(
    stack: RunningStack, open_window: OpenWindow, submitted_jobs: list[str]
) -> None:
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/new")
    for label, value in {
        "Name": "from the form",
        "Width (d_model)": "32",
        "Layers": "2",
        "Vocabulary size": "300",
        "Sequence length": "32",
        "Max steps": str(NUM_STEPS),
        "Exploding above": "0.001",
        "Ranks": "1",
    }.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Submit job").click()
    page.wait_for_url(re.compile(r"/jobs/job_"))
    asked, began_s = list[str](), time.monotonic()
    page.on("request", lambda request: asked.append(request.url))

    expect(page.locator("[data-status=live]")).to_be_visible()
    wait_until(lambda: loss_chart(page)[0] > 0, TRAIN_DEADLINE_S, "a first point of the loss")
    first = loss_chart(page)
    wait_until(lambda: loss_chart(page)[0] > first[0], TRAIN_DEADLINE_S, "further points, without a reload")
    expect(page.get_by_role("heading", name="from the form")).to_be_visible()
    expect(page.get_by_text("succeeded", exact=True).first).to_be_visible(timeout=TRAIN_DEADLINE_S * 1000)
    for panel in ("/metrics?points=500", "/media?after=0"):  # polled each 3 and 5 s, not asked at each event
        assert sum(url.endswith(panel) for url in asked) <= 3 + (time.monotonic() - began_s) / 3, panel
    submitted_jobs.append(page.url.rsplit("/", 1)[1])
    wait_until(lambda: loss_chart(page) == (NUM_STEPS, NUM_STEPS), 5.0, "all steps, each once")
    page.get_by_role("tab", name="Log").click()
    expect(page.get_by_role("log")).to_contain_text("running → succeeded")
    assert window.complaints == []
    assert window.hosts == {stack.url.removeprefix("http://")}


def test_gradients_are_drawn_with_anomalies_in_red(
    stack: RunningStack, open_window: OpenWindow, trained_job: str
) -> None:
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{trained_job}#gradients")
    timeline = page.get_by_role("img", name=re.compile("Gradient norms of .* layers by step"))
    heat_map = page.locator("canvas[aria-label^='Heat map']")
    for canvas in (timeline.locator("canvas"), heat_map):
        expect(canvas).to_be_visible()
        wait_until(lambda canvas=canvas: canvas.evaluate(COUNT_ALARM_PIXELS) > 100, 5.0, "red marks")  # type: ignore[misc]  # mypy infers no type for a default in a lambda
    expect(page.get_by_text(re.compile(r"\d+ exploding")).first).to_be_visible()

    table = page.get_by_role("table").first
    num_layers = table.get_by_role("row").count() - 1
    page.get_by_label("Search layers").fill("layers.1 mlp")
    expect(table.get_by_role("row")).to_have_count(1 + 3)
    page.get_by_label("Search layers").fill("")
    expect(table.get_by_role("row")).to_have_count(1 + num_layers)
    table.get_by_role("button", name="Max").click()
    maxima = [float(text.replace(",", "")) for text in table.locator("td:nth-child(6)").all_inner_texts()]
    assert maxima == sorted(maxima, reverse=True)
    assert window.complaints == []


def test_the_attempts_of_a_job_stay_when_the_live_connection_greets(
    stack: RunningStack, open_window: OpenWindow, trained_job: str
) -> None:
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{trained_job}")
    expect(page.get_by_text("Up to date")).to_be_visible()
    expect(page.get_by_role("region", name="Attempts").get_by_role("row")).to_have_count(1 + 1)
    assert window.complaints == []


def test_text_is_generated_from_the_newest_checkpoint(
    stack: RunningStack, open_window: OpenWindow, trained_job: str
) -> None:
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{trained_job}#generate")
    page.get_by_label("Text", exact=True).fill("The for statement")
    page.get_by_label("Max length, tokens").fill("12")
    page.get_by_role("button", name="Generate").click()
    generated = page.get_by_test_id("generated")
    expect(generated).to_be_visible(timeout=60_000)
    assert generated.inner_text().startswith("The for statement")
    assert len(generated.inner_text()) > len("The for statement")
    assert window.complaints == []


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_two_models_continue_a_text_side_by_side(
    stack: RunningStack, open_window: OpenWindow, trained_job: str, width: int, scheme: str
) -> None:
    window = open_window(width=width, height=900, scheme=scheme)
    page = window.context.new_page()
    page.goto(f"{stack.url}/generate")
    other = page.get_by_label("Compare with")
    other.select_option(index=other.locator("option").count() - 1)
    page.get_by_label("Max length, tokens").fill("20")
    page.get_by_role("button", name="Generate").click()
    texts = page.get_by_test_id("generated")
    expect(texts).to_have_count(2, timeout=60_000)
    expect(page.get_by_text(re.compile(r"tokens? in .* a second"))).to_have_count(2, timeout=60_000)
    regions = [page.get_by_role("region", name=name, exact=True) for name in OUTPUTS]
    first, second = (region.bounding_box() for region in regions)
    assert first is not None
    assert second is not None
    assert (first["y"] == second["y"]) is (width > 1_000)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    assert window.complaints == []


def test_checkpoints_are_listed_downloaded_and_deleted(
    stack: RunningStack, open_window: OpenWindow, trained_job: str
) -> None:
    page = open_window().context.new_page()
    page.goto(f"{stack.url}/jobs/{trained_job}#checkpoints")
    rows = page.get_by_role("table").get_by_role("row")
    expect(rows.nth(1)).to_contain_text(str(NUM_STEPS))
    num_checkpoints = rows.count() - 1
    with page.expect_download() as download:
        rows.nth(1).get_by_role("link", name="Download").click()
    assert download.value.path().stat().st_size > 10_000
    rows.nth(1).get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("is deleted")).to_be_visible()
    expect(page.get_by_role("button", name="Delete")).to_have_count(num_checkpoints - 1)


def test_no_page_scrolls_sideways_on_a_phone_in_the_dark(
    stack: RunningStack, open_window: OpenWindow, trained_job: str
) -> None:
    window = open_window(width=390, height=844, scheme="dark")
    page = window.context.new_page()
    job = f"/jobs/{trained_job}"
    tabs = [f"{job}#{tab}" for tab in ("training", "gradients", "checkpoints", "generate", "log")]
    for path in ["/", "/jobs/new", *tabs, "/checkpoints", "/generate", "/workers"]:
        page.goto("about:blank")
        page.goto(stack.url + path)
        page.wait_for_load_state("networkidle") if "#" not in path else page.get_by_role("tabpanel").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 18, 23)", path
    assert window.complaints == []

    page.goto(f"{stack.url}/nowhere")  # a page of the service, without the application's style
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    page.evaluate("document.body.style.backgroundColor = 'Canvas'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 18, 18)"  # Chromium's dark


def test_faults_are_shown_at_their_fields(stack: RunningStack, open_window: OpenWindow) -> None:
    page = open_window().context.new_page()
    page.goto(f"{stack.url}/jobs/new")
    page.get_by_label("Width (d_model)", exact=True).fill("30")
    page.get_by_role("button", name="Submit job").click()
    expect(page.get_by_text("must be an even multiple of the 4 attention heads")).to_be_visible()
    assert page.get_by_label("Width (d_model)", exact=True).get_attribute("aria-invalid") == "true"
    page.get_by_label("Width (d_model)", exact=True).fill("32")
    page.get_by_text("More options").click()
    page.get_by_label("Queue", exact=True).fill("no spaces allowed")  # only the server knows this rule
    page.get_by_role("button", name="Submit job").click()
    expect(page.get_by_label("Queue", exact=True)).to_have_attribute("aria-invalid", "true")


def test_a_restart_of_the_web_costs_no_point_and_doubles_none(stack: RunningStack, open_window: OpenWindow) -> None:
    job_id = stack.post("/api/jobs", ENDLESS_TRAINING)["id"]
    page = open_window().context.new_page()
    page.goto(f"{stack.url}/jobs/{job_id}")
    wait_until(lambda: loss_chart(page)[0] > 5, TRAIN_DEADLINE_S, "a live curve")

    stack.web_process().kill()
    expect(page.locator("[data-status=reconnecting]")).to_be_visible()
    seen = loss_chart(page)[1]
    expect(page.locator("[data-status=live]")).to_be_visible(timeout=30_000)
    wait_until(lambda: loss_chart(page)[1] > seen + 5, 10.0, "the curve going on")
    points, last_step = loss_chart(page)
    if last_step < 3_000:  # beyond that, points stand for several steps
        assert points == last_step

    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
    expect(page.get_by_text("cancelled", exact=True).first).to_be_visible(timeout=30_000)


def test_a_browser_without_a_session_is_told_how_to_sign_in(stack: RunningStack, chromium: Browser) -> None:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(stack.url)
    expect(page.get_by_role("heading", name="Sign in with a link")).to_be_visible()
    expect(page.get_by_text("apt-jobs login-link")).to_be_visible()
    context.close()


def test_zooming_into_a_long_history_sharpens_it(stack: RunningStack, open_window: OpenWindow) -> None:
    job_id, num_steps = long_history(stack), 20_000
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{job_id}")
    wait_until(lambda: loss_chart(page)[1] == num_steps, 20.0, "the whole history")
    points = loss_chart(page)[0]
    assert points < num_steps / 10
    host = page.get_by_role("img", name="Training and validation loss by step")
    box = host.locator(".u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.46, box["y"] + 50, steps=5)
    with page.expect_response(re.compile(r"/metrics\?.*from_step=[78]\d\d\d&to_step=9\d\d\d")):
        page.mouse.up()
    wait_until(lambda: loss_chart(page)[0] > points + 500, 10.0, "single steps of the range")
    page.get_by_role("region", name="Loss").get_by_role("button", name="Reset zoom").click()
    expect(page.get_by_role("button", name="Reset zoom")).to_have_count(0)
    wait_until(lambda: loss_chart(page)[0] == points, 10.0, "the overview again")
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert len(download.value.path().read_text().splitlines()) == num_steps + 1
    assert window.complaints == []


def test_the_heat_map_follows_the_zoom_of_its_timeline(stack: RunningStack, open_window: OpenWindow) -> None:
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{long_history(stack)}#gradients")
    heat_map = page.locator("canvas[aria-label^='Heat map']")
    expect(heat_map).to_have_attribute("data-last-step", "20000", timeout=20_000)
    assert int(heat_map.get_attribute("data-first-step") or 0) < 100
    box = page.get_by_role("img", name=re.compile("Gradient norms of .* by step")).locator(".u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.46, box["y"] + 50, steps=5)
    page.mouse.up()
    expect(heat_map).to_have_attribute("data-first-step", re.compile(r"^[78]\d\d\d$"))
    expect(heat_map).to_have_attribute("data-last-step", re.compile(r"^9\d\d\d$"))
    page.get_by_role("tab", name="Training").click()
    page.get_by_role("tab", name="Gradients").click()
    expect(heat_map).to_have_attribute("data-last-step", re.compile(r"^9\d\d\d$"))  # the zoom is in the address
    page.get_by_role("button", name="Reset zoom").first.click()
    expect(heat_map).to_have_attribute("data-last-step", "20000")
    assert window.complaints == []


def long_history(stack: RunningStack) -> str:
    """A job that trained 20,000 steps in no time."""
    database = Database(stack.settings.database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", queue="history")).id
        assert claim(session, job_id, "test", 600.0)
        now = datetime.now(UTC)
        events: list[Event] = [LayersNamed(("a", "b"))]
        for step in range(1, 20_001):
            loss = 5.0 / step**0.1 + 0.2 * (step % 7)
            events.append(StepTrained(step, 0, loss, 1e-3, 1.0 + step % 5, 10.0, 1000.0))
            events.append(GradientsRecorded(step, (1.0 + step % 3, 2.0), ()))
        append_events(session, job_id, 1, [(now, event) for event in events], 600.0)
        finish(session, job_id, 1, JobState.SUCCEEDED)
    database.dispose()
    return job_id
