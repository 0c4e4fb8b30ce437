"""A request that ends the waits of one formation of a group, made from another thread; and the sockets it shuts down.

Runs in every worker. Gloo waits in C++ code that neither `abort()` nor `shutdown()` nor a signal ends. What does end it
is the end of its TCP connections. Those have no handle in Python, so they are found among the descriptors of this
process by the address of gloo's listener, and remembered as (descriptor, inode): numbers are reused, inodes are not.
The descriptors stay gloo's; nothing here closes one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

Address = tuple[str, int]  # host, port
_KNOCK_TIMEOUT = 0.1  # seconds; the listener is in this process, and the kernel answers for it


class Release:
    """Made anew for every formation of a group. `request` may come from any thread, and at any time."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._lock = threading.Lock()  # held for a few instructions, never while something waits
        self._wakers: list[Callable[[], object]] = []

    def on_request(self, waker: Callable[[], object]) -> None:
        """Has `waker` called by the thread that requests the release; at once if that was before. It must not wait."""
        with self._lock:
            if not self.requested.is_set():
                self._wakers.append(waker)
                return
        waker()

    def request(self) -> None:
        """Wakes whoever waits in this formation or in its groups. Idempotent."""
        with self._lock:
            self.requested.set()
            wakers, self._wakers = self._wakers, []
        for waker in wakers:
            waker()


@dataclass(frozen=True, slots=True)
class SocketRef:
    """A socket that belongs to somebody else in this process."""

    descriptor: int
    inode: int

    def addresses(self) -> tuple[Address | None, Address | None]:
        """Own address of a TCP socket, and that of its peer (None if it has none); both None if it is gone."""
        own = peer = None
        borrowed = self._borrow()
        if borrowed is not None:
            with borrowed, contextlib.suppress(OSError):
                if borrowed.family in (socket.AF_INET, socket.AF_INET6) and borrowed.type == socket.SOCK_STREAM:
                    own = borrowed.getsockname()[:2]
                    peer = borrowed.getpeername()[:2]
        return own, peer

    def listens(self) -> bool:
        borrowed = self._borrow()
        if borrowed is None:
            return False
        with borrowed:
            return bool(borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def shut_down(self) -> None:
        """Ends the connection in both directions. Nothing happens if the socket was closed by now."""
        borrowed = self._borrow()
        if borrowed is not None:
            with borrowed, contextlib.suppress(OSError):  # its peer was faster
                borrowed.shutdown(socket.SHUT_RDWR)

    def _borrow(self) -> socket.socket | None:
        """A second descriptor of the same socket: once it is there, its owner's close() leads nowhere else."""
        try:
            copy = os.dup(self.descriptor)
        except OSError:
            return None
        status = os.fstat(copy)
        if not stat.S_ISSOCK(status.st_mode) or status.st_ino != self.inode:
            os.close(copy)
            return None
        return socket.socket(fileno=copy)


def open_sockets() -> set[SocketRef]:
    """All sockets of this process, of any kind."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, as the descriptor that listed them is
            kind, _, inode = os.readlink(f"/proc/self/fd/{name}").partition(":")
            if kind == "socket":
                found.add(SocketRef(int(name), int(inode.strip("[]"))))
    return found


def listening_address(sockets: Collection[SocketRef]) -> Address | None:
    """Where the one socket among them listens that does; None if several do, or none."""
    listening = [ref for ref in sockets if ref.listens()]
    return listening[0].addresses()[0] if len(listening) == 1 else None


def connections(sockets: Collection[SocketRef], own: Address, peers: Collection[Address]) -> list[SocketRef]:
    """Those that a listener at `own` accepted, and those that lead to a listener of `peers`."""
    ends = [(ref, *ref.addresses()) for ref in sockets]
    return [ref for ref, here, there in ends if there is not None and (here == own or there in peers)]


def knock(listener: Address, size: int) -> None:
    """Ends gloo's wait for members to connect to `listener`, this process's own: comes in their place, and leaves.

    Gloo takes a connection for that of the pair whose number, counted from 0 on each rank, comes first on it as a
    machine word. When it then ends, the pair is lost, and so is the forming (torch 2.13: at once, else 5 timeouts).
    """
    with contextlib.suppress(OSError):
        for pair in range(size):
            with socket.create_connection(listener, timeout=_KNOCK_TIMEOUT) as caller:
                caller.sendall(pair.to_bytes(8, sys.byteorder))
