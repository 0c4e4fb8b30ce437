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


class RemoteReplies:
    """Owns the reading of these queues; their frames wait in a deque until the leader takes them."""

    def __init__(self, readers: Mapping[int, QueueReader], ring: Callable[[], None]) -> None:
        self._readers = {reader.zmq.socket: (rank, reader) for rank, reader in readers.items() if reader.zmq}
        self._ring = ring
        self._inbox: deque[tuple[int, list[memoryview]]] = deque()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._stop_in = context.socket(zmq.PAIR)
        self._stop_out = context.socket(zmq.PAIR)
        endpoint = f"inproc://ray_shm-{id(self)}"
        self._stop_out.bind(endpoint)
        self._stop_in.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="ray_shm-remote-replies", daemon=True)
        self._thread.start()

    def take(self) -> Iterator[tuple[int, list[memoryview]]]:
        """(rank, frames) of what has arrived, one by one; the frames are the taker's."""
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
        for socket in self._readers:
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop_out in ready:
                return
            for socket in ready:
                self._receive(poller, socket)
            self._ring()

    def _receive(self, poller: zmq.Poller, socket: zmq.Socket[bytes]) -> None:
        rank, reader = self._readers[socket]
        try:
            while (frames := reader.poll()) is not None:
                self._inbox.append((rank, frames))
                reader.release()
        except RayShmError:  # a broken connection: the death watch says what became of the rank
            poller.unregister(socket)
