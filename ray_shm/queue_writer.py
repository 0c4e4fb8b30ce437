"""The writing end of a queue: frames in, to local readers through shared memory and to remote ones through ZeroMQ.

Runs in the process that created the queue. A message is sent to all readers or to none: room is awaited on both
channels before anything is written. No pickling (codec.py).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ray_shm import ring
from ray_shm.cuda_ipc import DeviceFrame, Sharer
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError
from ray_shm.handle import HANDLE_VERSION, Handle
from ray_shm.queue_end import QueueEnd, QueueStats
from ray_shm.reader_watch import ReaderWatch
from ray_shm.ring import Buffer
from ray_shm.shm_writer import RING_BYTES, ShmWriter
from ray_shm.size_text import size_text
from ray_shm.waiting import IDLE_PARK

if TYPE_CHECKING:
    from ray_shm.zmq_writer import ZmqWriter

_NEVER = Deadline.after(None)
_TRIM_EVERY = 64  # small messages between looks for memory that large ones have left behind
_log = logging.getLogger(__name__)


class QueueWriter(QueueEnd):
    """Sends messages to a fixed set of reader ranks. Threads may share it."""

    def __init__(
        self,
        local_ranks: Sequence[int],
        remote_ranks: Sequence[int],
        max_chunk_bytes: int,
        max_chunks: int,
        ip: str | None,
        *,
        port_range: tuple[int, int] | None = None,
        max_arena_bytes: int | None = None,
        drop_dead_readers: bool = False,
        watch_readers: bool = True,
        wakes: bool = True,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        """Raises as MessageQueue does.

        Args:
            ip, port_range: address to bind for remote readers, and ports (both ends included) to choose from.
            drop_dead_readers: go on without readers whose process or connection is gone.
            watch_readers: look for dead local readers; not needed where somebody calls `drop`.
            wakes: local readers sleep on this queue. False saves a system call a message where they are woken by
                other means.
            ring_bytes: shared memory for small messages, at most; a power of two.
        """
        super().__init__()
        self._sending = False
        self._watch_readers = watch_readers
        self._drop_dead = drop_dead_readers
        self._local_ranks = tuple(local_ranks)
        self._shm = (
            ShmWriter(len(self._local_ranks), max_chunk_bytes, max_chunks, ring_bytes, max_arena_bytes, wakes)
            if self._local_ranks
            else None
        )
        self._watch = ReaderWatch(self._shm) if self._shm is not None else None
        self._dead: set[int] = self._watch.dead if self._watch is not None else set()  # positions of local readers
        self._zmq = self._make_zmq(remote_ranks, max_chunk_bytes * max_chunks, ip, port_range) if remote_ranks else None
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
        self._open()

    def _make_zmq(
        self, ranks: Sequence[int], bound: int, ip: str | None, port_range: tuple[int, int] | None
    ) -> ZmqWriter:
        from ray_shm.zmq_writer import ZmqWriter

        try:
            return ZmqWriter(ranks, bound, ip or "127.0.0.1", port_range)
        except BaseException:
            if self._shm is not None:
                self._shm.close()
            raise

    @property
    def refused(self) -> int:
        """Connections and messages of strangers that the queue's TCP port has turned away."""
        return self._zmq.refused if self._zmq is not None else 0

    @property
    def sharer(self) -> Sharer | None:
        """Of GPU memory; None where some reader is on another node."""
        shm = self._shm
        return shm.sharer if shm is not None and self._zmq is None else None

    @property
    def bell(self) -> ring.Bell | None:
        """What local readers ring; None where there are none."""
        return self._shm.ring.bell if self._shm else None

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Until every reader has attached; then tell them.

        Raises:
            TimeoutError: naming the ranks that have not attached; the queue stays usable.
            PeerLostError: a reader that had attached is gone.
        """
        with self._lock:
            self._require_open()
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
            self._watch_attached()
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
            StaleError: of a message that shares GPU memory; nothing was sent.
        """
        lock = self._lock  # a forked child gets another one
        try:
            if not lock.acquire(False) and not self._acquire(deadline):
                self._require_open()
                raise TimeoutError(self._late_text(deadline, ""))  # another thread waits for room, and has the blocks
            if self._sending:  # the same thread: a signal handler, or a __del__
                lock.release()
                self._require_open()
                raise RuntimeError("enqueue was called inside of enqueue of the same queue; nothing was sent")
            self._sending = True
        except BaseException:
            self._let_go(lock, self._sending)
            raise
        try:
            shm = self._shm
            simple = shm is not None and self._zmq is None and not self._dead
            if simple and len(frames) == 1 and shm.put(frames[0]):  # type: ignore[union-attr]
                self.messages += 1
                self.bytes += len(frames[0])
                if not self.messages % _TRIM_EVERY:
                    shm.trim()  # type: ignore[union-attr]
                return
            self._require_open()
            lengths = [len(frame) for frame in frames]
            if type(frames[-1]) is DeviceFrame:
                frames[-1].outgoing.require_current()
            if not (simple and shm.try_send(frames, lengths)):  # type: ignore[union-attr]
                self._send_slowly(frames, lengths, deadline, on_wait)
            self.messages += 1
            self.bytes += sum(lengths)
        except BaseException:
            if self._shm is not None:
                self._shm.ring.republish()
            raise
        finally:
            self._sending = False
            lock.release()

    def _send_slowly(
        self, frames: Sequence[Buffer], lengths: list[int], deadline: Deadline, on_wait: Callable[[], object] | None
    ) -> None:
        self._require_readers()
        if self._shm is not None and not self._shm.room(lengths):
            self._wait_for_readers(lengths, deadline, on_wait)
        if self._zmq is not None:
            self._wait_for_credit(sum(lengths), deadline, on_wait)
        if self._shm is not None:
            self._shm.send(frames, lengths)
        if self._zmq is not None:
            try:
                self._zmq.send(frames, sum(lengths))
            except PeerLostError as exc:
                self._lose(exc)

    def require_readers(self) -> None:
        """Look for local readers that are gone; `send` itself does so only once it has to wait for them.

        Raises:
            PeerLostError: a reader's process is gone, or it closed its end. QueueClosedError: this end was closed.
        """
        with self._lock:
            self._require_open()
            if self._dead or self._has_left():
                self._require_readers()

    def drop(self, rank: int) -> None:
        """Go on without `rank`, whose process is gone. Takes no lock: a sender may hold it, waiting for `rank`."""
        if rank in self._local_ranks and self._shm is not None:
            self._shm.drop(self._local_ranks.index(rank), gone=True)
            self._shm.ring.bell.ring()
        elif self._zmq is not None:
            self._zmq.drop(rank)

    def readmit(self, rank: int) -> None:
        """Give the place of `rank`, which was dropped and whose process has ended, to a new process.

        It attaches as the old one did, with the same handle, at any time after this. It gets all that is sent from now
        on, and nothing from before; until it has attached and read, a sender may have to wait for it. Waits for a
        thread that is in `send`, but not for what the old process had not read.

        Raises:
            ValueError: no such rank, it was not dropped, or its process (on this node) lives. Nothing has changed.
            QueueClosedError: this end was closed. RuntimeError: called inside of `send`; nothing has changed.
            PeerLostError: the queue cannot be used any more; make a new one.
        """
        self._require_vacant(rank)  # may take a moment, so without the lock
        with self._lock:
            self._require_open()
            if self._sending:  # the same thread: `on_wait`, or a signal handler
                raise RuntimeError("readmit was called inside of enqueue of the same queue; nothing was readmitted")
            self._require_vacant(rank)  # still: another thread may have been faster
            if self._watch is not None and rank in self._local_ranks:
                self._watch.readmit(self._local_ranks.index(rank))
            elif self._zmq is not None:
                self._zmq.readmit(rank)

    def _require_vacant(self, rank: int) -> None:
        if rank in self._local_ranks:
            index = self._local_ranks.index(rank)
            dropped = self._shm is not None and index in self._shm.ring.dropped
            vacant = dropped and self._watch is not None and self._watch.is_vacant(index)
        elif rank in self.handle.remote_reader_ranks:
            dropped = vacant = self._zmq is not None and rank in self._zmq.dropped
        else:
            raise ValueError(f"the queue of pid {os.getpid()} has no reader {rank}")
        if not vacant:
            self._require_open()
            why = (
                "its process lives and may still write to its place: kill it first"
                if dropped
                else f"it was not dropped: call drop({rank}) once its process has ended"
            )
            raise ValueError(
                f"cannot readmit rank {rank}{self._pid_text(rank)} to the queue of pid {os.getpid()}: {why}"
            )

    def behind(self) -> dict[int, int]:
        """rank → bytes sent and not yet consumed, of the ranks that are behind."""
        lags: dict[int, int] = {}
        shm = self._shm
        if shm is not None:
            lags = {r: n for i, r in self._live_local() if (n := shm.ring.lag(i))}
        return {**lags, **dict(self._zmq.late() if self._zmq else [])}

    def stats(self) -> QueueStats:
        """Counters of this end. Takes no lock: a sender may hold it, waiting for room."""
        waiter, shm = self._waiter, self._shm
        return QueueStats(
            self.messages,
            self.bytes,
            shm.large if shm is not None else 0,
            waiter.waits,
            waiter.yields,
            waiter.parks,
            self.behind(),
            shm.arena_bytes if shm is not None else 0,
            refused=self.refused,
            shared=shm.sharer.messages if shm is not None else 0,
        )

    def _wake_waiting(self) -> None:
        shm = self._shm  # another thread may close this end, too
        if shm is not None:
            shm.ring.bell.ring()
        if self._zmq is not None:
            self._zmq.wake()

    def _free(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._shm is not None:
            self._shm.announce_close()
            self._shm.close()
            self._shm = None  # unmapped now, however long this object is kept
        if self._zmq is not None:
            self._zmq.close()

    def _abandon(self) -> None:
        if self._shm is not None:
            self._shm.abandon()
            self._shm = None
        if self._zmq is not None:
            self._zmq.abandon()
            self._zmq = None

    def _live_local(self) -> list[tuple[int, int]]:
        """(position, rank) of the local readers that count."""
        shm = self._shm
        return [] if shm is None else [(i, r) for i, r in enumerate(self._local_ranks) if i not in shm.ring.dropped]

    def _absent(self) -> list[int]:
        if self._shm is None:
            return []
        return [r for i, r in self._live_local() if self._shm.ring.state(i) == ring.ABSENT]

    def _has_left(self) -> bool:
        state = self._shm.ring.state if self._shm is not None else None
        return state is not None and ring.LEFT in [state(i) for i in range(len(self._local_ranks))]

    def _wait(self, ready: Callable[[], bool], deadline: Deadline, on_wait: Callable[[], object] | None = None) -> bool:
        shm = self._shm
        if shm is None:
            return True

        def looked() -> bool:
            if on_wait is not None:
                on_wait()
            self._require_readers()
            return self._closed or ready()

        shm.ring.want(True)
        try:
            done = self._waiter.wait(looked, shm.ring.bell.word, deadline, IDLE_PARK)
        finally:
            shm.ring.want(False)
        self._require_open()
        return done

    def _wait_for_readers(self, lengths: list[int], deadline: Deadline, on_wait: Callable[[], object] | None) -> None:
        if not self._wait(lambda: self._shm is None or self._shm.room(lengths), deadline, on_wait):
            raise TimeoutError(self._late_text(deadline, self._held_text()))

    def _wait_for_credit(self, nbytes: int, deadline: Deadline, on_wait: Callable[[], object] | None) -> None:
        while self._zmq is not None and not self._has_credit(nbytes):
            if on_wait is not None:
                on_wait()
            if deadline.expired():
                raise TimeoutError(self._late_text(deadline, self._held_text()))
            self._await_remote(deadline)

    def _has_credit(self, nbytes: int) -> bool:
        try:
            return self._zmq is None or self._zmq.room(nbytes)
        except PeerLostError as exc:
            self._lose(exc)
            return False

    def _await_remote(self, deadline: Deadline) -> None:
        if self._zmq is not None and not self._zmq.poll(deadline.slice(IDLE_PARK)):
            try:
                self._zmq.probe()
            except PeerLostError as exc:
                self._lose(exc)
        self._require_open()

    def _late_text(self, deadline: Deadline, held: str) -> str:
        late = {r: f"is {n:,} bytes behind" for r, n in self.behind().items()}
        absent = [*self._absent(), *(self._zmq.missing() if self._zmq is not None else [])]
        late.update(dict.fromkeys(absent, "never attached"))
        who = ", ".join(f"rank {r}{self._pid_text(r)} {late[r]}" for r in sorted(late))
        return (
            f"the queue of pid {os.getpid()} was full for {deadline.timeout} s: {who or 'no reader'}"
            f"{held}. Nothing was sent, and the queue is intact; read faster, wait longer, or raise "
            "max_chunks or max_arena_bytes."
        )

    def _pid_text(self, rank: int) -> str:
        if self._shm is not None and rank in self._local_ranks:
            pid = self._shm.ring.pid(self._local_ranks.index(rank))
        else:
            pid = self._zmq.pid(rank) if self._zmq is not None else 0
        return f" (pid {pid})" if pid else ""

    def _held_text(self) -> str:
        if self._shm is None:
            return ""
        holders = self._shm.holders().items()
        return "".join(
            f"; rank {self._local_ranks[i]} holds {n} block{'s' * (n != 1)}, {size_text(held)}"
            for i, (n, held) in holders
        )

    def _watch_attached(self) -> None:
        """Have the death of attached local readers told."""
        if self._watch is not None and self._watch_readers:
            self._watch.start(i for i, _ in self._live_local())

    def _require_readers(self) -> None:
        """Act on local readers that closed their end, or whose process is gone. Raises PeerLostError."""
        shm, watch = self._shm, self._watch
        if shm is None or watch is None or not self._watch_readers:
            return
        self._watch_attached()
        lost = [(i, rank, fate) for i, rank in self._live_local() if (fate := watch.fate(i))]
        if lost:
            who = ", ".join(f"rank {rank} (pid {shm.ring.pid(i)}) {fate}" for i, rank, fate in lost)
            self._lose(PeerLostError(f"reader {who}; close the queue or make a new one", [rank for _, rank, _ in lost]))

    def _lose(self, error: PeerLostError) -> None:
        """Readers are lost: raise, or go on without them."""
        if not self._drop_dead:
            raise error
        _log.warning("the queue of pid %d goes on without ranks %s: %s", os.getpid(), error.ranks, error)
        for rank in error.ranks:
            if rank not in self._local_ranks:
                if self._zmq is not None:
                    self._zmq.drop(rank)
            elif self._watch is not None:
                self._watch.drop(self._local_ranks.index(rank))
