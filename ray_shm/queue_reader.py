"""The reading end of a queue: frames out, from shared memory or ZeroMQ. Runs in the readers. No pickling (codec.py)."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ray_shm import death_watch, lease, ring
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueCancelledError, QueueClosedError, StartError
from ray_shm.handle import Handle
from ray_shm.queue_end import QueueEnd, QueueStats
from ray_shm.segment import start_time
from ray_shm.shm_reader import ShmReader
from ray_shm.waiting import CANCEL_PARK, IDLE_PARK

if TYPE_CHECKING:
    from ray_shm.zmq_reader import ZmqReader

Consume = Callable[[list[memoryview], bool], Any]


class QueueReader(QueueEnd):
    """Receives messages as one rank. Threads may share it: each message goes to one of them."""

    def __init__(self, handle: Handle, rank: int, longest_park: float | None = None) -> None:
        """Attach as `rank`. `longest_park`: seconds after which a sleeping reader looks up by itself (IDLE_PARK).

        Raises:
            AttachError: `rank` is a local reader and the memory cannot be reached from this process.
            StartError: another live process reads as `rank`.
            ValueError: the handle is of another version, or has no place for `rank`.
        """
        handle.require_version()
        super().__init__()
        self._longest_park = IDLE_PARK if longest_park is None else longest_park
        self._from = f"pid {handle.pid} on {handle.node}"
        self._writer_pid = handle.pid
        self._writer_started = handle.shm.ref.start_time if handle.shm else 0
        self._writer_dead = False
        self._stopping = False
        self._reading = False  # a message, by the thread that holds the lock
        self._end_watch: Callable[[], None] | None = None
        self._on_park: Callable[[], None] | None = self._look_for_writer  # where no pidfd tells of its death
        self.shm: ShmReader | None = None
        self.zmq: ZmqReader | None = None
        remote = handle.remote_reader_ranks
        if rank == -1 and len(remote) == 1:
            rank = remote[0]  # as vLLM names the only remote reader
        self._rank = rank
        if handle.shm is not None and rank in handle.local_reader_ranks:
            self._attach(handle, rank)
        elif handle.zmq is not None and rank in remote:
            from ray_shm.zmq_reader import ZmqReader

            self.zmq = ZmqReader(handle.zmq, rank, os.getpid())
        else:
            raise ValueError(
                f"the queue of {self._from} has local readers {list(handle.local_reader_ranks)} and remote readers "
                f"{list(remote)}, but no reader {rank}"
            )
        self._open()

    def _attach(self, handle: Handle, rank: int) -> None:
        if handle.shm is None:
            return
        try:
            self.shm = ShmReader(handle.shm, handle.local_reader_ranks.index(rank), os.getpid())
        except StartError as exc:
            exc.args = (f"cannot attach to the queue of {self._from} as rank {rank}: {exc}",)
            raise
        on_death = weakref.WeakMethod(self._on_writer_death)  # a dropped end is to be collected
        self._end_watch = death_watch.watch(
            self._writer_pid, self._writer_started, lambda: (tell := on_death()) and tell()
        )
        if self._end_watch is not None:
            self._on_park = None

    def _on_writer_death(self) -> None:
        self._writer_dead = True
        shm = self.shm
        if shm is not None:
            shm.ring.stopped = True
            # The word is the writer's, which is gone; other readers may do the same at this moment, hence at random.
            shm.ring.event.store(secrets.randbits(32))
            shm.ring.event.wake()

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Until the writer has seen every reader.

        Raises:
            TimeoutError, PeerLostError, QueueClosedError; the queue stays usable after a timeout.
        """
        with self._lock:
            self._require_open()
            if not self._await(self._is_ready_or_closed, deadline, None):
                raise TimeoutError(
                    f"the queue of {self._from} was not ready within {deadline.timeout} s: its writer has not called "
                    "wait_until_ready(), or another reader has not attached"
                )
            if not self._is_ready():
                self._require_message()

    def poll(self) -> list[memoryview] | None:
        """Frames of the next message if it is there, else None; valid until `release`. For a single owner.

        Raises:
            PeerLostError: messages from another node are missing.
        """
        shm = self.shm
        if shm is not None:
            return shm.peek()
        return self.zmq.peek() if self.zmq is not None else None

    @property
    def owned(self) -> bool:
        """Whether the polled frames, but for the first, stay valid for as long as something refers to them."""
        return self.shm.owned if self.shm is not None else True  # what came from another node is this process's

    def release(self) -> None:
        """Done with the polled message."""
        self.messages += 1
        if self.shm is not None:
            self.shm.release()
        elif self.zmq is not None:
            self.zmq.release()

    def await_message(self, deadline: Deadline, cancel: threading.Event | None = None) -> bool:
        """Until `poll` has something; False when the deadline comes first. For a single owner.

        Raises:
            QueueCancelledError: `cancel` was set. QueueClosedError: either end was closed, and all is read.
            PeerLostError: the writer's process is gone, and all is read.
        """
        news = self.shm.ring.news if self.shm is not None else self._has_news
        if not self._await(news, deadline, cancel):
            return False
        self._require_message()
        return True

    def receive(self, consume: Consume, deadline: Deadline, cancel: threading.Event | None = None) -> Any:
        """What `consume(frames, owned)` returns for the next message, which is consumed even if that raises.

        Raises:
            TimeoutError: nothing came; the queue stays usable. Others as `await_message`, and what `consume` raises.
        """
        lock = self._begin_reading(deadline)
        try:
            shm = self.shm
            frames = shm.peek() if shm is not None else None
            if frames is None and shm is not None and cancel is None:  # the hot path of a reader that waits
                self._waiter.wait(shm.ring.news, shm.ring.event, deadline, self._longest_park, self._on_park)
                frames = shm.peek() if not self._closed else None
            if frames is None or cancel is not None:
                frames = self._await_frames(deadline, cancel)
            try:
                self.bytes += len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
                return consume(frames, shm.owned if shm is not None else True)
            finally:
                del frames
                if not self._closed:  # by `consume` itself
                    self.release()
        finally:
            self._reading = False
            lock.release()

    @contextlib.contextmanager
    def message(self, deadline: Deadline, cancel: threading.Event | None = None) -> Iterator[list[memoryview]]:
        """The next message's frames, valid inside the `with`; consumed when it ends. Raises as `receive`."""
        lock = self._begin_reading(deadline)
        try:
            frames = self._await_frames(deadline, cancel)
            try:
                yield frames
            finally:
                if not self._closed:  # by the block itself
                    self.release()
        finally:
            self._reading = False
            lock.release()

    def _begin_reading(self, deadline: Deadline) -> threading.RLock:
        """Take the lock, which is returned: a forked child gets another one. Raises as `receive`."""
        lock = self._lock
        try:
            if not lock.acquire(False) and not self._acquire(deadline):
                self._require_open()
                raise TimeoutError(self._nothing_text(deadline))  # another thread waits for a message
            if self._reading:  # the same thread: inside of acquire_read, while unpickling, or in a signal handler
                lock.release()
                self._require_open()
                raise RuntimeError("a message of the same queue is being read in this thread; nothing was taken")
            self._reading = True
        except BaseException:
            self._let_go(lock, self._reading)
            raise
        return lock

    def stats(self) -> QueueStats:
        """Counters of this end; the leases are those of this process."""
        blocks, held = lease.held()
        waiter, shm = self._waiter, self.shm
        lag = {self._rank: shm.ring.lag} if shm is not None else {}
        large = shm.large if shm is not None else 0
        return QueueStats(
            self.messages,
            self.bytes,
            large,
            waiter.waits,
            waiter.yields,
            waiter.parks,
            lag,
            leased_blocks=blocks,
            leased_bytes=held,
        )

    def _await_frames(self, deadline: Deadline, cancel: threading.Event | None) -> list[memoryview]:
        self._require_open()
        if not self.await_message(deadline, cancel):
            raise TimeoutError(self._nothing_text(deadline))
        frames = self.poll()
        if frames is None:
            raise PeerLostError(f"the writer ({self._from}) closed the queue while a message was read")
        return frames

    def _nothing_text(self, deadline: Deadline) -> str:
        return (
            f"no message from {self._from} within {deadline.timeout} s (this is rank {self._rank}, pid {os.getpid()}); "
            "the queue stays usable"
        )

    def stop_waiting(self) -> None:
        """Have the thread that owns this end, and waits, look up and find the queue closed. From any thread."""
        self._stopping = True
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        shm = self.shm
        if shm is not None:
            shm.ring.stopped = True
            shm.ring.event.wake()
        if self.zmq is not None:
            self.zmq.wake()

    def _free(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
        if self.shm is not None:
            self.shm.ring.stopped = True  # this may be a signal handler inside of a wait
            self.shm.close()
            self.shm = None  # unmapped now, however long this object is kept
        if self.zmq is not None:
            self.zmq.close()

    def _abandon(self) -> None:
        if self.shm is not None:
            self.shm.abandon()
            self.shm = None
        if self.zmq is not None:
            self.zmq.abandon()
            self.zmq = None

    def _await(self, ready: Callable[[], bool], deadline: Deadline, cancel: threading.Event | None) -> bool:
        """Until `ready()`, or this end is closed or cancelled, which raises; False when the deadline comes first."""
        shm = self.shm
        if shm is None:
            done = self._await_zmq(ready, deadline, cancel)
        elif cancel is None:
            done = self._waiter.wait(ready, shm.ring.event, deadline, self._longest_park, self._on_park)
        else:
            done = self._waiter.wait(
                lambda: ready() or cancel.is_set(), shm.ring.event, deadline, CANCEL_PARK, self._on_park
            )
        if self._closed:
            self._require_open()
        if cancel is not None and cancel.is_set() and not ready():
            raise QueueCancelledError(f"dequeue from {self._from} was cancelled; the queue stays usable")
        if not done:  # it may not have slept at all, and polling with a timeout of 0 has to end, too
            self._look_for_writer()
            return ready()
        return True

    def _await_zmq(self, ready: Callable[[], bool], deadline: Deadline, cancel: threading.Event | None) -> bool:
        park = self._longest_park if cancel is None else CANCEL_PARK
        while self.zmq is not None and not (ready() or self._closed or (cancel is not None and cancel.is_set())):
            if self.zmq.broken() and not ready():
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

    def _has_news(self) -> bool:
        shm = self.shm
        if shm is not None:
            return shm.ring.news()
        return (
            self._closed
            or self._stopping
            or (self.zmq is not None and (self.zmq.peek() is not None or self.zmq.closed_by_writer))
        )

    def _require_message(self) -> None:
        """There is news: return if it is a message, else raise what it is."""
        shm = self.shm
        if shm is not None and shm.ring.readable():
            return
        if self.zmq is not None and self.zmq.peek() is not None:
            return
        self._require_open()
        if self._writer_dead and shm is not None and shm.ring.phase != ring.CLOSED:
            raise PeerLostError(f"the writer of the queue ({self._from}) is gone without closing it; make a new queue")
        raise QueueClosedError(f"the writer ({self._from}) closed the queue")

    def _look_for_writer(self) -> None:
        """Find out that the writer's process is gone where no pidfd tells."""
        if not self._writer_dead and self.shm is not None and start_time(self._writer_pid) != self._writer_started:
            self._on_writer_death()
