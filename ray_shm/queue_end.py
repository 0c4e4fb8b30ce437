"""What both ends of a queue have in common: a lock, being closed once, and being of no use in a forked child.

Runs in every process that sends or receives.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from ray_shm.deadline import Deadline
from ray_shm.errors import QueueClosedError
from ray_shm.locks import acquired
from ray_shm.waiting import Waiter

_ends: weakref.WeakSet[QueueEnd] = weakref.WeakSet()
_WAKE_AGAIN = 0.005  # seconds between attempts to wake a thread that waits while its end is closed


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counters of one end of a queue, as they stood at one moment.

    Attributes:
        messages, bytes: sent, or received. large: of the messages, those that went through the arena.
        waits: how often this end had to wait. spins: times it gave up the core for a moment while it waited.
        parks: times it slept.
        lag: writer: rank -> bytes sent and not yet consumed. Reader: its own rank -> bytes to read (shared memory).
        arena_bytes: writer: shared memory taken for large messages. leased_blocks, leased_bytes: reader's process:
            received memory that is still referred to, of all its queues.
        refused: writer: strangers turned away from the queue's TCP port.
        shared: writer: of the messages, those whose CUDA tensors the readers fetch from this process's GPU memory.
    """

    messages: int
    bytes: int
    large: int
    waits: int
    spins: int
    parks: int
    lag: dict[int, int] = field(default_factory=dict)
    arena_bytes: int = 0
    leased_blocks: int = 0
    leased_bytes: int = 0
    refused: int = 0
    shared: int = 0


class QueueEnd:
    """Base of QueueWriter and QueueReader, which call `_open` once all is there.

    Attributes:
        unfreed: `close` has something to do yet; so also after one that a signal's handler broke off.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._waiter = Waiter()
        self._closed = True  # until all is there
        self.unfreed = self._freeing = False
        self.messages = self.bytes = self.large = 0
        _ends.add(self)

    def _open(self) -> None:
        self.unfreed = True
        self._closed = False

    def close(self) -> None:
        """Leave the queue. Idempotent, from any thread: when it returns, whoever did it, the end is closed.

        One that a signal's handler broke off is finished by the next.
        """
        close_all([self])

    def _begin_closing(self) -> bool:
        """False: it was closed before."""
        self._closed = True
        return self.unfreed

    def _finish_closing(self) -> bool:
        """False: another thread waits in here; it is woken, and sees _closed."""
        lock = self._lock  # a forked child gets another one
        if not acquired(lock, True, _WAKE_AGAIN):
            self._wake_waiting()
            return False
        try:
            if self.unfreed and not self._freeing:  # else by this thread: this is a signal's handler
                self._freeing = True
                try:
                    self._free()
                    self.unfreed = False
                finally:
                    self._freeing = False
        finally:
            lock.release()
        return True

    def __del__(self) -> None:
        if getattr(self, "unfreed", False) and self._pid == os.getpid():
            self.close()  # first: a warning may be an error
            warnings.warn(f"{type(self).__name__} was dropped without close()", ResourceWarning, stacklevel=2)

    def _wake_waiting(self) -> None:
        raise NotImplementedError

    def _free(self) -> None:
        """Tell the other ends, and let go of everything. The lock is held. Idempotent, also where it was broken off."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """In a forked child: let go of everything without a word to anybody."""
        raise NotImplementedError

    def _acquire(self, deadline: Deadline) -> bool:
        """Take the lock; False when the deadline comes first."""
        return self._lock.acquire(timeout=-1 if deadline.at is None else deadline.slice(threading.TIMEOUT_MAX))

    def _let_go(self, lock: threading.RLock, busy: bool) -> None:
        """What a signal's handler raised came right after taking the lock, if it came then.

        busy: an outer call of this thread has it, too.
        """
        if not busy and lock._is_owned():  # type: ignore[attr-defined]
            lock.release()

    def _require_open(self) -> None:
        if not self._closed:
            return
        if self._pid != os.getpid():
            raise QueueClosedError(
                f"this end of the queue belongs to process {self._pid}, of which this one (pid {os.getpid()}) was "
                "forked; attach here with MessageQueue.create_from_handle, or make a new queue"
            )
        raise QueueClosedError("this end of the queue was closed in this process; make a new queue")


def close_all(ends: Iterable[QueueEnd]) -> None:
    """Close several. One thread may be inside of two of them: reading one, it waits in the other. So all are woken."""
    left = [end for end in ends if end._begin_closing()]
    while left:
        left = [end for end in left if not end._finish_closing()]


def _abandon_all() -> None:
    for end in list(_ends):
        end._lock = threading.RLock()  # another thread of the parent may have held it
        if end.unfreed:
            end._closed = True
            end.unfreed = end._freeing = False
            end._abandon()


os.register_at_fork(after_in_child=_abandon_all)
