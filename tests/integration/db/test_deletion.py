"""Deletion on both dialects: no job goes whose checkpoint another one needs."""

from typing import Any

import pytest

from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.steering import delete_job as delete_rows
from apt_jobs.db.steering import request_cancel
from apt_jobs.errors import Conflict
from apt_jobs.jobs.spec import parse_spec
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import running, saved, store


@pytest.mark.parametrize(
    ("fields", "needs_it"),
    [
        ({"kind": "train", "base_model": "ckpt_a"}, True),
        ({"kind": "generate", "texts": ["x"], "model": "ckpt_a"}, True),
        ({"kind": "generate", "texts": ["x"], "model": "JOB@best"}, True),
        ({"kind": "train", "base_model": "ckpt_b"}, False),
    ],
)
def test_a_job_whose_checkpoint_another_one_needs_stays(
    database: Database, fields: dict[str, Any], needs_it: bool
) -> None:
    base = running(database)
    store(database, base, saved("a", 1))
    with database.write() as session:
        jobs.finish(session, base.id, base.attempt, JobState.SUCCEEDED)
    if str(fields.get("model")).startswith("JOB"):
        fields = {**fields, "model": f"{base.id}@best"}
    with database.write() as session:
        other = jobs.insert_job(session, parse_spec(fields)).id
    with database.write() as session:
        if needs_it:
            with pytest.raises(Conflict, match=f"needed by job {other}, which is queued"):
                delete_rows(session, base.id)
            request_cancel(session, other)
        delete_rows(session, base.id)


def test_the_base_of_an_adapter_that_was_saved_stays(database: Database) -> None:
    base = running(database)
    store(database, base, saved("a", 1))
    adapter = running(database, base_model="ckpt_a", training={"lora": {}})
    store(database, adapter, saved("b", 1))
    with database.write() as session:
        for job in (base, adapter):
            jobs.finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    with database.write() as session:
        with pytest.raises(Conflict, match=f"needed by job {adapter.id}, which is succeeded"):
            delete_rows(session, base.id)
        delete_rows(session, adapter.id)
        delete_rows(session, base.id)
