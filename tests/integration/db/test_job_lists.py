"""Orders of the list of jobs against a slow reference, on both dialects: any part of it, whatever the filter."""

from typing import Any

import pytest
from sqlalchemy import insert, update

from apt_jobs.db import listing
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.job_filters import conditions_of, in_ranges
from apt_jobs.db.listing import count_by_state, list_jobs
from apt_jobs.db.models import Job
from apt_jobs.db.sweep_models import Sweep, SweepTrial
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.job_filter import parse_filter
from apt_jobs.jobs.job_sort import ACTIVE_GROUPS, parse_sort
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import OWNED_STATES, JobState

LOSSES: tuple[Any, ...] = (2.5, "NaN", None, -1.0, 2.5, 1e300)
GROUP_OF = {state: number for number, group in enumerate(ACTIVE_GROUPS) for state in group}


@pytest.fixture
def jobs(database: Database) -> list[dict[str, Any]]:
    """Sixty jobs of all states, kinds and queues, in order of their ids."""
    states = list(JobState)
    rows = []
    for number in range(60):
        state = states[number * 7 % len(states)]
        loss = LOSSES[number % len(LOSSES)]
        rows.append(
            {
                "id": f"job_{number:020d}",
                "kind": "generate" if number % 5 == 0 else "train",
                "name": f"run {number}",
                "queue": f"q{number % 3}",
                "labels": {"team": str(number % 2)},
                "spec": TrainSpec(kind="train").model_dump(mode="json"),
                "state": state,
                "max_attempts": 1,
                "lease_until": now_plus(60) if state in OWNED_STATES else None,
                "progress": {"metrics": {"eval/x.y": {"last": loss, "best": loss}}}
                if number % 2
                else {"train_loss": loss},
            }
        )
    with database.write() as session:
        for row in rows:
            session.execute(insert(Job).values(**row))
    return rows


def pages(database: Database, sort: str, **filters: Any) -> list[str]:
    """Read the whole list, page after page."""
    found: list[str] = []
    has_more = True
    with database.read() as session:
        while has_more:
            after = found[-1] if found else None
            rows, has_more = list_jobs(session, sort=sort, after=after, limit=7, **filters)
            found += [row.id for row in rows]
    return found


def parts(database: Database, sort: str, text: str = "", **filters: Any) -> list[str]:
    """Read the whole list by offsets."""
    found: list[str] = []
    with database.read() as session:
        terms = conditions_of(session, text)
        while rows := list_jobs(session, sort=sort, offset=len(found), limit=7, terms=terms, **filters)[0]:
            found += [row.id for row in rows]
    return found


@pytest.mark.parametrize("merged", [2_000, 10])
def test_what_runs_is_first_in_every_part_of_the_list(
    database: Database, jobs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, merged: int
) -> None:
    monkeypatch.setattr(listing, "MAX_IN_RANGES", merged)
    newest = sorted(jobs, key=lambda job: job["id"], reverse=True)
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"kinds": ["generate"]},
        {"queue": "q1"},
        {"states": ["queued", "failed", "dead"]},
        {"states": ["paused"], "kinds": ["train"], "queue": "q2"},
        {"queue": ""},
    )
    for case in cases:
        wanted = [
            job
            for job in sorted(newest, key=lambda job: GROUP_OF[job["state"]])
            if job["state"] in case.get("states", list(JobState))
            and job["kind"] in case.get("kinds", ["train", "generate"])
            and job["queue"] == case.get("queue", job["queue"])
        ]
        expected = [job["id"] for job in wanted]
        assert pages(database, "active", **case) == expected, case
        assert parts(database, "active", **case) == expected, case
        newest_first = [job["id"] for job in newest if job in wanted]
        assert parts(database, "-created_at", **case) == newest_first, case
    labelled = [
        job["id"] for job in sorted(newest, key=lambda job: GROUP_OF[job["state"]]) if job["labels"]["team"] == "1"
    ]
    assert pages(database, "active", label=("team", "1")) == labelled
    assert parts(database, "active", text="label:team=1") == labelled


@pytest.mark.parametrize(
    ("sort", "field"),
    [("metrics.eval/x.y.last", "metrics"), ("-metrics.eval/x.y.best", "metrics"), ("-metrics.loss.last", "train_loss")],
)
def test_jobs_are_in_order_of_a_metric_and_those_without_it_last(
    database: Database, jobs: list[dict[str, Any]], sort: str, field: str
) -> None:
    def value(job: dict[str, Any]) -> Any:
        found = job["progress"].get(field)
        return found["eval/x.y"]["last"] if isinstance(found, dict) else found

    is_descending = sort.startswith("-")
    order = sorted(jobs, key=lambda job: job["id"], reverse=is_descending)
    with_value = [job for job in order if isinstance(value(job), float)]
    with_value.sort(key=value, reverse=is_descending)
    if is_descending:  # `reverse` keeps the order of equal ones
        with_value.sort(key=lambda job: -value(job))
    expected = [job["id"] for job in [*with_value, *(job for job in order if not isinstance(value(job), float))]]
    assert pages(database, sort) == expected
    assert parts(database, sort) == expected


def test_jobs_of_no_sweep_are_listed_alone(database: Database, jobs: list[dict[str, Any]]) -> None:
    with database.write() as session:
        session.execute(insert(Sweep).values(id="sweep_1", request={}, metric="val_loss", goal="min", num_jobs=20))
        session.flush()
        trials = [
            {
                "sweep_id": "sweep_1",
                "number": number,
                "repeat": 0,
                "job_id": job["id"],
                "setting": {},
                "is_paused": False,
            }
            for number, job in enumerate(jobs[::3], 1)
        ]
        session.execute(insert(SweepTrial), trials)
        for job in jobs[::3]:
            session.execute(update(Job).where(Job.id == job["id"]).values(sweep_id="sweep_1"))
    alone = [job for index, job in enumerate(jobs) if index % 3]
    newest = sorted(alone, key=lambda job: job["id"], reverse=True)
    expected = [job["id"] for job in sorted(newest, key=lambda job: GROUP_OF[job["state"]])]
    terms = parse_filter("sweep:none")
    assert in_ranges(terms, (), (), None).is_sweepless
    assert pages(database, "active", sweepless=True) == expected
    assert parts(database, "active", sweepless=True, states=["queued", "dead"]) == [
        job["id"]
        for job in sorted(newest, key=lambda job: GROUP_OF[job["state"]])
        if job["state"] in ("queued", "dead")
    ]
    assert parts(database, "active", text="sweep:none") == expected
    assert parts(database, "active", text="sweep:none,sweep_1") == parts(database, "active")
    of_sweep = {job["id"] for job in jobs[::3]}
    assert (
        set(parts(database, "name", text="-sweep:none"))
        == set(parts(database, "name", text="sweep:sweep_1"))
        == of_sweep
    )
    with database.read() as session:
        assert sum(count_by_state(session, sweepless=True).values()) == len(alone)


def test_jobs_are_counted_by_state(database: Database, jobs: list[dict[str, Any]]) -> None:
    with database.read() as session:
        everything = count_by_state(session)
        of_kind = count_by_state(session, kinds=["train"], queue="q1", others=conditions_of(session, "label:team=1"))
    assert everything == {state: sum(job["state"] == state for job in jobs) for state in JobState}
    wanted = [job for job in jobs if (job["kind"], job["queue"], job["labels"]["team"]) == ("train", "q1", "1")]
    assert of_kind == {
        state: sum(job["state"] == state for job in wanted) for state in {job["state"] for job in wanted}
    }


def test_states_and_kinds_of_a_filter_are_ranges_of_an_index() -> None:
    terms = parse_filter("state:queued,running,failed -state:failed kind:train queue:a label:x")
    found = in_ranges(terms, ["running", "paused"], (), None)
    assert (found.states, found.kinds, found.queue, found.is_empty) == (("running",), ("train",), "a", False)
    for text in ("state:queued state:failed", "kind:train -kind:train", "queue:a queue:b"):
        assert in_ranges(parse_filter(text), (), (), None).is_empty, text
    assert in_ranges([], list(JobState), ["train", "generate"], None).states == ()


@pytest.mark.parametrize(
    "sort", ["-active", "metrics.x", "metrics..last", 'metrics.a"b.last', "metrics.a.mean", "--name", ""]
)
def test_an_order_that_there_is_not_is_refused(sort: str) -> None:
    with pytest.raises(InvalidInput, match="expected active, or one of created_at"):
        parse_sort(sort)


def test_a_place_that_is_gone_is_said(database: Database, jobs: list[dict[str, Any]]) -> None:
    for sort in ("active", "metrics.loss.last"):
        with database.read() as session, pytest.raises(InvalidInput, match="its place with it"):
            list_jobs(session, sort=sort, after="job_gone")
