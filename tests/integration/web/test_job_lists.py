"""What a list of jobs shows beside the rows: counts by state, loss curves in small, when waiting jobs start."""

from typing import Any

import httpx
import pytest

from apt_jobs.db.series import sparklines
from apt_jobs.events.kinds import StepTrained
from tests.integration.db.steps import claim, store, submit
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
ROWS = "id,state,sparkline,expected_start_at,num_gpus,num_ranks,waiting_for"


def listing(http: httpx.Client, **query: Any) -> Any:
    return http.get("/api/jobs", params=query).raise_for_status().json()


def test_a_list_counts_what_matches_in_every_state(served: Served, http: httpx.Client) -> None:
    for team in "aab":
        submit(served.database, labels={"team": team}, resources={"gpus": 2}, num_ranks=2)
    claim(served.database)
    found = listing(http, filter="state:queued label:team=a", counts=True, limit=1)
    counts = {state: count for state, count in found["counts"].items() if count}
    assert counts == {"running": 1, "queued": 1}
    assert (found["total"], len(found["counts"]), found["data"][0]["num_gpus"]) == (1, 8, 2.0)
    assert listing(http, counts=True)["total"] == 3
    nothing = listing(http, filter="kind:train -kind:train", counts=True)
    assert (nothing["data"], nothing["total"], sum(nothing["counts"].values())) == ([], 0, 0)
    only_states = listing(http, filter="state:queued state:failed", counts=True)
    assert (only_states["total"], only_states["counts"]["queued"]) == (0, 2)
    assert listing(http)["counts"] is None


def test_a_list_shows_curves_in_small(served: Served, http: httpx.Client) -> None:
    submit(served.database, name="waits", queue="other")
    submit(served.database)
    job = claim(served.database)
    losses = [float("nan"), *(1_000.0 / step for step in range(2, 101))]
    store(
        served.database, job, *(StepTrained(step, 0, loss, 1e-3, 1.0, 10.0, 0.0) for step, loss in enumerate(losses, 1))
    )
    first, second = listing(http, sort="active", fields=ROWS)["data"]
    assert (first["id"], first["state"], second["state"]) == (job.id, "running", "queued")
    assert 10 <= len(first["sparkline"]) <= 24
    assert first["sparkline"][0] is None
    assert first["sparkline"][1:] == sorted(first["sparkline"][1:], reverse=True)
    assert second["sparkline"] == []
    assert "no train worker serves the queue 'other'" in second["waiting_for"]
    assert set(first) == set(ROWS.split(","))
    assert listing(http)["data"][0]["sparkline"] is None


def test_any_part_of_a_list_is_read(served: Served, http: httpx.Client) -> None:
    ids = sorted((submit(served.database) for _ in range(5)), reverse=True)
    for sort in ("active", "-created_at", "-queue"):
        assert [row["id"] for row in listing(http, sort=sort, offset=3, limit=5)["data"]] == ids[3:], sort
    assert listing(http, offset=5)["data"] == []
    for wrong in ({"offset": -1}, {"offset": 2_000_000}, {"sort": "-active"}):
        assert http.get("/api/jobs", params=wrong).status_code == 422, wrong


def test_curves_that_take_too_long_come_with_a_later_answer(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparklines, "BUDGET_S", 0.0)
    for _ in range(3):
        submit(served.database)
        store(served.database, claim(served.database), StepTrained(1, 0, 2.5, 1e-3, 1.0, 10.0, 0.0))
    seen = [[row["sparkline"] for row in listing(http, fields="sparkline")["data"]].count([2.5]) for _ in range(3)]
    assert seen == [1, 2, 3]
