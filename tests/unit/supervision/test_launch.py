"""What the ranks of a node see: where they may listen, and no progress bars of our own trainer."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.errors import InvalidInput, Unavailable
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.launch import _command, _environment, limits_of, require_limits
from tests.integration.run_files import run_file_in

SPEC = TrainSpec(kind="train")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
BAR = "import sys, tqdm; list(tqdm.tqdm(range(3))); sys.exit(0)"


@pytest.fixture(autouse=True)
def no_interfaces_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*INTERFACES, "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)


def test_one_node_listens_on_loopback_whatever_the_worker_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in INTERFACES:
        monkeypatch.setenv(name, "eth0")
    run_file = run_file_in(tmp_path, SPEC)
    environment = _environment(Settings(network_interface="eth0"), run_file, 0, [])
    assert [environment[name] for name in INTERFACES] == ["lo", "lo"]
    assert "--rdzv-endpoint=127.0.0.1:0" in _command(Settings(), run_file, 0)


def test_several_nodes_listen_on_the_named_interface_or_the_one_of_the_rendezvous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = run_file_in(tmp_path, SPEC, rendezvous="127.0.0.1:29400")
    for node_rank in (0, 1):
        for settings in (Settings(), Settings(network_interface="lo")):
            environment = _environment(settings, run_file, node_rank, [])
            assert [environment[name] for name in INTERFACES] == ["lo", "lo"]
    assert "--rdzv-conf=node_rank=0,listen=127.0.0.1" in _command(Settings(), run_file, 0)
    assert "--rdzv-conf=node_rank=1" in _command(Settings(), run_file, 1)
    with pytest.raises(Unavailable, match="is not on this machine"):
        _environment(Settings(network_interface="no-such-0"), run_file, 1, [])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # the operator names it there
    environment = _environment(Settings(), run_file, 1, [])
    assert [environment[name] for name in INTERFACES] == ["lo", "ib0"]


def test_only_our_own_trainer_draws_no_progress_bars(tmp_path: Path) -> None:
    shown = {}
    for entry_point in (None, "script.py"):
        environment = _environment(Settings(), run_file_in(tmp_path, SPEC, entry_point=entry_point), 0, [])
        ended = subprocess.run([sys.executable, "-c", BAR], env=environment, capture_output=True, text=True, check=True)
        shown[entry_point] = "3/3" in ended.stderr
    assert shown == {None: False, "script.py": True}


def test_what_was_compiled_is_kept_in_the_data_directory_for_all_jobs(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    folders = {
        _environment(settings, run_file_in(tmp_path / name, SPEC), 0, [])["TORCHINDUCTOR_CACHE_DIR"]
        for name in ("one", "two")
    }
    assert folders == {str(settings.root / "compile_cache")}


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_of_a_rank_wait_without_a_busy_loop_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert _environment(Settings(), run_file_in(tmp_path, SPEC), 0, [])["OMP_WAIT_POLICY"] == expected


def test_limits_that_would_not_hold_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(job_max_processes=100, job_max_file_bytes=1 << 30)
    assert limits_of(settings) == {resource.RLIMIT_NPROC: 100, resource.RLIMIT_FSIZE: 1 << 30}
    assert limits_of(Settings()) == {}
    require_limits(Settings())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(InvalidInput, match="does not hold for root"):
        require_limits(settings)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda name: (50, 50))
    with pytest.raises(InvalidInput, match="above that of this process, 50"):
        require_limits(settings)
