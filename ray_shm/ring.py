"""The ring: one writer, many readers, records of variable size, in one shared segment. No pickling, no waiting policy.

Runs in every process: RingWriter in the one that created the segment, RingReader in those that attached.

Layout, after the segment's 64-byte header (every line is 64 bytes, so that no two owners share a cache line)::

    64   tail    u64  bytes published so far, modulo 2^64; written by the writer only; readers may see it late
         event   u32  changes with everything the writer announces; readers sleep on it; written by the writer only
         phase   u32  0 starting, 1 ready, 2 closed; written by the writer only
    128  bell    u32  changes with everything told to the writer's process, which sleeps on it; see `Bell`
    192  one line per reader i, written by reader i only; the writer may see it late:
         cursor  u64  bytes consumed so far, modulo 2^64; cursor <= tail, tail - cursor <= capacity
         state   u32  0 absent, 1 attached, 2 closed
         pid     u32  the reader's process
    data          capacity bytes (a power of two), page-aligned

A record starts at a multiple of 64 and never wraps: ``total u64 | kind u32 | count u32 | length u64 x count | frames``,
every frame at a multiple of 8 from the record's start, the record padded to 64 bytes. Kinds: INLINE (the frames stand
here), LARGE (one frame that says in which other segment the frames stand), SKIP (nothing until the ring's start).

States of a byte at position p, and who may touch it:

    1  free      p >= tail, p < slowest cursor + capacity    the writer writes it
    2  published slowest cursor <= p < tail                  nobody writes it; readers with cursor <= p read it
    1' free      p < slowest cursor                          the writer may reuse it

1 -> 2 is SYNC POINT "payload visible before tail"; 2 -> 1' is SYNC POINT "reads done before cursor". Both need
store-store and load-store order, which x86-64 keeps for plain moves to write-back memory, and CPython makes no move
across bytecodes; other processors are refused (futex.require_supported). No store-load order is needed anywhere:
sleepers compare the futex word inside the kernel, and whoever changes state changes the word and wakes, always.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ray_shm.futex import Word
from ray_shm.segment import Segment

INLINE, LARGE, SKIP = 0, 1, 2
STARTING, READY, CLOSED = 0, 1, 2
ABSENT, ATTACHED, LEFT = 0, 1, 2
MAX_READERS = 4094  # bell values carry the ringer in 12 bits

_LINE = 64
_TAIL, _EVENT, _PHASE = 64, 72, 76
_BELL = 128
_READERS = 192
_MOD = 1 << 64
_HEAD = struct.Struct("<QII")
_HEAD_OF_ONE = struct.Struct("<QIIQ")  # with the length of the only frame

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Shape:
    """Where things stand in a ring of `n_readers` with `capacity` bytes of data (a power of two)."""

    n_readers: int
    capacity: int

    @property
    def data(self) -> int:
        return -(-(_READERS + _LINE * self.n_readers) // 4096) * 4096

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
        # A process that takes over a ringer's number starts elsewhere; threads never draw the same number from it.
        self._count = itertools.count(os.getpid())

    def ring(self) -> None:
        self.word.store(self._ringer | (next(self._count) & 0xFFFFF))
        self.word.wake()


def record_bytes(lengths: Sequence[int]) -> int:
    """Size of the record that holds frames of these lengths, padded to 64 bytes."""
    total = _HEAD.size + 8 * len(lengths)
    for length in lengths:
        total += (length + 7) & ~7
    return (total + 63) & ~63


def write_record(view: memoryview, at: int, kind: int, frames: Sequence[Buffer], total: int) -> None:
    """Lay frames (flat byte buffers) out at `at`. The space must be free."""
    count = len(frames)
    if count == 1:  # every small message
        frame = frames[0]
        length = len(frame)
        view[at : at + 24] = _HEAD_OF_ONE.pack(total, kind, 1, length)
        view[at + 24 : at + 24 + length] = frame
        return
    view[at : at + 16] = _HEAD.pack(total, kind, count)
    table = at + 16
    at = table + 8 * count
    for frame in frames:
        length = len(frame)
        view[table : table + 8] = length.to_bytes(8, "little")
        table += 8
        view[at : at + length] = frame
        at += (length + 7) & ~7


def read_record(view: memoryview, at: int) -> tuple[int, int, list[memoryview]]:
    """(total, kind, frames) of the record at `at`; the frames are views into it."""
    total, kind, count = _HEAD.unpack(view[at : at + 16])
    table = at + 16
    at = table + 8 * count
    frames = []
    for i in range(count):
        length = int.from_bytes(view[table + 8 * i : table + 8 * i + 8], "little")
        frames.append(view[at : at + length])
        at += (length + 7) & ~7
    return total, kind, frames


class RingWriter:
    """The writing end. Not thread-safe: its owner holds a lock."""

    def __init__(self, segment: Segment, shape: Shape, largest: int | None = None) -> None:
        """`largest`: bytes of the largest record, at most and by default a quarter of the capacity."""
        self.shape = shape
        self.largest = min(shape.capacity // 4, largest or shape.capacity)  # so a skip always leaves room for it
        self._view = segment.view
        self._longs = segment.view.cast("Q")
        ints = segment.view.cast("I")
        self._ints = ints
        self.event = Word(segment.mapping, ints, _EVENT)
        self.bell = Bell(Word(segment.mapping, ints, _BELL), 0)
        self.tail = 0  # end of what was written; ahead of `published` while a skip is not announced yet
        self.published = 0
        self._limit = shape.capacity  # slowest cursor + capacity, as last looked up
        self._dropped: set[int] = set()

    def reserve(self, total: int) -> int | None:
        """Offset in the segment for a record of `total` bytes, or None while readers are in the way."""
        position = self.tail % self.shape.capacity
        rest = self.shape.capacity - position
        need = total if total <= rest else rest + total
        if self.tail + need > self._limit:
            self._limit = self.slowest() + self.shape.capacity
            if self.tail + need > self._limit:
                return None
        if need != total:
            self._view[self.shape.data + position : self.shape.data + position + 16] = _HEAD.pack(rest, SKIP, 0)
            self.tail += rest
            position = 0
        return self.shape.data + position

    def write(self, at: int, kind: int, frames: Sequence[Buffer], total: int) -> None:
        write_record(self._view, at, kind, frames, total)

    def publish(self, total: int, wake: bool = True) -> None:
        """Make the record just written visible, and wake the readers, unless none ever sleeps on this ring."""
        self.tail += total
        self.published = self.tail
        # SYNC POINT: payload visible before tail. The stores of `write` precede this one in program order.
        self._longs[_TAIL // 8] = self.tail % _MOD
        if wake:
            self.announce()

    def announce(self) -> None:
        """Change the readers' word and wake them; after every change of state."""
        self.event.store((self.event.load() + 1) & 0xFFFFFFFF)
        self.event.wake()

    def set_phase(self, phase: int) -> None:
        self._ints[_PHASE // 4] = phase
        self.announce()

    def lag(self, reader: int) -> int:
        """Bytes that `reader` has still to consume."""
        # SYNC POINT: reads done before cursor. The reader's loads precede its store of the cursor.
        cursor = self._longs[(_READERS + _LINE * reader) // 8]
        return (self.published - cursor) % _MOD

    def slowest(self) -> int:
        """Position up to which every reader that counts has consumed."""
        lags = [self.lag(i) for i in range(self.shape.n_readers) if i not in self._dropped]
        return self.published - max(lags, default=0)

    def state(self, reader: int) -> int:
        return self._ints[(_READERS + _LINE * reader + 8) // 4]

    def pid(self, reader: int) -> int:
        return self._ints[(_READERS + _LINE * reader + 12) // 4]

    def drop(self, reader: int) -> None:
        """Never wait for `reader` again. The owner knows that its process is gone."""
        self._dropped.add(reader)

    @property
    def dropped(self) -> set[int]:
        return self._dropped


class RingReader:
    """The reading end of reader number `index`. Not thread-safe: its owner holds a lock."""

    def __init__(self, segment: Segment, shape: Shape, index: int, pid: int) -> None:
        self._segment = segment
        self._shape = shape
        self._view = segment.view
        self._longs = segment.view.cast("Q")
        ints = segment.view.cast("I")
        self._ints = ints
        self._line = _READERS + _LINE * index
        self.event = Word(segment.mapping, ints, _EVENT)
        self.bell = Bell(Word(segment.mapping, ints, _BELL), index + 1)
        self._cursor: int = self._longs[self._line // 8]
        self._pending = 0  # bytes of the record that was peeked and not released
        ints[(self._line + 12) // 4] = pid
        self.set_state(ATTACHED)

    def set_state(self, state: int) -> None:
        self._ints[(self._line + 8) // 4] = state
        self.bell.ring()

    @property
    def phase(self) -> int:
        return self._ints[_PHASE // 4]

    def readable(self) -> bool:
        # SYNC POINT: payload visible before tail. Loads of the payload follow this one in program order.
        return self._longs[_TAIL // 8] != self._cursor

    def announced(self) -> bool:
        """There is something to read, or nothing will ever come."""
        return self._longs[_TAIL // 8] != self._cursor or self._ints[_PHASE // 4] == CLOSED

    def peek(self) -> tuple[int, list[memoryview]] | None:
        """(kind, frames) of the next record, or None. The frames stay valid until `release`."""
        while self.readable():
            at = self._shape.data + self._cursor % self._shape.capacity
            total, kind, frames = read_record(self._view, at)
            self._pending = total
            if kind != SKIP:
                return kind, frames
            self.release()
        return None

    def release(self) -> None:
        """Give the peeked record back to the writer; its frames must not be touched again."""
        self._cursor = (self._cursor + self._pending) % _MOD
        self._pending = 0
        # SYNC POINT: reads done before cursor. Our loads of the payload precede this store.
        self._longs[self._line // 8] = self._cursor
