"""One suite for queues whose readers share memory (local), use ZeroMQ (remote), or do one of each (mixed)."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from reader_pool import LOCAL_READERS, WATCHDOG, Me, Peer, Wire, attach_only, close

from ray_shm.errors import PeerLostError, QueueCancelledError, QueueClosedError
from ray_shm.message_queue import MessageQueue

SOON = 0.15  # seconds: a timeout that is meant to run out
MakeWire = Callable[..., Wire]


@pytest.fixture(scope="module")
def peers() -> Iterator[list[Peer]]:
    made = [Peer(), Peer()]
    yield made
    for peer in made:
        peer.close()


@pytest.fixture(params=["local", "mixed", "remote"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_wire(kind: str, peers: list[Peer]) -> Iterator[MakeWire]:
    made: list[Wire] = []

    def make(**bounds: int) -> Wire:
        made.append(Wire(kind, peers, **bounds))
        return made[-1]

    yield make
    for wire in made:
        wire.close()
        del wire.queue


# Checks: these run in the readers' processes


def take(me: Me, count: int = 1) -> list[Any]:
    return [me.queue.dequeue(WATCHDOG) for _ in range(count)]


def take_error(me: Me, timeout: float = WATCHDOG) -> str:
    try:
        got = me.queue.dequeue(timeout)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return f"no error, but {got!r}"


def wait_until_ready(me: Me, timeout: float) -> str:
    try:
        me.queue.wait_until_ready(timeout)
    except Exception as exc:
        return type(exc).__name__
    return "ready"


# The ready barrier


def test_the_barrier_names_who_is_missing(kind: str, peers: list[Peer]) -> None:
    with MessageQueue(2, LOCAL_READERS[kind]) as queue:
        peers[0].run(attach_only, queue.export_handle(), 0)
        assert peers[0].run(wait_until_ready, 0.0) == "TimeoutError"
        with pytest.raises(TimeoutError, match=r"readers \[1\] of the queue of pid \d+ did not attach within 0.15 s"):
            queue.wait_until_ready(SOON)
        peers[1].run(attach_only, queue.export_handle(), 1)
        queue.wait_until_ready(WATCHDOG)
        queue.enqueue("after a timeout")
        for peer in peers:
            assert peer.run(wait_until_ready, WATCHDOG) == "ready"
            assert peer.run(take) == ["after a timeout"]
            peer.run(close)


def test_a_reader_waiting_for_the_barrier_hears_of_a_close(kind: str, peers: list[Peer]) -> None:
    with MessageQueue(2, LOCAL_READERS[kind]) as queue:
        for rank, peer in enumerate(peers):
            peer.run(attach_only, queue.export_handle(), rank)
            peer.start(wait_until_ready, WATCHDOG)
        while queue._writer is not None and (queue._writer._zmq and queue._writer._zmq.missing()):
            time.sleep(0.005)
        queue.close()
        for peer in peers:
            assert peer.result() == "QueueClosedError"
            assert peer.run(take_error).startswith("QueueClosedError")
            peer.run(close)


# Content and order


def stream(seed: int, count: int, most: int) -> Iterator[Any]:
    rng = random.Random(seed)
    for i in range(count):
        size = rng.choice([0, 1, 60, 64, rng.randrange(most)])
        yield i, rng.randbytes(size) if i % 2 else np.frombuffer(rng.randbytes(size), np.uint8)


def take_stream(me: Me, seed: int, count: int, most: int) -> str:
    for i, expected in stream(seed, count, most):
        got_i, got = me.queue.dequeue(WATCHDOG)
        if got_i != i or bytes(got) != bytes(expected):
            return f"message {i}: got number {got_i} and {len(got)} bytes"
    return "all"


def test_ten_thousand_messages_wrap_the_ring(make_wire: MakeWire, kind: str) -> None:
    """Sizes around every border: of a line, of a record in the ring (5,461 bytes), of a buffer of its own."""
    wire = make_wire(max_chunk_bytes=1 << 13, max_chunks=10)
    count = 10_000 if kind == "local" else 2_000
    wire.start(take_stream, 5, count, 12_000)
    for message in stream(5, count, 12_000):
        wire.queue.enqueue(message, WATCHDOG)
    assert wire.results() == ["all", "all"]


def summary(me: Me, count: int) -> list[Any]:
    got = take(me, count)
    return [(type(x).__name__, x.nbytes, int(x.astype("i8").sum())) for x in got]


def test_objects_larger_than_the_ring_and_than_the_bound(make_wire: MakeWire) -> None:
    wire = make_wire(max_chunk_bytes=1024, max_chunks=2)
    wire.start(summary, 6)
    for size in (3_000_000, 10, 70_000, 3_000_000, 5_000, 2_900_000):
        wire.queue.enqueue(np.ones(size, np.uint8), WATCHDOG)
    expected = [("ndarray", n, n) for n in (3_000_000, 10, 70_000, 3_000_000, 5_000, 2_900_000)]
    assert wire.results() == [expected] * 2


def test_what_was_sent_does_not_follow_later_changes(make_wire: MakeWire) -> None:
    wire = make_wire()
    for size in (10, 5_000, 200_000, 3_000_000):
        array = np.ones(size, np.uint8)
        wire.queue.enqueue(array)
        array[:] = 9
        assert wire.run(summary, 1) == [("ndarray", size, size)]


def keep(me: Me) -> None:
    me.kept = take(me, 4)


def is_kept_unchanged(me: Me) -> list[tuple[int, bool, bool]]:
    states = [(len(x), bool((x == k).all()), bool(x.flags.writeable)) for k, x in enumerate(me.kept)]
    for array in me.kept:
        array[:] = 77
    return states


def test_what_was_received_never_changes(make_wire: MakeWire) -> None:
    wire = make_wire(max_chunk_bytes=1 << 16, max_chunks=4)
    sizes = (10, 5_000, 40_000, 300_000)
    for k, size in enumerate(sizes):
        wire.queue.enqueue(np.full(size, k, np.uint8), WATCHDOG)
        if k == 0:
            wire.start(keep)
    assert wire.results() == [None, None]
    wire.start(take_count, 100)
    for k in range(100):
        wire.queue.enqueue(np.full(sizes[k % 4], 200, np.uint8), WATCHDOG)
    assert wire.results() == [100, 100]
    assert wire.run(is_kept_unchanged) == [(size, True, True) for size in sizes]


def take_count(me: Me, count: int) -> int:
    return len(take(me, count))


class OnlyHere:
    """Unpickling it fails."""

    def __reduce__(self) -> Any:
        return fail, ()


def fail() -> None:
    raise ArithmeticError("cannot be unpickled")


def test_unpicklable_objects_leave_the_queue_usable(make_wire: MakeWire) -> None:
    wire = make_wire()
    with pytest.raises(TypeError):
        wire.queue.enqueue([np.zeros(9000), threading.Lock()])
    wire.queue.enqueue(OnlyHere())
    wire.queue.enqueue("next")
    assert wire.run(take_error) == "ArithmeticError: cannot be unpickled"
    assert wire.run(take) == ["next"]


def test_lambdas_and_local_classes_go_by_value(make_wire: MakeWire) -> None:
    class Local:
        def double(self) -> int:
            return 2 * base

    base = 21
    wire = make_wire()
    wire.queue.enqueue((lambda obj: obj.double(), Local()))
    assert wire.run(call_it) == 42


def call_it(me: Me) -> Any:
    [(function, obj)] = take(me)
    return function(obj)


# The bound, and timeouts


def test_a_full_queue_times_out_naming_late_readers_and_stays_intact(make_wire: MakeWire) -> None:
    wire = make_wire(max_chunk_bytes=1100, max_chunks=2)
    wire.queue.enqueue((0, bytes(1000)), WATCHDOG)
    wire.queue.enqueue((1, bytes(1000)), WATCHDOG)
    for _ in range(2):
        with pytest.raises(TimeoutError, match=wire.late_text(0, 1)):
            wire.queue.enqueue((2, bytes(1000)), SOON)
    wire.peers[1].run(take)
    with pytest.raises(TimeoutError) as caught:
        wire.queue.enqueue((3, bytes(1000)), SOON)
    assert "rank 0" in str(caught.value)
    wire.peers[0].run(take)
    wire.queue.enqueue((4, bytes(1000)), WATCHDOG)
    assert [k for k, _ in wire.run(take, 2)] == [1, 4]


def test_as_many_chunks_fit_as_promised(make_wire: MakeWire) -> None:
    """Nobody reads before all are sent, whatever their size in a chunk."""
    for chunk, count in ((1 << 12, 3), (1 << 16, 10), (1 << 18, 10), (1 << 20, 4)):
        wire = make_wire(max_chunk_bytes=chunk, max_chunks=count)
        for size in (chunk // 8, chunk // 2, chunk - 1000):
            for k in range(count):
                wire.queue.enqueue(np.full(size, k, np.uint8), WATCHDOG)
            with_tail = wire.run(summary, count)
            assert [n for _, n, _ in with_tail] == [size] * count
        wire.close_readers()


def test_dequeue_times_out_and_goes_on(make_wire: MakeWire) -> None:
    wire = make_wire()
    wire.start(take_error, SOON)
    for error, peer in zip(wire.results(), wire.peers, strict=True):
        assert error.startswith(f"TimeoutError: no message from pid {os.getpid()} on ")
        assert f"pid {peer.process.pid})" in error
    wire.start(take_error, 0.0)
    assert all(error.startswith("TimeoutError") for error in wire.results())
    wire.queue.enqueue("then")
    assert wire.run(take) == ["then"]


def take_indefinitely(me: Me) -> Any:
    return me.queue.dequeue(0.001, indefinite=True)


def test_indefinite_waits_beyond_the_timeout(make_wire: MakeWire) -> None:
    wire = make_wire()
    wire.start(take_indefinitely)
    time.sleep(SOON)
    wire.queue.enqueue("late")
    assert wire.results() == ["late", "late"]


def take_cancelled(me: Me, delay: float) -> str:
    cancel = threading.Event()
    timer = threading.Timer(delay, cancel.set)
    timer.start()
    try:
        me.queue.dequeue(WATCHDOG, cancel=cancel)
    except QueueCancelledError as exc:
        return str(exc)
    finally:
        timer.join()
    return "not cancelled"


def test_a_cancelled_dequeue_takes_nothing(make_wire: MakeWire) -> None:
    wire = make_wire()
    for delay in (0.0, SOON):
        assert "was cancelled; the queue stays usable" in wire.run(take_cancelled, delay)
    wire.queue.enqueue("kept")
    assert wire.run(take) == ["kept"]


# Closing


def take_until_closed(me: Me) -> tuple[list[int], str]:
    numbers: list[int] = []
    while True:
        try:
            numbers.append(me.queue.dequeue(WATCHDOG)[0])
        except Exception as exc:
            return numbers, type(exc).__name__


def test_readers_drain_what_a_closed_writer_had_sent(make_wire: MakeWire) -> None:
    wire = make_wire()
    for k in range(20):
        wire.queue.enqueue((k, bytes(100)))
    wire.queue.close()
    with pytest.raises(QueueClosedError, match="was closed in this process"):
        wire.queue.enqueue("x")
    assert wire.run(take_until_closed) == (list(range(20)), "QueueClosedError")
    assert wire.run(take_until_closed) == ([], "QueueClosedError")


def test_a_closing_writer_waits_for_large_messages_to_be_fetched(make_wire: MakeWire) -> None:
    wire = make_wire()
    for k in range(3):
        wire.queue.enqueue((k, bytes(1_000_000)))
    wire.start(take_until_closed)
    wire.queue.close()
    assert wire.results() == [([0, 1, 2], "QueueClosedError")] * 2


def close_while_blocked(me: Me) -> str:
    timer = threading.Timer(SOON, me.queue.close)
    timer.start()
    error = take_error(me)
    timer.join()
    return error


def test_close_wakes_a_blocked_dequeue(make_wire: MakeWire) -> None:
    assert make_wire().run(close_while_blocked).startswith("QueueClosedError: this end of the queue was closed")


def test_close_wakes_a_blocked_enqueue(make_wire: MakeWire) -> None:
    wire = make_wire(max_chunk_bytes=1000, max_chunks=1)
    wire.queue.enqueue(bytes(900))
    timer = threading.Timer(SOON, wire.queue.close)
    timer.start()
    with pytest.raises(QueueClosedError):
        wire.queue.enqueue(bytes(900))
    timer.join()
    with pytest.raises(QueueClosedError):
        wire.queue.wait_until_ready(0)


def test_a_reader_that_left_is_named_to_a_full_writer(make_wire: MakeWire) -> None:
    wire = make_wire(max_chunk_bytes=1000, max_chunks=1)
    wire.queue.enqueue(bytes(900))
    wire.peers[0].run(take)
    wire.peers[1].run(close)
    with pytest.raises(PeerLostError, match="rank 1"):
        wire.queue.enqueue(bytes(900))


# Raw bytes, and threads


def take_raw(me: Me, size: int) -> tuple[int, bytes, bool]:
    with me.queue.acquire_read(WATCHDOG) as buffer:
        return len(buffer), bytes(buffer[:size]), buffer.readonly


def test_raw_buffers(make_wire: MakeWire) -> None:
    wire = make_wire(max_chunk_bytes=6000, max_chunks=3)
    with wire.queue.acquire_write(WATCHDOG) as buffer:
        assert len(buffer) == 6000
        buffer[:5] = b"hello"
    with pytest.raises(KeyError):
        with wire.queue.acquire_write() as buffer:
            raise KeyError("nothing is sent then")
    wire.queue.enqueue("next")
    assert wire.run(take_raw, 6) == (6000, b"hello\0", True)
    assert wire.run(take) == ["next"]


def take_in_two_threads(me: Me, count: int) -> list[int]:
    taken: list[list[int]] = [[], []]

    def work(k: int) -> None:
        while (got := me.queue.dequeue(WATCHDOG)) >= 0:
            taken[k].append(got)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG)
    for one in taken:
        for sender in range(2):
            part = [got for got in one if got % 2 == sender]
            assert part == sorted(part), "the order of one sender is kept at every thread"
    return sorted(taken[0] + taken[1])


def test_two_threads_share_an_end(make_wire: MakeWire) -> None:
    wire = make_wire()
    wire.start(take_in_two_threads, 1000)

    def work(k: int) -> None:
        for i in range(k, 1000, 2):
            wire.queue.enqueue(i, WATCHDOG)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG)
    wire.queue.enqueue(-1)
    wire.queue.enqueue(-2)
    assert wire.results() == [list(range(1000))] * 2


def test_broadcast_object(make_wire: MakeWire) -> None:
    wire = make_wire()
    wire.start(take_broadcast)
    assert wire.queue.broadcast_object({"a": 1}) == {"a": 1}
    assert wire.results() == [{"a": 1}] * 2


def take_broadcast(me: Me) -> Any:
    return me.queue.broadcast_object()
