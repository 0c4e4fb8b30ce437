"""Queues whose ends are in this process or in peers, for the hazard tests."""

from __future__ import annotations

import threading
import time
from typing import Any

import hazard_checks as checks
from hazard_checks import outcome
from injection import (
    HANG,
    be_patient,
)
from reader_pool import Me, Peer, Wire

from ray_shm.message_queue import MessageQueue


class Ends:
    """A queue with all its ends in this process."""

    def __init__(self, n_readers: int = 1, **bounds: Any) -> None:
        self.writer = MessageQueue(n_readers, n_readers, **bounds)
        handle = self.writer.export_handle()
        self.readers = [MessageQueue.create_from_handle(handle, rank) for rank in range(n_readers)]
        self.writer.wait_until_ready(HANG)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self.writer, *self.readers):
            end.close()


def make_bounded(me: Me, bounds: dict[str, int]) -> Any:
    return checks.make_queue(me, 1, **bounds)


def patient_wire(peers: list[Peer], **bounds: int) -> Wire:
    for peer in peers:
        peer.run(be_patient)
    return Wire("local", peers, **bounds)


def pid_of(peer: Peer) -> int:
    assert peer.process.pid is not None
    return peer.process.pid


def blocked(queue: MessageQueue, obj: Any, into: list[str]) -> threading.Thread:
    """A thread that sleeps in enqueue."""
    thread = threading.Thread(target=lambda: into.append(outcome(lambda: queue.enqueue(obj))))
    thread.start()
    assert queue._writer is not None
    waiter = queue._writer._waiter
    before = -1
    while waiter.parks == 0 or waiter.parks != before:
        before = waiter.parks
        time.sleep(0.02)
    return thread


def close_only(me: Me) -> None:
    me.queue.close()


def holders(queue: MessageQueue) -> dict[int, tuple[int, int]]:
    """Reader → (blocks, bytes) it keeps from reuse, as the writer sees it."""
    assert queue._writer is not None
    assert queue._writer._shm is not None
    return dict(queue._writer._shm.holders())
