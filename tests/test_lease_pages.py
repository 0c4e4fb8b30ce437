"""What a receiver writes to what it holds, and what a forked child sees of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from holders import write_all
from injection import HANG, Forked
from queue_ends import holders
from reader_pool import Peer, Wire

from ray_shm import lease
from ray_shm.message_queue import MessageQueue

MIB = 1 << 20
SIZES = (50, 3000, 100 << 10, MIB)  # in the pickle, in the ring, in a block and copied out, in a block and leased
KINDS = ("bytes", "bytearray", "memoryview", "array")


MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("what_stays")


def pass_by(ends: tuple[MessageQueue, MessageQueue], count: int) -> None:
    """Send and drop large messages, so that every free block is written."""
    writer, reader = ends
    for k in range(count):
        writer.enqueue(np.full(MIB, k, np.uint8), HANG)
        assert reader.dequeue(HANG).nbytes == MIB


def check_that_writes_stay_private(a: MessageQueue, b: MessageQueue, writer: MessageQueue) -> None:
    sent = np.full(3 * MIB, 1, np.uint8)
    writer.enqueue(sent, HANG)
    mine = a.dequeue(HANG)
    mine[:] = 77
    assert (sent == 1).all()
    other = b.dequeue(HANG)
    assert (other == 1).all(), "another reader sees what the first wrote"
    other[5000:70_000] = 88
    assert (mine == 77).all()
    del mine, other
    for value in range(2, 8):
        writer.enqueue(np.full(3 * MIB, value, np.uint8), HANG)
        for reader in (a, b):
            got = reader.dequeue(HANG)
            assert (got == value).all(), "the next message shows what was written to an earlier one"
            got[:: 4096 * 3] = 99
            del got


@pytest.fixture
def two() -> Iterator[tuple[MessageQueue, MessageQueue, MessageQueue]]:
    with MessageQueue(2, 2) as writer:
        handle = writer.export_handle()
        with MessageQueue.create_from_handle(handle, 0) as a, MessageQueue.create_from_handle(handle, 1) as b:
            writer.wait_until_ready(HANG)
            yield a, b, writer


def test_what_is_written_is_seen_by_nobody_else(two: tuple[MessageQueue, MessageQueue, MessageQueue]) -> None:
    check_that_writes_stay_private(*two)


def test_written_pages_that_stay_would_be_seen(
    two: tuple[MessageQueue, MessageQueue, MessageQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "drop_own_pages", lambda *_: None)
    with pytest.raises(AssertionError, match="next message"):
        check_that_writes_stay_private(*two)


def test_shared_windows_would_be_seen(
    two: tuple[MessageQueue, MessageQueue, MessageQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that maps blocks shared: the file is read-only to it, so it cannot."""
    window = lease.Window
    monkeypatch.setattr(lease, "Window", lambda fd, at, size, private: window(fd, at, size, False))
    with pytest.raises(PermissionError):
        check_that_writes_stay_private(*two)


def test_writes_in_other_processes() -> None:
    peers = [Peer(), Peer()]
    wire = Wire("local", peers, max_chunk_bytes=4 * MIB)
    try:
        for peer in peers:
            peer.start(write_all, 40)
        sent = np.empty(600_000, np.uint8)
        for k in range(40):
            sent[:] = k
            wire.queue.enqueue(sent, HANG)
        assert wire.results() == [list(range(40))] * 2
    finally:
        wire.close()
        for peer in peers:
            peer.close()


# Fork with leases


def check_that_a_child_keeps_its_view(writer: MessageQueue, reader: MessageQueue) -> None:
    """The parent gives the lease back, the block is written again, then the child looks."""
    writer.enqueue(np.full(MIB, 5, np.uint8), HANG)
    box = [reader.dequeue(HANG)]
    child = Forked(lambda: [int(v) for v in np.unique(box[0][1::2])])
    box[0][0] = 6
    box.clear()
    assert lease.held() == (0, 0)
    for k in range(6):
        writer.enqueue(np.full(MIB, 200 + k, np.uint8), HANG)
        assert (reader.dequeue(HANG) == 200 + k).all()
    assert child.go() == [5]


def test_a_forked_child_keeps_its_view(ends: tuple[MessageQueue, MessageQueue]) -> None:
    for _ in range(3):
        check_that_a_child_keeps_its_view(*ends)


def test_a_child_without_memory_of_its_own_would_see_changes(
    ends: tuple[MessageQueue, MessageQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "own_pages", lambda *_: None)
    with pytest.raises(AssertionError):
        check_that_a_child_keeps_its_view(*ends)


def test_what_a_child_does_to_its_view_is_its_own(ends: tuple[MessageQueue, MessageQueue]) -> None:
    writer, reader = ends
    writer.enqueue(np.full(MIB, 5, np.uint8), HANG)
    box = [reader.dequeue(HANG)]

    def write_and_drop() -> tuple[int, int]:
        box[0][:] = 9
        box.clear()
        gc.collect()
        return lease.held()

    assert Forked(write_and_drop).go() == (0, 0)
    assert (box[0] == 5).all()
    assert holders(writer)[0][0] == 1, "a child gives no lease of its parent's back"
    box[0][7] = 1
    box.clear()
    assert holders(writer) == {}
    pass_by(ends, 3)
