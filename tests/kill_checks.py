"""Lives of the processes that are killed at a chosen line of the queue's code. Forked by `injection.fork_child`."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import CodeType
from typing import Any

import numpy as np
from hazard_checks import content
from injection import HANG, Fuse, be_patient, codes, die

from ray_shm import arena, futex, lease, queue_reader, ring, shm_reader, shm_writer
from ray_shm.handle import Handle
from ray_shm.message_queue import MessageQueue

Say = Callable[[Any], Any]
# In the pickle; beside it in the ring; copied out of the arena; leased; and so many that the ring wraps.
SIZES = (20, 7000, 90_000, 400_000, 7000, 7000, 30, 7000, 7000, 7000, 300_000, 7000, 20)
BOUNDS = {"max_chunk_bytes": 8000, "max_chunks": 4}  # a ring of 64 KiB
BIG = {"max_chunk_bytes": 24 << 20, "max_chunks": 10}


def every_fence() -> None:
    """What aarch64 does, too: fences that x86-64 does without."""
    futex.fence = futex.fence_all


def writers_code() -> set[CodeType]:
    """All that stores into shared memory, on the writer's side."""
    return codes(
        ring.RingWriter.put,
        ring.RingWriter.reserve,
        ring.RingWriter.write,
        ring.RingWriter.publish,
        ring.RingWriter._publish,
        ring.RingWriter.announce,
        ring.RingWriter.want,
        ring.RingWriter.set_phase,
        ring.write_record,
        arena.fill,
        shm_writer.ShmWriter.send,
        shm_writer.ShmWriter._send_block,
        shm_writer.ShmWriter._put,
        shm_writer.ShmWriter._count,
        shm_writer.ShmWriter._lease,
        shm_writer.ShmWriter._free_block,
    )


def readers_code() -> set[CodeType]:
    """All that stores into shared memory, on the reader's side."""
    return codes(
        ring.RingReader.release,
        ring.RingReader.lease_release,
        ring.RingReader.peek,
        ring.Bell.ring,
        shm_reader.ShmReader._large,
        shm_reader.ShmReader.release,
        lease.Leases.take,
        lease.Leases.returned,
        lease.drop_own_pages,
        queue_reader.QueueReader.receive,
    )


def writer_life(say: Say, at: int, bounds: dict[str, int], sizes: tuple[int, ...], readers: int) -> None:
    """Sends one message of each size, and is killed before line `at`; says what was surely sent."""
    be_patient()
    every_fence()
    queue = MessageQueue(readers, readers, **bounds)  # type: ignore[arg-type]
    say(queue.export_handle())
    queue.wait_until_ready(HANG)
    fuse = Fuse(writers_code(), at, die)
    messages = [(k, content(k, size)) for k, size in enumerate(sizes)]
    fuse.light()
    for message in messages:
        queue.enqueue(message, HANG)
    queue.close()
    fuse.put_out()


def reader_life(say: Say, at: int, handle: Handle, rank: int, count: int) -> None:
    """Takes `count` messages, writes to each, keeps some for a while, and is killed before line `at`."""
    be_patient()
    every_fence()
    queue = MessageQueue.create_from_handle(handle, rank)
    say(os.getpid())
    queue.wait_until_ready(HANG)
    kept: list[Any] = []
    fuse = Fuse(readers_code(), at, die)
    fuse.light()
    for _ in range(count):
        k, got = queue.dequeue(HANG)
        assert np.all(got == k % 251)
        if got.size:
            got[:] = 255
        if len(kept) > 1:
            kept.clear()
        kept.append(got)
        del got
    kept.clear()
    queue.close()
    fuse.put_out()


def idle_reader_life(say: Say, handle: Handle, rank: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    say("attached")
    while True:
        queue.dequeue()
