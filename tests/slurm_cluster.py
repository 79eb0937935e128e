"""A Slurm of a test: one controller and two nodes as processes of this machine, on ports of their own, ended by pid."""

import getpass
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from apt_jobs.run.parent import die_with_parent
from tests.conftest import some_port

NODES = ("n0", "n1")
START_DEADLINE_S = 60.0
GRACE_S = 20  # between Slurm's SIGTERM and SIGKILL
PARTITIONS = f"""
PartitionName=low Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={GRACE_S}
PartitionName=high Nodes=n[0-1] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser={user}
SlurmctldPort={controller_port}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first_port} CPUs=8 RealMemory=2000 State=UNKNOWN
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second_port} CPUs=8 RealMemory=2000 State=UNKNOWN
"""
WRAPPER = """#!/bin/sh
# sbatch, which does once what the file `fault` says
mode=$(cat {folder}/fault 2>/dev/null); rm -f {folder}/fault
script=$(cat)
submit() {{ printf '%s\\n' "$script" | {sbatch} "$@"; }}
case "$mode" in
  lose) submit "$@" >/dev/null; echo "sbatch: error: Socket timed out on send/recv operation"; exit 1;;
  twice) submit "$@"; submit "$@";;
  never) exec sleep 600;;
  late) setsid sh -c 'sleep 6; printf "%s\\n" "$0" | {sbatch} "$@"' "$script" "$@" >/dev/null 2>&1 & exec sleep 600;;
  *) submit "$@";;
esac
"""


class SlurmCluster:
    """Its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        (folder / "bin").mkdir()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        values = {
            "user": getpass.getuser(),
            "folder": folder,
            "controller_port": some_port(),
            "first_port": some_port(),
            "second_port": some_port(),
        }
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**values) + PARTITIONS)
        wrapper = folder / "bin" / "sbatch"
        wrapper.write_text(WRAPPER.format(folder=folder, sbatch=shutil.which("sbatch")))
        wrapper.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """What a worker of this cluster has in its environment: an `sbatch` that can fail, before the real one."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def fail_next_sbatch(self, how: str) -> None:
        """`lose`: its answer is lost; `twice`; `never`: it hangs; `late`: it hangs, and the job comes all the same."""
        (self.folder / "fault").write_text(how)

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D")

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str) -> None:
        """kill -9 of one process: jobs on a node live on."""
        self._processes[name].kill()
        self._processes[name].wait()

    def lose_node(self, name: str) -> None:
        """kill -9 of all that runs on a node, as a power cut does."""
        self.kill(name)
        steps = {parent for one in psutil.process_iter() if self._is_on(one, name) and (parent := _daemon_of(one))}
        lost = [*steps, *(child for step in steps for child in _children(step))]
        for one in lost:  # its daemons first, which would report
            with suppress(psutil.Error):
                one.kill()

    def ask(self, *command: str) -> str:
        """Run one of Slurm's commands."""
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def rows(self, *columns: str) -> list[list[str]]:
        """What `squeue` says of all jobs."""
        lines = self.ask("squeue", "--noheader", "--states=all", f"--format={'|'.join(columns)}").splitlines()
        return [line.split("|") for line in lines]

    def wait_until_idle(self, nodes: Sequence[str] = NODES) -> None:
        """Wait until the nodes have registered."""
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                states = self.ask("sinfo", "--noheader", "-N", "--format=%N %t", "--partition=low").splitlines()
            except subprocess.CalledProcessError:
                states = []
            if {f"{node} idle" for node in nodes} <= set(states):
                return
            assert time.monotonic() < deadline, f"{states}; {self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        return "\n".join(file.read_text()[-3_000:] for file in self.folder.glob("*.log"))

    def close(self) -> None:
        for name in NODES:
            if name in self._processes:
                self.lose_node(name)
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _start(self, name: str, *command: str) -> None:
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        environment["PATH"] += f"{os.pathsep}/usr/sbin"
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )

    def _is_on(self, process: psutil.Process, node: str) -> bool:
        """Whether it is a task of a job on the node."""
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        is_ours = environment.get("SLURM_CONF") == str(self.folder / "slurm.conf")
        return is_ours and environment.get("SLURMD_NODENAME") == node


def _daemon_of(process: psutil.Process) -> psutil.Process | None:
    """The slurmstepd that started a process."""
    try:
        parent = process.parent()
        return parent if parent is not None and parent.name().startswith("slurmstepd") else None
    except psutil.Error:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster whose nodes are idle; everything that it starts is ended."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start_controller()
        for node in NODES:
            cluster.start_node(node)
        cluster.wait_until_idle()
        yield cluster
    finally:
        cluster.close()
