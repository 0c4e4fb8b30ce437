"""The writing end of a queue: frames in, to local readers through shared memory and to remote ones through ZeroMQ.

Runs in the process that created the queue. A message is sent to all readers or to none: room is awaited on both
channels before anything is written. No pickling (codec.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ray_shm import ring
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError
from ray_shm.handle import HANDLE_VERSION, Handle
from ray_shm.ring import Buffer
from ray_shm.segment import start_time
from ray_shm.shm_channel import RING_BYTES, ShmWriter
from ray_shm.waiting import IDLE_PARK, Waiter

if TYPE_CHECKING:
    from ray_shm.zmq_channel import ZmqWriter

_NEVER = Deadline.after(None)
QUIET_PARK = 0.002  # seconds between looks at a full quiet queue
LINGER = 2.0  # seconds that close() leaves readers to fetch large messages


class QueueWriter:
    """Sends messages to a fixed set of reader ranks. Threads may share it."""

    def __init__(
        self,
        local_ranks: Sequence[int],
        remote_ranks: Sequence[int],
        max_chunk_bytes: int,
        max_chunks: int,
        ip: str | None,
        watch_readers: bool = True,
        quiet: bool = False,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        """Raises as MessageQueue does.

        Args:
            ip: address to bind for remote readers.
            watch_readers: look for dead local readers while waiting for room; not needed where somebody calls `drop`.
            quiet: local readers neither sleep on this queue nor ring when they have read: a message wakes nobody, and a
                full queue is looked at every QUIET_PARK. Saves two system calls a message where readers are woken
                by other means.
            ring_bytes: shared memory for small messages, at most; a power of two.
        """
        self._watch_readers = watch_readers
        self._quiet = quiet
        self._local_ranks = tuple(local_ranks)
        self._lock = threading.RLock()
        self._waiter = Waiter()
        self._closed = False
        self._started: dict[int, int] = {}  # local rank -> start time of its process, to tell it from a reused pid
        self._shm = (
            ShmWriter(len(self._local_ranks), max_chunk_bytes, max_chunks, ring_bytes) if self._local_ranks else None
        )
        self._zmq = self._make_zmq(remote_ranks, max_chunk_bytes * max_chunks, ip) if remote_ranks else None
        self.handle = Handle(
            HANDLE_VERSION,
            len(self._local_ranks) + len(remote_ranks),
            self._local_ranks,
            tuple(remote_ranks),
            max_chunk_bytes,
            self._shm.address if self._shm else None,
            self._zmq.address if self._zmq else None,
            os.getpid(),
            socket.gethostname(),
        )

    def _make_zmq(self, ranks: Sequence[int], bound: int, ip: str | None) -> ZmqWriter:
        from ray_shm.zmq_channel import ZmqWriter

        try:
            return ZmqWriter(ranks, bound, ip or "127.0.0.1")
        except BaseException:
            if self._shm is not None:
                self._shm.close()
            raise

    @property
    def refused(self) -> int:
        """Connections and messages of strangers that the queue's TCP port has turned away."""
        return self._zmq.refused if self._zmq is not None else 0

    @property
    def bell(self) -> ring.Bell | None:
        """What local readers ring; None where there are none."""
        return self._shm.ring.bell if self._shm else None

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Until every reader has attached; then tell them.

        Raises:
            TimeoutError: naming the ranks that have not attached; the queue stays usable.
        """
        with self._locked():
            if self._shm is not None:
                self._wait(lambda: not self._absent(), deadline)
            while self._zmq is not None and self._zmq.missing() and not deadline.expired():
                self._await_remote(deadline)
            late = self._absent() + (self._zmq.missing() if self._zmq else [])
            if late:
                raise TimeoutError(
                    f"readers {late} of the queue of pid {os.getpid()} did not attach within {deadline.timeout} s; "
                    "are they started, and did they get this queue's handle?"
                )
            if self._shm is not None:
                self._shm.ring.set_phase(ring.READY)
            if self._zmq is not None:
                self._zmq.ready()

    def send(
        self,
        frames: Sequence[Buffer],
        deadline: Deadline = _NEVER,
        on_wait: Callable[[], object] | None = None,
    ) -> None:
        """Send one message to every reader.

        Args:
            frames: flat byte buffers; the caller may change them as soon as this returns.
            on_wait: called before every look at a full queue; may raise to give up.

        Raises:
            TimeoutError: readers are behind, and named; nothing was sent, the queue stays usable.
            PeerLostError: a reader's process is gone, or it closed its end.
            QueueClosedError: this end was closed.
            StartError: no memory for a large message; nothing was sent.
        """
        lengths = [len(frame) for frame in frames]
        if not self._lock.acquire(timeout=-1 if deadline.at is None else deadline.slice(threading.TIMEOUT_MAX)):
            self._require_open()
            raise TimeoutError(self._late_text(deadline))  # another thread waits for room
        try:
            self._require_open()
            shm = self._shm
            if shm is not None and self._zmq is None and shm.try_send(frames, lengths, not self._quiet):
                return
            if shm is not None and not shm.room(lengths):
                self._wait_for_readers(lengths, deadline, on_wait)
            if self._zmq is not None:
                self._wait_for_credit(sum(lengths), deadline, on_wait)
            if shm is not None:
                shm.send(frames, lengths, not self._quiet)
            if self._zmq is not None:
                self._zmq.send(frames, sum(lengths))
        finally:
            self._lock.release()

    def drop(self, rank: int) -> None:
        """Go on without `rank`, whose process is gone. Takes no lock: a sender may hold it, waiting for `rank`."""
        if rank in self._local_ranks and self._shm is not None:
            self._shm.ring.drop(self._local_ranks.index(rank))
            self._shm.ring.bell.ring()
        elif self._zmq is not None:
            self._zmq.drop(rank)

    def behind(self) -> dict[int, int]:
        """rank → bytes sent and not yet consumed, of the ranks that are behind."""
        lags = {}
        if self._shm is not None:
            lags = {r: self._shm.ring.lag(i) for i, r in self._live_local()}
        remote = self._zmq.late() if self._zmq else []
        return {r: n for r, n in [*lags.items(), *remote] if n}

    def close(self) -> None:
        """Tell the readers, who may still read what was sent; free this end. Idempotent, from any thread.

        Waits up to LINGER seconds for readers that are behind and have still to fetch a large message.
        """
        if self._closed:
            return
        self._closed = True
        while not self._lock.acquire(timeout=0.005):  # another thread waits in send: wake it, it sees _closed
            if self._shm is not None:
                self._shm.ring.bell.ring()
        try:
            if self._shm is not None:
                self._shm.announce_close()
                self._linger(self._shm)
                self._shm.close()
                self._shm = None  # unmapped now, however long this object is kept
            if self._zmq is not None:
                self._zmq.close()
        finally:
            self._lock.release()

    def _linger(self, shm: ShmWriter) -> None:
        """Give readers time to attach to large messages, whose memory is reached through this process."""

        def forget_lost() -> None:
            for i, rank in self._live_local():
                if shm.ring.state(i) == ring.ABSENT or self._fate(i, rank):
                    shm.ring.drop(i)

        if self._watch_readers and shm.large_unread():
            forget_lost()
            self._waiter.wait(
                lambda: not shm.large_unread(), shm.ring.bell.word, Deadline.after(LINGER), on_park=forget_lost
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._require_open()
            yield

    def _require_open(self) -> None:
        if self._closed:
            raise QueueClosedError("this end of the queue was closed in this process; make a new queue")

    def _live_local(self) -> list[tuple[int, int]]:
        if self._shm is None:
            return []
        return [(i, r) for i, r in enumerate(self._local_ranks) if i not in self._shm.ring.dropped]

    def _absent(self) -> list[int]:
        if self._shm is None:
            return []
        return [r for i, r in self._live_local() if self._shm.ring.state(i) == ring.ABSENT]

    def _wait(self, ready: Callable[[], bool], deadline: Deadline) -> bool:
        if self._shm is None:
            return True
        park = QUIET_PARK if self._quiet else IDLE_PARK
        done = self._waiter.wait(
            lambda: ready() or self._closed, self._shm.ring.bell.word, deadline, park, self._require_readers
        )
        self._require_open()
        return done

    def _wait_for_readers(self, lengths: list[int], deadline: Deadline, on_wait: Callable[[], object] | None) -> None:
        def ready() -> bool:
            if on_wait is not None:
                on_wait()
            return self._shm is None or self._shm.room(lengths)

        self._require_readers()
        if not self._wait(ready, deadline):
            raise TimeoutError(self._late_text(deadline))

    def _wait_for_credit(self, nbytes: int, deadline: Deadline, on_wait: Callable[[], object] | None) -> None:
        while self._zmq is not None and not self._zmq.room(nbytes):
            if on_wait is not None:
                on_wait()
            if deadline.expired():
                raise TimeoutError(self._late_text(deadline))
            self._await_remote(deadline)

    def _await_remote(self, deadline: Deadline) -> None:
        if self._zmq is not None and not self._zmq.poll(deadline.slice(IDLE_PARK)):
            self._zmq.probe()
        self._require_open()

    def _late_text(self, deadline: Deadline) -> str:
        late = {r: f"{n:,} bytes behind" for r, n in self.behind().items()}
        absent = [*self._absent(), *(self._zmq.missing() if self._zmq is not None else [])]
        late.update(dict.fromkeys(absent, "never attached"))
        who = ", ".join(f"rank {r} ({late[r]})" for r in sorted(late))
        return (
            f"the queue of pid {os.getpid()} was full for {deadline.timeout} s: {who or 'no reader'} did not read. "
            "Nothing was sent; read faster, wait longer, or raise max_chunks."
        )

    def _require_readers(self) -> None:
        """Raise PeerLostError for a local reader that closed its end, or whose process is gone."""
        if self._shm is None or not self._watch_readers:
            return
        for i, rank in self._live_local():
            fate = self._fate(i, rank)
            if fate:
                pid = self._shm.ring.pid(i)
                raise PeerLostError(f"reader rank {rank} (pid {pid}) {fate}; close the queue or make a new one")

    def _fate(self, index: int, rank: int) -> str:
        """What became of a local reader; empty while it is absent, or attached and alive."""
        if self._shm is None or self._shm.ring.state(index) == ring.ABSENT:
            return ""
        if self._shm.ring.state(index) == ring.LEFT:
            return "closed its end of the queue"
        started = start_time(self._shm.ring.pid(index))
        return "" if started and self._started.setdefault(rank, started) == started else "is gone"
