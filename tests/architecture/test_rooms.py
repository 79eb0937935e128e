"""One rule, one room: what only one module may do, found by reading the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "apt_jobs"
MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 400
LONG = {"web/api/endpoint.py:endpoint"}  # a decorator: most of its lines are those of the functions in it
INPUT_AND_OUTPUT = {"os", "io", "pathlib", "shutil", "socket", "subprocess", "tempfile"}


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "node_modules" not in path.parts:
            yield str(path.relative_to(PACKAGE)), path.read_text()


@pytest.mark.parametrize(
    ("rule", "pattern", "rooms"),
    [
        (
            "a path is made from an id",  # not of a temporary file
            r"settings\.(checkpoints_dir|datasets_dir|files_dir|local_models_dir|runs_dir)\s*/(?! f\"\.)",
            ["artifacts/"],
        ),
        ("a folder with config.json is a model", r"/ \"config\.json\"", ["artifacts/models.py"]),
        (
            "a folder is removed",
            r"shutil\.rmtree\(",
            [
                "artifacts/",
                "run/",
                "training/checkpoint.py",
                "training/prepare.py",
                "gradient_monitor/callbacks/lightning_run.py",
            ],
        ),
        ("a wait doubles", r"\b2(\.0)?\s*\*\*\s*[a-z(]|(wait|pause|delay|_s)\w* \*= 2\b", ["backoff.py"]),
        (
            "heartbeats are counted",
            r"\*\s*(self\._?)?(settings\.)?heartbeat_s",
            ["operations/liveness.py", "settings.py"],
        ),
        ("a wait with a limit swallows no cancellation", r"asyncio\.wait_for\(", []),  # it does before Python 3.12
        ("a job is steered", r"from apt_jobs\.db\.steering import", ["operations/", "db/schedules.py"]),
        (
            "a file between processes is written",
            r"(commands|outcome|share)_path(\(.*\))?\.(write|read)_",
            ["jobs/"],
        ),
    ],
)
def test_a_rule_is_in_its_room_alone(rule: str, pattern: str, rooms: list[str]) -> None:
    found = {name for name, text in sources() if re.search(pattern, text)}
    assert {name for name in found if not name.startswith(tuple(rooms))} == set(), rule


def test_the_diagnosis_does_no_input_and_output() -> None:
    for name, text in sources():
        if name.startswith("diagnosis/"):
            nodes = list(ast.walk(ast.parse(text)))
            imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert imported & INPUT_AND_OUTPUT == set(), name


def test_functions_and_files_are_short() -> None:
    long = [name for name, text in sources() if text.count("\n") > MAX_FILE_LINES]
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES and f"{name}:{node.name}" not in LONG:
                    long.append(f"{name}:{node.name} ({num_lines} lines)")
    assert long == []
