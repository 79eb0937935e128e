"""What others on the machine and its network reach while trainings run.

Nothing listens beyond loopback or the named interface, nothing unpickles what it gets, no file can be read.
"""

import base64
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistStoreError

from apt_jobs.client.client import Client
from apt_jobs.supervision.network import addresses_of
from tests.acceptance.stack import DEADLINE_S, LONG, TINY, Stack, attempts_of, has_both_workers, until

LOOPBACK = {"127.0.0.1", "::1"}
SCAN_EVERY_S = 0.05
JOBS: dict[str, dict[str, Any]] = {
    "one rank": {**TINY, "num_ranks": 1},
    "two ranks": TINY,
    "FSDP2": {**TINY, "training": {**TINY["training"], "sharding": "fsdp2"}},
    "own script": {"kind": "train", "num_ranks": 2, "entry_point": "plain-loop", "arguments": {"steps": 40}},
}
Address = tuple[str, int]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("neighbours")
    folder.chmod(0o755)  # as an earlier version left it
    stack = Stack(folder)
    try:
        until(lambda: (stack.data_dir / "local.json").exists() or stack.process.poll() is not None)
        with stack.client() as client:
            until(lambda: has_both_workers(client))
        yield stack
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client


class Listeners:
    """All sockets that processes of a stack were seen to listen on, by process."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.seen: dict[Address, str] = {}
        self.of_ranks: set[Address] = set()

    def scan(self) -> set[Address]:
        """Look once; what listens now."""
        now: set[Address] = set()
        for pid in self._stack.pids():
            try:
                process = psutil.Process(pid)
                command = " ".join(process.cmdline())
                found = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            except psutil.Error:
                continue
            now |= {(at.ip, at.port) for at in found}
            self.seen |= {(at.ip, at.port): command for at in found}
            if "apt_jobs.training" in command:
                self.of_ranks |= {(at.ip, at.port) for at in found}
        return now

    def beyond(self, allowed: set[str]) -> dict[Address, str]:
        return {at: command for at, command in self.seen.items() if at[0].removeprefix("::ffff:") not in allowed}


@contextmanager
def watched(stack: Stack) -> Iterator[Listeners]:
    """Look again and again, in a thread."""
    listeners, done = Listeners(stack), threading.Event()

    def scan_on() -> None:
        while not done.wait(SCAN_EVERY_S):
            listeners.scan()

    thread = threading.Thread(target=scan_on)
    thread.start()
    try:
        yield listeners
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", JOBS)
def test_nothing_of_a_training_listens_beyond_loopback(stack: Stack, client: Client, name: str) -> None:
    with watched(stack) as listeners:
        job = client.wait(client.submit(JOBS[name])["id"])
    assert job["state"] == "succeeded", stack.story()
    assert listeners.of_ranks, "no rank was seen to listen: the test looks at the wrong processes"
    assert listeners.beyond(LOOPBACK) == {}


def test_nothing_of_a_resumed_training_listens_beyond_loopback(stack: Stack, client: Client) -> None:
    job_id = client.submit(LONG)["id"]
    until(lambda: client.checkpoints(job_id))
    client.pause(job_id)
    until(lambda: client.get(job_id)["state"] == "paused")
    with watched(stack) as listeners:
        paused_step = client.get(job_id)["step"]
        client.resume(job_id)
        until(lambda: client.get(job_id)["step"] > paused_step + 10)
        client.cancel(job_id)
        until(lambda: client.get(job_id)["state"] == "cancelled")
    assert attempts_of(client, job_id)[-1]["resumed_from_step"] == paused_step
    assert listeners.of_ranks
    assert listeners.beyond(LOOPBACK) == {}


@pytest.mark.parametrize("interface", ["lo", "another"])
def test_two_nodes_listen_on_the_named_interface_only(stack: Stack, client: Client, interface: str) -> None:
    """Both nodes are on this machine, so what they send to its own address stays in it."""
    if interface == "another":
        interface = next((name for name in psutil.net_if_addrs() if name != "lo" and has_ipv4(name)), "")
        if not interface:
            pytest.skip("this machine has no interface but loopback")
    address = addresses_of(interface)[0]
    stack.environment |= {"APT_JOBS_RENDEZVOUS_HOST": address, "APT_JOBS_NETWORK_INTERFACE": interface}
    name = f"cluster-{interface}"
    head = stack.worker("head", "train", f"--queue={name}", f"--name={name}", "--num-nodes=2")
    node = stack.worker("node", "node", f"--head={name}")
    try:
        until(lambda: {name, f"{name}/node-1"} <= {row["name"] for row in client.workers() if row["alive"]})
        with watched(stack) as listeners:
            job = client.wait(client.submit({**TINY, "queue": name, "num_nodes": 2})["id"])
    finally:
        for process in (head, node):
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
    assert job["state"] == "succeeded", stack.story()
    assert {at[0] for at in listeners.of_ranks} == {address}
    assert listeners.beyond({*LOOPBACK, address}) == {}


def has_ipv4(interface: str) -> bool:
    return any(entry.family == socket.AF_INET for entry in psutil.net_if_addrs()[interface])


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._file,)


def test_nothing_that_arrives_is_unpickled(stack: Stack, client: Client, tmp_path: Path) -> None:
    """Write an evil pickle to everything that listens, also in the words of the store, before and while they train."""
    proof = tmp_path / "it-ran"
    payload = pickle.dumps(Evil(proof))
    pickle.loads(payload)  # the payload works
    assert proof.exists()
    proof.unlink()
    job_id = client.submit({**LONG, "training": {**LONG["training"], "max_steps": 400}})["id"]
    listeners, attacked = Listeners(stack), set[Address]()
    num_written = 0
    while client.get(job_id)["state"] in ("queued", "running"):
        for at in listeners.scan() & listeners.of_ranks - attacked:
            attacked.add(at)
            num_written += write_to_store(at, payload, job_id)
            write_raw(at, payload)
    assert num_written > 0, "no store was found"
    assert len(attacked) > 1
    assert not proof.exists(), stack.story()


def write_to_store(at: Address, payload: bytes, job_id: str) -> int:
    """Set keys that torch's rendezvous, agents and process groups read; how many."""
    run_id = f"{job_id}-1"
    names = ("torch.rendezvous.none", f"torch.rendezvous.{run_id}", "evil")
    keys = [f"{prefix}{name}" for prefix in ("", "none/", f"{run_id}/", "default_pg/0//") for name in names]
    try:
        store = TCPStore(*at, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
        for key in keys:
            store.set(key, base64.b64encode(payload).decode())  # as the "c10d" rendezvous keeps its state
            store.set(f"{key}.raw", payload)  # type: ignore[arg-type]  # bytes are taken, too
    except (RuntimeError, DistStoreError):  # gloo's
        return 0
    return len(keys)


def write_raw(at: Address, payload: bytes) -> None:
    try:
        with socket.create_connection(at, timeout=1) as connection:
            connection.sendall(payload)
    except OSError:
        pass


def test_no_other_user_can_read_what_the_service_and_the_ranks_write(stack: Stack, client: Client) -> None:
    assert client.wait(client.submit(JOBS["own script"])["id"])["state"] == "succeeded"
    assert client.wait(client.submit(TINY)["id"])["state"] == "succeeded"
    own = {stack.data_dir / "logs" / "head.log", stack.data_dir / "logs" / "node.log"}  # this test's, not the service's
    written = {stack.data_dir, *stack.data_dir.rglob("*")} - own
    assert {str(path): oct(path.lstat().st_mode) for path in written if path.lstat().st_mode & 0o077} == {}
    names = {path.name for path in written}
    assert {"apt_jobs.sqlite3", "stdout.log", "model.safetensors", "worker-train.log"} <= names
    umasks = {pid: umask_of(pid) for pid in stack.pids()}
    assert {umask for umask in umasks.values() if umask is not None} == {"0077"}


def umask_of(pid: int) -> str | None:
    """Of a process; None: it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[1] for line in lines if line.startswith("Umask:")), None)
