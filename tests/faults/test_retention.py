"""Promise 22: retention removes no file that a row needs and nothing that has not ended, wherever it is killed."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import select

from apt_jobs.db.engine import Database
from apt_jobs.db.model_aliases import list_aliases, set_alias
from apt_jobs.db.models import Checkpoint, Job
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.operations.data_directory import mark_data_directory
from apt_jobs.operations.retention import apply_retention
from apt_jobs.operations.sweep_orphans import sweep_orphans
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings
from tests.faults.record import campaign, count
from tests.integration.operations.kept_jobs import kept_job

JOBS_A_ROUND = 12
POLICY = RetentionPolicy(days=30, checkpoint_days=5, run_days=5, log_days=5)
PRUNER = """
import sys
from pathlib import Path
from pydantic import SecretStr
from apt_jobs.db.engine import Database
from apt_jobs.errors import Conflict
from apt_jobs.operations import retention
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings

retention.JOBS_AT_ONCE = 2  # more places to be killed at
settings = Settings(data_dir=Path(sys.argv[1]), database_url=SecretStr(sys.argv[2]))
database = Database(settings.database)
policy = RetentionPolicy.model_validate_json(sys.argv[3])
for line in sys.stdin:
    print("begins", flush=True)
    retention.apply_retention(database, settings, policy)
    print("ended", flush=True)
"""


def test_a_killed_retention_takes_nothing_that_is_needed(tmp_path: Path, process_test_url: str) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(process_test_url))
    database = Database(settings.database)
    mark_data_directory(settings, database)
    with campaign(22, "kill -9 of retention at a random moment") as found:
        found.on(database.dialect)
        chance = random.Random(found.seed)
        unended: set[str] = set()
        for _ in range(count(2, 100)):
            unended |= add_jobs(database, settings, chance)
            with pruner(settings, process_test_url) as process:
                time.sleep(chance.uniform(0.0, 0.15))
                process.kill()
            found.fault("kill")
            found.trials += JOBS_A_ROUND
            found.violations += violations(database, settings, unended)
        apply_retention(database, settings, POLICY)
        sweep_orphans(database, settings, -60.0)  # without a grace: nothing else writes here
        found.violations += violations(database, settings, unended)
        found.violations += left_over(database, settings)
    database.dispose()


@contextmanager
def pruner(settings: Settings, url: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has begun to remove."""
    command = [sys.executable, "-c", PRUNER, str(settings.root), url, POLICY.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "begins\n"
        try:
            yield process
        finally:
            process.kill()


def add_jobs(database: Database, settings: Settings, chance: random.Random) -> set[str]:
    """Add old and young jobs of all kinds; return those that have not ended."""
    unended: set[str] = set()
    for _ in range(JOBS_A_ROUND):
        days = chance.choice([None, 1.0, 10.0, 50.0, 50.0])
        losses = {step: chance.choice([None, chance.random()]) for step in range(chance.randrange(4))}
        state = chance.choice([JobState.SUCCEEDED, JobState.FAILED])
        job_id = kept_job(database, settings, days=days, losses=losses, state=state)
        if days is None:
            unended.add(job_id)
        with database.write() as session:
            ids = list(session.scalars(select(Checkpoint.id).where(Checkpoint.job_id == job_id)))
            if ids and chance.random() < 0.3:
                set_alias(session, f"alias-{job_id[4:]}", chance.choice(ids))
    return unended


def violations(database: Database, settings: Settings, unended: set[str]) -> list[str]:
    """Say what a row promises and is not there."""
    with database.read() as session:
        checkpoints = {row.id: row.filename for row in session.scalars(select(Checkpoint))}
        states = {row.id: row.state for row in session.execute(select(Job.id, Job.state))}
        aliases = list_aliases(session)
    found = [
        f"{name} is registered and has no files"
        for name in checkpoints.values()
        if not (settings.checkpoints_dir / name / "model.safetensors").is_file()
    ]
    found += [f"alias {name} stands for nothing" for name, model in aliases.items() if model not in checkpoints]
    found += [
        f"{job_id} had not ended and is gone" for job_id in unended if states.get(job_id) in (None, *TERMINAL_STATES)
    ]
    return found + [f"the run of {job_id} is gone" for job_id in unended if not (settings.runs_dir / job_id).is_dir()]


def left_over(database: Database, settings: Settings) -> list[str]:
    """Say what no row names and is still there."""
    with database.read() as session:
        names = set(session.scalars(select(Checkpoint.filename)))
        ids = set(session.scalars(select(Job.id)))
    saved = [f"{path.parent.name}/{path.name}" for path in settings.checkpoints_dir.glob("*/*")]
    jobs = [path.name for root in (settings.checkpoints_dir, settings.runs_dir) for path in root.iterdir()]
    return [f"{name} is left" for name in saved if name not in names] + [
        f"{name} is left" for name in jobs if name not in ids
    ]
