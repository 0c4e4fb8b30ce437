"""A signal's handler that raises at each step of a message's way: nothing is lost for good, torn or used twice."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hazard_checks import content, is_content
from injection import HANG
from interrupts import interrupted
from queue_ends import Ends

from ray_shm import arena, lease
from ray_shm.errors import PeerLostError, QueueClosedError
from ray_shm.message_queue import MessageQueue
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import LEASES
from ray_shm.shm_writer import ShmWriter

KIB = 1 << 10
LARGE = 300 * KIB  # leased
STEPS = 2000  # a queue that needs more of them for one message is not what this is about

pytestmark = pytest.mark.usefixtures("what_stays", "lost")


class Numbered:
    """Messages of one end to the other, each with content of its own."""

    def __init__(self, ends: Ends, size: int = LARGE) -> None:
        self.ends, self.size, self.sent = ends, size, 0
        self.shm: ShmWriter = ends.writer._writer._shm  # type: ignore[union-attr, assignment]

    def message(self) -> tuple[int, np.ndarray]:
        self.sent += 1
        return self.sent, content(self.sent % 251, self.size)

    def send(self) -> int:
        self.ends.writer.enqueue(self.message(), HANG)
        return self.sent

    def receive(self) -> tuple[int, np.ndarray]:
        number, data = self.ends.readers[0].dequeue(HANG)
        self.check(number, data)
        return number, data

    def check(self, number: int, data: np.ndarray) -> None:
        assert is_content(data, number % 251, self.size), f"message {number} is torn, or another came into its memory"

    def exchange(self, count: int) -> list[tuple[int, np.ndarray]]:
        """Some more messages, one by one, and all of them held."""
        got = []
        for _ in range(count):
            number = self.send()
            got.append(self.receive())
            assert got[-1][0] == number
        return got

    def assert_nothing_is_kept(self) -> None:
        if lease.held() != (0, 0):
            gc.collect()  # a traceback's
        shm = self.shm
        assert shm.holders() == {}
        assert (len(shm._counted), shm._counted_bytes, shm._leased) == (0, 0, [])
        assert sorted(shm._free_leases) == list(range(LEASES))
        blocks = shm._arena.blocks
        prepared = [block for block in blocks if block is shm._prepared]
        assert len(shm._arena._free) + len(shm._arena._hollow) + len(prepared) == len(blocks)
        assert len({id(block) for block in (*shm._arena._free, *shm._arena._hollow, *prepared)}) == len(blocks)
        assert shm._arena.reserved == sum(block.size for block in blocks if block.window is not None)
        assert all(block.end == arena.UNSENT and block.lease < 0 for block in blocks)
        assert lease.held() == (0, 0)


def leave_blocks_to_reclaim(way: Numbered) -> list[tuple[int, np.ndarray]]:
    """The next message finds three blocks that are free again, and between them two that are held."""
    got = way.exchange(5)
    return [got[1], got[3]]


BOUNDS = {
    "wide": {"max_chunk_bytes": 1 << 22, "max_chunks": 6},
    "narrow": {"max_chunk_bytes": 400 * KIB, "max_chunks": 1},
    "with a small arena": {"max_chunk_bytes": 1 << 22, "max_chunks": 6, "max_arena_bytes": 2 << 20},
    "for small messages": {"max_chunk_bytes": 6000, "max_chunks": 1},
}
CASES = [*((bounds, LARGE) for bounds in BOUNDS), *(("for small messages", size) for size in (50, 5000)), ("wide", 50)]
for_every_case = pytest.mark.parametrize(("bounds", "size"), CASES)


def assert_free(ends: Ends) -> None:
    """Another thread may use both ends: no lock was left behind."""
    for end in (ends.writer._writer, ends.readers[0]._reader):
        assert not end._lock._is_owned()  # type: ignore[union-attr, attr-defined]


@for_every_case
def test_an_enqueue_that_is_interrupted_anywhere(bounds: str, size: int) -> None:
    with Ends(**BOUNDS[bounds]) as ends:
        way = Numbered(ends, size)
        for at in range(STEPS):
            held = leave_blocks_to_reclaim(way)
            message = way.message()
            broken = interrupted(at, lambda message=message: ends.writer.enqueue(message, HANG))
            assert_free(ends)
            number = way.sent
            more = [way.receive()] if way.shm.ring.lag(0) else []
            assert [got[0] for got in more] in ([number], [] if broken else [number])
            more += way.exchange(5)
            for each in (*held, *more):
                way.check(*each)
            del held, more, each
            way.assert_nothing_is_kept()
            if broken is None:
                break
        assert 30 < at < STEPS - 1


@for_every_case
def test_a_dequeue_that_is_interrupted_anywhere(bounds: str, size: int) -> None:
    """`kept`: a notebook keeps the last traceback, and with it what the broken dequeue had in hand."""
    kept: list[Any] = []
    with Ends(**BOUNDS[bounds]) as ends:
        way = Numbered(ends, size)
        lost = 0
        for at in range(STEPS):
            held = leave_blocks_to_reclaim(way)
            first = way.send()
            kept.append(interrupted(at, lambda: ends.readers[0].dequeue(HANG)))
            assert_free(ends)
            broken = kept[-1] is not None
            if broken and way.shm.ring.lag(0):
                held.append(way.receive())
                assert held[-1][0] == first
            else:
                lost += broken
            more = way.exchange(2)
            kept.clear()
            more += way.exchange(2)
            for each in (*held, *more):
                way.check(*each)
            del held, more, each
            way.assert_nothing_is_kept()
            if not broken:
                break
        assert 15 < at < STEPS - 1
        assert lost < at / 2  # those that were being unpickled


def test_a_lease_whose_end_is_interrupted_anywhere(lost: list[type[BaseException]]) -> None:
    with Ends(**BOUNDS["wide"]) as ends:
        way = Numbered(ends)
        for at in range(STEPS):
            held = way.exchange(2)
            held[0][1][::4096] += 1  # pages of its own, to be dropped
            last = [held.pop(0)]
            seen = len(lost)
            broken = interrupted(at, last.clear)
            more = way.exchange(3)
            for each in (*held, *more):
                way.check(*each)
            del held, more, each
            way.assert_nothing_is_kept()
            if broken is None and len(lost) == seen:
                break
        assert 20 < at < STEPS - 1


def ends_between_nodes() -> tuple[MessageQueue, MessageQueue]:
    writer = MessageQueue(1, 0)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    others = threading.Thread(target=reader.wait_until_ready, args=(HANG,))
    others.start()
    writer.wait_until_ready(HANG)
    others.join()
    return writer, reader


@pytest.mark.parametrize("size", [50, LARGE])
def test_a_dequeue_between_nodes_that_is_interrupted_anywhere(size: int) -> None:
    writer, reader = ends_between_nodes()
    with writer, reader:
        number = lost = 0
        for at in range(STEPS):
            writer.enqueue((number, content(number, size)), HANG)
            broken = interrupted(at, lambda: reader.dequeue(HANG)) is not None
            writer.enqueue((number + 1, content(number + 1, size)), HANG)
            got = [reader.dequeue(HANG)]
            if broken and got[0][0] == number:
                got.append(reader.dequeue(HANG))
            else:
                lost += broken  # while it was unpickled
            assert got[-1][0] == number + 1
            assert all(is_content(data, k, size) for k, data in got)
            number += 2
            if not broken:
                break
        assert 15 < at < STEPS - 1
        assert lost < at / 2


def kept_memory() -> list[str]:
    """Mappings and descriptors of queues in this process."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:ray_shm:queue" in line]
    return maps + [link for fd in os.listdir("/proc/self/fd") if "memfd:ray_shm:queue" in (link := link_of(fd))]


def link_of(fd: str) -> str:
    with contextlib.suppress(OSError):  # the listing's own
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


def ends_on_one_node() -> tuple[MessageQueue, MessageQueue]:
    writer = MessageQueue(1, 1, **BOUNDS["for small messages"])
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    writer.wait_until_ready(HANG)
    return writer, reader


def use_until_closed(end: MessageQueue, writes: bool) -> None:
    while True:  # a writer may fill the other end's place first
        end.enqueue(bytes(LARGE), HANG) if writes else end.dequeue(HANG)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("finished_by", ["close", "collection"])
@pytest.mark.parametrize("which", ["writer", "reader"])
@pytest.mark.parametrize("make", [ends_on_one_node, ends_between_nodes])
def test_a_close_that_is_interrupted_anywhere_is_finished(
    make: Callable[[], tuple[MessageQueue, MessageQueue]],
    which: str,
    finished_by: str,
    lost: list[type[BaseException]],
) -> None:
    # Between nodes a writer that was interrupted while it said that it closes is lost.
    writer_closed = (QueueClosedError, PeerLostError) if make is ends_between_nodes else QueueClosedError
    before = kept_memory()
    for at in range(STEPS):
        ends = [*make()]
        ends[0].enqueue(bytes(LARGE))
        assert len(ends[1].dequeue(HANG)) == LARGE
        if which == "reader":
            ends.reverse()
        seen = len(lost)
        broken = interrupted(at, ends[0].close) is not None
        ends[0].close() if finished_by == "close" else ends.pop(0)
        gc.collect()
        with pytest.raises(writer_closed if which == "writer" else PeerLostError):
            use_until_closed(ends[-1], which == "reader")
        ends.pop().close()
        ends.clear()
        if kept_memory() != before:
            gc.collect()  # a traceback's
        assert kept_memory() == before
        if not broken and len(lost) == seen:
            break
    assert 15 < at < STEPS - 1


def test_the_queues_of_a_group_whose_close_is_interrupted_anywhere() -> None:
    from ray_shm.queue_broadcast import _Ends

    for at in range(STEPS):
        ends = _Ends()
        writer = QueueWriter([0], [], 1 << 16, 4, None)
        ends.add([writer, QueueReader(writer.handle, 0)])
        kept = list(ends.open)
        broken = interrupted(at, ends.close) is not None
        others = threading.Thread(target=ends.close, daemon=True)
        others.start()
        others.join(HANG)
        assert not others.is_alive()
        assert not any(end.unfreed for end in kept)
        if not broken:
            break
    assert 30 < at < STEPS - 1
