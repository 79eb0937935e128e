"""torchrun with our rendezvous: `python -m apt_jobs.training.launch_ranks --rdzv-backend=apt-jobs ... -m MODULE`.

The supervisor starts one on each node of an attempt; it starts the node's ranks. torchrun's own rendezvous listens on
all addresses of the machine, whatever it is told, and the default one ("c10d") unpickles what anybody writes to it.
Ours is static, as the supervisor knows every node: the head opens one store on one address, and keys and values stay
bytes and JSON. The ranks use the same store (`use_agent_store`), so nothing else listens but gloo and NCCL, which are
given an interface through the environment.
"""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import main as run_torchrun

BACKEND = "apt-jobs"  # in `--rdzv-backend`
JOIN_TIMEOUT = timedelta(seconds=600)  # for all nodes to reach the head's store; as torchrun's own


class OneAddressRendezvous(RendezvousHandler):
    """A rendezvous of nodes that are known, at a store that listens on one address of the head.

    Parameters of `--rdzv-conf`: `node_rank`, and on the head (node 0) `listen`, the address to bind to. The endpoint
    is where the other nodes reach it; port 0 lets the kernel choose, which only a single node can use.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        host, _, port = parameters.endpoint.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._run_id, self._num_nodes = parameters.run_id, parameters.max_nodes
        self._node_rank = parameters.get_as_int("node_rank", 0) or 0
        self._listen_address = str(parameters.get("listen", self._host))
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        """Return the name that torchrun checks."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Have the ranks use this store instead of opening one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open the store, or join it, and return this node's place.

        Raises:
            RendezvousConnectionError: the address is not to be had, or the head does not answer.
        """
        try:
            if self._store is None:
                self._store = self._open() if self._node_rank == 0 else self._connect(self._host, self._port)
        except (OSError, RuntimeError) as exc:
            where = f"{self._listen_address if self._node_rank == 0 else self._host}:{self._port}"
            raise RendezvousConnectionError(f"node {self._node_rank} cannot use the store at {where}: {exc}") from exc
        at = RendezvousStoreInfo(self._host, self._port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), self._node_rank, self._num_nodes, at)

    def is_closed(self) -> bool:
        """Return False: the supervisor ends attempts, not the rendezvous."""
        return False

    def set_closed(self) -> None:
        """Do nothing: there is no second round."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no node joins later."""
        return 0

    def get_run_id(self) -> str:
        """Return the attempt's id, which separates it from others at the same store."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: the store ends with this process."""
        return True

    def _open(self) -> TCPStore:
        """Listen on the one address. The ranks of this node reach the store there, not by its outer name."""
        family = socket.AF_INET6 if ":" in self._listen_address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._listen_address, self._port))
            listener.listen()
            self._host, self._port = self._listen_address, listener.getsockname()[1]
            return self._connect(self._host, self._port, listen_fd=listener.detach())  # the store closes it

    def _connect(self, host: str, port: int, listen_fd: int | None = None) -> TCPStore:
        """Connect to the store, once it listens; with `listen_fd` also be it, until all nodes have connected."""
        return TCPStore(
            host,
            port,
            self._num_nodes,
            listen_fd is not None,
            JOIN_TIMEOUT,
            multi_tenant=True,
            master_listen_fd=listen_fd,
        )


def main() -> None:
    """Entry of the process."""
    rendezvous_handler_registry.register(BACKEND, OneAddressRendezvous)
    run_torchrun()


if __name__ == "__main__":
    main()
