"""The OpenAPI document is one that generators and a linter accept without a word."""

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from apt_jobs.web.api.examples import EXAMPLES
from apt_jobs.web.api.openapi import Declaration, openapi_document
from apt_jobs.web.app import ROUTES, document
from scripts.rest_typescript import UI, run_tool

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "build" / "tools"
# Beside what the project has: openapi-python-client wants an older typer than ours, but runs with it.
PYTHON_CLIENT = ("openapi-python-client", "ruamel.yaml")
INSTALL_TIMEOUT_S = 240
DOCUMENT = document()
OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openapi") / "openapi.json"
    path.write_text(json.dumps(DOCUMENT))
    return path


@pytest.fixture(scope="module")
def python_client() -> Path:
    """Install the generator of Python clients, as constraints.txt pins it, into a folder of its own."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    there = {found.metadata["Name"]: found.version for found in distributions(path=[str(TOOLS)])}
    if any(there.get(name) != pins[name] for name in PYTHON_CLIENT):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--upgrade", "--target", str(TOOLS), *(f"{name}=={pins[name]}" for name in PYTHON_CLIENT)]
        subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
    return TOOLS


def test_openapi_typescript_writes_types_without_a_warning(file: Path, tmp_path: Path) -> None:
    printed = run_tool("openapi-typescript", str(file), "--output", str(tmp_path / "rest.ts"))
    assert not re.search(r"warn|error|✘|can't", printed, re.IGNORECASE), printed
    assert "export interface paths" in (tmp_path / "rest.ts").read_text()


def test_openapi_python_client_writes_a_client_without_a_warning(
    file: Path, tmp_path: Path, python_client: Path
) -> None:
    target, config = tmp_path / "client", tmp_path / "config.json"
    config.write_text(json.dumps({"post_hooks": []}))  # they only format what was written
    run = "import sys; sys.path.append(sys.argv.pop(1)); from openapi_python_client.cli import app; app()"
    arguments = ["generate", "--path", str(file), "--config", str(config), "--output-path", str(target)]
    command = [sys.executable, "-c", run, str(python_client), *arguments, "--fail-on-warning"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert not re.search(r"^(warning|error)|unable|skipped|could not", done.stdout, re.IGNORECASE | re.MULTILINE)
    called = {path.stem for path in target.rglob("api/*/*.py")}
    assert {operation["operationId"] for operation in OPERATIONS.values()} <= called


def test_the_linter_finds_nothing(file: Path) -> None:
    assert "valid" in run_tool("redocly", "lint", "--config", str(UI / "redocly.yaml"), str(file))


def test_schemas_have_plain_names_and_operations_have_ids() -> None:
    assert [name for name in DOCUMENT["components"]["schemas"] if not re.fullmatch(r"[A-Z][A-Za-z]*", name)] == []
    assert [name for name in DOCUMENT["components"]["schemas"] if name.endswith(("Input", "Output"))] == []
    ids = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in ids)
    assert {"list_jobs", "submit_job", "get_job", "cancel_job", "delete_job", "list_workers"} <= set(ids)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_says_what_it_is_and_which_errors_it_gives(name: str) -> None:
    operation = OPERATIONS[name]
    assert operation["summary"]
    assert operation["description"]
    assert len(operation["tags"]) == 1
    answers = operation["responses"]
    assert [status for status in answers if status.startswith("2")]
    assert {"401", "403"} <= answers.keys()
    has_body = "requestBody" in operation
    assert all((status in answers) == has_body for status in ("413", "415"))


def test_creating_operations_have_an_idempotency_key_and_mark_replays() -> None:
    declared: list[tuple[str, Declaration]] = [
        (f"{method.lower()} {route.path}", route.endpoint.declaration)  # type: ignore[attr-defined]  # these have one
        for route in ROUTES
        if hasattr(getattr(route, "endpoint", None), "declaration")
        for method in route.methods or ()  # type: ignore[attr-defined]
        if method != "HEAD"
    ]
    creating = {name for name, declaration in declared if declaration.creates}
    assert creating
    for name, operation in OPERATIONS.items():
        headers = {row["name"] for row in operation.get("parameters", ()) if row["in"] == "header"}
        assert ("Idempotency-Key" in headers) == (name in creating), name
        if name in creating:
            answer = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
            assert "Idempotent-Replayed" in answer["headers"], name


def test_every_body_has_an_example_and_examples_are_possible() -> None:
    models = {
        getattr(model, "__name__", "AnyJobSpec"): model
        for route in ROUTES
        if (declaration := getattr(getattr(route, "endpoint", None), "declaration", None)) is not None
        for model in (declaration.body, *declaration.answers.values())
        if model is not None
    }
    bodies = [operation["requestBody"]["content"] for operation in OPERATIONS.values() if "requestBody" in operation]
    for content in bodies:
        if "application/json" in content:
            assert content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1] in EXAMPLES
    for name in EXAMPLES.keys() & models.keys():
        TypeAdapter(models[name]).validate_json(json.dumps(EXAMPLES[name]))


def test_the_document_names_the_place_and_the_cookie_of_its_service() -> None:
    shown = openapi_document(ROUTES, url="/jobs", cookie="apt_session_0123")
    assert shown["servers"][0]["url"] == "/jobs"
    assert shown["components"]["securitySchemes"]["browser"]["name"] == "apt_session_0123"
    assert DOCUMENT["components"]["schemas"]["Problem"]["required"]
