"""The files of examples/recipes: commands, options, settings and times are those of this version."""

import configparser
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from apt_jobs.cli import app
from apt_jobs.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"
PAGE = (ROOT / "docs" / "how-to" / "orchestrators.md").read_text()
FILES = sorted(path for path in RECIPES.rglob("*") if path.is_file())
STOP_S = Settings.model_fields["drain_timeout_s"].default + 2 * Settings.model_fields["stop_timeout_s"].default


def unit_of(path: Path) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text())
    return unit


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Find the specifications of pods in a manifest."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def commands(path: Path) -> Iterator[list[str]]:
    """Find the arguments of each `apt-jobs` that a file starts."""
    if path.parts[-2] == "kubernetes":
        for pod in pods(documents(path)):
            yield from (container["args"] for container in pod["containers"])
    else:
        for line in path.read_text().splitlines():
            if found := re.search(r"(?:^ExecStart(?:Pre)?=\S*|exec )(?:apt-jobs)? ?(worker .*|web|migrate)$", line):
                yield shlex.split(found.group(1).replace("%i", "train"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_recipe_starts_what_this_version_has(path: Path) -> None:
    found = list(commands(path))
    assert found or path.name == "scaled_object.yaml"
    for arguments in found:
        group: Any = typer.main.get_command(app)
        words = list(arguments)
        while hasattr(group, "commands"):
            group = group.commands[words.pop(0)]
        group.make_context(group.name, words)  # parses, runs nothing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_recipe_names_settings_that_there_are(path: Path) -> None:
    names = set(re.findall(r"APT_JOBS_([A-Z_]+)", path.read_text()))
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert path.name in PAGE or path.suffix == ".service"


@pytest.mark.parametrize("path", sorted((RECIPES / "kubernetes").iterdir()), ids=lambda path: path.name)
def test_a_manifest_leaves_time_to_save(path: Path) -> None:
    for document in documents(path):
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(document)
        for pod in pods(document):
            assert pod["terminationGracePeriodSeconds"] > STOP_S
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
                assert container["resources"]["limits"]["nvidia.com/gpu"]


def test_the_scaled_object_scales_the_deployment_by_what_waits_and_runs() -> None:
    [scaled], [deployment] = (
        documents(RECIPES / "kubernetes" / f"{name}.yaml") for name in ("scaled_object", "worker_deployment")
    )
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["spec"]["minReplicaCount"] == 0
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    assert query.removesuffix(" or vector(0)") in PAGE
    [arguments] = commands(RECIPES / "kubernetes" / "worker_deployment.yaml")
    assert f'queue="{arguments[arguments.index("--queue") + 1]}"' in query
    assert "apt_jobs_jobs{" in query


def test_the_nodes_of_the_jobset_find_their_lead() -> None:
    [jobset] = documents(RECIPES / "kubernetes" / "pool_jobset.yaml")
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    lead, node = jobset["spec"]["replicatedJobs"]
    pools = {
        arguments[arguments.index("--pool") + 1] for arguments in commands(RECIPES / "kubernetes" / "pool_jobset.yaml")
    }
    assert len(pools) == 1
    [pod] = pods(lead)
    [host] = [one["value"] for one in pod["containers"][0]["env"] if one["name"] == "APT_JOBS_RENDEZVOUS_HOST"]
    network, name = jobset["spec"]["network"], jobset["metadata"]["name"]
    assert host == f"{name}-{lead['name']}-0-0.{network['subdomain']}"
    assert node["replicas"] >= 1


@pytest.mark.parametrize("path", sorted((RECIPES / "systemd").iterdir()), ids=lambda path: path.name)
def test_a_unit_restarts_and_leaves_time_to_save(path: Path) -> None:
    service = unit_of(path)["Service"]
    assert service["Restart"] == "always"
    if "worker@" in path.name:
        assert service["KillMode"] == "mixed"
        assert int(service["TimeoutStopSec"]) > STOP_S


def test_skypilot_and_dstack_are_told_of_the_service() -> None:
    [sky], [dstack] = (documents(RECIPES / name) for name in ("skypilot.yaml", "dstack.yml"))
    needed = {"APT_JOBS_DATA_DIR", "APT_JOBS_DATABASE_URL", "APT_JOBS_REDIS_URL"}
    assert set(sky["envs"]) == {one.partition("=")[0] for one in dstack["env"]} == needed
    assert sky["envs"]["APT_JOBS_DATA_DIR"] in sky["file_mounts"]
    assert dstack["volumes"][0]["path"] == "/data"
    assert dstack["stop_duration"] == "3m"
