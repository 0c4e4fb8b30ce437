"""A TCP connection by which a driver actor learns at once that a client which shares no memory with it was killed.

    client                                     driver actor
    connects, sends its token   ────────────►  Lifelines: one thread, asleep
    (killed: the kernel closes) ──── FIN ───►  on_end()

Nothing else goes through it. Ray tells of a killed Ray Client only after the 30 s in which one may connect again; what
breaks the network but not the process (a reset, silence) is left to that. A client that cannot reach the actor's node
has no lifeline, and Ray's word alone.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ray_shm.deadline import Deadline

logger = logging.getLogger("ray_shm")

_TOKEN_BYTES = 16
_REACH = 2.0  # seconds that a client tries to connect
_PATIENCE = 5.0  # seconds that a stranger may take to send a token
_MOST_STRANGERS = 64
_PAUSE = 0.05  # seconds

Address = tuple[str, int]


class Lifelines:
    """The driver actor's ends. Takes `listener` over, which is bound to the node's own address and listens."""

    def __init__(self, listener: socket.socket) -> None:
        self.address: Address = listener.getsockname()[:2]
        self._listener = listener
        self._expected: dict[bytes, Callable[[], object]] = {}
        self._strangers: dict[socket.socket, tuple[Deadline, bytearray]] = {}
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for end, act in ((listener, self._accept), (self._woken, lambda _: None)):
            end.setblocking(False)
            self._selector.register(end, selectors.EVENT_READ, act)
        self._thread = threading.Thread(target=self._run, name="ray_shm-lifelines", daemon=True)
        self._thread.start()

    def expect(self, on_end: Callable[[], object]) -> bytes:
        """The token of a client to come. on_end: called on the thread here when its process has ended."""
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._expected[token] = on_end
        return token

    def close(self) -> None:
        """Idempotent. Ends of clients that come after that are not told."""
        with contextlib.suppress(OSError):
            self._waker.close()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(_PATIENCE if self._strangers else None):
                    if key.fileobj is self._woken:
                        return
                    key.data(key.fileobj)
                for stranger, (deadline, _) in list(self._strangers.items()):
                    if deadline.expired():
                        self._drop(stranger)
        finally:
            for key in list(self._selector.get_map().values()):
                self._drop(key.fileobj)
            self._selector.close()

    def _accept(self, _: Any) -> None:
        try:
            caller, _address = self._listener.accept()
        except OSError:  # it has gone again; or there are no descriptors left
            time.sleep(_PAUSE)
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            caller.close()
            return
        caller.setblocking(False)
        self._strangers[caller] = Deadline.after(_PATIENCE), bytearray()
        self._selector.register(caller, selectors.EVENT_READ, self._hear)

    def _hear(self, caller: socket.socket) -> None:
        """A piece of a token."""
        _, token = self._strangers[caller]
        data = _received(caller, _TOKEN_BYTES - len(token))
        if not data:
            self._drop(caller)
            return
        token += data
        if len(token) == _TOKEN_BYTES:
            del self._strangers[caller]
            on_end = self._expected.pop(bytes(token), None)
            if on_end is None:
                self._drop(caller)
            else:
                self._selector.modify(caller, selectors.EVENT_READ, partial(self._watch, on_end))

    def _watch(self, on_end: Callable[[], object], client: socket.socket) -> None:
        data = _received(client, 1)
        if data:
            return
        self._drop(client)
        if data is not None:
            try:
                on_end()
            except Exception:
                logger.exception("after the end of a client")

    def _drop(self, end: Any) -> None:
        self._strangers.pop(end, None)
        self._selector.unregister(end)
        end.close()


def _received(end: socket.socket, nbytes: int) -> bytes | None:
    """b"": its process closed it, or has ended. None: the connection broke."""
    try:
        return end.recv(nbytes)
    except OSError:
        return None


class Lifeline:
    """A client's end. Raises OSError where the driver actor's node cannot be reached."""

    def __init__(self, address: Address, token: bytes) -> None:
        self._socket = socket.create_connection(address, timeout=_REACH)
        try:
            self._socket.sendall(token)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()
