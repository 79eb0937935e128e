"""What users steer in the pages: jobs, schedules, workers and queues; and what they see when the service is away."""

import re
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import insert

from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.jobs.spec import TrainSpec
from tests.browser.conftest import RunningStack, Watched, wait_until

DEADLINE_S = 240.0
LOST_WITHIN_S = 5.0
NUM_STORED = 1_000
OpenWindow = Callable[..., Watched]
TINY = {
    "kind": "train",
    "name": "steered",
    "model": {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 16},
    "training": {
        "max_steps": 6_000,  # more than a busy machine trains between a click and its effect
        "epochs": 1_000,
        "batch_size": 1,
        "validate_every_steps": 20_000,
        "checkpoint_every_steps": 20_000,
    },
}


def state_on(page: Page, state: str) -> None:
    """Wait until the page says that its job is in this state."""
    expect(page.locator("header .badge")).to_have_text(state, timeout=DEADLINE_S * 1000)


def steering(page: Page) -> list[str]:
    group = page.get_by_role("group", name="Steer this job")
    return [text.strip() for text in group.get_by_role("button").all_inner_texts()]


def cancel_all(stack: RunningStack) -> None:
    for job in stack.get("/api/jobs?state=queued&state=running&state=pausing&state=paused")["data"]:
        stack.post(f"/api/jobs/{job['id']}/cancel", {})


@pytest.mark.timeout(900)  # two starts of torchrun and two checkpoints, on a machine that may be busy
def test_a_training_is_paused_and_resumed_with_buttons(stack: RunningStack, open_window: OpenWindow) -> None:
    job: dict[str, Any] = stack.post("/api/jobs", TINY)
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{job['id']}")
    state_on(page, "running")
    wait_until(lambda: (stack.get(f"/api/jobs/{job['id']}")["step"] or 0) >= 1, DEADLINE_S, "a step")
    assert steering(page) == ["Pause", "Cancel job"]

    page.get_by_role("button", name="Pause").dblclick()
    state_on(page, "paused")
    step = stack.get(f"/api/jobs/{job['id']}")["step"]
    expect(page.locator(".notice")).to_contain_text(f"saved at step {step}")
    assert steering(page) == ["Resume", "Cancel job"]

    page.get_by_role("button", name="Resume").click()
    wait_until(lambda: (stack.get(f"/api/jobs/{job['id']}")["step"] or 0) > step, DEADLINE_S, "a step after the pause")
    state_on(page, "succeeded")
    assert steering(page) == []
    attempts = page.get_by_role("table").last.get_by_role("row")
    expect(attempts).to_have_count(3)
    expect(attempts.nth(1)).to_contain_text("paused")
    expect(attempts.nth(2).get_by_role("cell").nth(5)).to_have_text(str(step))
    assert window.complaints == []


def test_a_refusal_of_the_server_is_shown_in_words(stack: RunningStack, open_window: OpenWindow) -> None:
    job = stack.post("/api/jobs", {**TINY, "queue": "nobody"})
    page = open_window().context.new_page()
    page.goto(f"{stack.url}/jobs/{job['id']}")
    state_on(page, "queued")
    page.route("**/pause", lambda route: stack.post(f"/api/jobs/{job['id']}/cancel", {}) and route.continue_())
    page.get_by_role("button", name="Pause").click()  # meanwhile somebody has cancelled it
    expect(page.get_by_test_id("refusal")).to_contain_text("is cancelled already and cannot be paused")
    state_on(page, "cancelled")
    assert steering(page) == ["Retry"]


def test_jobs_are_steered_in_the_list(stack: RunningStack, open_window: OpenWindow) -> None:
    jobs = [stack.post("/api/jobs", {**TINY, "name": f"listed {index}", "queue": "nobody"}) for index in range(2)]
    page = open_window().context.new_page()
    page.goto(stack.url)
    page.get_by_role("combobox", name="Filter jobs").fill("listed")
    rows = page.get_by_role("row").filter(has=page.locator(".badge"))
    expect(rows).to_have_count(2)
    row = rows.filter(has_text="listed 1")
    row.get_by_label("Actions of listed 1").click()
    row.get_by_role("button", name="Pause").click()
    expect(row.locator(".badge")).to_have_text("paused")

    for index in range(2):
        page.get_by_label(f"Select listed {index}").check()
    page.get_by_role("button", name="Cancel 2").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel 2 jobs").click()
    expect(page.get_by_text("2 jobs are cancelled or being cancelled.")).to_be_visible()
    assert [stack.get(f"/api/jobs/{job['id']}")["state"] for job in jobs] == ["cancelled", "cancelled"]


def store_many(stack: RunningStack, team: str) -> None:
    """Store jobs of one team: a thousand that ended, three that wait; the later ones are the newer ones."""
    database = Database(stack.settings.database)
    spec = TrainSpec(kind="train", queue="nobody").model_dump(mode="json")
    same = {"kind": "train", "queue": "nobody", "spec": spec, "max_attempts": 1, "labels": {"team": team}}
    ended = [
        {**same, "id": f"job_{team}{number:012d}", "name": f"{team} {number}", "state": ("dead", "failed")[number % 2]}
        for number in range(NUM_STORED)
    ]
    waiting = [{**same, "id": f"job_{team}w{number:011d}", "name": f"{team} waits {number}"} for number in range(3)]
    with database.write() as session:
        session.execute(insert(Job), [*ended, *({**row, "state": "queued"} for row in waiting)])
    database.dispose()


def test_any_job_of_a_thousand_is_found_linked_and_steered(stack: RunningStack, open_window: OpenWindow) -> None:
    store_many(stack, "many")
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/?filter=label:team%3Dmany")
    table = page.get_by_role("table", name="Jobs")
    expect(table).to_have_attribute("aria-rowcount", str(NUM_STORED + 4))
    rows = page.locator("[data-index]")
    expect(rows.first).to_contain_text("many waits 2")
    assert rows.count() < 80
    expect(page.get_by_role("button", name=re.compile("^Failed 1,?000$"))).to_be_visible()
    page.evaluate("document.querySelector('.scroll').scrollTop = 1e9")
    expect(page.get_by_role("link", name="many 0", exact=True)).to_be_visible()

    page.get_by_role("button", name="Name", exact=True).click()
    expect(page).to_have_url(re.compile("sort=name"))
    expect(rows.first).to_contain_text("many 0")
    page.go_back()
    expect(rows.first).to_contain_text("many waits 2")

    page.keyboard.press("/")
    page.keyboard.type("sta")
    for key in ("ArrowDown", "Enter", "q", "u", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    expect(page).to_have_url(re.compile("team%3Dmany\\+state%3Aqueued"))
    expect(rows).to_have_count(3)
    page.get_by_role("heading", name="Jobs", exact=True).click()
    for key in ("j", "j", "x"):
        page.keyboard.press(key)
    expect(page.get_by_label("Select many waits 1")).to_be_checked()
    page.keyboard.press("Escape")
    page.get_by_label("Select many waits 2").click()
    page.get_by_label("Select many waits 0").click(modifiers=["Shift"])
    page.get_by_role("button", name="Pause 3").click()
    expect(page.get_by_text("3 jobs are paused or pausing.")).to_be_visible()
    expect(page.get_by_text("No job matches.")).to_be_visible()

    page.get_by_role("button", name="Remove state:queued").click()
    page.get_by_label("Select all that match").click()
    page.get_by_role("button", name="Cancel 3").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel 3 jobs").click()
    expect(page.get_by_text("3 jobs are cancelled or being cancelled.")).to_be_visible()
    page.get_by_role("combobox", name="Filter jobs").fill("nope:x")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the filter has no field 'nope'")
    assert all("422" in complaint for complaint in window.complaints)


def test_columns_and_views_are_remembered_and_a_phone_has_cards(stack: RunningStack, open_window: OpenWindow) -> None:
    store_many(stack, "wide")
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/?filter=label:team%3Dwide&sort=-name")
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="Priority").check()
    page.get_by_role("checkbox", name="Loss curve").uncheck()
    page.keyboard.press("Escape")
    page.get_by_text("Views", exact=True).click()
    page.get_by_label("Name of this view").fill("the wide ones")
    page.get_by_role("button", name="Save this view").click()
    page.goto(stack.url)
    expect(page.get_by_role("columnheader", name="Priority")).to_be_visible()
    assert page.get_by_role("columnheader", name="Loss curve").count() == 0
    page.get_by_text("Views", exact=True).click()
    page.get_by_role("button", name="the wide ones", exact=True).click()
    expect(page.locator("[data-index]").first).to_contain_text("wide waits 2")
    expect(page.get_by_role("columnheader", name="Name")).to_have_attribute("aria-sort", "descending")

    page.set_viewport_size({"width": 390, "height": 844})
    card = page.get_by_role("listitem").filter(has_text="wide waits 2")
    expect(card).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    card.get_by_label("Actions of wide waits 2").click()
    card.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
    expect(card.locator(".badge")).to_have_text("cancelled")
    assert window.complaints == []


def test_a_schedule_is_made_in_the_form_and_run_at_once(stack: RunningStack, open_window: OpenWindow) -> None:
    window = open_window()
    page = window.context.new_page()
    page.goto(f"{stack.url}/schedules")
    page.get_by_role("link", name="New schedule").first.click()
    assert page.get_by_label("Run this on a schedule").is_checked()
    for label, value in {"Name": "", "Ranks": "1", "Max steps": "2", "Name of the schedule": "nightly"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_text("More options").click()
    page.get_by_label("Queue", exact=True).fill("nobody")
    page.get_by_label("Labels").fill("team=nlp")
    cron, zone = page.get_by_label("Cron expression"), page.get_by_label("Time zone")
    for wrong, said in {"0 0 30 2 *": "bad day-of-month", "* " * 60: "has 60 fields", "": "has 0 fields"}.items():
        cron.fill(wrong)
        expect(page.get_by_text(said)).to_be_visible()
        expect(cron).to_have_attribute("aria-invalid", "true")
    zone.fill("Mars/Olympus")
    page.get_by_role("button", name="Create schedule").click()
    expect(page.get_by_text("'Mars/Olympus' is no IANA time zone")).to_be_visible()
    cron.fill("30 3 * * *")
    zone.fill("Europe/Berlin")
    expect(page.get_by_role("status", name="Next due times").get_by_role("listitem")).to_have_count(5)
    page.get_by_role("button", name="Create schedule").click()

    card = page.get_by_role("region", name="nightly")
    expect(card.get_by_text("30 3 * * * in Europe/Berlin")).to_be_visible()
    expect(card.get_by_role("listitem")).to_have_count(5)
    expect(card.get_by_role("listitem").first).to_contain_text(re.compile(r"03:30.*in \d+"))
    page.get_by_role("button", name="Run now").dblclick()
    link = page.get_by_text("was submitted as").get_by_role("link")
    job = stack.get(link.get_attribute("href").replace("/jobs/", "/api/jobs/"))  # type: ignore[union-attr]  # a link has an address
    assert (job["schedule_id"], job["labels"]) == (stack.get("/api/schedules")["data"][0]["id"], {"team": "nlp"})
    expect(card.get_by_role("table").get_by_role("link", name=job["id"])).to_be_visible()

    card.get_by_role("button", name="Pause").click()
    expect(card.get_by_text("None while it is paused.")).to_be_visible()
    card.get_by_role("button", name="Edit").click()
    editor = page.get_by_role("dialog", name="Edit schedule")
    editor.get_by_label("Cron expression").fill("0 4 * * *")
    editor.get_by_role("button", name="Save").click()
    expect(card.get_by_text("0 4 * * * in Europe/Berlin")).to_be_visible()
    card.get_by_role("button", name="Resume").click()
    expect(card.get_by_role("listitem").first).to_contain_text("04:00")
    card.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    assert stack.get("/api/schedules")["data"] == []
    cancel_all(stack)


def test_a_worker_is_drained_and_a_queue_limited_and_paused(stack: RunningStack, open_window: OpenWindow) -> None:
    cancel_all(stack)
    wait_until(
        lambda: all(one["current_job_id"] is None for one in stack.get("/api/workers")["data"]), DEADLINE_S, "idle"
    )
    page = open_window().context.new_page()
    page.goto(f"{stack.url}/workers")
    row = page.get_by_role("row").filter(has=page.get_by_text(re.compile("^train-")))
    row.get_by_role("button", name="Drain").click()
    expect(row).to_contain_text("drained")
    job = stack.post("/api/jobs", {**TINY, "training": {"max_steps": 2}})
    expect(page.get_by_role("row", name=re.compile("^train open 1 0"))).to_be_visible()

    queue = page.get_by_role("row").filter(has=page.get_by_role("button", name="Pause train"))
    page.get_by_label("Max running jobs of train").fill("2")
    queue.get_by_role("button", name="Set").click()
    page.get_by_role("button", name="Pause train").click()
    expect(page.get_by_role("button", name="Resume train")).to_be_visible()
    known = next(row for row in stack.get("/api/queues")["data"] if row["name"] == "train")
    assert (known["max_running"], known["paused"], known["queued"]) == (2, True, 1)

    page.get_by_role("button", name="Resume train").click()
    assert stack.get(f"/api/jobs/{job['id']}")["state"] == "queued"
    row.get_by_role("button", name="Resume").click()
    expect(row).not_to_contain_text("drained")
    wait_until(lambda: stack.get(f"/api/jobs/{job['id']}")["state"] == "succeeded", DEADLINE_S, "the job is done")


def test_pages_of_operations_fit_a_phone(stack: RunningStack, open_window: OpenWindow) -> None:
    schedule = {"name": "a long name of a schedule " * 4, "cron": "* * * * *", "paused": True}
    schedule_id = stack.post("/api/schedules", {**schedule, "job": {**TINY, "queue": "nobody"}})["id"]
    stack.post(f"/api/schedules/{schedule_id}/run", {})
    window = open_window(width=390, height=844, scheme="dark")
    page = window.context.new_page()
    for path in ("/", f"/schedules#{schedule_id}", "/workers", "/jobs/new#schedule"):  # the address opens the history
        page.goto("about:blank")
        page.goto(stack.url + path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path
    assert window.complaints == []


def test_a_lost_service_is_said_within_5_s_and_the_page_goes_on(stack: RunningStack, open_window: OpenWindow) -> None:
    stack.post("/api/jobs", {**TINY, "queue": "nobody"})
    window = open_window()
    idle = window.context.new_page()
    idle.goto(f"{stack.url}/jobs/new")
    idle.get_by_label("Name", exact=True).fill("half written")
    listing = window.context.new_page()
    listing.goto(stack.url)
    rows = listing.get_by_role("row").filter(has=listing.locator(".badge"))
    expect(rows.first).to_be_visible()
    num_rows = rows.count()
    lost = [page.get_by_test_id("lost") for page in (listing, idle)]

    web = stack.web_process()
    web.suspend()  # it answers nothing, and no connection ends
    try:
        for page, banner in zip((listing, idle), lost, strict=True):
            page.bring_to_front()
            expect(banner).to_be_visible(timeout=LOST_WITHIN_S * 1000)
    finally:
        web.resume()
    for banner in lost:
        expect(banner).to_be_hidden()

    up = psutil.Process(stack.process.pid)
    up.suspend()  # else it starts the web process again before a page has missed it
    try:
        web.kill()
        expect(lost[1]).to_be_visible(timeout=LOST_WITHIN_S * 1000)
        assert rows.count() == num_rows
    finally:
        up.resume()
    for banner in lost:
        expect(banner).to_be_hidden(timeout=DEADLINE_S * 1000)
    assert idle.get_by_label("Name", exact=True).input_value() == "half written"
    stack.post("/api/jobs", {**TINY, "name": "after the break", "queue": "nobody"})
    expect(listing.get_by_text("after the break")).to_be_visible()
    cancel_all(stack)
