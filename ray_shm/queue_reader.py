"""The reading end of a queue: frames out, from shared memory or ZeroMQ. Runs in the readers. No pickling (codec.py)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ray_shm import ring
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueCancelledError, QueueClosedError
from ray_shm.handle import Handle
from ray_shm.segment import AttachError, start_time
from ray_shm.shm_channel import ShmReader
from ray_shm.waiting import CANCEL_PARK, IDLE_PARK, Waiter

if TYPE_CHECKING:
    from ray_shm.zmq_channel import ZmqReader


class QueueReader:
    """Receives messages as one rank. Threads may share it: each message goes to one of them."""

    def __init__(self, handle: Handle, rank: int) -> None:
        """Attach as `rank`.

        Raises:
            AttachError: `rank` is a local reader and the memory cannot be reached from this process.
            ValueError: the handle is of another version, or has no place for `rank`.
        """
        handle.require_version()
        self._from = f"pid {handle.pid} on {handle.node}"
        self._writer_pid = handle.pid
        self._writer_started = handle.shm.ref.start_time if handle.shm else 0
        self._lock = threading.RLock()
        self._waiter = Waiter()
        self._closed = False
        self.shm: ShmReader | None = None
        self.zmq: ZmqReader | None = None
        remote = handle.remote_reader_ranks
        if rank == -1 and len(remote) == 1:
            rank = remote[0]  # as vLLM names the only remote reader
        if handle.shm is not None and rank in handle.local_reader_ranks:
            self.shm = ShmReader(handle.shm, handle.local_reader_ranks.index(rank), os.getpid())
        elif handle.zmq is not None and rank in remote:
            from ray_shm.zmq_channel import ZmqReader

            self.zmq = ZmqReader(handle.zmq, rank, os.getpid())
        else:
            raise ValueError(
                f"the queue of {self._from} has local readers {list(handle.local_reader_ranks)} and remote readers "
                f"{list(remote)}, but no reader {rank}"
            )

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Until the writer has seen every reader.

        Raises:
            TimeoutError, PeerLostError, QueueClosedError; the queue stays usable after a timeout.
        """
        with self._locked():
            if not self._await(self._is_ready_or_closed, deadline, IDLE_PARK, None):
                raise TimeoutError(
                    f"the queue of {self._from} was not ready within {deadline.timeout} s: its writer has not called "
                    "wait_until_ready(), or another reader has not attached"
                )
            if not self._is_ready():
                raise QueueClosedError(f"the writer ({self._from}) closed the queue before it was ready")

    def poll(self) -> list[memoryview] | None:
        """Frames of the next message if it is there, else None; valid until `release`. For a single owner.

        Raises:
            PeerLostError: a large message went with its writer, or messages from another node are missing.
        """
        if self.shm is not None:
            try:
                return self.shm.peek()
            except AttachError as exc:
                raise PeerLostError(f"the writer ({self._from}) is gone, and its large message with it") from exc
        return self.zmq.peek() if self.zmq is not None else None

    def release(self, notify: bool = True) -> None:
        """Done with the polled message. `notify` wakes a writer that waits for room."""
        if self.shm is not None:
            self.shm.release()
            if notify:
                self.shm.ring.bell.ring()
        elif self.zmq is not None:
            self.zmq.release()

    def await_message(self, deadline: Deadline, cancel: threading.Event | None = None) -> bool:
        """Until `poll` has something; False when the deadline comes first. For a single owner.

        Raises:
            QueueCancelledError: `cancel` was set. QueueClosedError: either end was closed, and all is read.
            PeerLostError: the writer's process is gone, and all is read.
        """
        park = IDLE_PARK if cancel is None else CANCEL_PARK
        if not self._await(self._has_news, deadline, park, cancel):
            return False
        if not self._has_message():
            self._require_open()
            raise QueueClosedError(f"the writer ({self._from}) closed the queue")
        return True

    @contextlib.contextmanager
    def message(self, deadline: Deadline, cancel: threading.Event | None = None) -> Iterator[list[memoryview]]:
        """The next message's frames, valid inside the `with`; consumed when it ends, even by an exception.

        Raises:
            TimeoutError: nothing came; the queue stays usable. Others as `await_message`.
        """
        with self._locked():
            if not self.await_message(deadline, cancel):
                raise TimeoutError(
                    f"no message from {self._from} within {deadline.timeout} s (this is pid {os.getpid()}); "
                    "the queue stays usable"
                )
            frames = self.poll()
            if frames is None:
                raise PeerLostError(f"the writer ({self._from}) closed the queue while a message was read")
            try:
                yield frames
            finally:
                if not self._closed:  # by the block itself
                    self.release()

    def close(self) -> None:
        """Leave the queue; a `dequeue` blocked in another thread raises QueueClosedError. Idempotent."""
        if self._closed:
            return
        self._closed = True
        while not self._lock.acquire(timeout=0.005):
            if self.shm is not None:
                self.shm.ring.event.wake()
        try:
            if self.shm is not None:
                self.shm.close()
                self.shm = None  # unmapped now, however long this object is kept
            if self.zmq is not None:
                self.zmq.close()
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._require_open()
            yield

    def _require_open(self) -> None:
        if self._closed:
            raise QueueClosedError("this end of the queue was closed in this process")

    def _await(
        self, ready: Callable[[], bool], deadline: Deadline, park: float, cancel: threading.Event | None
    ) -> bool:
        """Until `ready()`, or this end is closed or cancelled, which raises; False when the deadline comes first."""

        def news() -> bool:
            return ready() or self._closed or (cancel is not None and cancel.is_set())

        if self.shm is not None:
            done = self._waiter.wait(news, self.shm.ring.event, deadline, park, self._require_writer)
            if not done:  # it may not have slept at all, and polling with a timeout of 0 has to end, too
                self._require_writer()
        else:
            done = self._await_zmq(news, deadline, park)
        if done and not ready():
            self._require_open()
            raise QueueCancelledError(f"dequeue from {self._from} was cancelled; the queue stays usable")
        return done

    def _await_zmq(self, news: Callable[[], bool], deadline: Deadline, park: float) -> bool:
        while self.zmq is not None and not news():
            if self.zmq.broken() and not news():
                raise PeerLostError(f"the connection to the writer ({self._from}) is gone; make a new queue")
            if deadline.expired():
                return False
            self.zmq.poll(deadline.slice(park))
        return True

    def _is_ready(self) -> bool:
        if self.shm is not None:
            return self.shm.ring.phase == ring.READY or self.shm.ring.readable()
        return self.zmq is not None and (self.zmq.peek() is not None or self.zmq.ready)

    def _is_ready_or_closed(self) -> bool:
        return self._is_ready() or self._has_news()

    def _has_message(self) -> bool:
        if self.shm is not None:
            return self.shm.ring.readable()
        return self.zmq is not None and self.zmq.peek() is not None

    def _has_news(self) -> bool:
        if self.shm is not None:
            return self.shm.ring.announced()
        return self.zmq is not None and (self.zmq.peek() is not None or self.zmq.closed_by_writer)

    def _require_writer(self) -> None:
        """Raise PeerLostError where the writer's process is gone and nothing is left to read."""
        # In this order: a writer that is gone publishes nothing after the look at the ring.
        if start_time(self._writer_pid) == self._writer_started or self._has_news():
            return
        raise PeerLostError(f"the writer of the queue ({self._from}) is gone without closing it; make a new queue")
