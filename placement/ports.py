"""A TCP port held from the moment it is chosen. Runs in the process that Ray placed and that will serve on it.

A port that is probed, released and bound again later can be taken in between, by another group on the same node most
of all. So the socket is bound and listening before its number is known to anyone, and is handed over open.
Does not accept connections.
"""

from __future__ import annotations

import errno
import socket
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from ray_shm.errors import PlacementError

_BACKLOG = 1024  # pending connects: every rank of a large group connects at once; the kernel caps it at somaxconn


class HeldPort:
    """A listening socket and the address to publish for it. A context manager; closing is idempotent.

    Dropped without ``take()`` or ``close()``, it is closed with a ResourceWarning.

    Attributes:
        host: the address it is bound to. port: the number, valid after ``take()`` and ``close()`` too.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._socket = listening
        address = listening.getsockname()
        self.host: str = address[0]
        self.port: int = address[1]
        self._finalizer = weakref.finalize(self, _close_dropped, listening, f"{self.host} port {self.port}")
        self._finalizer.atexit = False  # the kernel closes it; a warning at exit helps nobody

    @classmethod
    def bind(cls, host: str, port_range: tuple[int, int] | None = None) -> HeldPort:
        """Bind and listen on `host`: on a port the kernel picks, or the first free one of `port_range`.

        Args:
            host: this node's address as Ray knows it, IPv4 or IPv6, not a wildcard that others could not reach.
            port_range: first and last port, both included, 1..65535.

        Raises:
            ValueError: for a range that is empty or outside 1..65535.
            PlacementError: if no port of the range is free, or `host` is no address of this node. Nothing is left open.
        """
        candidates: Iterable[int] = (0,)
        if port_range is not None:
            first, last = require_port_range(port_range) or (0, 0)
            candidates = range(first, last + 1)
        family, address = _resolve(host)
        for port in candidates:
            listening = _try_listen(family, address, port)
            if listening is not None:
                return cls(listening)
        where = f"ports {port_range[0]}..{port_range[1]}" if port_range else "any port"
        raise PlacementError(f"cannot listen on {where} of {host}: all are in use; free some or widen port_range")

    def take(self) -> socket.socket:
        """The open, listening socket; closing it is the caller's from now on.

        Raises:
            RuntimeError: if it was taken or closed before.
        """
        if self._finalizer.detach() is None:
            raise RuntimeError(f"the socket of {self.host} port {self.port} was already taken or closed")
        return self._socket

    def close(self) -> None:
        """Release the port, unless the socket was taken."""
        if self._finalizer.detach() is not None:
            self._socket.close()

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HeldPort({self.host!r}, {self.port}, {'held' if self._finalizer.alive else 'released'})"


def require_port_range(port_range: tuple[int, int] | None) -> tuple[int, int] | None:
    """It, if it is one, or None. Raises ValueError."""
    if port_range is None:
        return None
    numbers = tuple(port_range) if isinstance(port_range, Iterable) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or not 1 <= numbers[0] <= numbers[1] <= 65535:
        raise ValueError(f"port_range must be (first, last) within 1..65535, got {port_range}")
    return numbers


def _close_dropped(listening: socket.socket, where: str) -> None:
    listening.close()
    warnings.warn(f"a HeldPort ({where}) was dropped without take() or close()", ResourceWarning, stacklevel=2)


def _resolve(host: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise PlacementError(f"cannot resolve {host!r} to listen on it: {exc}") from exc
    return found[0][0], found[0][4]


def _try_listen(family: socket.AddressFamily, address: tuple[Any, ...], port: int) -> socket.socket | None:
    """A listening socket, or None when the port is in use."""
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if port:  # else a port whose last connection is in TIME_WAIT is refused for a minute
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address[0], port, *address[2:]))
        listening.listen(_BACKLOG)  # with SO_REUSEADDR, a port bound by two is refused only here
    except OSError as exc:
        listening.close()
        if exc.errno in (errno.EADDRINUSE, errno.EACCES):  # EACCES: below 1024 without the right to it
            return None
        raise PlacementError(f"cannot listen on {address[0]}: {exc}; is it an address of this node?") from exc
    except BaseException:
        listening.close()
        raise
    return listening
