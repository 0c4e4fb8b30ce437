"""Receives the replies of ranks on other nodes: one thread that polls their ZeroMQ sockets and rings the bell.

Runs in the driver's process, only for groups that have such ranks: a socket and a futex cannot be awaited together.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import zmq

from ray_shm.errors import RayShmError
from ray_shm.queue_reader import QueueReader

_LOOK = b"look"


class RemoteReplies:
    """Owns the reading of these queues; their frames wait in a deque until the leader takes them."""

    def __init__(
        self,
        readers: Mapping[int, QueueReader],
        ring: Callable[[], None],
        lost: Callable[[int, str], None],
    ) -> None:
        """`lost`: told of a rank whose connection is gone for good, and why."""
        self._readers: dict[zmq.Socket[bytes], tuple[int, QueueReader]] = {}
        self._added: deque[tuple[int, QueueReader]] = deque(readers.items())
        self._ring = ring
        self._lost = lost
        self._inbox: deque[list[memoryview]] = deque()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._stop_in = context.socket(zmq.PAIR)
        self._stop_out = context.socket(zmq.PAIR)
        endpoint = f"inproc://ray_shm-{id(self)}"
        self._stop_out.bind(endpoint)
        self._stop_in.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="ray_shm-remote-replies", daemon=True)
        self._thread.start()

    def add(self, rank: int, reader: QueueReader) -> None:
        """Read from a replaced rank's new process. The old reader is let go of, and is to be closed by its owner."""
        self._added.append((rank, reader))
        self._stop_in.send(_LOOK)

    def take(self) -> Iterator[list[memoryview]]:
        """Frames of what has arrived, one by one; they are the taker's."""
        while self._inbox:
            yield self._inbox.popleft()

    def close(self) -> None:
        """Stop the thread. Idempotent; the queues themselves are closed by their owner, afterwards."""
        if self._stop_in.closed:
            return
        self._stop_in.send(b"")
        self._thread.join()
        self._stop_in.close(0)
        self._stop_out.close(0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._stop_out, zmq.POLLIN)
        self._register(poller)
        while True:
            ready = dict(poller.poll())
            if self._stop_out in ready:
                if self._stop_out.recv() != _LOOK:
                    return
                self._register(poller)
            for socket in ready:
                if socket in self._readers:
                    self._receive(poller, socket)
            self._ring()

    def _register(self, poller: zmq.Poller) -> None:
        while self._added:
            rank, reader = self._added.popleft()
            for socket in [s for s, (known, _) in self._readers.items() if known == rank]:
                self._forget(poller, socket)
            if reader.zmq is not None:
                for socket in (reader.zmq.socket, reader.zmq.monitor):
                    self._readers[socket] = (rank, reader)
                    poller.register(socket, zmq.POLLIN)

    def _forget(self, poller: zmq.Poller, socket: zmq.Socket[bytes]) -> None:
        del self._readers[socket]
        poller.unregister(socket)

    def _receive(self, poller: zmq.Poller, socket: zmq.Socket[bytes]) -> None:
        rank, reader = self._readers[socket]
        try:
            while (frames := reader.poll()) is not None:
                self._inbox.append(frames)
                reader.release()
            if reader.zmq is None or not reader.zmq.broken():
                return
            why = "its connection is gone"
        except RayShmError as exc:
            why = str(exc)
        for other in [s for s, (known, _) in self._readers.items() if known == rank]:
            self._forget(poller, other)
        self._lost(rank, why)
