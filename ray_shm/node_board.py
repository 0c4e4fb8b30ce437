"""Where the members of one group on one node stand: a line of shared memory each, and the waits for each other.

Runs in every worker, in the segment of a `NodeExchange`; what lies behind the lines is the exchange's. No torch here.
Layout, after the segment's 64-byte header::

    64         over     u32  0 while the group is of use; whoever ends it stores 1, so all store the same value
    128 + 128r the line of rank r in the group:
               arrived  u64  the step that r has come to; written by r only; others may see it late
               what     u64  four of them, by step modulo 4: what r does in that step; by r only
               ended    u32  0, or why r takes no more part: CLOSED ...; by r, and DIED by any other; the first stays
               event    u32  changes with everything told here; those who wait for r sleep on it; see `ring.Bell`
               entered  u64  collective operations that r has begun, of any kind: for errors only; by r only
    data()     what the steps move, two areas for each rank, for even and for odd steps; by that rank only

All members go through the same steps, 1, 2, ...: an operation is one step or two. A step, on each rank::

    await_readers   (who writes) all have come to the step before, so have read what is to be overwritten
    publish         what, arrived, event, a wake; before it, the own area is written
    await_members   those whose areas this rank reads; then read them

Who writes in step k has seen all others in k - 1, and who has done step k has seen its writer there: so nobody is more
than two steps ahead of another, and nobody overwrites what another has still to read. A rank that ends (closes, is
released, gives up, dies) ends the group for all: no step begins after that, but for a broadcast's reader; yet a wait
whose members have all arrived succeeds: who finished first may leave first.

The SYNC POINTs, and why each holds (what x86-64 and aarch64 promise, and what a fence is: futex.py):

    payload before arrived  x86-64: stores in order, loads in order. aarch64: the fence of `publish` lies between the
                            stores of area and `what` and that of `arrived`. Who sees the new `arrived` made that load
                            after the barrier it took part in, and its loads of the area come later in its program.
    arrived before event    the same for `arrived`, or `ended` and `over`, and the word: Bell.ring fences in between.
    word before state       a sleeper loads the word, looks at `arrived` and `over`, sleeps while the word is unchanged
                            (waiting.py). Several processes store to one word, each values of its own, and none of them
                            twice (ring.Bell). It does no harm if one overwrites another's value before a sleeper saw
                            that: the word has changed for him anyway, and he then sees what both did before. x86-64:
                            there is one order of all stores. aarch64: both had all threads pass a barrier before.
    reads before arrival    a rank's loads of step k precede its store of `arrived` = k + 1. x86-64: no store overtakes
                            an earlier load. aarch64: who is to overwrite what was read saw that store, then fences
                            (`await_readers`), then writes: at that barrier the reader was past its store.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ray_shm import death_watch, futex
from ray_shm.deadline import Deadline
from ray_shm.errors import RpcCancelledError
from ray_shm.futex import Word
from ray_shm.ring import Bell
from ray_shm.segment import Segment, start_time
from ray_shm.waiting import Waiter

LOST, CLOSED, RELEASED, GAVE_UP, MISMATCHED, INTERRUPTED, DIED = range(1, 8)
_WHY = {
    LOST: "has lost the group",
    CLOSED: "has left the group",
    RELEASED: "was released from the group",
    GAVE_UP: "has given up waiting",
    MISMATCHED: "found that the members called different operations",
    INTERRUPTED: "was interrupted in an operation",
    DIED: "is gone",
}
_LINE = 128
_OVER = 64
_LINES = 128
_ARRIVED, _WHAT, _ENDED, _EVENT, _ENTERED = 0, 8, 40, 44, 48  # in a line


class LateRanksError(TimeoutError):
    """The deadline came before all members did.

    Attributes:
        late: ranks in the group that were waited for and had not come.
    """

    def __init__(self, message: str, late: Sequence[int]) -> None:
        super().__init__(message)
        self.late = list(late)


class ExchangeEndedError(RuntimeError):
    """Members that were waited for will not come: one has left the group, died, or was released; or this rank was.

    Attributes:
        late: ranks in the group that were waited for and had not come.
    """

    def __init__(self, message: str, late: Sequence[int]) -> None:
        super().__init__(message)
        self.late = list(late)


@dataclass(frozen=True, slots=True)
class Place:
    """A member's process: its pid, and when that started (segment.start_time). rank: global."""

    rank: int
    pid: int
    started: int

    def __str__(self) -> str:
        return f"global rank {self.rank} (pid {self.pid})"


def data(size: int) -> int:
    """Offset of what lies behind the lines of `size` members; page-aligned."""
    return -(-(_LINES + _LINE * size) // mmap.PAGESIZE) * mmap.PAGESIZE


class NodeBoard:
    """This rank's end. Used by one thread at a time, but for `end`; `close` after the last use.

    Attributes:
        step: that this rank is in, or was in last. Written by the thread that uses it only.
        interruption: a cancelled call's error that came while this rank waited; to be raised once the step is done.
    """

    def __init__(self, segment: Segment, places: Sequence[Place], own: int) -> None:
        self.step = 0
        self.interruption: RpcCancelledError | None = None
        self.others = [rank for rank in range(len(places)) if rank != own]
        self._places, self._own = places, own
        self._longs = segment.view.cast("Q")
        self._ints = ints = segment.view.cast("I")
        self._arrived = [(_LINES + _LINE * rank + _ARRIVED) // 8 for rank in range(len(places))]
        self._bells = [Bell(Word(segment.mapping, ints, _event(rank)), own + 1) for rank in range(len(places))]
        self._ring = self._bells[own].ring
        self._waiter = Waiter()
        self._ending = threading.RLock()  # held for a few instructions; a signal's handler may release the group
        self._watches: list[Callable[[], None]] = []
        self._end_watches = weakref.finalize(self, _call_all, self._watches)  # also where this object is dropped
        self._end_watches.atexit = False
        self._unwatched: list[int] = []  # ranks of whose end no thread tells

    def watch(self) -> None:
        """Have the end of the other members' processes told, until `close`."""
        for rank in self.others:
            place = self._places[rank]
            end_watch = death_watch.watch(place.pid, place.started, _ender(self, rank, DIED))
            if end_watch is None:
                self._unwatched.append(rank)
            else:
                self._watches.append(end_watch)

    def ender(self, why: int) -> Callable[[], None]:
        """A function that ends the group for all, because of this rank. From any thread; does not keep this object."""
        return _ender(self, self._own, why)

    def end(self, rank: int, why: int) -> None:
        """`rank` takes no more part: whoever waits, in any process, looks up. From any thread, until `close`."""
        with self._ending:
            bells = self._bells
            if not bells or os.getpid() != self._places[self._own].pid:  # closed, or a forked child's copy
                return
            at = (_LINES + _LINE * rank + _ENDED) // 4
            if self._ints[at] == 0:
                self._ints[at] = why
            if futex.fence is not None:
                futex.fence()  # who sees `over` sees why
            self._ints[_OVER // 4] = 1
            for bell in bells:
                bell.ring()  # SYNC POINT: arrived before event; here, `over`

    def enter(self) -> None:
        """This rank begins a collective operation, whether it goes this way or not."""
        self._longs[self._arrived[self._own] + _ENTERED // 8] += 1

    def not_entered(self) -> list[int]:
        """Ranks in the group that have begun fewer operations than this one."""
        longs, at = self._longs, _ENTERED // 8
        own = longs[self._arrived[self._own] + at]
        return [rank for rank in self.others if longs[self._arrived[rank] + at] < own]

    def begin(self) -> int:
        """The next step's number."""
        self.step += 1
        return self.step

    def await_readers(self, deadline: Deadline) -> None:
        """Until the own area of this step is free: nobody reads what it held two steps ago any more.

        Raises:
            LateRanksError: the readers had not come at the deadline. ExchangeEndedError: the group has ended.
        """
        self.require()
        self._await(self.others, self.step - 1, deadline)
        if futex.fence is not None:
            futex.fence()  # SYNC POINT: reads before arrival

    def require(self) -> None:
        """Raises ExchangeEndedError if the group has ended."""
        if self._ints[_OVER // 4]:
            raise self._ended([])

    def publish(self, what: int) -> None:
        """Tell the others that this rank has come to its step, and what it does there; what it wrote may be read."""
        longs = self._longs
        line = self._arrived[self._own]
        longs[line + _WHAT // 8 + (self.step & 3)] = what
        if futex.fence is not None:
            futex.fence()  # SYNC POINT: payload before arrived
        longs[line] = self.step
        self._ring()  # SYNC POINT: arrived before event

    def await_members(self, ranks: Sequence[int], deadline: Deadline) -> None:
        """Until these ranks have come to this step.

        Raises:
            LateRanksError: they had not at the deadline. ExchangeEndedError: they never will.
        """
        self._await(ranks, self.step, deadline)

    def what(self, rank: int, step: int) -> int:
        """What `rank` does in this step or did in the last, to which it has come."""
        return self._longs[self._arrived[rank] + _WHAT // 8 + (step & 3)]

    def _late(self, ranks: Iterable[int], step: int) -> list[int]:
        return [rank for rank in ranks if self._longs[self._arrived[rank]] < step]

    def name(self, ranks: Sequence[int]) -> str:
        """Members in words."""
        return ", ".join(str(self._places[rank]) for rank in ranks)

    def close(self) -> None:
        """Tell the others that this rank has left, and let go of the memory. Idempotent."""
        self._end_watches()
        self.end(self._own, CLOSED)
        with self._ending:
            self._bells = []
            self._longs = self._ints = memoryview(b"")
            self._ring = _nothing

    def _await(self, ranks: Sequence[int], step: int, deadline: Deadline) -> None:
        longs, arrived = self._longs, self._arrived
        for rank in ranks:
            # SYNC POINT: payload before arrived. Loads of the area follow this one in program order.
            if longs[arrived[rank]] < step and not self._sleep(rank, step, deadline):
                del longs  # a traceback must not keep the memory
                raise self._failure(ranks, step, deadline)

    def _sleep(self, rank: int, step: int, deadline: Deadline) -> bool:
        """Whether `rank` came to `step`."""
        longs, ints, at = self._longs, self._ints, self._arrived[rank]
        word, on_park = self._bells[rank].word, self._look if self._unwatched else None

        def ready() -> bool:
            return longs[at] >= step or ints[_OVER // 4] != 0

        while True:
            try:
                self._waiter.wait(ready, word, deadline, on_park=on_park)
                return longs[at] >= step
            except RpcCancelledError as exc:
                # As in C code, where no signal's handler runs: the step goes on to its end, so that all members have
                # made the same steps. If another does not come, the driver releases this rank.
                self.interruption = exc

    def _look(self) -> None:
        """For ranks of whose end no thread tells. At most twice a second."""
        for rank in self._unwatched:
            if start_time(self._places[rank].pid) != self._places[rank].started:
                self.end(rank, DIED)

    def _failure(self, ranks: Sequence[int], step: int, deadline: Deadline) -> Exception:
        late = self._late(ranks, step)
        if self._ints[_OVER // 4]:
            return self._ended(late)
        return LateRanksError(f"{self.name(late)} had not arrived after {deadline.timeout} s", late)

    def _ended(self, late: Sequence[int]) -> ExchangeEndedError:
        codes = [self._ints[(_LINES + _LINE * rank + _ENDED) // 4] for rank in range(len(self._places))]
        ended = [rank for rank, code in enumerate(codes) if code]
        ended = [rank for rank in ended if codes[rank] != LOST] or ended  # not who ended because others had
        # A death explains that others gave up; this rank's own end comes last.
        ended.sort(key=lambda rank: (rank == self._own, -codes[rank]))
        told = [f"{self._places[rank]} {_WHY[codes[rank]]}" for rank in ended]
        absent = [rank for rank in late if not codes[rank]]
        if absent:
            told.append(f"{self.name(absent)} had not arrived")
        return ExchangeEndedError("; ".join(told), late)


def _event(rank: int) -> int:
    return _LINES + _LINE * rank + _EVENT


def _ender(board: NodeBoard, rank: int, why: int) -> Callable[[], None]:
    me = weakref.ref(board)

    def end() -> None:
        there = me()
        if there is not None:
            there.end(rank, why)

    return end


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _nothing() -> None:
    return None


def own_place(rank: int) -> Place:
    return Place(rank, os.getpid(), start_time(os.getpid()))
