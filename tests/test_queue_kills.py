"""Ends of a queue that are killed at every line that stores to shared memory, while they sleep, read or hold memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import hazard_checks as checks
import kill_checks
import numpy as np
import pytest
from hazard_checks import content, is_content, outcome
from injection import (
    HANG,
    Fuse,
    be_patient,
    fork_child,
    is_alive,
    patient,
    result_within,
    sync_points,
    wait_for,
    wait_until_asleep,
)
from kill_checks import BIG, BOUNDS, SIZES, reader_life, writer_life
from queue_ends import holders
from reader_pool import Me, Peer, Wire, attach

from ray_shm import lease, ring, shm_writer
from ray_shm.errors import PeerLostError, QueueClosedError
from ray_shm.message_queue import MessageQueue

pytestmark = pytest.mark.usefixtures("what_stays")


# Writers that are killed at every line


def drain(queue: MessageQueue, got: list[int], wrong: list[str]) -> Exception:
    """Read all there is; what ended it."""
    while True:
        try:
            k, data = queue.dequeue()
        except Exception as exc:
            return exc
        if not is_content(data, k, SIZES[k % len(SIZES)]):
            wrong.append(f"message {k} is torn")
        got.append(k)


def life_of_a_writer(zygote: Peer, at: int, bounds: dict[str, int], sizes: tuple[int, ...]) -> tuple[int, bool]:
    """(messages that came, whether it lived to the end) of a writer that is killed before line `at`."""
    pid, handle = zygote.run(fork_child, writer_life, at, bounds, sizes, 2)
    with MessageQueue.create_from_handle(handle, 0) as first, MessageQueue.create_from_handle(handle, 1) as second:
        got: tuple[list[int], list[int]] = ([], [])
        wrong: list[str] = []
        ends: list[Exception] = []
        thread = threading.Thread(target=lambda: ends.append(drain(first, got[0], wrong)), daemon=True)
        thread.start()
        reader = second._reader
        assert reader is not None
        assert reader.shm is not None
        wanted = reader.shm.ring._ints
        # The second one is late, so that the writer has to wait for room.
        wait_for(lambda: wanted[ring._WANTED_I] or not is_alive(pid) or len(got[0]) == len(sizes), "full or gone")
        end = drain(second, got[1], wrong)
        thread.join(HANG)
        assert ends, f"killed before line {at}, the writer leaves a reader asleep"
        assert wrong == []
        assert got[0] == got[1] == list(range(len(got[0]))), f"killed before line {at}: {got}"
        lived = isinstance(end, QueueClosedError)
        assert type(end) is type(ends[0])
        assert lived or isinstance(end, PeerLostError)
        if lived:
            assert len(got[0]) == len(sizes)
        else:
            assert f"pid {pid}" in str(end)
        return len(got[0]), lived


def kill_at_every_line(zygote: Peer, bounds: dict[str, int], sizes: tuple[int, ...], step: int) -> None:
    counts = []
    at, lived = 1, False
    while not lived:
        count, lived = life_of_a_writer(zygote, at, bounds, sizes)
        counts.append(count)
        at += step
    assert counts[0] == 0
    assert len(counts) > 100 // step
    assert set(counts) >= set(range(len(sizes) + 1)) or step > 1, "a kill between every two messages"


def test_a_writer_is_killed_at_every_line(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    kill_at_every_line(peer, BIG, SIZES[:5], 2)


@pytest.mark.slow
def test_a_writer_is_killed_at_really_every_line(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    kill_at_every_line(peer, BIG, SIZES, 1)


def test_a_waiting_writer_is_killed(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is full again and again."""
    patient(monkeypatch)
    kill_at_every_line(peer, BOUNDS, SIZES, 11)


@pytest.mark.slow
def test_a_waiting_writer_is_killed_at_every_line(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    kill_at_every_line(peer, BOUNDS, SIZES, 1)


def test_every_sync_point_of_the_writer_is_among_those_lines() -> None:
    kill_checks_code = kill_checks.writers_code() | kill_checks.readers_code()
    fuse = Fuse(kill_checks_code, 0, lambda: None)
    before = kill_checks.futex.fence
    try:
        kill_checks.every_fence()
        with MessageQueue(1, 1, **BOUNDS) as writer:  # type: ignore[arg-type]
            with MessageQueue.create_from_handle(writer.export_handle(), 0) as reader:
                fuse.light()
                assert writer._writer is not None
                assert writer._writer._shm is not None
                for k, size in enumerate(SIZES * 2):
                    writer.enqueue(content(k, size))
                    while outcome(lambda: writer.enqueue(bytes(7000), 0)).startswith("returned"):
                        pass
                    writer._writer._shm.ring.want(True)  # as a writer that waits: readers ring
                    while outcome(lambda: reader.dequeue(0)).startswith("returned"):
                        pass
                fuse.put_out()
    finally:
        fuse.put_out()
        kill_checks.futex.fence = before
    for module in (ring, shm_writer):
        points = sync_points(module, kill_checks_code)
        assert points
        assert points <= fuse.lines, f"not reached: {sorted(points - fuse.lines)}"


def test_a_torn_message_would_be_found(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that publishes before it writes."""
    patient(monkeypatch)
    peer.run(publish_first)
    with pytest.raises(AssertionError):
        kill_at_every_line(peer, BIG, SIZES[:5], 1)


def publish_first(_me: Me) -> None:
    def write(self: Any, at: int, kind: int, frames: Any, total: int) -> None:
        tail = self.tail
        self._longs[ring._TAIL_Q] = tail + total
        self.announce()
        ring.write_record(self._view, at, kind, frames, total)

    ring.RingWriter.write = write  # type: ignore[method-assign]
    ring.RingWriter.put = lambda self, frame: False  # type: ignore[method-assign, assignment]


# Readers that are killed at every line


def knows_of_the_end(queue: MessageQueue) -> bool:
    """Of reader 1's end."""
    writer = queue._writer
    assert writer is not None
    assert writer._shm is not None
    return 1 in writer._dead or 1 in writer._shm.ring.dropped or writer._shm.ring.state(1) == ring.LEFT


def life_of_a_reader(zygote: Peer, at: int, drop: bool) -> bool:
    """Whether it lived to the end, of a reader that is killed before line `at`."""
    sizes = (20, 400_000, 90_000, 300_000, 7000)
    with MessageQueue(2, 2, drop_dead_readers=drop) as writer:
        handle = writer.export_handle()
        with MessageQueue.create_from_handle(handle, 0) as other:
            pid, said = zygote.run(fork_child, reader_life, at, handle, 1, len(sizes))
            assert said == pid
            writer.wait_until_ready(HANG)
            assert writer._writer is not None
            shm = writer._writer._shm
            assert shm is not None
            shm.ring.want(True)  # as a writer that waits: readers ring
            sent = 0
            lost = ""
            for k in range(len(sizes) + 4):
                if k == len(sizes):
                    wait_for(lambda: not is_alive(pid), "the reader ends")
                    wait_for(lambda: knows_of_the_end(writer), "the writer is told")
                text = outcome(lambda k=k: writer.enqueue((k, content(k, (*sizes, *[400_000] * 4)[k])), HANG))
                if text != "returned None":
                    lost = text
                    break
                sent += 1
            lived = shm.ring.state(1) == ring.LEFT
            if not lived:
                expected = "" if drop else f"PeerLostError: reader rank 1 (pid {pid}) is gone"
                assert lost.startswith(expected)
                assert bool(lost) != drop
            for k in range(sent):
                number, got = other.dequeue(HANG)
                assert number == k
                assert (got == k % 251).all(), f"message {k} is torn"
                del got
            if drop and not lived:
                assert shm.holders() == {}, "what a dead reader held is not used again"
            return lived


@pytest.mark.parametrize(("drop", "step"), [(True, 4), (False, 13)])
def test_a_reader_is_killed_at_every_line(peer: Peer, drop: bool, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    at = 1
    while not life_of_a_reader(peer, at, drop):
        at += step
    assert at > 100


@pytest.mark.slow
@pytest.mark.parametrize("drop", [True, False])
def test_a_reader_is_killed_at_really_every_line(peer: Peer, drop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    at = 1
    while not life_of_a_reader(peer, at, drop):
        at += 1


# Readers that are killed while they sleep, read or hold memory


class Sleeper:
    """Whoever unpickles it sleeps for ever."""

    def __reduce__(self) -> Any:
        return signal.pause, ()


def read_for_ever(me: Me) -> None:
    me.queue.dequeue(HANG)


def bring_about(state: str, wire: Wire) -> int:
    """The reader of rank 0 is in that state; messages that the other one has not read yet."""
    victim = wire.peers[0]
    pid = victim.process.pid
    assert pid is not None
    if state == "parked":
        victim.start(checks.blocked_dequeue)
        wait_until_asleep(pid)
        return 0
    if state == "reading":
        wire.queue.enqueue((Sleeper(), content(0, 400_000)))
        victim.start(read_for_ever)
        in_pause = Path(f"/proc/{pid}/wchan")
        wait_for(lambda: "pause" in in_pause.read_text(), "the reader is inside of unpickling")
        return 1
    for k in range(6):
        wire.queue.enqueue(content(k, 400_000))
    victim.run(checks.keep, 4)
    assert victim.run(leases_held) == 4
    return 6


def leases_held(_me: Me) -> int:
    return lease.held()[0]


def take_all_but_sleepers(me: Me, skip: int, count: int) -> list[tuple[int, bool]]:
    for _ in range(skip):
        with me.queue.acquire_read(HANG):
            pass
    got = [me.queue.dequeue(HANG) for _ in range(count)]
    return [(k, is_content(data, k, 400_000)) for k, data in got]


@pytest.mark.parametrize("drop", [False, True], ids=["raise", "drop"])
@pytest.mark.parametrize("state", ["parked", "reading", "holding"])
def test_a_reader_is_killed(state: str, drop: bool, peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    for peer in peers:
        peer.run(be_patient)
    wire = Wire("local", peers, drop_dead_readers=drop, max_arena_bytes=24 << 20)
    with wire.queue as queue:
        unread = bring_about(state, wire)
        victim, other = peers
        victim.kill()
        if not drop:
            said = None
            for k in range(10_000):
                try:
                    queue.enqueue((k, content(k, 400_000)))
                except PeerLostError as exc:
                    said = exc
                    break
            assert said is not None
            assert f"rank 0 (pid {victim.process.pid}) is gone" in str(said)
            assert said.ranks == [0]
            got = other.run(take_all_but_sleepers, unread, k)
        else:
            other.start(take_all_but_sleepers, unread, 300)
            for k in range(300):
                queue.enqueue((k, content(k, 400_000)), HANG)
            got = result_within(other, HANG)
            assert 0 not in holders(queue)
            assert queue.stats().arena_bytes <= 24 << 20
        assert got == [(k, True) for k in range(len(got))]
        other.run(checks.close_all)


def test_all_readers_are_dead(peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    wire = Wire("local", peers, drop_dead_readers=True)
    with wire.queue as queue:
        for peer in peers:
            peer.kill()
        for k in range(300):
            queue.enqueue(content(k, 1 << 20), HANG)
            queue.enqueue(k, HANG)
        assert holders(queue) == {}
        assert queue.stats().lag == {}


# Stopped is not dead


def test_a_stopped_reader_is_late_not_dead(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire("local", [peer], max_arena_bytes=4 << 20, drop_dead_readers=True)
    pid = peer.process.pid
    assert pid is not None
    wire.queue.enqueue(content(0, 1 << 20))
    peer.run(checks.keep)
    os.kill(pid, signal.SIGSTOP)
    try:
        wire.queue.enqueue(content(1, 1 << 20))
        wire.queue.enqueue(content(2, 1 << 20))
        with pytest.raises(TimeoutError, match=rf"rank 0 \(pid {pid}\) is [\d,]+ bytes behind.*rank 0 holds 3 blocks"):
            wire.queue.enqueue(content(3, 1 << 20), 1.2)
    finally:
        os.kill(pid, signal.SIGCONT)
    peer.start(checks.take, 3)
    wire.queue.enqueue(content(4, 1 << 20), HANG)
    assert [int(np.unique(a)[0]) for a in peer.result()] == [1, 2, 4]
    wire.close()


def test_a_stopped_writer_is_waited_for(peer: Peer) -> None:
    pid = peer.process.pid
    assert pid is not None
    with MessageQueue.create_from_handle(peer.run(checks.make_queue), 0) as reader:
        peer.run(checks.await_ready)
        peer.run(checks.put, "before")
        os.kill(pid, signal.SIGSTOP)
        try:
            assert reader.dequeue(HANG) == "before"
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=f"no message from pid {pid}"):
                reader.dequeue(1.2)
            assert time.monotonic() - began >= 1.2
        finally:
            os.kill(pid, signal.SIGCONT)
        peer.run(checks.put, "after")
        assert reader.dequeue(HANG) == "after"
        assert outcome(lambda: reader.dequeue(0)).startswith("TimeoutError")


def test_a_killed_writer_after_a_stop(peers: list[Peer]) -> None:
    writer, reader = peers
    reader.run(be_patient)
    reader.start(attach, writer.run(checks.make_queue), 0)
    writer.run(checks.await_ready)
    reader.result()
    writer.run(checks.put, "one")
    assert writer.process.pid is not None
    os.kill(writer.process.pid, signal.SIGSTOP)
    reader.start(checks.take, 1)
    assert result_within(reader, HANG) == ["one"]
    reader.start(checks.blocked_dequeue)
    writer.kill()
    assert result_within(reader, HANG).startswith("PeerLostError")
