"""The site builds without a warning and asks no other host, and generated pages say what the code says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.cli import app
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.settings import Settings
from scripts.reference import FOLDER, ROOT, pages

NAMED_HOSTS = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*\bhref=["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return pages()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_has_its_place_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        index = site / name.parent if page.stem in ("index", "README") else site / name
        assert (index / "index.html").is_file(), page


def test_the_site_asks_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert NAMED_HOSTS.findall(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet


def test_every_page_that_is_seen_in_the_browser_shows_it() -> None:
    pictures = {picture.name for picture in (ROOT / "docs" / "images").glob("*.png")}
    shown = {
        name
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for name in re.findall(r"!\[[^\]]+\]\([^)]*?([\w-]+\.png)\)", page.read_text())
    }
    assert shown <= pictures
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        assert re.search(r"!\[", page.read_text()), f"{page.name} shows no picture"


def test_generated_pages_are_up_to_date(generated: dict[str, str]) -> None:
    stale = [name for name, text in generated.items() if (FOLDER / name).read_text() != text]
    assert stale == [], "run: make generate"


def test_generated_pages_leave_nothing_out(generated: dict[str, str]) -> None:
    assert all(f"`APT_JOBS_{name.upper()}`" in generated["settings.md"] for name in Settings.model_fields)
    assert all(f"| `{name}` |" in generated["job_options.md"] for name in TrainingOptions.model_fields)
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"## apt-jobs {name}\n" in generated["command_line.md"]
    for name in ("`Unavailable`", "`urn:apt-jobs:invalid-request`"):
        assert name in generated["errors.md"]
