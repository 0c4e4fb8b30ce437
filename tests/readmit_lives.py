"""Lives of readers whose place another process takes, in children of a zygote, and what a test does beside them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hazard_checks import content, is_content
from injection import HANG, Fuse, codes, die, is_alive, wait_for

from ray_shm import ring
from ray_shm.handle import Handle
from ray_shm.message_queue import MessageQueue
from ray_shm.queue_writer import QueueWriter

SIZES = (20, 400_000, 7000, 90_000)  # in the pickle; leased; beside it in the ring; copied out of the arena
# Local readers of two, and which one is replaced
KINDS = {"shm": (2, 1), "zmq": (0, 1), "mixed, the local one": (1, 0), "mixed, the remote one": (1, 1)}


def parked(say: Any, handle: Handle, rank: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    for _ in SIZES:
        queue.dequeue(HANG)
    say("parked")
    queue.dequeue()


def amid_a_message(say: Any, handle: Handle, rank: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.dequeue(HANG)
    with queue.acquire_read(HANG):  # the large one
        say("reading")
        signal.pause()


def holding(say: Any, handle: Handle, rank: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    kept = [queue.dequeue(HANG) for _ in SIZES]
    say(len(kept))
    signal.pause()


def behind(say: Any, handle: Handle, rank: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.wait_until_ready(HANG)
    say("ready")
    signal.pause()


def collect(say: Any, handle: Handle, rank: int) -> None:
    """The numbers of the messages up to None, as a reader that comes later."""
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.wait_until_ready(HANG)
    got = []
    while (message := queue.dequeue(HANG)) is not None:
        k, data = message
        got.append(k if is_content(data, k, len(data)) else f"{k} is torn")
        del message, data
    say(got)
    queue.close()


def dies_attaching(say: Any, at: int, handle: Handle, rank: int) -> None:
    fuse = Fuse(codes(ring.RingReader.__init__, ring.RingReader.set_state, ring.Bell.ring), at, die)
    fuse.light()
    queue = MessageQueue.create_from_handle(handle, rank)
    fuse.put_out()
    say("attached")
    queue.close()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), f"the end of {pid}")


def send(queue: MessageQueue, numbers: range) -> list[int]:
    for k in numbers:
        queue.enqueue((k, content(k, SIZES[k % len(SIZES)])), HANG)
    return list(numbers)


def receive(queue: MessageQueue) -> list[int]:
    """Numbers of all messages up to None."""
    numbers = []
    while (message := queue.dequeue(HANG)) is not None:
        assert is_content(message[1], message[0], SIZES[message[0] % len(SIZES)])
        numbers.append(message[0])
        del message
    return numbers


@contextmanager
def queue_of_two(kind: str, **bounds: Any) -> Iterator[tuple[MessageQueue, QueueWriter, MessageQueue, int]]:
    """(queue, its writing end, the reading end here that stays, rank that is replaced)."""
    n_local, rank = KINDS[kind]
    with MessageQueue(2, n_local, **bounds) as queue:
        assert queue._writer is not None
        with MessageQueue.create_from_handle(queue.export_handle(), 1 - rank) as other:
            yield queue, queue._writer, other, rank
