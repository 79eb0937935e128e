"""Which HTTP connections give way when there are too many: those that have shown no key and wait, the oldest first.

Limits hold for a process: of all connections, and of those from one address that have shown no key. Whoever came with a
key or a session is a stranger no more, so a crowd that sends nothing takes no place from others.
"""

from collections import defaultdict
from typing import Protocol


class Connection(Protocol):
    """What the table knows of a connection."""

    @property
    def address(self) -> str:
        """Where it comes from."""
        ...

    @property
    def has_shown_key(self) -> bool:
        """Whether its newest request came with a valid key or session."""
        ...

    def drop(self) -> None:
        """End it at once."""
        ...


class ConnectionTable:
    """The connections of a process. A connection waits while no request of it is being answered."""

    def __init__(self, max_connections: int, max_per_address: int) -> None:
        self._max_connections, self._max_per_address = max_connections, max_per_address
        self._strangers: dict[str, dict[Connection, None]] = defaultdict(dict)  # by address
        self._waiting: dict[Connection, None] = {}  # the oldest first

    def opened(self, connection: Connection, num_open: int) -> bool:
        """Take in a connection, of which there are then `num_open`; False: there is no room, and it has to go."""
        address = connection.address
        self._strangers[address][connection] = None
        self._waiting[connection] = None
        is_too_many = num_open > self._max_connections
        if len(self._strangers[address]) > self._max_per_address:
            self._recognize(address)
            if len(self._strangers[address]) > self._max_per_address and not self._drop_one_of(address, connection):
                self.closed(connection)
                return False
        elif is_too_many and not self._drop_one(connection):
            self.closed(connection)
            return False
        return True

    def busy(self, connection: Connection) -> None:
        """Note that a whole head has come."""
        self._waiting.pop(connection, None)

    def waiting(self, connection: Connection) -> None:
        """Note that a request was answered."""
        self._waiting[connection] = None
        if connection.has_shown_key:
            self._forget_stranger(connection)

    def closed(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self._waiting.pop(connection, None)
        self._forget_stranger(connection)

    def _forget_stranger(self, connection: Connection) -> None:
        strangers = self._strangers.get(connection.address)
        if strangers is not None:
            strangers.pop(connection, None)
            if not strangers:
                del self._strangers[connection.address]

    def _recognize(self, address: str) -> None:
        """Take those whose key was found valid meanwhile off the list."""
        for connection in [one for one in self._strangers[address] if one.has_shown_key]:
            self._strangers[address].pop(connection)

    def _drop_one_of(self, address: str, newest: Connection) -> bool:
        return self._drop_first([one for one in self._strangers[address] if one in self._waiting and one is not newest])

    def _drop_one(self, newest: Connection) -> bool:
        waiting = [one for one in self._waiting if one is not newest]
        return self._drop_first([one for one in waiting if not one.has_shown_key] or waiting)

    def _drop_first(self, candidates: list[Connection]) -> bool:
        if not candidates:
            return False
        self.closed(candidates[0])
        candidates[0].drop()
        return True
