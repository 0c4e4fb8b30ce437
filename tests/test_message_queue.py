"""One suite for queues whose readers share memory (local), use ZeroMQ (remote), or do one of each (mixed)."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reader_pool import LOCAL_READERS, WATCHDOG, Me, Peer, Wire, attach_only, close

from ray_shm.errors import PeerLostError, QueueCancelledError, QueueClosedError, StartError
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


# Arguments and handles; both ends in this process


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0, 0), {}),
        ((1, 2), {}),
        ((2, -1), {}),
        ((2, 2), {"local_reader_ranks": [0]}),
        ((2, 2), {"local_reader_ranks": [1, 1]}),
        ((2, 1), {"local_reader_ranks": [-1]}),
        ((1, 1), {"max_chunks": 0}),
        ((1, 1), {"max_chunk_bytes": 0}),
        ((5000, 5000), {}),
    ],
)
def test_counts_and_ranks_that_do_not_fit(args: tuple[int, int], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MessageQueue(*args, **kwargs)


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(StartError, match=r"cannot bind a queue's socket to 192.0.2.1"):
        MessageQueue(2, 1, connect_ip="192.0.2.1")


def test_ranks_as_given() -> None:
    with MessageQueue(3, 1, local_reader_ranks=[1]) as queue:
        handle = queue.export_handle()
        assert (handle.local_reader_ranks, handle.remote_reader_ranks) == ((1,), (0, 2))
        for wrong in (3, -1):
            with pytest.raises(ValueError, match=f"no reader {wrong}"):
                MessageQueue.create_from_handle(handle, wrong)


def test_minus_one_is_the_only_remote_reader() -> None:
    with MessageQueue(2, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), -1) as reader:
        with pytest.raises(TimeoutError, match=r"readers \[0\]"):
            queue.wait_until_ready(SOON)
        queue.enqueue("x")
        assert reader.dequeue(WATCHDOG) == "x"


def test_a_rank_is_read_by_one_end_at_a_time() -> None:
    with MessageQueue(1, 1) as queue:
        handle = queue.export_handle()
        with MessageQueue.create_from_handle(handle, 0) as reader:
            with pytest.raises(StartError, match=rf"as rank 0: that place is taken: process {os.getpid()} reads"):
                MessageQueue.create_from_handle(handle, 0)
            queue.enqueue("for the first")
            assert reader.dequeue(WATCHDOG) == "for the first"
        with pytest.raises(StartError, match="make a new queue"):  # what it holds may still lie in leased memory
            MessageQueue.create_from_handle(handle, 0)


def test_dequeue_inside_of_a_read_is_refused() -> None:
    with MessageQueue(1, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
        queue.enqueue("first")
        queue.enqueue("second")
        with reader.acquire_read(WATCHDOG), pytest.raises(RuntimeError, match="nothing was taken"):
            reader.dequeue(WATCHDOG)
        assert reader.dequeue(WATCHDOG) == "second"


@pytest.mark.parametrize("size", [100_000, 500_000], ids=["copied", "leased"])
def test_a_read_buffer_outlives_a_close_inside_of_the_read(size: int) -> None:
    with MessageQueue(1, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
        with queue.acquire_write() as buffer:
            buffer[:size] = b"x" * size
        with reader.acquire_read(WATCHDOG) as got:
            reader.close()
            assert got[:size] == b"x" * size


def test_senders_that_time_out_behind_another_name_who_is_late() -> None:
    """They do not touch what the sender that waits works on."""
    with (
        MessageQueue(1, 1, max_chunk_bytes=100_000, max_chunks=2) as queue,
        MessageQueue.create_from_handle(queue.export_handle(), 0),
    ):
        outcomes: list[BaseException] = []

        def send() -> None:
            try:
                while True:
                    queue.enqueue(bytes(90_000), SOON)
            except BaseException as exc:
                outcomes.append(exc)

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WATCHDOG)
        assert [type(exc) for exc in outcomes] == [TimeoutError] * 4
        assert all("rank 0 (pid" in str(exc) for exc in outcomes)


def test_enqueue_inside_of_enqueue_is_refused() -> None:
    """As from a signal handler or a __del__ that runs amid it; what is sent around it is intact."""
    with MessageQueue(1, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
        errors: list[BaseException] = []

        def enqueue_again() -> None:
            try:
                queue.enqueue("inner")
            except RuntimeError as exc:
                errors.append(exc)

        assert queue._writer is not None
        put = queue._writer._shm.put  # type: ignore[union-attr]
        queue._writer._shm.put = lambda frame: (enqueue_again(), put(frame))[1]  # type: ignore[union-attr, method-assign, func-returns-value]
        queue.enqueue("outer")
        assert "inside of enqueue" in str(errors[0])
        assert reader.dequeue(WATCHDOG) == "outer"
        with pytest.raises(TimeoutError):
            reader.dequeue(0)


def test_a_handle_of_another_version_is_refused() -> None:
    with MessageQueue(1, 1) as queue:
        with pytest.raises(ValueError, match=r"version 99 from pid \d+ on .*Install the same ray-shm"):
            MessageQueue.create_from_handle(replace(queue.export_handle(), version=99), 0)


def test_secrets_stay_out_of_logs() -> None:
    with MessageQueue(1, 0) as queue:
        address = queue.export_handle().zmq
        assert address is not None
        assert repr(address.token)[2:-1] not in repr(queue.export_handle())
        assert address.server_key.decode() not in repr(queue.export_handle())


def test_each_end_refuses_what_the_other_does() -> None:
    with MessageQueue(1, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
        with pytest.raises(RuntimeError, match="writing end"):
            queue.dequeue()
        with pytest.raises(RuntimeError, match="reading end"):
            reader.enqueue(1)
        queue.shutdown()
        with pytest.raises(QueueClosedError):
            reader.dequeue()


# Resources


def resources() -> tuple[int, int, int]:
    """Open descriptors, mappings of ours, threads."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:ray_shm" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped, len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("n_local", [1, 0], ids=["local", "remote"])
def test_two_hundred_queues_leave_nothing(n_local: int) -> None:
    def cycle() -> None:
        with MessageQueue(1, n_local) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
            queue.enqueue(np.zeros(200_000))
            assert reader.dequeue(WATCHDOG).size == 200_000

    cycle()
    before = resources()
    for _ in range(200):
        cycle()
    deadline = time.monotonic() + WATCHDOG
    while _grown(before) and time.monotonic() < deadline:  # zmq closes its sockets in the background
        time.sleep(0.05)
    assert not _grown(before)


def _grown(before: tuple[int, ...]) -> bool:
    """Grown by more than a few: a leak is 200, and Ray's own threads in this process open a descriptor now and then."""
    return any(now > then + 5 for now, then in zip(resources(), before, strict=True))


def test_a_blocked_dequeue_wakes_twice_a_second() -> None:
    with MessageQueue(1, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
        with pytest.raises(TimeoutError):
            reader.dequeue(2.0)
        assert reader._reader is not None
        assert 1 <= reader._reader._waiter.parks <= 6  # 4, and a signal or two
