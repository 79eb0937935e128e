"""The hashed locks that the images install from agree with pyproject.toml and constraints.txt."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
WANTED = {
    "requirements.lock": [*PROJECT["project"]["dependencies"], *EXTRAS["export"]],
    "requirements-train.lock": [*PROJECT["project"]["dependencies"], *EXTRAS["export"], *EXTRAS["train"]],
    "requirements-build.lock": PROJECT["build-system"]["requires"],
}
LOCKS = sorted(WANTED)


def locked(name: str) -> dict[str, tuple[Requirement, str]]:
    """Requirement and hashes by canonical name."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, tuple[Requirement, str]] = {}
    for line in filter(None, text.splitlines()):
        requirement, _, hashes = line.partition("--hash")
        parsed = Requirement(requirement.strip())
        found[canonicalize_name(parsed.name)] = (parsed, f"--hash{hashes}")
    return found


def pins() -> dict[str, Version]:
    rows = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): Version(version) for name, version in rows}


def version_of(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_has_one_version_and_hashes(name: str) -> None:
    for requirement, hashes in locked(name).values():
        assert requirement.url is None
        assert version_of(requirement)
        assert re.fullmatch(r"(\s*--hash=sha256:[0-9a-f]{64})+\s*", hashes), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    known = pins()
    different = {
        package: str(requirement)
        for package, (requirement, _) in locked(name).items()
        if package in known and version_of(requirement) != known[package]
    }
    assert different == {}, "run `make lock`"


@pytest.mark.parametrize("name", LOCKS)
def test_everything_that_the_project_asks_for_is_locked(name: str) -> None:
    rows = locked(name)
    for text in WANTED[name]:
        wanted = Requirement(text)
        package = canonicalize_name(wanted.name)
        assert package in rows, f"{text} is not in {name}: run `make lock`"
        assert version_of(rows[package][0]) in wanted.specifier, f"{text} in {name}: run `make lock`"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_registry(name: str) -> None:
    assert re.findall(r"https?://|--\w*index|--find-links", (ROOT / name).read_text()) == []


def test_the_images_install_nothing_without_a_hash() -> None:
    commands = re.findall(r"pip (?:install|wheel)[^&\n]*", (ROOT / "Dockerfile").read_text())
    assert len(commands) >= 4
    for command in commands:
        lock = re.search(r"--require-hashes -r (\S+)", command)
        assert lock is not None or "--no-deps" in command, command
        assert lock is None or lock.group(1) in WANTED


def test_the_service_image_has_no_torch() -> None:
    assert {"torch", "transformers"} & set(locked("requirements.lock")) == set()
