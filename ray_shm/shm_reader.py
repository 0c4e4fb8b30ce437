"""The receiving end of the ring and the arena behind it: frames of messages. No unpickling, no waiting policy.

Runs in every process that receives. See shm_writer.py for which messages stand in the ring, which in a block, and which
of these are leased.
"""

from __future__ import annotations

import os

from ray_shm import arena, futex, ring
from ray_shm.cuda_ipc import Received
from ray_shm.errors import StartError
from ray_shm.handle import ShmAddress
from ray_shm.lease import Leases
from ray_shm.ring import RingReader
from ray_shm.segment import Segment


class ShmReader:
    """The receiving end number `index`. Not thread-safe: its owner holds a lock."""

    def __init__(self, address: ShmAddress, index: int, pid: int) -> None:
        """Raises AttachError where the memory cannot be reached from here, StartError where `index` is taken."""
        futex.require_supported()
        self._segment = Segment.attach(address.ref)
        occupant = RingReader.occupant(self._segment, index)
        if occupant:  # its cursor and its leases are not another one's to take over
            self._segment.close()
            raise StartError(
                f"that place is taken: process {occupant} reads or has read there; make a new queue, or, once that "
                "process has ended, have the writer drop and readmit it"
            )
        self.ring = RingReader(self._segment, address.shape, index, pid)
        self._leases = Leases(os.dup(self._segment.fd), self.ring.leases, self.ring.lease_release())
        self.large = 0  # messages that came through the arena
        self._frames: list[memoryview] | None = None  # of a large message that was peeked and not released
        self.owned = False  # the frames peeked last, but for the first, may be kept: they lie in leased memory

    def peek(self) -> list[memoryview] | None:
        """Frames of the next message, or None. They stay valid until `release`; where `owned`, all but the first do
        for as long as something refers to them.

        Raises:
            OSError: a large message's memory cannot be mapped (too many mappings). It can be tried again.
        """
        if self._frames is not None:
            return self._frames
        record = self.ring.peek()
        if record is None:
            return None
        kind, frames = record
        self.owned = False
        return self._special(kind, frames) if kind else frames

    def _special(self, kind: int, frames: list[memoryview]) -> list[memoryview]:
        large = kind & ring.LARGE
        if large:
            frames = self._large(frames[0])
        if kind & ring.DEVICE:
            frames[-1] = Received.of(frames[-1], self.ring)  # type: ignore[call-overload]
        if large:
            self._frames = frames
            self.large += 1
        return frames

    def _large(self, where: memoryview) -> list[memoryview]:
        offset, size, used, lease, generation = arena.WHERE.unpack(where)
        view = self._leases.take((offset, size), used, lease, generation)
        self.owned = lease >= 0
        return arena.contents(view)

    def release(self) -> None:
        self._frames = None
        self.ring.release()

    def close(self) -> None:
        """Tell the writer that this reader left. What was received stays valid. Idempotent."""
        self._frames = None
        self._leases.close()
        self.ring.set_state(ring.LEFT)
        self._segment.close()

    def abandon(self) -> None:
        """In a forked child: close the descriptors, and leave the rest to the parent."""
        self._frames = None
        self._leases.close()
        self._segment.close()
