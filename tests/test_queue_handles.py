"""Arguments and handles of queues, who may use an end how, and what queues leave; both ends in this process."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reader_pool import WATCHDOG

from ray_shm.errors import QueueClosedError, StartError
from ray_shm.message_queue import MessageQueue

SOON = 0.15  # seconds: a timeout that is meant to run out


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
