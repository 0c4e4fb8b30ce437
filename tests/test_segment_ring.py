"""The segment (memfd, attach, memory limits), the ring in it, and waiting on its words."""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ray_shm import ring, segment
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, StartError
from ray_shm.ring import RingReader, RingWriter, Shape, record_bytes
from ray_shm.segment import AttachError, Segment, SegmentRef
from ray_shm.waiting import Waiter

WATCHDOG = 30.0  # seconds; only a hang comes near
NONCE = bytes(16)


def make_page() -> Segment:
    return Segment.create(4096, "test")


def open_files() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))


def _is_open(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


# Attaching


def test_attached_memory_is_the_same_memory() -> None:
    with make_page() as page:
        there = Segment.attach(page.ref)
        page.view[100:105] = b"hello"
        assert bytes(there.view[100:105]) == b"hello"
        there.view[200] = 7
        assert page.view[200] == 7
        assert there.size == page.size == 4096


def test_the_size_is_rounded_up_to_pages() -> None:
    with Segment.create(4097, "test") as made:
        assert made.size == 2 * mmap.PAGESIZE


def test_another_process_attaches() -> None:
    with make_page() as page:
        page.view[100:105] = b"hello"
        code = (
            "import sys, pickle, os; from ray_shm.segment import Segment\n"
            "there = Segment.attach(pickle.load(sys.stdin.buffer))\n"
            "there.view[100:105] = bytes(there.view[100:105]).upper()"
        )
        subprocess.run([sys.executable, "-c", code], input=pickle.dumps(page.ref), check=True, timeout=WATCHDOG)
        assert bytes(page.view[100:105]) == b"HELLO"


def plain_file(folder: Path) -> int:
    (folder / "plain").write_bytes(bytes(4096))
    return os.open(folder / "plain", os.O_RDWR)


def fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDWR)


def a_socket(_folder: Path) -> int:
    return socket.socket().detach()


def memfd(name: str, seals: int) -> Callable[[Path], int]:
    def make(_folder: Path) -> int:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        header = segment._HEADER.pack(segment._MAGIC, segment.LAYOUT_VERSION, mmap.PAGESIZE, 4096, NONCE)
        os.pwrite(fd, header, 0)
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    return make


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def test_a_memfd_as_ours_is_accepted(tmp_path: Path) -> None:
    """So that the refusals below have no other reason than the one they name."""
    fd = memfd("ray_shm:test", SEALS)(tmp_path)
    try:
        assert Segment.attach(SegmentRef(os.getpid(), fd, 4096, NONCE, "", 0)).size == 4096
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (plain_file, "that descriptor is /"),
        (fifo, "that descriptor is /"),
        (a_socket, "that descriptor is|No such device|ENXIO"),
        (memfd("other", SEALS), "that descriptor is /memfd:other"),
        (memfd("ray_shm:test", 0), "not sealed"),
        (memfd("ray_shm:test", fcntl.F_SEAL_SHRINK), "not sealed"),
    ],
    ids=["plain file", "FIFO", "socket", "foreign memfd", "unsealed", "may grow"],
)
def test_refuses_what_is_no_segment(make: Callable[[Path], int], why: str, tmp_path: Path) -> None:
    fd = make(tmp_path)
    before = open_files()
    try:
        with pytest.raises(AttachError, match=why) as caught:
            Segment.attach(SegmentRef(os.getpid(), fd, 4096, NONCE, "", 0))
        assert f"pid {os.getpid()}" in str(caught.value)
        assert open_files() == before
    finally:
        os.close(fd)


def test_refuses_another_segment_in_the_same_place() -> None:
    with make_page() as page:
        for wrong in (replace(page.ref, nonce=bytes(16)), replace(page.ref, size=8192)):
            with pytest.raises(AttachError, match=r"nonce|size"):
                Segment.attach(wrong)


def test_refuses_a_closed_descriptor_and_a_gone_process() -> None:
    with make_page() as page:
        gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
        gone.wait(WATCHDOG)
        page.close()
        for ref in (page.ref, replace(page.ref, pid=gone.pid)):
            with pytest.raises(AttachError, match="is gone"):
                Segment.attach(ref)


def test_memory_stays_while_somebody_maps_it() -> None:
    owner = Segment.create(4096, "test")
    there = Segment.attach(owner.ref)
    owner.view[64] = 5
    owner.close()
    owner.close()
    assert there.view[64] == 5


def test_a_dropped_segment_closes_its_descriptor_and_warns() -> None:
    before = open_files()
    made = Segment.create(4096, "test")
    with pytest.warns(ResourceWarning, match="without close"):
        del made
    assert open_files() == before


# Memory limits


def test_short_memory_is_a_start_error_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "_memory_left", lambda: iter([("memory cgroup /x", 100_000_000)]))
    before = open_files()
    with pytest.raises(StartError, match=re.escape("50,000,000 bytes")) as caught:
        segment.require_memory(50_000_000, "ring")
    for part in ("ring", "memory cgroup /x", "100,000,000"):
        assert part in str(caught.value)
    with pytest.raises(StartError):
        Segment.create(50_000_000, "ring")
    assert open_files() == before
    segment.require_memory(30_000_000, "ring")


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(StartError, match="leaves"):
        Segment.create(1 << 50, "test")


def test_every_ancestor_cgroup_counts_and_page_cache_does_not(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("500\n")
    (inner / "memory.stat").write_text("anon 1\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("900\n")
    (inner.parent / "memory.stat").write_text("anon 300\ninactive_file 400\nactive_file 200\nshmem 7\n")
    left = list(segment._cgroup_left(tmp_path, "/outer/inner", "memory.max", "memory.current"))
    assert left == [(f"memory cgroup {inner.parent}", 700)]


def test_limits_of_this_machine_are_read() -> None:
    names = [name for name, left in segment._memory_left() if left > 0]
    assert "the machine (MemAvailable)" in names


# The ring


def make_ring(
    n_readers: int, capacity: int, start: int = 0, event: int = 0
) -> tuple[Segment, RingWriter, list[RingReader]]:
    """A ring that has carried `start` bytes and `event` announcements before."""
    shape = Shape(n_readers, capacity)
    owner = Segment.create(shape.bytes, "ring")
    longs = owner.view.cast("Q")
    longs[ring._TAIL // 8] = start
    for i in range(n_readers):
        longs[(ring._READERS + 64 * i) // 8] = start
    writer = RingWriter(owner, shape)
    writer.tail = writer.published = start
    writer._limit = start + capacity
    writer.event.store(event)
    readers = [RingReader(Segment.attach(owner.ref), shape, i, os.getpid()) for i in range(n_readers)]
    return owner, writer, readers


def put(writer: RingWriter, frames: list[bytes]) -> bool:
    total = record_bytes([len(frame) for frame in frames])
    at = writer.reserve(total)
    if at is None:
        return False
    writer.write(at, ring.INLINE, frames, total)
    writer.publish(total)
    return True


def get(reader: RingReader) -> list[bytes] | None:
    record = reader.peek()
    if record is None:
        return None
    frames = [bytes(frame) for frame in record[1]]
    reader.release()
    return frames


@pytest.mark.parametrize("start", [0, 64 * 37, 2**64 - 64 * 5], ids=["new", "used", "cursors wrap at 2^64"])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_against_a_model(seed: int, start: int) -> None:
    """Every reader sees every record once, in order and unchanged, however far the readers are apart."""
    rng = random.Random(seed)
    owner, writer, readers = make_ring(3, 8192, start, event=2**32 - 100)
    unread: list[deque[list[bytes]]] = [deque() for _ in readers]
    sent = full = 0
    while sent < 1500:
        if rng.random() < 0.5:
            lengths = [rng.choice([0, 1, 7, 8, 63, 64, rng.randrange(600)]) for _ in range(rng.randrange(4))]
            frames = [rng.randbytes(n) for n in lengths]
            if put(writer, frames):
                sent += 1
                for queue in unread:
                    queue.append(frames)
            else:
                full += 1
                assert max(writer.lag(i) for i in range(3)) > 8192 // 2
        else:
            i = rng.randrange(3)
            assert get(readers[i]) == (unread[i].popleft() if unread[i] else None)
    for reader, queue in zip(readers, unread, strict=True):
        while queue:
            assert get(reader) == queue.popleft()
        assert get(reader) is None
    assert full > 10
    assert writer.event.load() < 2**31, "the event word has wrapped"
    assert [writer.lag(i) for i in range(3)] == [0, 0, 0]
    owner.close()


def test_the_largest_record_fits_at_every_position_of_an_empty_ring() -> None:
    owner, writer, [reader] = make_ring(1, 4096)
    largest = b"x" * (writer.largest - 24)
    assert record_bytes([len(largest)]) == writer.largest == 1024
    for _ in range(64):
        assert put(writer, [largest])
        assert get(reader) == [largest]
        assert put(writer, [b"shift by one line"])
        assert get(reader) == [b"shift by one line"]
    owner.close()


def test_a_skip_that_is_not_announced_is_no_lag() -> None:
    owner, writer, [reader] = make_ring(1, 4096)
    for _ in range(4):
        assert put(writer, [bytes(900)])
        assert get(reader) is not None
    assert writer.reserve(1024) == writer.shape.data  # skips the rest, which is too short
    assert writer.tail > writer.published
    assert writer.lag(0) == 0
    assert put(writer, [b"next"])
    assert get(reader) == [b"next"]
    owner.close()


def test_a_full_ring_takes_nothing_until_the_slowest_reader_moves() -> None:
    owner, writer, readers = make_ring(2, 4096)
    sent = 0
    while put(writer, [sent.to_bytes(8, "little") + bytes(200)]):
        sent += 1
    assert sent == 4096 // 256
    for i in range(sent):
        assert get(readers[0]) == [i.to_bytes(8, "little") + bytes(200)]
    assert not put(writer, [b"x"])
    assert get(readers[1]) is not None
    assert put(writer, [b"x"])
    writer.drop(1)
    assert writer.slowest() == writer.tail - 64
    assert put(writer, [bytes(900)])
    owner.close()


def test_phases_and_states_are_seen_across() -> None:
    owner, writer, [reader] = make_ring(1, 4096)
    assert (writer.state(0), writer.pid(0)) == (ring.ATTACHED, os.getpid())
    assert reader.phase == ring.STARTING
    writer.set_phase(ring.READY)
    assert reader.phase == ring.READY
    assert not reader.news()
    writer.set_phase(ring.CLOSED)
    assert reader.news()
    reader.set_state(ring.LEFT)
    assert writer.state(0) == ring.LEFT
    owner.close()


# Waiting


@pytest.mark.parametrize("event", [0, 2**32 - 1], ids=["start", "word wraps"])
def test_a_sleeper_is_woken_by_the_next_record(event: int) -> None:
    owner, writer, [reader] = make_ring(1, 4096, event=event)
    waiter = Waiter()
    done: list[bool] = []
    deadline = Deadline.after(WATCHDOG)
    thread = threading.Thread(
        target=lambda: done.append(waiter.wait(reader.readable, reader.event, deadline, longest_park=WATCHDOG))
    )
    thread.start()
    while not waiter.parks:
        time.sleep(0.001)
    assert put(writer, [b"x"])
    thread.join(WATCHDOG)
    assert done == [True]
    assert deadline.remaining() > WATCHDOG / 2, "woken, not timed out"
    owner.close()


def test_the_bell_is_heard_from_every_ringer() -> None:
    owner, writer, readers = make_ring(2, 4096)
    seen = {writer.bell.word.load()}
    for bell in (readers[0].bell, readers[1].bell, writer.bell) * 3:
        bell.ring()
        assert writer.bell.word.load() not in seen
        seen.add(writer.bell.word.load())
    owner.close()


def test_waiting_ends_at_the_deadline_and_by_on_park() -> None:
    owner, _, [reader] = make_ring(1, 4096)
    waiter = Waiter()
    assert not waiter.wait(reader.readable, reader.event, Deadline.after(0))
    assert waiter.parks == 0
    before = time.monotonic()
    assert not waiter.wait(reader.readable, reader.event, Deadline.after(0.05))
    assert time.monotonic() - before >= 0.05

    def lost() -> None:
        raise PeerLostError("gone")

    with pytest.raises(PeerLostError):
        waiter.wait(reader.readable, reader.event, Deadline.after(None), longest_park=0.01, on_park=lost)
    owner.close()


def test_an_idle_sleeper_looks_up_twice_a_second() -> None:
    owner, _, [reader] = make_ring(1, 4096)
    waiter = Waiter()
    assert not waiter.wait(reader.readable, reader.event, Deadline.after(2.0))
    assert 1 <= waiter.parks <= 6  # 4, and a signal or two
    owner.close()
