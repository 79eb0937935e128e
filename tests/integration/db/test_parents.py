"""Jobs that come after others, on both dialects: held, released and ended in the transaction in which a parent ends."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from apt_jobs.db import holds, jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.job_groups import finish_succeeded
from apt_jobs.db.models import Job
from apt_jobs.db.steering import delete_job, request_cancel, request_pause, request_resume, request_retry
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, claim, job_of, saved, started, state_of, store, submit, trained


def after(*parents: str, on: str = "success") -> list[dict[str, str]]:
    return [{"job": parent, "on": on} for parent in parents]


def is_held(database: Database, job_id: str) -> bool:
    return bool(job_of(database, job_id).holds & holds.PARENTS)


def end(database: Database, job: Job, state: JobState = JobState.SUCCEEDED, reason: str | None = None) -> None:
    with database.write() as session:
        jobs.finish(session, job.id, job.attempt, state, reason=reason)


def test_a_child_waits_for_all_of_its_parents(database: Database) -> None:
    first, second = (claim_of(database, submit(database)) for _ in range(2))
    child = submit(database, after=after(first.id, second.id), priority=9)
    with database.write() as session:
        assert jobs.claim_next(session, "train", "worker-a", LEASE_S) is None
    end(database, first)
    assert is_held(database, child)
    end(database, second)
    assert claim(database).id == child


def claim_of(database: Database, job_id: str) -> Job:
    with database.write() as session:
        claimed = jobs.claim(session, job_id, "worker-a", LEASE_S)
    assert claimed is not None
    return claimed.job


def test_a_parent_that_does_not_succeed_ends_all_that_come_after_it(database: Database) -> None:
    parent = claim_of(database, submit(database))
    chain = [parent.id]
    with database.write() as session:
        for _ in range(30):
            spec = TrainSpec.model_validate({"kind": "train", "after": after(chain[-1])})
            chain.append(jobs.insert_job(session, spec).id)
    anyway = submit(database, after=after(chain[3], on="end"))
    end(database, parent, JobState.FAILED, "rank 0: ValueError: x")
    assert {state_of(database, job_id) for job_id in chain[1:]} == {"cancelled"}
    assert job_of(database, chain[1]).reason == (
        f"job {parent.id}, which it comes after, is failed: rank 0: ValueError: x"
    )
    assert (state_of(database, anyway), is_held(database, anyway)) == ("queued", False)


@pytest.mark.parametrize("outcome", [JobState.CANCELLED, JobState.DEAD])
def test_any_end_but_success_counts_as_none(database: Database, outcome: JobState) -> None:
    parent = claim_of(database, submit(database))
    child, anyway = submit(database, after=after(parent.id)), submit(database, after=after(parent.id, on="end"))
    end(database, parent, outcome)
    assert state_of(database, child) == "cancelled"
    assert claim(database).id == anyway


def test_a_parent_that_waits_again_keeps_its_children_held(database: Database) -> None:
    parent = claim_of(database, submit(database))
    child = submit(database, after=after(parent.id))
    end(database, parent, JobState.QUEUED, "drained")
    assert is_held(database, child)


def test_parents_that_end_at_once_release_their_child(database: Database) -> None:
    for _ in range(5):
        parents = [claim_of(database, submit(database)) for _ in range(4)]
        child = submit(database, after=after(*(parent.id for parent in parents)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda parent: end(database, parent), parents))
        assert claim(database).id == child


def test_an_end_that_is_undone_releases_nothing(database: Database) -> None:
    parent = claim_of(database, submit(database))
    child = submit(database, after=after(parent.id))

    def die_before_the_commit() -> None:
        with database.write() as session:
            jobs.finish(session, parent.id, parent.attempt, JobState.SUCCEEDED)
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        die_before_the_commit()
    assert (state_of(database, parent.id), is_held(database, child)) == ("running", True)
    end(database, parent)
    assert not is_held(database, child)


def test_jobs_that_end_as_a_group_release_their_children(database: Database) -> None:
    with database.write() as session:
        parent = jobs.insert_job(session, GenerateSpec(kind="generate", texts=["x"])).id
    running = claim_of(database, parent)
    child = submit(database, after=after(parent))
    with database.write() as session:
        finish_succeeded(session, {(parent, running.attempt): {"texts": []}})
    assert claim(database).id == child


def test_a_paused_child_stays_held_when_it_goes_on(database: Database) -> None:
    parent = claim_of(database, submit(database))
    child = submit(database, after=after(parent.id))
    with database.write() as session:
        request_pause(session, child)
        request_resume(session, child)
    assert is_held(database, child)
    with database.write() as session:
        request_pause(session, child)
    end(database, parent)
    with database.write() as session:
        request_resume(session, child)
    assert claim(database).id == child


def test_a_child_is_retried_when_its_parent_can_succeed_again(database: Database) -> None:
    parent = claim_of(database, submit(database))
    child = submit(database, after=after(parent.id), base_model="{{job.last_checkpoint}}")
    end(database, parent, JobState.FAILED)
    with database.write() as session, pytest.raises(Conflict, match="retry that one first"):
        request_retry(session, child)
    with database.write() as session:
        request_retry(session, parent.id)
        request_retry(session, child)
    assert is_held(database, child)
    with database.write() as session:
        request_cancel(session, child)
    again = claim_of(database, parent.id)
    store(database, again, started(), trained(1), saved("a", 1))
    end(database, again)
    with database.write() as session:
        request_retry(session, child)
    assert claim(database).spec["base_model"] == "ckpt_a"


def test_results_of_parents_are_filled_in_before_a_claim(database: Database) -> None:
    first, second = (claim_of(database, submit(database)) for _ in range(2))
    submit(
        database,
        after=after(first.id, second.id),
        entry_point="mine",
        base_model=f"{{{{{first.id}.best_checkpoint}}}}",
        arguments={"steps": f"{{{{{second.id}.step}}}}", "text": f"from {{{{ {second.id}.id }}}}", "n": 1},
    )
    store(database, first, started(), trained(1), saved("a", 1), saved("b", 2, is_best=True), saved("c", 3))
    store(database, second, started(), trained(7))
    end(database, first)
    end(database, second)
    spec = claim(database).spec
    assert spec["base_model"] == "ckpt_b"
    assert spec["arguments"] == {"steps": 7, "text": f"from {second.id}", "n": 1}


def test_a_result_that_a_parent_does_not_have_ends_the_child(database: Database) -> None:
    parent = claim_of(database, submit(database))
    child = submit(database, after=after(parent.id), base_model="{{job.best_checkpoint}}")
    end(database, parent)
    ended = job_of(database, child)
    assert (ended.state, ended.reason) == (
        "cancelled",
        f"base_model names best_checkpoint of job {parent.id}, which it does not have",
    )


def test_a_parent_that_ended_before_counts(database: Database) -> None:
    good, bad = (claim_of(database, submit(database)) for _ in range(2))
    store(database, good, started(), trained(1), saved("a", 1))
    end(database, good)
    end(database, bad, JobState.FAILED)
    submit(database, after=after(good.id), base_model="{{job.last_checkpoint}}")
    assert claim(database).spec["base_model"] == "ckpt_a"
    with pytest.raises(InvalidInput, match=f"job {bad.id}, which it comes after, is failed"):
        submit(database, after=after(bad.id))
    with pytest.raises(InvalidInput, match="there is no job"):
        submit(database, after=after("job_" + "0" * 20))
    anyway = submit(database, after=after(bad.id, on="end"))
    with database.write() as session:
        delete_job(session, bad.id)
    assert not is_held(database, anyway)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"after": [{"job": "job_x"}]}, "pattern"),
        ({"after": after("job_" + "0" * 20) * 2}, "twice"),
        ({"after": after(*(f"job_{number:020d}" for number in range(101)))}, "at most 100"),
        ({"after": [{"job": "job_" + "0" * 20, "on": "failure"}]}, "success"),
        ({"base_model": "{{job.best_checkpoint}}"}, "after has 0 jobs"),
        ({"base_model": f"{{{{job_{1:020d}.best_checkpoint}}}}", "after": after(f"job_{2:020d}")}, "not in after"),
        ({"arguments": {"a": "{{job.nope}}"}, "after": after("job_" + "0" * 20)}, "'nope' of a job"),
        ({"base_model": "{{job.step}}", "after": after("job_" + "0" * 20)}, "pattern"),
    ],
)
def test_what_no_job_can_come_after_is_refused(sqlite_database: Database, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        submit(sqlite_database, **fields)


def test_braces_of_a_script_without_parents_are_its_own(sqlite_database: Database) -> None:
    job_id = submit(sqlite_database, entry_point="mine", arguments={"template": "{{job.nope}} {{x}}"})
    assert job_of(sqlite_database, job_id).spec["arguments"] == {"template": "{{job.nope}} {{x}}"}
