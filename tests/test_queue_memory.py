"""Memory of a queue: bounded, given back, not leaked, refused in time; and an idle queue costs nothing."""

from __future__ import annotations

import gc
import os
import random
import re
import resource
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hazard_checks as checks
import kill_checks
import numpy as np
import pytest
from hazard_checks import content, is_content
from injection import HANG, fork_child, sleeps, wait_until_asleep
from queue_ends import holders
from reader_pool import Me, Peer, Wire

from ray_shm import arena, lease
from ray_shm.message_queue import MessageQueue

MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("what_stays")


def shared_bytes(queue: MessageQueue) -> int:
    """Memory that the queue's memfd really takes."""
    assert queue._writer is not None
    assert queue._writer._shm is not None
    return os.fstat(queue._writer._shm._segment.fd).st_blocks * 512


Ends = tuple[MessageQueue, MessageQueue]


@pytest.fixture
def make_ends() -> Iterator[Callable[..., Ends]]:
    """Both in this process."""
    made: list[MessageQueue] = []

    def make(**bounds: Any) -> Ends:
        writer = MessageQueue(1, 1, **bounds)
        reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
        made.extend((writer, reader))
        writer.wait_until_ready(HANG)
        return writer, reader

    yield make
    for end in made:
        end.close()


# Create, use, close


def usage() -> dict[str, int]:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "private KiB": int(status["RssAnon"].split()[0]),
        "shared KiB": int(status["RssShmem"].split()[0]),
    }


SLACK = {"descriptors": 0, "threads": 0, "mappings": 8, "private KiB": 8192, "shared KiB": 64}


def cycles(count: int) -> None:
    for k in range(count):
        with MessageQueue(1, 1) as writer, MessageQueue.create_from_handle(writer.export_handle(), 0) as reader:
            writer.wait_until_ready(HANG)
            writer.enqueue(k)
            writer.enqueue(content(k, 2 * MIB))
            writer.enqueue(content(k, 90_000))
            assert reader.dequeue(HANG) == k
            kept = reader.dequeue(HANG)
            kept[:] = 1
            assert is_content(reader.dequeue(HANG), k, 90_000)
        del kept


def grown(before: dict[str, int]) -> dict[str, int]:
    now = usage()
    return {what: now[what] - before[what] for what in now if now[what] - before[what] > SLACK[what]}


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_cycles_leave_nothing(count: int) -> None:
    cycles(30)
    before = usage()
    cycles(count)
    deadline = time.monotonic() + HANG
    while grown(before) and time.monotonic() < deadline:  # the thread that watches for deaths is on its way out
        time.sleep(0.05)
    assert grown(before) == {}


def test_a_dropped_end_is_closed_with_a_warning() -> None:
    """Who forgets close() is told, and the other end is, too."""
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    writer.wait_until_ready(HANG)
    seen = weakref.ref(reader._reader)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del reader
        gc.collect()
    gone = seen() is None
    seen_writer = weakref.ref(writer._writer)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught_too:
        warnings.simplefilter("always")
        del writer
        gc.collect()
    gone_too = seen_writer() is None
    for left in (seen(), seen_writer()):
        if left is not None:
            left.close()
    assert gone, "a dropped reader stays"
    assert gone_too, "a dropped writer stays"
    for record in (caught, caught_too):
        assert any("was dropped without close()" in str(w.message) for w in record)


@pytest.mark.usefixtures("lost")
def test_an_end_that_is_collected_with_a_cycle_closes_each_descriptor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it consists of is collected in any order, and a number that was closed may be another file's."""
    closed: list[int] = []
    close = os.close

    def note(fd: int) -> None:
        closed.append(fd)
        close(fd)

    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    for end in (reader, writer):
        cycle: list[Any] = [end]
        cycle.append(cycle)
    del writer, reader, end, cycle
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", note)
        with pytest.warns(ResourceWarning):
            gc.collect()
    assert len(closed) >= 3
    assert len(closed) == len(set(closed))


# The cap


def keep_all(me: Me, count: int) -> list[int]:
    """Numbers of the messages that are not as sent, while all are kept."""
    me.kept = [me.queue.dequeue(HANG) for _ in range(count)]
    return [k for k, got in enumerate(me.kept) if not is_content(got, k, MIB)]


def test_who_keeps_everything_never_stops_the_writer(peer: Peer) -> None:
    cap = 16 * MIB
    wire = Wire("local", [peer], max_arena_bytes=cap)
    empty = shared_bytes(wire.queue)
    try:
        peer.start(keep_all, 300)
        most = 0
        for k in range(300):
            wire.queue.enqueue(content(k, MIB), HANG)
            most = max(most, wire.queue.stats().arena_bytes, shared_bytes(wire.queue) - empty)
        assert peer.result() == []
        assert most <= cap
        assert 4 <= holders(wire.queue)[0][0] <= 8, "half of the cap is leased"
        peer.run(checks.drop_kept)
        assert holders(wire.queue) == {}
    finally:
        wire.close()


def test_who_keeps_everything_of_a_leases_words(make_ends: Callable[..., Ends]) -> None:
    """More messages are kept than a reader has lease words."""
    writer, reader = make_ends(max_arena_bytes=1 << 40, max_chunk_bytes=1 << 30)
    kept = []
    for k in range(1100):
        writer.enqueue(content(k, 1 << 18), HANG)
        kept.append(reader.dequeue(HANG))
    assert lease.held()[0] == 1024
    assert all(is_content(got, k, 1 << 18) for k, got in enumerate(kept))
    kept.clear()
    assert holders(writer) == {}


def test_unread_messages_fill_the_cap(peer: Peer) -> None:
    wire = Wire("local", [peer], max_arena_bytes=16 * MIB)
    try:
        for sent in range(15):
            wire.queue.enqueue(content(sent, MIB), HANG)
        with pytest.raises(TimeoutError) as caught:
            wire.queue.enqueue(content(15, MIB), 0.1)
        text = str(caught.value)
        assert re.search(wire.late_text(0), text), text
        assert "rank 0 holds 15 blocks, 15.9 MiB. Nothing was sent" in text
        assert wire.queue.stats().arena_bytes <= 16 * MIB
        for _ in range(3):
            with pytest.raises(TimeoutError):
                wire.queue.enqueue(content(9, MIB), 0)
        peer.start(keep_all, 40)
        for k in range(15, 40):
            wire.queue.enqueue(content(k, MIB), HANG)
        assert peer.result() == []
    finally:
        wire.close()


def test_more_than_the_cap_goes_alone_and_is_given_back(make_ends: Callable[..., Ends]) -> None:
    writer, reader = make_ends(max_arena_bytes=4 * MIB)
    before = shared_bytes(writer)
    kept = []
    for k in range(3):
        writer.enqueue(content(k, 7 * MIB), HANG)
        assert shared_bytes(writer) >= before + 7 * MIB
        with pytest.raises(TimeoutError, match="rank 0 holds 1 block, 7"):
            writer.enqueue(content(9, MIB), 0)
        got = reader.dequeue(HANG)
        kept.append(got)
        writer.enqueue(content(k, 90_000), HANG)
        assert reader.dequeue(HANG).nbytes == 90_000
        assert shared_bytes(writer) < before + MIB
        assert writer.stats().arena_bytes < MIB
    assert all(is_content(got, k, 7 * MIB) for k, got in enumerate(kept))


@pytest.mark.parametrize("seed", range(3))
def test_the_cap_holds_for_any_sizes(make_ends: Callable[..., Ends], seed: int) -> None:
    """Blocks are freed, given back and taken again, by messages of other sizes."""
    rng = random.Random(seed)
    cap = 16 * MIB
    writer, reader = make_ends(max_arena_bytes=cap)
    empty = shared_bytes(writer)
    unread = 0
    for _ in range(300):
        size = int(2 ** rng.uniform(17, 23))
        try:
            writer.enqueue(np.zeros(size, np.uint8), 0)
            unread += 1
        except TimeoutError:
            while unread:
                reader.dequeue(HANG)
                unread -= 1
        assert writer.stats().arena_bytes <= cap
        assert shared_bytes(writer) - empty <= cap


def test_a_block_that_was_given_back_counts_in_full(
    make_ends: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range of a large block is taken again for a smaller message: all of it counts."""
    cap = 16 * MIB
    writer, reader = make_ends(max_arena_bytes=cap)
    monkeypatch.setattr(arena, "IDLE_SECONDS", 0.0)
    writer.enqueue(np.zeros(10 * MIB, np.uint8))
    reader.dequeue(HANG)
    for _ in range(3):  # a look back, that gives back
        writer.enqueue(np.zeros(MIB, np.uint8))
        reader.dequeue(HANG)
    assert writer.stats().arena_bytes < 4 * MIB
    monkeypatch.undo()
    for _ in range(4):
        writer.enqueue(np.zeros(2 * MIB, np.uint8), 0)
    writer.enqueue(np.zeros(5 * MIB + 300_000, np.uint8), 0)
    assert writer.stats().arena_bytes <= cap


@pytest.mark.parametrize("after", ["large", "small"])
def test_the_memory_of_a_burst_is_given_back(
    make_ends: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """By whatever is sent once the blocks have lain idle for a while."""
    monkeypatch.setattr(arena, "IDLE_SECONDS", 0.2)
    writer, reader = make_ends()
    empty = shared_bytes(writer)
    for k in range(20):
        writer.enqueue(content(k, MIB), HANG)
    for k in range(20):
        assert is_content(reader.dequeue(HANG), k, MIB)
    assert shared_bytes(writer) >= empty + 20 * MIB
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline and writer.stats().arena_bytes > 2 * MIB:
        writer.enqueue(content(1, MIB) if after == "large" else "small", HANG)
        reader.dequeue(HANG)
        time.sleep(0.02)
    assert writer.stats().arena_bytes <= 2 * MIB
    assert shared_bytes(writer) <= empty + 3 * MIB


def test_a_default_queue_is_small() -> None:
    with MessageQueue(8, 8) as queue:
        assert shared_bytes(queue) <= 4 * MIB
        assert queue.stats().arena_bytes == 0


def test_leases_end_where_no_descriptor_is_left() -> None:
    """In a process of its own, which cannot open any file when its first lease ends."""
    code = """
import os, resource
import numpy as np
from ray_shm import lease
from ray_shm.message_queue import MessageQueue
writer = MessageQueue(1, 1)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
writer.enqueue(np.full(1 << 20, 1, np.uint8))
got = reader.dequeue()
got[:] = 9
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
del got
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(lease.held(), writer._writer._shm.holders())
for k in range(3):
    writer.enqueue(np.full(1 << 20, k, np.uint8))
    assert (reader.dequeue() == k).all()
writer.close()
reader.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(0, 0) {}\n", "")


def test_a_large_message_after_the_main_thread_has_ended() -> None:
    """Another thread goes on, as Python lets it: its large copies cannot rely on a pool that is shut down by then."""
    code = """
import threading
import numpy as np
from ray_shm.message_queue import MessageQueue
writer = MessageQueue(1, 1)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
def work():
    threading.main_thread().join()
    writer.enqueue(np.full(16 << 20, 7, np.uint8))
    assert (reader.dequeue(10) == 7).all()
    writer.close()
    reader.close()
    print("sent")
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sent\n", "")


# Idle


def test_idle_readers_sleep(peer: Peer) -> None:
    """Two wake-ups a second at most, of eight readers that wait."""
    n = 8
    with MessageQueue(n, n) as queue:
        pids = [peer.run(fork_child, kill_checks.idle_reader_life, queue.export_handle(), k)[0] for k in range(n)]
        queue.wait_until_ready(HANG)
        queue.enqueue("once")
        for pid in pids:
            wait_until_asleep(pid)
        begun = time.monotonic()
        before = [sleeps(pid) for pid in pids]
        cpu = [cpu_ticks(pid) for pid in pids]
        time.sleep(3.0)
        woken = [now - then for now, then in zip([sleeps(pid) for pid in pids], before, strict=True)]
        ticks = sum(cpu_ticks(pid) for pid in pids) - sum(cpu)
        seconds = time.monotonic() - begun
    assert max(woken) <= 2 * seconds + 1
    assert ticks / os.sysconf("SC_CLK_TCK") / seconds < 0.02


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_idle_writer_that_waits_sleeps(make_ends: Callable[..., Ends]) -> None:
    writer, _ = make_ends(max_chunk_bytes=1000, max_chunks=1)
    writer.enqueue(bytes(900))
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    with pytest.raises(TimeoutError):
        writer.enqueue(bytes(900), 2.0)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before <= 12  # the interpreter's own among them
    assert writer.stats().parks <= 6
