"""The ring: one writer, many readers, records of variable size, in one shared segment. No pickling, no waiting policy.

Runs in every process: RingWriter in the one that created the segment, RingReader in those that attached.

Layout, after the segment's 64-byte header (every line is 64 bytes, so that no two owners share a cache line)::

    64   tail    u64  bytes published so far, modulo 2^64; written by the writer only; readers may see it late
         event   u32  changes with everything the writer announces; readers sleep on it; written by the writer only
         phase   u32  0 starting, 1 ready, 2 closed; written by the writer only
         wanted  u32  the writer sleeps on the bell, or is about to; written by the writer only
    128  bell    u32  changes with everything told to the writer's process, which sleeps on it; see `Bell`
    192  one line per reader i, written by reader i only (by the writer while no process has it: `RingWriter.readmit`);
         the writer may see it late:
         cursor  u64  bytes consumed so far, modulo 2^64; cursor <= tail, tail - cursor <= capacity
         state   u32  0 absent, 1 attached, 2 closed
         pid     u32  the reader's process; 0: none has attached, and one may
         started u64  when that process started (segment.py), which tells it from a later one with the same pid
         device  u32  0 unknown, 1 can, 2 cannot open the writer's GPU memory; see cuda_ipc.py
    leases       LEASES u32 per reader, page-aligned, written by that reader only; see arena.py
    data         capacity bytes (a power of two), page-aligned

A record starts at a multiple of 64 and never wraps: ``total u64 | kind u32 | count u32 | length u64 x count | frames``,
every frame at a multiple of 8 from the record's start, the record padded to 64 bytes. Kinds: INLINE (the frames stand
here), LARGE (one frame that says where in the arena the frames stand), SKIP (nothing until the ring's start). The first
two with DEVICE added: the last frame says where in GPU memory more stands (cuda_ipc.py).

States of a byte at position p, and who may touch it:

    1  free      p >= tail, p < slowest cursor + capacity    the writer writes it
    2  published slowest cursor <= p < tail                  nobody writes it; readers with cursor <= p read it
    1' free      p < slowest cursor                          the writer may reuse it

The SYNC POINTs, and why each holds (what x86-64 and aarch64 promise, and what a fence is: futex.py). CPython makes no
move across bytecodes. `fence()` stands for nothing on x86-64. tests/model/ has the same names.

    payload before tail     x86-64: stores in order, loads in order. aarch64: the writer's fence lies between its store
                            of the payload and that of the tail. A reader that sees the new tail made that load after
                            the barrier it took part in, and its loads of the payload come later in its program, so
                            after that barrier too.
    tail before event       the same for "what the word stands for" and the word.
    word before state       a sleeper loads the word, then looks at the state, then sleeps while the word is unchanged.
                            x86-64: loads in order. aarch64: by the fence before the store of the word, as above. The
                            kernel compares and queues under its lock, and FUTEX_WAKE looks for sleepers under the same,
                            after the store: whoever saw the old word is either queued by then, or will not sleep.
    reads before cursor     x86-64: no store overtakes an earlier load. aarch64: see the next.
    cursors before reuse    aarch64: the writer saw a reader's cursor (or lease word), then fences, then writes: at that
                            barrier the reader was past its store of the cursor, so its earlier loads were done.
    wanted before cursors   the writer stores `wanted`, then runs fence_all (on x86-64 too), then looks at the cursors;
                            a reader stores its cursor, then loads `wanted`, without any fence. The reader's barrier
                            falls before its store of the cursor (then its load sees `wanted`, and it rings) or after
                            (then the writer sees the cursor). This saves a system call per message and reader.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_shm import futex
from ray_shm.futex import Word
from ray_shm.segment import Segment, start_time

INLINE, LARGE, SKIP, DEVICE = 0, 1, 2, 4
STARTING, READY, CLOSED = 0, 1, 2
ABSENT, ATTACHED, LEFT = 0, 1, 2
UNKNOWN, CAN, CANNOT = 0, 1, 2
MAX_READERS = 4094  # bell values carry the ringer in 12 bits
LEASES = 1024  # lease words of a reader: messages whose memory it may hold at once

_LINE = 64
_PAGE = 4096
_TAIL, _EVENT, _PHASE, _WANTED = 64, 72, 76, 80
_BELL = 128
_READERS = 192
_MASK = (1 << 64) - 1
_HEAD = struct.Struct("<QII")
_HEAD_OF_ONE = struct.Struct("<QIIQ")  # with the length of the only frame
_TAIL_Q, _EVENT_I, _PHASE_I, _WANTED_I = _TAIL // 8, _EVENT // 4, _PHASE // 4, _WANTED // 4

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Shape:
    """Where things stand in a ring of `n_readers` with `capacity` bytes of data (a power of two)."""

    n_readers: int
    capacity: int

    @property
    def leases(self) -> int:
        return -(-(_READERS + _LINE * self.n_readers) // _PAGE) * _PAGE

    @property
    def data(self) -> int:
        return self.leases + -(-4 * LEASES * self.n_readers // _PAGE) * _PAGE

    @property
    def bytes(self) -> int:
        return self.data + self.capacity


class Bell:
    """The word that the writer's process sleeps on. Anybody may ring: readers (1..n), the process itself (0).

    A plain store must never restore a value that a sleeper has just read. So each ringer stores values that no other
    ringer can store (its number in the high bits) and that it has not stored for 2^20 rings.
    """

    __slots__ = ("_count", "_ringer", "word")

    def __init__(self, word: Word, ringer: int) -> None:
        self.word = word
        self._ringer = ringer << 20
        # A process that takes over a ringer's number starts elsewhere, and its place is free only once the writer has
        # rung, too; threads never draw the same number from it.
        self._count = itertools.count(os.getpid())

    def ring(self) -> None:
        if futex.fence is not None:
            futex.fence()  # SYNC POINT: tail before event; here, what was done before the ring, and the word
        self.word.store(self._ringer | (next(self._count) & 0xFFFFF))
        self.word.wake()


def bell_in(segment: Segment, ringer: int) -> Bell:
    """The bell of a segment laid out as above, for a process that is no reader; `ringer`: its own number there."""
    return Bell(Word(segment.mapping, segment.view.cast("I"), _BELL), ringer)


def record_bytes(lengths: Sequence[int]) -> int:
    """Size of the record that holds frames of these lengths, padded to 64 bytes."""
    total = _HEAD.size + 8 * len(lengths)
    for length in lengths:
        total += (length + 7) & ~7
    return (total + 63) & ~63


def write_record(view: memoryview, at: int, kind: int, frames: Sequence[Buffer], total: int) -> None:
    """Lay frames (flat byte buffers) out at `at`. The space must be free."""
    count = len(frames)
    view[at : at + 16] = _HEAD.pack(total, kind, count)
    table = at + 16
    at = table + 8 * count
    for frame in frames:
        length = len(frame)
        view[table : table + 8] = length.to_bytes(8, "little")
        table += 8
        view[at : at + length] = frame
        at += (length + 7) & ~7


class RingWriter:
    """The writing end. Not thread-safe: its owner holds a lock."""

    def __init__(self, segment: Segment, shape: Shape, largest: int | None = None, wakes: bool = True) -> None:
        """`largest`: bytes of the largest record, at most and by default a quarter of the capacity.

        `wakes`: readers sleep on this ring.
        """
        self.shape = shape
        self.largest = min(shape.capacity // 4, largest or shape.capacity)  # so a skip always leaves room for it
        self._capacity = shape.capacity
        self._data = shape.data
        self._view = segment.view
        self._longs = segment.view.cast("Q")
        ints = segment.view.cast("I")
        self._ints = ints
        self._wakes = wakes
        self.event = Word(segment.mapping, ints, _EVENT)
        self._wake = self.event.wake
        self.bell = Bell(Word(segment.mapping, ints, _BELL), 0)
        self.tail = 0  # end of what was written; ahead of `published` while a skip is not announced yet
        self.published = 0
        self._limit = shape.capacity  # slowest cursor + capacity, as last looked up
        self._dropped: set[int] = set()
        if not futex.has_membarrier():
            self.want(True)  # for good: readers ring after every message

    def put(self, frame: Buffer) -> bool:
        """Publish an INLINE record of one frame, which every small message is. False: not done; see `reserve`."""
        length = len(frame)
        total = (length + 87) & ~63  # record_bytes([length])
        tail = self.tail
        position = tail % self._capacity
        if total > self.largest or position + total > self._capacity or tail + total > self._limit:
            return False
        at = self._data + position
        view = self._view
        _HEAD_OF_ONE.pack_into(view, at, total, INLINE, 1, length)
        view[at + 24 : at + 24 + length] = frame
        self._publish(tail + total)
        return True

    def reserve(self, total: int) -> int | None:
        """Offset in the segment for a record of `total` bytes, or None while readers are in the way."""
        position = self.tail % self._capacity
        rest = self._capacity - position
        need = total if total <= rest else rest + total
        if self.tail + need > self._limit:
            limit = self.slowest() + self._capacity
            # SYNC POINT: cursors before reuse. Also where there is no room for this record: a smaller one may use it.
            if futex.fence is not None:
                futex.fence()
            self._limit = limit
            if self.tail + need > limit:
                return None
        if need != total:
            self._view[self._data + position : self._data + position + 16] = _HEAD.pack(rest, SKIP, 0)
            self.tail += rest
            position = 0
        return self._data + position

    def write(self, at: int, kind: int, frames: Sequence[Buffer], total: int) -> None:
        write_record(self._view, at, kind, frames, total)

    def publish(self, total: int) -> None:
        """Make the record just written visible, and wake the readers, unless none ever sleeps on this ring."""
        self._publish(self.tail + total)

    def _publish(self, tail: int) -> None:
        self.tail = self.published = tail
        # SYNC POINT: payload before tail.
        if futex.fence is not None:
            futex.fence()
        self._longs[_TAIL_Q] = tail & _MASK
        if self._wakes:
            self.announce()

    def announce(self) -> None:
        """Change the readers' word and wake them; after every change of state."""
        # SYNC POINT: tail before event.
        if futex.fence is not None:
            futex.fence()
        ints = self._ints
        ints[_EVENT_I] = (ints[_EVENT_I] + 1) & 0xFFFFFFFF
        self._wake()

    def republish(self) -> None:
        """Make sure that all was announced, after an exception (Ctrl-C) that may have come in between."""
        self._publish(self.published)

    def set_phase(self, phase: int) -> None:
        self._ints[_PHASE_I] = phase
        self.announce()

    def want(self, wanted: bool) -> None:
        """Ask readers to ring the bell when they have consumed a record or let go of a lease; before a sleep on it."""
        if not futex.has_membarrier():
            wanted = True
        self._ints[_WANTED_I] = wanted
        if wanted and futex.has_membarrier():
            futex.fence_all()  # SYNC POINT: wanted before cursors

    def lag(self, reader: int) -> int:
        """Bytes that `reader` has still to consume."""
        # SYNC POINT: reads before cursor.
        return (self.published - self._longs[(_READERS + _LINE * reader) // 8]) & _MASK

    def slowest(self) -> int:
        """Position up to which every reader that counts has consumed."""
        lags = [self.lag(i) for i in range(self.shape.n_readers) if i not in self._dropped]
        return self.published - max(lags, default=0)

    def state(self, reader: int) -> int:
        return self._ints[(_READERS + _LINE * reader + 8) // 4]

    def pid(self, reader: int) -> int:
        return self._ints[(_READERS + _LINE * reader + 12) // 4]

    def started(self, reader: int) -> int:
        return self._longs[(_READERS + _LINE * reader + 16) // 8]

    def device(self, reader: int) -> int:
        """Whether `reader` can open GPU memory of this process. May be seen late: it still says UNKNOWN then."""
        return self._ints[(_READERS + _LINE * reader + 24) // 4]

    def drop(self, reader: int) -> None:
        """Never wait for `reader` again. The owner knows that it left or that its process is gone."""
        self._dropped.add(reader)

    def readmit(self, reader: int) -> None:
        """Let a new process attach as `reader`, which was dropped; it reads what is published from now on.

        The owner knows that the old process has ended, so nobody else stores here, and has cleared its lease words.
        """
        line = _READERS + _LINE * reader
        self._longs[line // 8] = self.published & _MASK  # not `tail`: behind that, a skip may still be announced
        self._ints[(line + 8) // 4] = ABSENT
        self._ints[(line + 24) // 4] = UNKNOWN
        # SYNC POINT: payload before tail; here, the place, and the pid of 0 that says it is free.
        if futex.fence is not None:
            futex.fence()
        self._ints[(line + 12) // 4] = 0
        self._dropped.discard(reader)
        self.bell.ring()  # so that no sleeper has seen a value of the old process, which the new one may store again

    @property
    def dropped(self) -> set[int]:
        return self._dropped


class RingReader:
    """The reading end of reader number `index`. Not thread-safe: its owner holds a lock."""

    def __init__(self, segment: Segment, shape: Shape, index: int, pid: int) -> None:
        self._capacity = shape.capacity
        self._data = shape.data
        self._view = segment.view
        self._longs = segment.view.cast("Q")
        ints = segment.view.cast("I")
        self._ints = ints
        self._line = _READERS + _LINE * index
        self._cursor_q = self._line // 8
        self.event = Word(segment.mapping, ints, _EVENT)
        self.bell = Bell(Word(segment.mapping, ints, _BELL), index + 1)
        self._always_rings = not futex.has_membarrier()  # then the writer's barrier does not reach this process
        self.stopped = False  # nobody waits for this end any more: it is closed, or its writer is gone
        self._cursor: int = self._longs[self._cursor_q]
        self._pending = 0  # bytes of the record that was peeked and not released
        leases = shape.leases + 4 * LEASES * index
        self.leases = segment.view[leases : leases + 4 * LEASES].cast("I")
        self._longs[self._line // 8 + 2] = start_time(pid)
        # SYNC POINT: payload before tail; here, when the process started, and its pid; then the pid, and the state.
        if futex.fence is not None:
            futex.fence()
        ints[(self._line + 12) // 4] = pid
        if futex.fence is not None:
            futex.fence()
        self.set_state(ATTACHED)

    @staticmethod
    def occupant(segment: Segment, index: int) -> int:
        """Pid of the process that reads, or has read, as `index`; 0: none since its writer last readmitted one."""
        return segment.view.cast("I")[(_READERS + _LINE * index + 12) // 4]

    def set_state(self, state: int) -> None:
        self._ints[(self._line + 8) // 4] = state
        self.bell.ring()

    @property
    def device(self) -> int:
        """Whether this process can open GPU memory of the writer's."""
        return self._ints[(self._line + 24) // 4]

    @device.setter
    def device(self, state: int) -> None:
        self._ints[(self._line + 24) // 4] = state

    @property
    def phase(self) -> int:
        return self._ints[_PHASE_I]

    @property
    def lag(self) -> int:
        """Bytes published and not yet consumed here."""
        return (self._longs[_TAIL_Q] - self._cursor) & _MASK

    def readable(self) -> bool:
        # SYNC POINT: payload before tail. Loads of the payload follow this one in program order.
        return self._longs[_TAIL_Q] != self._cursor

    def news(self) -> bool:
        """There is something to read, or nothing will ever come, or this end is not to wait any more."""
        return self._longs[_TAIL_Q] != self._cursor or self.stopped or self._ints[_PHASE_I] == CLOSED

    def peek(self) -> tuple[int, list[memoryview]] | None:
        """(kind, frames) of the next record, or None. The frames stay valid until `release`."""
        while self._longs[_TAIL_Q] != self._cursor:
            at = self._data + self._cursor % self._capacity
            view = self._view
            total, kind, count, length = _HEAD_OF_ONE.unpack_from(view, at)
            self._pending = total
            if count == 1:
                return kind, [view[at + 24 : at + 24 + length]]
            if kind != SKIP:
                return kind, _frames(view, at + 16, count)
            self.release()
        return None

    def release(self) -> None:
        """Give the peeked record back to the writer; its frames must not be touched again."""
        self._cursor = cursor = (self._cursor + self._pending) & _MASK
        self._pending = 0
        # SYNC POINT: reads before cursor. Our loads of the payload precede this store.
        self._longs[self._cursor_q] = cursor
        if self._ints[_WANTED_I] or self._always_rings:  # SYNC POINT: wanted before cursors
            self.bell.ring()

    def lease_release(self) -> Callable[[int], None]:
        """A function that gives the lease of word `index` back. It outlives this object, and needs no lock."""
        leases, ints, bell, always = self.leases, self._ints, self.bell, self._always_rings

        def release(index: int) -> None:
            leases[index] = 0  # SYNC POINT: reads before cursor; a lease word is one, too
            if ints[_WANTED_I] or always:
                bell.ring()

        return release


def _frames(view: memoryview, table: int, count: int) -> list[memoryview]:
    at = table + 8 * count
    frames = []
    for i in range(count):
        length = int.from_bytes(view[table + 8 * i : table + 8 * i + 8], "little")
        frames.append(view[at : at + length])
        at += (length + 7) & ~7
    return frames
