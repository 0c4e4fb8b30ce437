"""One TCP key-value store per actor group, through which its coordinator groups find each other.

    the process Ray placed                             every rank
    ──────────────────────                             ──────────
    socket bound to (node IP, 0), held ──► serve()     connect(host, port)
                                            │              │
                                            └── TCPStore ◄─┘     prefix("tp/0/0"), prefix("pp/0/1"), ...

The port is bound before it is published and never released in between, so nobody can take it. The store carries
addresses and other short text only: torch's store has no authentication, hence no pickle ever goes through it and
it listens on the node's own address alone. Knows nothing of Ray. Torch is imported on first use.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, StartError

if TYPE_CHECKING:
    from torch.distributed import Store

_WILDCARDS = ("0.0.0.0", "::", "")
_RETRY_SECONDS = 0.02  # between attempts to reach a server that does not listen yet


class GroupStore:
    """One end of the store: the server with its own client, or a client. Made by `serve` or `connect`.

    Several coordinator groups share one end, each under its own prefix; none keeps the others off it while it waits.
    `close` takes it from nobody: a thread that waits at this end goes on until its key or its timeout comes.
    """

    def __init__(self, store: Store, host: str, port: int) -> None:
        self._store: Store | None = store
        self.host = host
        self.port = port

    @classmethod
    def serve(cls, listener: socket.socket, timeout: float = 300.0) -> GroupStore:
        """Serves the store on a socket that is bound to this node's address and listens already.

        Args:
            listener: a TCP socket, bound to (node IP, 0). The store takes its file descriptor over and closes it.
            timeout: seconds that a wait for a key may take.

        Raises:
            ValueError: the socket does not listen, or is bound to every interface; it stays the caller's.
            StartError: torch could not serve on it; the socket is closed.
        """
        host, port = _listening_address(listener)
        fd = listener.detach()
        return cls(_open_store(host, port, timeout, fd), host, port)

    @classmethod
    def connect(
        cls, host: str, port: int, timeout: float = 300.0, *, cancel: threading.Event | None = None
    ) -> GroupStore:
        """Connects to a store, waiting up to `timeout` seconds for it to listen, or until `cancel` is set.

        Raises:
            StartError: nothing listened there in time, or what listens is no store, or cancelled. Nothing remains,
                but for a daemon thread if a stranger holds the connection open and says nothing.
        """
        deadline = Deadline.after(timeout)
        _await_listener(host, port, deadline, cancel or threading.Event())
        return cls(_open_store(host, port, timeout, None, deadline), host, port)

    def prefix(self, name: str) -> Store:
        """A torch store whose keys all start with `name`, for one coordinator group and epoch."""
        from torch.distributed import PrefixStore

        if self._store is None:
            raise GroupClosedError(f"{self!r} was closed in this process; connect to it again")
        return PrefixStore(name, self._store)

    def close(self) -> None:
        """Drops this end; the server stops once no group of this process uses it. Idempotent."""
        self._store = None

    def __enter__(self) -> GroupStore:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GroupStore({self.host}:{self.port}{', closed' if self._store is None else ''})"


def _listening_address(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    if host in _WILDCARDS:
        raise ValueError(
            f"the store's socket is bound to every interface ({host!r}, port {port}); bind it to this node's own "
            "IP address: the store has no authentication"
        )
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"the store's socket on {host}:{port} does not listen; call listen() on it first")
    return str(host), int(port)


def _await_listener(host: str, port: int, deadline: Deadline, cancel: threading.Event) -> None:
    """Returns once something accepts on host:port: TCPStore's own retries log a stack trace for each attempt."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.05, deadline.slice(5.0))).close()
            return
        except OSError as exc:
            if deadline.expired():
                raise StartError(
                    f"no coordinator store at {host}:{port}: tried to connect for {deadline.timeout} s, last answer: "
                    f"{exc}. Check that the process that serves it is alive and that this node reaches that address"
                ) from exc
        if cancel.wait(deadline.slice(_RETRY_SECONDS)):
            raise StartError(f"connecting to the coordinator store at {host}:{port} was cancelled")


def _open_store(host: str, port: int, timeout: float, listen_fd: int | None, deadline: Deadline | None = None) -> Store:
    from torch.distributed import TCPStore

    def construct() -> Any:
        serving: dict[str, Any] = {"multi_tenant": True, "master_listen_fd": listen_fd}
        return TCPStore(
            host,
            port,
            None,
            listen_fd is not None,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            **(serving if listen_fd is not None else {}),
        )

    try:
        return _within(deadline or Deadline.after(timeout), construct)
    except (RuntimeError, TimeoutError) as exc:  # torch's DistError is a RuntimeError
        doing = "connect to" if listen_fd is None else "serve"
        raise StartError(
            f"could not {doing} the coordinator store at {host}:{port} within {timeout} s: {first_line(exc)}. "
            "Check that a ray-shm or torch store holds that port, and no other program"
        ) from exc


def _within(deadline: Deadline, construct: Callable[[], Any]) -> Any:
    """Runs `construct` on a thread: TCPStore's constructor waits without limit for a stranger that says nothing."""
    outcome: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(construct())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, name="ray-shm-store", daemon=True)
    thread.start()
    left = deadline.remaining()
    thread.join(None if left is None else left + 1.0)  # torch keeps to its own timeout where it can
    if errors:
        raise errors.pop()
    if not outcome:
        raise TimeoutError("it accepts connections but does not answer as a store")
    return outcome.pop()


def first_line(exc: BaseException) -> str:
    """Torch's messages carry C++ stack traces; their first line says what happened."""
    text = str(exc).strip()
    return text.splitlines()[0].rstrip(".") if text else type(exc).__name__
