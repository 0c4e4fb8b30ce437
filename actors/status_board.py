"""Where every rank stands, in shared memory: written by the workers, read by the driver without anybody's help.

A worker that is stuck in C code can answer nothing, but its row still says what it was doing, and since when. One
segment of the driver's process holds a slot for each rank; a rank that cannot reach it keeps a slot of its own, and its
control thread answers with that.

Slot of rank r, at SLOT · (r + 1) of the segment (the segment's own header comes first)::

    0    death word: a robust mutex that the rank's main thread holds
    64   changes  u32  odd while the row changes      state  u32
    72   call     u64  id of the call                  since  u64  time.monotonic_ns() of this node, of the last change
    88   calls    u64  that have ended                 length u32  of the text
    104  text: method of the call, UTF-8, cut off at 144 bytes

Written by one thread, the rank's main thread, field by field (a reader that meets an odd or a changed `changes` looks
again). On aarch64 a reader may see the fields in another order; what it shows is for people.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ray_shm.segment import Segment, SegmentRef

SLOT = 256
_ROW = 64
_TEXT = 104
_TEXT_BYTES = SLOT - _TEXT - 8
_ATTEMPTS = 100

STARTING, IDLE, RUNNING, REPLYING, ENDED, UNPICKLING = range(6)
STATES = ("starting", "idle", "running", "replying", "ended", "running")


@dataclass(frozen=True, slots=True)
class Standing:
    """One rank's row. state: of STATES. call_id, method: of the present call, or the last; "" while it is unpickled.

    seconds: in this state. calls: how many have ended. operation: the collective it is in, "" if none or not known.
    """

    state: str
    call_id: int
    method: str
    seconds: float
    calls: int
    operation: str = ""

    def words(self) -> str:
        """As in "running 'train' (call 412) for 41.0 s in all_reduce of 'tp'"."""
        where = f" in {self.operation}" if self.operation else ""
        if self.state in ("running", "replying"):
            what = f"{self.method!r} (call {self.call_id})" if self.method else f"call {self.call_id} (being unpickled)"
            return f"{self.state} {what} for {self.seconds:.1f} s{where}"
        return f"{self.state} for {self.seconds:.1f} s{where}"


class StatusRow:
    """A rank's own row; used by its main thread."""

    def __init__(self, memory: memoryview, at: int = 0) -> None:
        """`memory`: at least SLOT writable bytes from `at`."""
        slot = memory[at : at + SLOT]
        self._ints = slot[_ROW:_TEXT].cast("I")
        self._longs = slot[_ROW:_TEXT].cast("Q")
        self._text = slot[_TEXT : _TEXT + _TEXT_BYTES]
        self._shown = ""
        self._changes = 0

    def begin(self, call_id: int) -> None:
        """A call was taken from the queue; what it runs is not known yet."""
        ints, longs = self._ints, self._longs
        self._changes = changes = (self._changes + 2) & 0xFFFFFFFF
        ints[0] = changes | 1
        ints[1] = UNPICKLING
        longs[1] = call_id
        longs[2] = time.monotonic_ns()
        ints[0] = changes

    def show(self, method: str) -> None:
        """What the call runs."""
        if method != self._shown:
            self._shown = method
            data = method.encode(errors="replace")[:_TEXT_BYTES]
            self._ints[8] = 0
            self._text[: len(data)] = data
            self._ints[8] = len(data)
        self._ints[1] = RUNNING

    def replying(self) -> None:
        self._ints[1] = REPLYING

    def idle(self) -> None:
        """The call is over."""
        ints, longs = self._ints, self._longs
        self._changes = changes = (self._changes + 2) & 0xFFFFFFFF
        ints[0] = changes | 1
        ints[1] = IDLE
        longs[2] = time.monotonic_ns()
        longs[3] += 1
        ints[0] = changes

    def rest(self, state: int) -> None:
        """STARTING, IDLE or ENDED."""
        self._longs[2] = time.monotonic_ns()
        self._ints[1] = state

    def standing(self) -> Standing:
        return read(self._longs, self._ints, self._text)

    def close(self) -> None:
        """Let go of the memory."""
        for view in (self._ints, self._longs, self._text):
            view.release()


class StatusBoard:
    """All ranks' rows, in the driver's process (`create`), or in a client of it on the same node (`attach`)."""

    def __init__(self, segment: Segment) -> None:
        self._open: Segment | None = segment

    @classmethod
    def create(cls, world_size: int) -> StatusBoard:
        """Raises StartError: no memory."""
        return cls(Segment.create(SLOT * (world_size + 1), "status"))

    @classmethod
    def attach(cls, ref: SegmentRef) -> StatusBoard:
        """Raises AttachError."""
        return cls(Segment.attach(ref))

    @property
    def _segment(self) -> Segment:
        if self._open is None:
            raise ValueError("the board is closed")
        return self._open

    @property
    def ref(self) -> SegmentRef:
        return self._segment.ref

    @property
    def memory(self) -> memoryview:
        return self._segment.view

    @staticmethod
    def slot(rank: int) -> int:
        """Byte offset of a rank's slot, which is where its death word lies."""
        return SLOT * (rank + 1)

    def row(self, rank: int) -> StatusRow:
        return StatusRow(self._segment.view, self.slot(rank))

    def clear(self, rank: int) -> None:
        """For a new process of this rank; the old one is gone."""
        at = self.slot(rank)
        self._segment.view[at : at + SLOT] = bytes(SLOT)

    def standing(self, rank: int) -> Standing:
        row = self.row(rank)
        try:
            return row.standing()
        finally:
            row.close()

    def close(self) -> None:
        """Unmapped with the last row that is in use. Idempotent."""
        if self._open is not None:
            self._open.close()
            self._open = None


def read(longs: memoryview, ints: memoryview, text: memoryview) -> Standing:
    for _ in range(_ATTEMPTS):
        before = ints[0]
        state, call_id, since, calls, length = ints[1], longs[1], longs[2], longs[3], ints[8]
        method = bytes(text[:length]).decode(errors="replace") if state != UNPICKLING else ""
        if not before & 1 and ints[0] == before:
            break
    seconds = max(0.0, (time.monotonic_ns() - since) / 1e9) if since else 0.0
    return Standing(STATES[state] if state < len(STATES) else "?", call_id, method, seconds, calls)
