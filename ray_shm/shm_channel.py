"""Messages (lists of byte frames) through one ring to readers on the same node. No pickling, no waiting policy.

Runs in every process: ShmWriter in the one that sends, ShmReader in each that receives. A message stands in the ring if
`max_chunks` of its size fit there. A larger one is written to a segment of its own, and the ring carries where it is;
so a message is published for all readers by one store, or not at all. Readers copy out before they release.

Unread bytes are bounded by max_chunk_bytes x max_chunks. A ring smaller than that bounds what stands in it by itself;
in a ring that is larger (a "tight" queue) every message is counted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ray_shm import futex, ring
from ray_shm.handle import ShmAddress
from ray_shm.ring import Buffer, RingReader, RingWriter, Shape, record_bytes
from ray_shm.segment import HEADER_BYTES, Segment, SegmentRef

RING_BYTES = 1 << 20
SMALLEST_RING = 1 << 16
SMALLEST_INLINE = 4096  # records up to this size stand in the ring however many chunks there may be
MOST_SEGMENTS = 128  # large messages under way; each costs two descriptors, of which a process may have 1,024
KEEP_BYTES = 64 << 20  # a large segment up to this size is kept for the next large message
_WHERE = struct.Struct("<IIQ16s")
_WHERE_RECORD = record_bytes([_WHERE.size])


@dataclass(slots=True)
class _InFlight:
    end: int  # ring position after which no reader needs the message
    segment: Segment | None  # None: it stands in the ring
    bytes: int  # of the message


class ShmWriter:
    """The sending end. Not thread-safe: its owner holds a lock."""

    def __init__(self, n_readers: int, max_chunk_bytes: int, max_chunks: int, ring_bytes: int = RING_BYTES) -> None:
        """Bound the unread bytes by max_chunk_bytes x max_chunks; one message larger than that goes through alone.

        `ring_bytes`: the largest ring to make, a power of two.

        Raises:
            StartError: no memory, or a platform without support. ValueError: too many readers.
        """
        futex.require_supported()
        if n_readers > ring.MAX_READERS:
            raise ValueError(f"a queue takes at most {ring.MAX_READERS} local readers, not {n_readers}")
        self._bound = max_chunk_bytes * max_chunks
        capacity = SMALLEST_RING
        while capacity < min(2 * self._bound, ring_bytes):
            capacity *= 2
        shape = Shape(n_readers, capacity)
        self._segment = Segment.create(shape.bytes, "ring")
        self.ring = RingWriter(self._segment, shape, max(capacity // (max_chunks + 2), SMALLEST_INLINE))
        self.address = ShmAddress(self._segment.ref, shape)
        self._tight = capacity > self._bound
        self._counted: deque[_InFlight] = deque()  # large messages; in a tight queue, all
        self._counted_bytes = 0
        self._spare: Segment | None = None

    def room(self, lengths: Sequence[int]) -> bool:
        """Whether a message of frames this long can be sent now."""
        total = record_bytes(lengths)
        small = total <= self.ring.largest
        if (self._counted or self._tight) and not self._within_bound(sum(lengths), small):
            return False
        return self.ring.reserve(total if small else _WHERE_RECORD) is not None

    def _within_bound(self, nbytes: int, small: bool) -> bool:
        self._reclaim()
        unread = self._counted_bytes
        if not self._tight:  # what stands in the ring is not counted
            places = _WHERE_RECORD * len(self._counted)
            unread += max(0, self.ring.published - self.ring.slowest() - places)
        enough_descriptors = small or len(self._counted) < MOST_SEGMENTS or self._tight
        return enough_descriptors and (unread == 0 or unread + nbytes <= self._bound)

    def try_send(self, frames: Sequence[Buffer], lengths: Sequence[int], wake: bool = True) -> bool:
        """`room` and `send` in one, for the common case short. False: no room now. Raises as `send`."""
        total = record_bytes(lengths)
        if self._counted or self._tight or total > self.ring.largest:
            if not self.room(lengths):
                return False
            self.send(frames, lengths, wake)
            return True
        at = self.ring.reserve(total)
        if at is None:
            return False
        self.ring.write(at, ring.INLINE, frames, total)
        self.ring.publish(total, wake)
        return True

    def send(self, frames: Sequence[Buffer], lengths: Sequence[int], wake: bool = True) -> None:
        """Publish a message for which `room` has just said yes. `wake`: see RingWriter.publish.

        Raises:
            StartError: no memory for a large message; nothing was published.
        """
        total = record_bytes(lengths)
        if total > self.ring.largest:
            segment = self._take_segment(HEADER_BYTES + total)
            ring.write_record(segment.view, HEADER_BYTES, ring.INLINE, frames, total)
            self._put(ring.LARGE, [_WHERE.pack(*_where(segment.ref))], _WHERE_RECORD, wake)
            self._count(segment, sum(lengths))
            return
        self._put(ring.INLINE, frames, total, wake)
        if self._tight:
            self._count(None, sum(lengths))

    def _put(self, kind: int, frames: Sequence[Buffer], total: int, wake: bool) -> None:
        at = self.ring.reserve(total)
        if at is None:
            raise RuntimeError("send() without room(): a bug in ray-shm")
        self.ring.write(at, kind, frames, total)
        self.ring.publish(total, wake)

    def _count(self, segment: Segment | None, nbytes: int) -> None:
        self._counted.append(_InFlight(self.ring.tail, segment, nbytes))
        self._counted_bytes += nbytes

    def _take_segment(self, size: int) -> Segment:
        spare, self._spare = self._spare, None
        if spare is not None and spare.size >= size:
            return spare
        if spare is not None:
            spare.close()
        return Segment.create(size, "large")

    def _reclaim(self) -> None:
        slowest = self.ring.slowest()
        while self._counted and self._counted[0].end <= slowest:
            done = self._counted.popleft()
            self._counted_bytes -= done.bytes
            if done.segment is None:
                continue
            if self._spare is None and done.segment.size <= KEEP_BYTES:
                self._spare = done.segment
            else:
                done.segment.close()

    def announce_close(self) -> None:
        """Tell the readers that nothing more will come."""
        self.ring.set_phase(ring.CLOSED)

    def large_unread(self) -> bool:
        """Whether some reader has still to attach to, or to copy from, a segment of ours."""
        self._reclaim()
        return any(item.segment is not None for item in self._counted)

    def close(self) -> None:
        """Let go of the memory; readers that attached to the ring still read what stands there. Idempotent."""
        for item in self._counted:
            if item.segment is not None:
                item.segment.close()
        self._counted.clear()
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        self._segment.close()


def _where(ref: SegmentRef) -> tuple[int, int, int, bytes]:
    return ref.pid, ref.fd, ref.size, ref.nonce


class ShmReader:
    """The receiving end number `index`. Not thread-safe: its owner holds a lock."""

    def __init__(self, address: ShmAddress, index: int, pid: int) -> None:
        """Raises AttachError where the memory cannot be reached from this process."""
        futex.require_supported()
        self._segment = Segment.attach(address.ref)
        self.ring = RingReader(self._segment, address.shape, index, pid)
        self._last: Segment | None = None  # the large segment that came last; writers reuse theirs

    def peek(self) -> list[memoryview] | None:
        """Frames of the next message, or None. They stay valid until `release`.

        Raises:
            AttachError: a large message's memory is gone, because the writer closed or died.
        """
        record = self.ring.peek()
        if record is None:
            return None
        kind, frames = record
        return self._large(frames[0]) if kind == ring.LARGE else frames

    def _large(self, where: memoryview) -> list[memoryview]:
        pid, fd, size, nonce = _WHERE.unpack(where)
        if self._last is None or self._last.ref.nonce != nonce:
            self._last = Segment.attach(SegmentRef(pid, fd, size, nonce, "", 0))
        return ring.read_record(self._last.view, HEADER_BYTES)[2]

    def release(self) -> None:
        self.ring.release()
        if self._last is not None and self._last.size > KEEP_BYTES:
            self._last = None

    def close(self) -> None:
        """Tell the writer that this reader left. Idempotent."""
        self._last = None
        self.ring.set_state(ring.LEFT)
        self._segment.close()
