"""The build hook: builds when sources changed, says what npm said when it fails."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BUILD_JS = """
const fs = require("fs");
fs.mkdirSync("../static", { recursive: true });
fs.writeFileSync("../static/index.html", "built");
fs.appendFileSync("../builds", "x");
"""


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose UI needs no package and no network."""
    ui = tmp_path / "apt_jobs" / "web" / "ui"
    ui.mkdir(parents=True)
    package = {"name": "ui", "version": "1.0.0", "scripts": {"build": "node build.js"}}
    (ui / "package.json").write_text(json.dumps(package))
    lock = {"name": "ui", "version": "1.0.0", "lockfileVersion": 3, "packages": {"": package}}
    (ui / "package-lock.json").write_text(json.dumps(lock))
    (ui / "build.js").write_text(BUILD_JS)
    return tmp_path


def test_the_ui_is_built_only_when_its_sources_changed(hook: ModuleType, project: Path) -> None:
    assert hook.build_ui(project)
    assert not hook.build_ui(project)
    ui = project / "apt_jobs" / "web" / "ui"
    (ui / "build.js").write_text(BUILD_JS + "// changed\n")
    assert hook.build_ui(project)
    (ui / "node_modules" / "package").mkdir(parents=True)
    (ui / "node_modules" / "package" / "index.js").write_text("not a source")
    assert not hook.build_ui(project)
    assert (ui.parent / "builds").read_text() == "xx"


def test_an_output_that_was_removed_is_built_again(hook: ModuleType, project: Path) -> None:
    hook.build_ui(project)
    (project / "apt_jobs" / "web" / "static" / "index.html").unlink()
    assert hook.build_ui(project)


def test_a_failing_build_says_what_npm_said_and_is_tried_again(hook: ModuleType, project: Path) -> None:
    script = project / "apt_jobs" / "web" / "ui" / "build.js"
    script.write_text('console.error("no such module: uplot"); process.exit(3);')
    for _ in range(2):
        with pytest.raises(
            hook.UiBuildError, match=r"(?s)npm run build.*failed with exit code 3.*no such module: uplot"
        ):
            hook.build_ui(project)


def test_the_lock_file_names_no_registry() -> None:
    lock = (ROOT / "apt_jobs" / "web" / "ui" / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    packages = json.loads(lock)["packages"]
    assert all(re.match(r"sha512-", entry["integrity"]) for path, entry in packages.items() if path)
