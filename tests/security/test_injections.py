"""Job specs that try to run something: refused by their form, or carried to the ranks as plain data."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from apt_jobs.db.access import Role
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim_next, get_job, insert_job
from apt_jobs.jobs.printable import first_unprintable
from apt_jobs.jobs.spec import AnyJobSpec, TrainSpec
from apt_jobs.settings import Settings
from tests.security.attacked import AttackedWeb

ROOT = Path(__file__).parents[2]
SHELL = [
    *("; touch {canary}", "| touch {canary}", "&& touch {canary}", "$(touch {canary})", "`touch {canary}`"),
    *("\ntouch {canary}\n", "' ; touch {canary} #", '" ; touch {canary} #', "${{IFS}}touch${{IFS}}{canary}", "\x00"),
    *("--nproc-per-node=99", "--", "-m os", "-c 'import os'", "--run-file=/etc/passwd", "--log-dir=/", "@/etc/passwd"),
    *("%(asctime)s", "{{0.__class__}}", "{{{{7*7}}}}", "%s%n", "<script>alert(1)</script>", "../../etc/passwd"),
    *("\u202etxt.exe", "'; DROP TABLE jobs; --"),
]
ENVIRONMENT = [
    *("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT"),
    *("PATH", "BASH_ENV", "IFS", "NCCL_NET_PLUGIN", "TORCH_EXTENSIONS_DIR", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR"),
    *("APT_JOBS_DATABASE_URL", "APT_JOBS_ENTRY_POINTS", "APT_JOBS_RUN_FILE", "CC", "CUDA_HOME", "TRITON_CACHE_DIR"),
    *("TORCHINDUCTOR_CACHE_DIR", "HF_MODULES_CACHE", "GCONV_PATH", "PROMPT_COMMAND", "NODE_OPTIONS", "GIT_SSH_COMMAND"),
]
CODE = [
    *("os:system", "subprocess:run", "builtins:exec", "os.system", "__import__('os')", "/tmp/evil.py", "evil.py"),
    *("language-model:evil", "..evil", "apt_jobs.training.loop:train", "-m", "--", "-c", "http://evil/x.py"),
]
UNKNOWN_FIELDS = ["env", "environment", "command", "cmd", "args", "script", "image", "docker", "volumes", "user", "cwd"]


def test_there_are_as_many_as_the_checklist_asks_for() -> None:
    assert len(SHELL) + len(ENVIRONMENT) + len(CODE) + len(UNKNOWN_FIELDS) >= 60


@pytest.mark.parametrize("field", ["entry_point", "dataset", "base_model", "queue"])
@pytest.mark.parametrize("value", [*SHELL, *CODE])
def test_a_reference_is_a_name_or_refused(web: AttackedWeb, field: str, value: str) -> None:
    with web.client(web.keys[Role.SUBMITTER]) as client:
        answer = client.post("/api/jobs", json={"kind": "train", field: value, "labels": {"from": "injection"}})
    if answer.status_code == 202:  # a name that nobody has: a worker refuses it, see the next test
        assert field in ("entry_point", "queue")
        assert value.replace(".", "").replace("_", "").replace("-", "").isalnum()
    else:
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == f"#/{field}"


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_no_field_sets_a_variable_of_the_environment(name: str) -> None:
    for field in UNKNOWN_FIELDS:
        for value in ({name: "evil"}, [f"{name}=evil"], f"{name}=evil"):
            _refused({"kind": "train", field: value})
    _refused({"kind": "train", "arguments": {f"{name}=evil x": "x"}})
    _refused({"kind": "train", "model": {name: 1}})
    _refused({"kind": "train", "training": {name: 1}})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_ranks": "1 --nnodes=9"},
        {"num_ranks": True},
        {"num_ranks": 1.5},
        {"num_ranks": 1e9},
        {"device": "cuda; touch x"},
        {"arguments": {"nested": {"a": 1}}},
        {"arguments": {"list": ["a"]}},
        {"arguments": {"--flag": "x"}},
        {"arguments": {"": "x"}},
        {"arguments": {"a\n": "x"}},
        {"labels": {"a=b": "x"}},
        {"name": 5},
        {"kind": "shell"},
        {"kind": ["train"]},
        {"training": {"precision": "fp32; x"}},
    ],
)
def test_typed_fields_take_only_their_type(fields: dict[str, Any]) -> None:
    _refused({"kind": "train", **fields})


@pytest.fixture
def database(tmp_path: Path, sqlite_url: str) -> Iterator[Database]:
    opened = Database(sqlite_url)
    yield opened
    opened.dispose()


def test_an_unregistered_entry_point_does_not_start(tmp_path: Path, sqlite_url: str, database: Database) -> None:
    for entry_point in ("os.system", "evil.py", "apt_jobs.training.loop"):
        job_id = _supervise(database, sqlite_url, tmp_path, TrainSpec(kind="train", entry_point=entry_point))
        with database.read() as session:
            job = get_job(session, job_id)
        assert job.state == "queued"  # handed back: another worker may have it
        assert f"no entry point {entry_point!r}" in str(job.reason)
        assert not (tmp_path / "data" / "runs" / job_id / "attempt-1" / "torchrun.log").exists()


def test_what_is_taken_arrives_as_data(tmp_path: Path, sqlite_url: str, database: Database) -> None:
    canary = tmp_path / "canary"
    texts = [text.format(canary=canary) for text in SHELL if "\x00" not in text]
    arguments: dict[str, bool | int | float | str] = {
        **{f"text{number}": text for number, text in enumerate(texts)},
        **dict.fromkeys(ENVIRONMENT, "/evil"),
    }
    spec = TrainSpec(
        kind="train",
        entry_point="record",
        name=next(text for text in texts[3:] if first_unprintable(text) is None),
        labels={f"label{number}": text for number, text in enumerate(texts) if first_unprintable(text) is None},
        arguments=arguments,
    )
    job_id = _supervise(database, sqlite_url, tmp_path, spec)
    with database.read() as session:
        job = get_job(session, job_id)
    assert job.state == "succeeded", (job.reason, job.error)
    seen = json.loads((tmp_path / "data" / "runs" / job_id / "attempt-1" / "seen.json").read_text())
    assert seen["arguments"] == arguments
    assert not any("/evil" in value for value in seen["environment"].values())
    assert not any(text in part for text in texts for part in seen["command"] if len(text) > 2)
    ours = {name for name in seen["environment"] if name.startswith("APT_JOBS_")}
    assert ours == {"APT_JOBS_ATTEMPT", "APT_JOBS_WORKER", "APT_JOBS_RUN_FILE"}  # whose process it is; no setting
    assert not canary.exists()


def _refused(spec: dict[str, Any]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyJobSpec)
    with pytest.raises(ValidationError):
        adapter.validate_json(json.dumps(spec))


def _supervise(database: Database, url: str, folder: Path, spec: TrainSpec) -> str:
    """Submit and claim a job, and run its supervisor to the end."""
    settings = Settings(data_dir=folder / "data")
    with database.write() as session:
        job_id = insert_job(session, spec).id
    with database.write() as session:
        assert claim_next(session, "train", "worker", 60.0)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "APT_JOBS_DATA_DIR": str(settings.root),
        "APT_JOBS_DATABASE_URL": url,
        "APT_JOBS_ENTRY_POINTS": json.dumps({"record": "tests.security.entry_point:record"}),
    }
    module = "apt_jobs.supervision.supervise"
    command = [sys.executable, "-m", module, f"--job-id={job_id}", "--attempt=1", "--worker-name=a"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        log = process.stderr.read()
        assert process.wait() == 0, log
    return job_id
