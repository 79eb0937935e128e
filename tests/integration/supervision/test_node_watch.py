"""What the head of an attempt learns of its further nodes."""

from pathlib import Path

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.workers import record_worker
from apt_jobs.jobs.node_share import NodeShare, ShareState, read_share, write_share
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.supervision import node_watch
from apt_jobs.supervision.node_watch import NodeWatch
from tests.integration.run_files import run_file_in


@pytest.fixture
def run_file(tmp_path: Path) -> RunFile:
    """Of an attempt on two nodes."""
    return run_file_in(tmp_path, TrainSpec(kind="train", num_nodes=2, num_ranks=2))


@pytest.fixture
def watch(database: Database, run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> NodeWatch:
    """One that looks each time it is asked."""
    monkeypatch.setattr(node_watch, "LOOK_EVERY_S", 0.0)
    return NodeWatch(database, run_file, "head", alive_within_s=60.0)


def record(database: Database, name: str) -> None:
    with database.write() as session:
        record_worker(
            session,
            name=name,
            kind="node",
            queues=[],
            hostname="machine",
            pid=1,
            version="1",
            gpus=[],
            current_job_id=None,
        )


def test_a_node_that_lives_is_not_lost(database: Database, run_file: RunFile, watch: NodeWatch) -> None:
    record(database, "head/node-1")
    assert watch.lost() is None
    write_share(run_file, 1, ShareState.JOINED)
    assert read_share(run_file, 1) == NodeShare(state=ShareState.JOINED)
    assert watch.lost() is None


def test_a_node_that_no_longer_says_it_is_alive_is_gone(
    database: Database, run_file: RunFile, watch: NodeWatch
) -> None:
    record(database, "head/node-2")
    write_share(run_file, 1, ShareState.JOINED)
    assert watch.lost() == "head/node-1 is gone"


def test_a_node_that_finished_its_share_may_go(run_file: RunFile, watch: NodeWatch) -> None:
    write_share(run_file, 1, ShareState.FINISHED)
    assert watch.lost() is None


def test_a_share_that_ended_early_is_told(database: Database, run_file: RunFile, watch: NodeWatch) -> None:
    record(database, "head/node-1")
    write_share(run_file, 1, ShareState.ENDED_EARLY, "torchrun ended with status 1")
    assert watch.lost() == "head/node-1 ended early: torchrun ended with status 1"


def test_a_node_that_does_not_join_in_time_is_told(
    database: Database, watch: NodeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(database, "head/node-1")
    monkeypatch.setattr(node_watch, "JOIN_TIMEOUT_S", 0.0)
    assert "head/node-1 did not join" in str(watch.lost())


def test_a_database_that_does_not_answer_says_nothing_of_nodes(run_file: RunFile, watch: NodeWatch) -> None:
    write_share(run_file, 1, ShareState.JOINED)
    assert watch.lost() == "head/node-1 is gone"
    watch._database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    assert watch.lost() is None
