"""Hazards of a shared-memory queue: mutation after sending, desync after a timeout, lost wake-ups.

Each check runs on the real thing, where it has to pass, and most also on a naive variant, where it has to fail.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from typing import Any

import hazard_checks as checks
import numpy as np
import pytest
from hazard_checks import content, is_content
from injection import (
    HANG,
    be_patient,
    is_hung,
    patient,
    result_within,
    wait_until_asleep,
)
from queue_ends import Ends, blocked, close_only, make_bounded, patient_wire, pid_of
from reader_pool import Me, Peer, Wire, attach

FAILED = (AssertionError, pytest.fail.Exception)
SOON = 0.1  # seconds: a timeout that is meant to run out


pytestmark = pytest.mark.usefixtures("what_stays")


# Mutation after enqueue

SIZES = (50, 3000, 5000, 60_000, 100 << 10, 400_000, 1 << 20, 9 << 20)


def check_mutation_after_enqueue() -> None:
    with Ends(2) as ends:
        for make in (lambda n: np.full(n, 1, np.uint8), lambda n: bytearray(b"\1" * n)):
            for size in SIZES:
                buffer = make(size)
                ends.writer.enqueue([buffer, "end"], HANG)
                memoryview(buffer)[:] = b"\2" * size
            for size in SIZES:
                for reader in ends.readers:
                    got, _ = reader.dequeue(HANG)
                    assert is_content(np.frombuffer(got, np.uint8), 1, size), f"{size} bytes follow a later change"
                    del got


def test_what_was_sent_does_not_follow_later_changes() -> None:
    check_mutation_after_enqueue()


def test_a_writer_that_keeps_references_would_send_later_values(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.keep_references(monkeypatch)
    with pytest.raises(AssertionError, match="follow a later change"):
        check_mutation_after_enqueue()


def test_raw_buffers_may_be_changed_after_they_were_sent() -> None:
    with Ends(max_chunk_bytes=100_000) as ends:
        for value in (1, 2):
            with ends.writer.acquire_write(HANG) as buffer:
                buffer[:] = bytes([value]) * len(buffer)
            buffer[:] = b"\7" * len(buffer)
        for value in (1, 2):
            with ends.readers[0].acquire_read(HANG) as got:
                assert set(got) == {value}


# Desync after a timeout

SMALL = {"max_chunk_bytes": 1500, "max_chunks": 3}
LARGE = {"max_chunk_bytes": 1 << 22, "max_chunks": 4, "max_arena_bytes": 4 << 20}


def check_timeouts_leave_no_trace(seed: int, bounds: dict[str, int], sizes: tuple[int, ...], count: int) -> None:
    """Two readers, each at its own pace, get exactly what enqueue did not refuse."""
    rng = random.Random(seed)
    with Ends(2, **bounds) as ends:
        unread: list[list[tuple[int, int]]] = [[], []]
        refused = 0

        def read(i: int) -> None:
            k, size = unread[i].pop(0)
            number, got = ends.readers[i].dequeue(HANG)
            assert number == k, f"reader {i}: message {number} instead of {k}"
            assert is_content(got, k, size), f"reader {i}: message {k} is torn"

        for k in range(count):
            size = rng.choice(sizes)
            try:
                ends.writer.enqueue((k, content(k, size)), rng.choice((0, 0, 0.002)))
            except TimeoutError:
                refused += 1
            else:
                for rest in unread:
                    rest.append((k, size))
            for i in range(2):
                while unread[i] and rng.random() < 0.45:
                    read(i)
        for i in range(2):
            while unread[i]:
                read(i)
            with pytest.raises(TimeoutError):
                ends.readers[i].dequeue(0)
        assert refused > count // 20, "the queue was never full"
        ends.writer.enqueue("usable")
        assert [reader.dequeue(HANG) for reader in ends.readers] == ["usable"] * 2


@pytest.mark.parametrize("seed", range(3))
def test_timeouts_leave_no_trace(seed: int) -> None:
    check_timeouts_leave_no_trace(seed, SMALL, (0, 100, 800, 1200, 4000), 600)
    check_timeouts_leave_no_trace(seed, LARGE, (10, 90_000, 300_000, 1 << 20, 5 << 20), 150)


@pytest.mark.slow
def test_timeouts_leave_no_trace_for_long() -> None:
    for seed in range(10, 18):
        check_timeouts_leave_no_trace(seed, SMALL, (0, 100, 800, 1200, 4000), 5000)
        check_timeouts_leave_no_trace(seed, LARGE, (10, 90_000, 300_000, 1 << 20, 5 << 20), 500)


def test_a_start_that_stays_after_a_timeout_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.forget_what_was_cut_off(monkeypatch)
    with pytest.raises((AssertionError, TypeError)):
        check_timeouts_leave_no_trace(0, SMALL, (0, 100, 800, 1200, 4000), 600)


def test_a_timeout_says_who_is_late(peers: list[Peer]) -> None:
    wire = Wire("local", peers, max_chunk_bytes=1000, max_chunks=2)
    try:
        for k in range(2):
            wire.queue.enqueue((k, bytes(900)))
        with pytest.raises(TimeoutError, match=rf"full for {SOON} s: {wire.late_text(0, 1)}"):
            wire.queue.enqueue(bytes(900), SOON)
        peers[0].run(checks.take, 2)
        with pytest.raises(TimeoutError, match=wire.late_text(1)) as caught:
            wire.queue.enqueue(bytes(1900), SOON)
        assert "rank 0" not in str(caught.value)
    finally:
        wire.close()


def test_a_timeout_says_who_holds_memory(peers: list[Peer]) -> None:
    wire = Wire("local", peers, max_arena_bytes=8 << 20)
    try:
        wire.queue.enqueue(content(0, 1 << 20))
        peers[0].run(checks.keep)
        peers[1].run(checks.take)
        for k in range(1, 7):
            wire.queue.enqueue(content(k, 1 << 20), HANG)
        with pytest.raises(TimeoutError) as caught:
            wire.queue.enqueue(content(7, 1 << 20), SOON)
        text = str(caught.value)
        assert re.search(wire.late_text(0, 1), text), text
        assert "rank 0 holds 7 blocks, 7.4 MiB; rank 1 holds 6 blocks, 6.4 MiB. Nothing was sent" in text
        for k in range(1, 7):
            for peer in peers:
                [got] = peer.run(checks.take)
                assert is_content(got, k, 1 << 20)
        wire.queue.enqueue("next", HANG)
        assert wire.run(checks.take) == ["next"]
    finally:
        wire.close()


# Lost wake-ups: without the safety timeout each is a hang


def exchange(
    peers: list[Peer], how: str, count: int, longest: float, naive: Callable[[Me], None] | None = None
) -> None:
    """Messages between two processes, with random gaps on both sides."""
    first, second = peers
    for peer in peers:
        peer.run(be_patient)
        if naive is not None:
            peer.run(naive)
    bounds = {"one way": {"max_chunk_bytes": 150, "max_chunks": 2}, "large": {"max_arena_bytes": 1 << 20}}.get(how, {})
    second.start(attach, first.run(make_bounded, bounds), 0)
    first.run(checks.await_ready)
    second.result()
    if how == "ping-pong":
        first.run(checks.attach_answers, second.run(checks.add_answers))
    work = {
        "one way": (checks.send_with_gaps, checks.take_with_gaps),
        "ping-pong": (checks.play_first, checks.play_second),
        "large": (checks.send_large_with_gaps, checks.take_large_with_gaps),
    }[how]
    for peer, one in zip(peers, work, strict=True):
        peer.start(one, count, count, longest)
    parks = []
    for peer in peers:
        while not peer.pipe.poll(0.2):
            if is_hung(peers, 1.0) and not any(p.pipe.poll(0) for p in peers):
                pytest.fail("both sleep for ever")
        parks.append(peer.result())
    assert max(parks) > count // 100, "nobody ever slept"
    for peer in peers:
        peer.run(checks.close_all)


@pytest.mark.parametrize(("how", "count"), [("one way", 4000), ("ping-pong", 2000), ("large", 500)])
def test_no_wake_up_is_lost(peers: list[Peer], how: str, count: int) -> None:
    exchange(peers, how, count, 100e-6)


@pytest.mark.slow
@pytest.mark.parametrize("longest", [20e-6, 60e-6, 200e-6])
@pytest.mark.parametrize(("how", "count"), [("one way", 100_000), ("ping-pong", 100_000), ("large", 10_000)])
def test_no_wake_up_is_lost_in_many_messages(peers: list[Peer], how: str, count: int, longest: float) -> None:
    exchange(peers, how, count, longest)


@pytest.mark.parametrize(
    ("how", "naive"),
    [
        ("ping-pong", checks.wake_without_changing_the_word),
        ("one way", checks.ring_without_changing_the_word),
        ("one way", checks.look_at_nobody_waiting),
    ],
)
def test_a_naive_wake_up_would_be_lost(peers: list[Peer], how: str, naive: Callable[[Me], None]) -> None:
    with pytest.raises(pytest.fail.Exception, match="sleep for ever"):
        exchange(peers, how, 100_000, 60e-6, naive)


def test_a_closing_writer_wakes_its_readers(peers: list[Peer]) -> None:
    wire = patient_wire(peers)
    wire.start(checks.blocked_dequeue)
    for peer in peers:
        wait_until_asleep(pid_of(peer))
    wire.queue.close()
    for peer in peers:
        assert result_within(peer, HANG).startswith("QueueClosedError: the writer (pid")
    wire.close()


def close_from_a_thread(me: Me, call: Callable[..., str], *args: Any) -> str:
    closer = threading.Timer(0.3, me.queue.close)
    closer.start()
    said = call(me, *args)
    closer.join()
    return said


def test_close_in_another_thread_wakes_a_dequeue_and_an_enqueue(peers: list[Peer]) -> None:
    writer, reader = peers
    reader.run(be_patient)
    writer.run(be_patient)
    reader.start(attach, writer.run(make_bounded, {"max_chunk_bytes": 1000, "max_chunks": 1}), 0)
    writer.run(checks.await_ready)
    reader.result()
    writer.run(checks.put, bytes(900))
    writer.start(close_from_a_thread, checks.blocked_enqueue, 900)
    assert result_within(writer, HANG).startswith("QueueClosedError: this end of the queue was closed in this process")
    reader.run(checks.take)
    wire = Wire("local", [reader])
    reader.start(close_from_a_thread, checks.blocked_dequeue)
    assert result_within(reader, HANG).startswith("QueueClosedError: this end of the queue was closed in this process")
    wire.close()


@pytest.mark.parametrize("event", ["read", "lease ended", "closed", "killed"])
def test_what_wakes_a_blocked_writer(peer: Peer, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    wire = patient_wire([peer], max_arena_bytes=4 << 20)
    said: list[str] = []
    wire.queue.enqueue(content(0, 1 << 20))
    peer.run(checks.keep)
    for k in (1, 2):
        wire.queue.enqueue(content(k, 1 << 20), HANG)
    thread = blocked(wire.queue, content(3, 1 << 20), said)
    assert said == []
    {
        "read": lambda: peer.run(checks.take),
        "lease ended": lambda: peer.run(checks.drop_kept),
        "closed": lambda: peer.run(close_only),
        "killed": peer.kill,
    }[event]()
    thread.join(HANG)
    lost = f"PeerLostError: reader rank 0 (pid {peer.process.pid}) "
    expected = {"closed": f"{lost}closed its end", "killed": f"{lost}is gone"}.get(event, "returned None")
    assert said, "the writer sleeps for ever"
    assert said[0].startswith(expected)
    wire.close()


def test_a_writer_that_dies_wakes_its_readers(peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = peers
    reader.run(be_patient)
    reader.start(attach, writer.run(checks.make_queue), 0)
    writer.run(checks.await_ready)
    reader.result()
    reader.start(checks.blocked_dequeue)
    wait_until_asleep(pid_of(reader))
    writer.kill()
    said = result_within(reader, HANG)
    assert said.startswith(f"PeerLostError: the writer of the queue (pid {writer.process.pid} on")


def test_stats_do_not_wait_for_a_blocked_enqueue() -> None:
    """Whoever looks why a queue stands still has to get an answer."""
    with Ends(max_chunk_bytes=1000, max_chunks=1) as ends:
        said: list[str] = []
        seen: list[Any] = []
        ends.writer.enqueue(bytes(900))
        thread = blocked(ends.writer, bytes(900), said)
        looker = threading.Thread(target=lambda: seen.append(ends.writer.stats()))
        looker.start()
        looker.join(HANG)
        early = list(seen)
        ends.readers[0].dequeue(HANG)
        thread.join(HANG)
        looker.join(HANG)
        assert early, "stats() waits for as long as enqueue does"
        assert early[0].lag[0] > 900
