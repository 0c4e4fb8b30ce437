"""Which local readers of a queue are gone, and whose places are free again. Runs in the process that made the queue.

A reader is known here by its position in the ring. It has closed its end when its place says so; it is gone when its
process has ended, which a thread tells (death_watch.py) or, where no pidfd can be had, a look at /proc. What becomes of
the queue then is the writer's to decide (queue_writer.py).
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable

from ray_shm import death_watch, ring
from ray_shm.segment import start_time
from ray_shm.shm_writer import ShmWriter

_ENDING = 5.0  # seconds that a killed process may still need: freeing its memory takes 5 ms for each GiB


class ReaderWatch:
    """Watches the local readers of one queue. Its owner holds a lock, except for `dead` and `is_vacant`.

    Attributes:
        dead: positions of readers whose process has ended, until they are dropped; told at any time, by a thread.
    """

    def __init__(self, shm: ShmWriter) -> None:
        self.dead: set[int] = set()
        self._shm: ShmWriter | None = shm
        self._watched: dict[int, Callable[[], None] | None] = {}  # position -> what ends its watch
        self._replaced: Counter[int] = Counter()  # position -> processes that had it before
        self._replacing = threading.RLock()  # held while a place passes on, so that no late word meets the next process

    def start(self, positions: Iterable[int]) -> None:
        """Have the end of those of these readers told that have attached."""
        for i in positions:
            if i not in self._watched and self._shm is not None and self._shm.ring.state(i) == ring.ATTACHED:
                self._watch(i)

    def fate(self, position: int) -> str:
        """What became of a reader; empty while it is absent, or attached and alive."""
        if self._shm is None or self._shm.ring.state(position) == ring.ABSENT:
            return ""
        if self._shm.ring.state(position) == ring.LEFT:
            return "closed its end of the queue"
        if position in self.dead:
            return "is gone"
        if self._watched.get(position) is not None:
            return ""
        return "" if start_time(self._shm.ring.pid(position)) == self._shm.ring.started(position) else "is gone"

    def drop(self, position: int) -> None:
        """Go on without a reader that has a fate; what it leased counts for as long as its process lives."""
        if self._shm is None:
            return
        self._shm.drop(position, gone=self._shm.ring.state(position) != ring.LEFT)
        if position not in self._watched:  # it left before anybody looked
            self._watch(position)
        if position in self.dead:
            self._shm.drop(position, gone=True)
            self.dead.discard(position)

    def is_vacant(self, position: int) -> bool:
        """Whether no process has attached there, or the one that had has ended, or does so within _ENDING."""
        if self._shm is None:
            return False
        pid, started = self._shm.ring.pid(position), self._shm.ring.started(position)
        if not pid:
            return True
        try:
            pidfd = os.pidfd_open(pid)  # tells of the end of all its threads, /proc of the first one's only
        except ProcessLookupError:
            return True
        except OSError:  # an old kernel, or a seccomp filter
            return start_time(pid) != started
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return start_time(pid) not in (0, started) or bool(poll.poll(1000 * _ENDING))
        finally:
            os.close(pidfd)

    def readmit(self, position: int) -> None:
        """Let a new process attach to a place that is dropped and vacant; it gets what is sent from now on."""
        end_watch = self._watched.pop(position, None)
        if end_watch is not None:
            end_watch()
        with self._replacing:
            self._replaced[position] += 1
            self.dead.discard(position)
            if self._shm is not None:
                self._shm.readmit(position)

    def close(self) -> None:
        for end_watch in self._watched.values():
            if end_watch is not None:
                end_watch()
        self._watched.clear()
        self._shm = None  # which may be kept mapped by nothing else

    def _watch(self, position: int) -> None:
        shm = self._shm
        if shm is not None:
            on_death = self._on_death(position, self._replaced[position])
            self._watched[position] = death_watch.watch(shm.ring.pid(position), shm.ring.started(position), on_death)

    def _on_death(self, position: int, replaced: int) -> Callable[[], None]:
        me = weakref.ref(self)  # a dropped end is to be collected

        def on_death() -> None:
            watch = me()
            if watch is not None:
                watch._died(position, replaced)

        return on_death

    def _died(self, position: int, replaced: int) -> None:
        shm = self._shm
        if shm is None:
            return
        with self._replacing:
            if self._replaced[position] != replaced:  # another process has its place by now
                return
            if position in shm.ring.dropped:  # it had closed its end; what it still held is free now
                shm.drop(position, gone=True)
            else:
                self.dead.add(position)
        shm.ring.bell.ring()
