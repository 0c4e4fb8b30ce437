"""Messages (lists of byte frames) into one ring for readers on the same node. No pickling, no waiting policy.

Runs in the process that sends. A message stands in the ring if `max_chunks` of its size fit there. A larger one is
written to a block of the arena (arena.py), and the ring carries where that is; so a message is published for all
readers by one store, or not at all.

Small messages are copied out by their readers, large ones are leased: what a reader unpickles lies in the block. Once
leases take up half of `max_arena_bytes`, readers copy large messages out, too, so that one who keeps everything it
receives never stops the writer.

Unread bytes are bounded by max_chunk_bytes x max_chunks. A ring smaller than that bounds what stands in it by itself;
in a ring that is larger (a "tight" queue) every message is counted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from ray_shm import arena, futex, ring
from ray_shm.arena import UNSENT, Arena, Block
from ray_shm.cuda_ipc import DeviceFrame, Sharer
from ray_shm.handle import ShmAddress
from ray_shm.ring import LEASES, Buffer, RingWriter, Shape, record_bytes
from ray_shm.segment import Segment

RING_BYTES = 1 << 20
SMALLEST_RING = 1 << 16
SMALLEST_INLINE = 4096  # records up to this size stand in the ring however many chunks there may be
LEASE_BYTES = 1 << 18  # blocks from this size on are leased; below, copying is cheaper
ARENA_BYTES = 1 << 30  # the default cap, unless twice the bound on unread bytes is more
_WHERE_RECORD = record_bytes([arena.WHERE.size])


@dataclass(slots=True)
class _InFlight:
    end: int  # ring position after which no reader needs the message
    block: Block | None  # None: it stands in the ring
    bytes: int  # of the message


class _Keeping:
    """``with _Keeping(writer):`` around what changes its books in several steps.

    The books: its lists and sums. After an exception in here, the next one makes them anew first. Made for each use:
    an attribute would make a cycle, and the memory of a closed queue would stay mapped until the next collection.
    """

    __slots__ = ("_writer",)

    def __init__(self, writer: ShmWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        if self._writer.broken:
            self._writer.recover()
        self._writer.broken = True

    def __exit__(self, raised: object, *_: object) -> None:
        self._writer.broken = raised is not None


class ShmWriter:
    """The sending end. Not thread-safe: its owner holds a lock."""

    def __init__(
        self,
        n_readers: int,
        max_chunk_bytes: int,
        max_chunks: int,
        ring_bytes: int = RING_BYTES,
        max_arena_bytes: int | None = None,
        wakes: bool = True,
    ) -> None:
        """Bound the unread bytes by max_chunk_bytes x max_chunks; one message larger than that goes through alone.

        Args:
            ring_bytes: the largest ring to make, a power of two.
            max_arena_bytes: bound of the memory for large messages, leased ones included; one message that finds no
                room beside the leases goes through alone, beyond it.
            wakes: readers sleep on this queue.

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
        self._segment = Segment.create(shape.bytes, "queue", growable=True)
        self.ring = RingWriter(self._segment, shape, max(capacity // (max_chunks + 2), SMALLEST_INLINE), wakes)
        self.address = ShmAddress(self._segment.ref, shape)
        cap = max(ARENA_BYTES, 2 * self._bound) if max_arena_bytes is None else max_arena_bytes
        self._arena = Arena(self._segment.fd, self._segment.size, cap)
        self._lease_words = self._segment.view[shape.leases : shape.leases + 4 * LEASES * n_readers].cast("I")
        self._free_leases = list(range(LEASES))
        self._generation = 0
        self._tight = capacity > self._bound
        self._counted: deque[_InFlight] = deque()  # large messages; in a tight queue, all
        self._counted_bytes = 0
        self._leased: list[Block] = []  # read by all, and perhaps held by some
        self._prepared: Block | None = None
        self.broken = False  # an exception came while the books were changed
        self.large = 0  # messages that went through the arena
        self._gone: set[int] = set()  # readers whose process is gone: their leases no longer count
        self.sharer = Sharer(self.ring, self._bound)  # of GPU memory

    def try_send(self, frames: Sequence[Buffer], lengths: Sequence[int]) -> bool:
        """`room` and `send` in one, for the common case short. False: no room now. Raises as `room`."""
        total = record_bytes(lengths)
        if self._counted or self._tight or total > self.ring.largest:
            if not self.room(lengths):
                return False
            self.send(frames, lengths)
            return True
        at = self.ring.reserve(total)
        if at is None:
            return False
        self.ring.write(at, self._kind(ring.INLINE, frames, total), frames, total)
        self.ring.publish(total)
        return True

    def _kind(self, kind: int, frames: Sequence[Buffer], total: int) -> int:
        """Of the record of a message, which is published next, `total` bytes from where the ring ends now."""
        last = frames[-1]
        if type(last) is not DeviceFrame:
            return kind
        last.outgoing.send(self.ring.tail + total)
        return kind | ring.DEVICE

    def put(self, frame: Buffer) -> bool:
        """Send a message of one small frame if nothing is in the way; False: see `try_send`."""
        return not self._counted and not self._tight and self.ring.put(frame)

    def room(self, lengths: Sequence[int]) -> bool:
        """Whether a message of frames this long can be sent now.

        Raises:
            StartError: no memory for a large message.
        """
        total = record_bytes(lengths)
        if total <= self.ring.largest and not self._counted and not self._tight:
            return self.ring.reserve(total) is not None
        with _Keeping(self):
            if not self._within_bound(sum(lengths)):
                return False
            if total <= self.ring.largest:
                return self.ring.reserve(total) is not None
            return self.ring.reserve(_WHERE_RECORD) is not None and self._prepare(arena.layout(lengths)[1])

    def _within_bound(self, nbytes: int) -> bool:
        self._note_read()
        unread = self._counted_bytes
        if not self._tight:  # what stands in the ring is not counted
            places = _WHERE_RECORD * len(self._counted)
            unread += max(0, self.ring.published - self.ring.slowest() - places)
        return unread == 0 or unread + nbytes <= self._bound

    def _prepare(self, nbytes: int) -> bool:
        """Find a block for the next message; False: unread messages fill the arena."""
        if self._prepared is not None:
            if self._prepared.size >= nbytes:
                return True
            unused, self._prepared = self._prepared, None
            self._arena.free(unused)
        self._reclaim()
        # Unread messages are read some day, leases may be kept for ever: beside nothing but leases it goes alone.
        alone = not any(item.block is not None for item in self._counted)
        self._prepared = self._arena.allocate(nbytes, passing=alone)
        return self._prepared is not None

    def send(self, frames: Sequence[Buffer], lengths: Sequence[int]) -> None:
        """Publish a message for which `room` has just said yes."""
        total = record_bytes(lengths)
        if total <= self.ring.largest:
            self._put(ring.INLINE, frames, frames, total)
            if self._tight:
                with _Keeping(self):
                    self._count(None, sum(lengths))
            return
        with _Keeping(self):
            self._send_block(frames, lengths)

    def _send_block(self, frames: Sequence[Buffer], lengths: Sequence[int]) -> None:
        block, self._prepared = self._prepared, None
        if block is None:
            raise RuntimeError("send() without room(): a bug in ray-shm")
        used = arena.layout(lengths)[1]
        self._lease(block, used)
        if futex.fence is not None:
            futex.fence()  # SYNC POINT: cursors before reuse
        block.filling = True
        try:
            arena.fill(block, frames, lengths)
        finally:
            block.filling = False
            if self._arena.closed:  # by a signal's handler, which left this block to its user
                self._arena.close()
        where = arena.WHERE.pack(block.offset, block.size, used, block.lease, block.generation)
        block.nbytes = sum(lengths)
        self._put(ring.LARGE, [where], frames, _WHERE_RECORD, block)
        self.large += 1
        self._count(block, block.nbytes)

    def _lease(self, block: Block, used: int) -> None:
        """Decide whether readers may keep a message's memory."""
        taken = sum(b.size for b in self._blocks() if b.lease >= 0)
        within = taken + block.size <= self._arena.cap // 2 or (not taken and block.size <= self._arena.cap)
        if used >= LEASE_BYTES and within and not block.passing and self._free_leases:
            block.lease = self._free_leases.pop()
            self._generation = block.generation = self._generation % 0xFFFFFFFF + 1  # never 0
        else:
            block.lease = -1

    def _blocks(self) -> list[Block]:
        return [*(item.block for item in self._counted if item.block is not None), *self._leased]

    def _put(
        self, kind: int, stored: Sequence[Buffer], frames: Sequence[Buffer], total: int, block: Block | None = None
    ) -> None:
        """stored: what stands in the ring of the message `frames`. block: where the rest of it is."""
        at = self.ring.reserve(total)
        if at is None:
            raise RuntimeError("send() without room(): a bug in ray-shm")
        self.ring.write(at, self._kind(kind, frames, total), stored, total)
        if block is not None:
            block.end = self.ring.tail + total
        self.ring.publish(total)

    def _count(self, block: Block | None, nbytes: int) -> None:
        self._counted.append(_InFlight(self.ring.tail, block, nbytes))
        self._counted_bytes += nbytes

    def _note_read(self) -> None:
        """Move what every reader has consumed from the unread to the leased."""
        slowest = self.ring.slowest()
        while self._counted and self._counted[0].end <= slowest:
            done = self._counted.popleft()
            self._counted_bytes -= done.bytes
            if done.block is not None:
                self._leased.append(done.block)

    def _reclaim(self) -> None:
        """Free the blocks that no reader holds any more, and give back the memory of those long free."""
        if not self._leased:
            self._arena.trim()
            return
        if futex.fence is not None:
            futex.fence()  # lease words are stored before cursors, and seen in that order
        held = []
        for block in self._leased:
            if self._holders(block):
                held.append(block)
            else:
                self._free_block(block)
        self._leased = held
        self._arena.trim()

    def trim(self) -> None:
        """Give back the memory of large messages that is long free; for when only small ones come."""
        self.sharer.trim()
        if self._arena.blocks:
            with _Keeping(self):
                self._note_read()
                self._reclaim()

    def recover(self) -> None:
        """Make the books anew from what stands in the blocks, after an exception that came at any time."""
        slowest, published = self.ring.slowest(), self.ring.published
        for block in self._arena.blocks:
            if block.end > published:
                block.end = UNSENT
        sent = [block for block in self._arena.blocks if block.end != UNSENT]
        unread = [_InFlight(block.end, block, block.nbytes) for block in sent if block.end > slowest]
        unread += [item for item in self._counted if item.block is None]
        self._counted = deque(sorted(unread, key=lambda item: item.end))
        self._counted_bytes = sum(item.bytes for item in unread)
        self._leased = [block for block in sent if block.end <= slowest]
        self._free_leases = sorted(set(range(LEASES)) - {block.lease for block in sent})
        self._prepared = None
        self._arena.recover()

    def _holders(self, block: Block) -> Sequence[int]:
        """Readers (by position) that hold objects in `block`."""
        if block.lease < 0:
            return ()
        return [
            i
            for i in range(self.ring.shape.n_readers)
            if self._lease_words[i * LEASES + block.lease] == block.generation and i not in self._gone
        ]

    def _free_block(self, block: Block) -> None:
        if block.lease >= 0:
            self._free_leases.append(block.lease)
        self._arena.free(block)

    def holders(self) -> dict[int, tuple[int, int]]:
        """Reader position → (blocks, bytes) that it keeps from reuse, unread or leased."""
        with _Keeping(self):
            self._note_read()
            self._reclaim()
        blocks: Counter[int] = Counter()
        nbytes: Counter[int] = Counter()
        for item in self._counted:
            for i in range(self.ring.shape.n_readers):
                behind = self.ring.published - self.ring.lag(i) < item.end
                if item.block is not None and i not in self.ring.dropped and behind:
                    blocks[i] += 1
                    nbytes[i] += item.block.size
        for block in self._leased:
            for i in self._holders(block):
                blocks[i] += 1
                nbytes[i] += block.size
        return {i: (blocks[i], nbytes[i]) for i in sorted(blocks)}

    @property
    def arena_bytes(self) -> int:
        """Memory in the arena, free blocks included."""
        return self._arena.reserved

    def drop(self, reader: int, gone: bool) -> None:
        """Never wait for `reader` again. `gone`: nor for what it leased, its process has ended."""
        self.ring.drop(reader)
        if gone:
            self._gone.add(reader)

    def readmit(self, reader: int) -> None:
        """Let a new process attach as `reader`, which was dropped and is vacant; it gets what is sent from now on."""
        first = reader * LEASES
        self._lease_words[first : first + LEASES] = memoryview(bytes(4 * LEASES)).cast("I")
        self._gone.discard(reader)
        self.ring.readmit(reader)

    def announce_close(self) -> None:
        """Tell the readers that nothing more will come."""
        self.ring.set_phase(ring.CLOSED)

    def close(self) -> None:
        """Let go of the memory; readers that attached still read all that was sent. Idempotent."""
        self.sharer.close()
        self._prepared = None
        self._arena.close()
        self._counted.clear()
        self._leased.clear()
        self._segment.close()

    def abandon(self) -> None:
        """In a forked child: close the descriptor, and leave the memory to the parent."""
        self._segment.close()
