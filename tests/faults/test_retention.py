"""Promise 22: retention removes no file that a row needs and nothing that has not ended, wherever it is killed."""

import random
import subprocess
import sys
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
import shutil
import sys
from pathlib import Path
from pydantic import SecretStr
from apt_jobs.artifacts import folders
from apt_jobs.db import retention as rows
from apt_jobs.db.engine import Database
from apt_jobs.operations import retention
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings

def stepwise(module, name):
    real = getattr(module, name)
    def call(*arguments, **options):
        step()
        answer = real(*arguments, **options)
        step()
        return answer
    setattr(module, name, call)

def step():
    print("step", flush=True)
    sys.stdin.readline()

retention.JOBS_AT_ONCE = 2
stepwise(rows, "remove_jobs")  # afterwards: not committed yet
stepwise(rows, "remove_checkpoints")
stepwise(retention, "try_to_delete_folder")
stepwise(retention, "delete_checkpoint_files")
stepwise(folders.shutil, "rmtree")  # afterwards the folder is renamed
settings = Settings(data_dir=Path(sys.argv[1]), database_url=SecretStr(sys.argv[2]))
retention.apply_retention(Database(settings.database), settings, RetentionPolicy.model_validate_json(sys.argv[3]))
print("ended", flush=True)
"""
MAX_STEPS = 60


def test_a_killed_retention_takes_nothing_that_is_needed(tmp_path: Path, process_test_url: str) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(process_test_url))
    database = Database(settings.database)
    mark_data_directory(settings, database)
    with campaign(22, "kill -9 of retention at a random step") as found:
        found.on(database.dialect)
        chance = random.Random(found.seed)
        unended: set[str] = set()
        for _ in range(count(2, 100)):
            unended |= add_jobs(database, settings, chance)
            kill_at(settings, process_test_url, chance.randrange(MAX_STEPS))
            found.fault("kill")
            found.trials += JOBS_A_ROUND
            found.violations += violations(database, settings, unended)
        apply_retention(database, settings, POLICY)
        sweep_orphans(database, settings, -60.0)  # without a grace: nothing else writes here
        found.violations += violations(database, settings, unended)
        found.violations += left_over(database, settings)
    database.dispose()


def kill_at(settings: Settings, url: str, num_steps: int) -> None:
    """Kill a retention when it has gone so many steps, or has ended."""
    command = [sys.executable, "-c", PRUNER, str(settings.root), url, POLICY.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(num_steps):
            line = process.stdout.readline()
            assert line in ("step\n", "ended\n"), line
            if line == "ended\n":
                break
            process.stdin.write("\n")
            process.stdin.flush()
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
