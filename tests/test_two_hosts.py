"""Queues between hosts that share nothing but a cable: reading across it, pulling it, and handles on the wrong host."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
from netns import Host, HostProcess, lay_cable
from reader_pool import WATCHDOG, Me

from ray_shm.errors import PeerLostError, QueueClosedError, StartError
from ray_shm.handle import Handle
from ray_shm.message_queue import MessageQueue

NOTICED = 8.0  # seconds within which a silent host is noticed, on a busy machine: 5, and what a wait adds
STOPPED = 12.0  # seconds: more than that
SIZES = [100, 1000, 4096, 70_000, 262_144, 262_145, 1_000_000, 8 << 20]


@pytest.fixture(scope="module")
def laid() -> Iterator[tuple[Host, Host]]:
    yield from lay_cable()


@pytest.fixture
def hosts(laid: tuple[Host, Host]) -> Iterator[tuple[Host, Host]]:
    yield laid
    for host in laid:
        host.close_others()


@pytest.fixture
def fresh_hosts() -> Iterator[tuple[Host, Host]]:
    """For a test that pulls the cable."""
    yield from lay_cable()


# Checks: these run on the hosts


def make_queue(me: Me, ip: str, n_reader: int, n_local: int, chunk: int = 1 << 20, chunks: int = 10) -> Handle:
    me.queue = MessageQueue(n_reader, n_local, connect_ip=ip, max_chunk_bytes=chunk, max_chunks=chunks)
    return me.queue.export_handle()


def attach(me: Me, handle: Handle, rank: int) -> None:
    me.queue = MessageQueue.create_from_handle(handle, rank)


def wait_until_ready(me: Me) -> None:
    me.queue.wait_until_ready(WATCHDOG)


def payloads(seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for size in [*SIZES, *rng.choices(SIZES[:5], k=40)]:
        yield rng.randbytes(size)


def send_payloads(me: Me, seed: int) -> str:
    digest = hashlib.sha256()
    for payload in payloads(seed):
        digest.update(payload)
        block = bytearray(payload)
        me.queue.enqueue(block, WATCHDOG)
        block[:] = bytes(len(block))
    me.queue.close()
    return digest.hexdigest()


def take_payloads(me: Me) -> str:
    digest = hashlib.sha256()
    while True:
        try:
            digest.update(me.queue.dequeue(WATCHDOG))
        except QueueClosedError:
            return digest.hexdigest()


def enqueue(me: Me, size: int, count: int = 1) -> None:
    for _ in range(count):
        me.queue.enqueue(bytes(size), WATCHDOG)


def enqueue_error(me: Me, size: int, timeout: float = WATCHDOG) -> tuple[str, str, list[int], float]:
    start = time.monotonic()
    try:
        while True:
            me.queue.enqueue(bytes(size), timeout)
    except Exception as exc:
        return type(exc).__name__, str(exc), getattr(exc, "ranks", []), time.monotonic() - start


def dequeue_error(me: Me, timeout: float = WATCHDOG) -> tuple[str, float]:
    start = time.monotonic()
    try:
        while True:
            me.queue.dequeue(timeout)
    except Exception as exc:
        return type(exc).__name__, time.monotonic() - start


def attach_error(me: Me, handle: Handle, rank: int) -> str:
    with pytest.raises(StartError) as caught:
        MessageQueue.create_from_handle(handle, rank)
    return str(caught.value)


def pid(me: Me) -> int:
    return os.getpid()


def close(me: Me) -> None:
    if me.queue is not None:
        me.queue.close()
        me.queue = None


def start_queue(writer: HostProcess, ip: str, readers: list[HostProcess], n_local: int, **bounds: int) -> None:
    handle = writer.run(make_queue, ip, len(readers), n_local, *bounds.values())
    for rank, reader in enumerate(readers):
        reader.run(attach, handle, rank)
    for process in (writer, *readers):
        process.start(wait_until_ready)
    for process in (writer, *readers):
        process.result()


# Reading across the cable


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_one_local_and_two_remote_readers_get_the_same(hosts: tuple[Host, Host], family: str) -> None:
    here, there = hosts
    writer, readers = here, [here.spawn(), there, there.spawn()]
    start_queue(writer, here.ip if family == "IPv4" else here.ip6, readers, 1)
    for process in readers:
        process.start(take_payloads)
    expected = writer.run(send_payloads, 7)
    assert [process.result() for process in readers] == [expected] * 3
    for process in (writer, *readers):
        process.run(close)


def test_a_local_handle_on_the_other_host_is_refused(hosts: tuple[Host, Host]) -> None:
    """Also by a process there whose id is the writer's, and by one beside it."""
    here, there = hosts
    handle = here.run(make_queue, here.ip, 2, 2)
    assert handle.pid == here.run(pid) == there.run(pid) == 1
    for process in (there, there.spawn()):
        assert "pid 1" in process.run(attach_error, handle, 0)
    beside = here.spawn()
    for rank in (0, 1):
        beside.run(attach, handle, rank)  # nobody has taken them
        beside.run(close)
    here.run(close)


# Pulling it


def test_both_ends_notice_a_pulled_cable(fresh_hosts: tuple[Host, Host]) -> None:
    """Whether they wait for the other, have bytes on their way, or look only later."""
    here, there = fresh_hosts
    full, sending = here, here.spawn()
    unread, waiting = there, there.spawn()
    for writer, reader in ((full, unread), (sending, waiting)):
        start_queue(writer, here.ip, [reader], 0, chunk=1 << 20, chunks=8)
    reader_pids = [reader.run(pid) for reader in (unread, waiting)]
    waiting.start(dequeue_error)
    full.start(enqueue_error, 1 << 20)
    assert not full.pipe.poll(0.5)  # it fills the queue and blocks
    there.set_link("down")
    sending.start(enqueue_error, 1 << 20)
    for writer, reader_pid in zip((full, sending), reader_pids, strict=True):
        error, text, ranks, took = writer.result()
        assert (error, ranks) == (PeerLostError.__name__, [0])
        assert f"rank 0 (pid {reader_pid}) at {there.ip} is gone" in text
        assert took < NOTICED
    error, took = waiting.result()
    assert error == PeerLostError.__name__
    assert took < NOTICED
    error, text, ranks, took = full.run(enqueue_error, 100, 0.0)
    assert (error, ranks) == (PeerLostError.__name__, [0])
    assert "Nothing was sent" in text


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 60], ids=["little on its way", "more than the kernels take"])
def test_a_stopped_reader_on_another_host_is_late_and_not_lost(fresh_hosts: tuple[Host, Host], count: int) -> None:
    here, there = fresh_hosts
    start_queue(here, here.ip, [there], 0, chunk=1 << 20, chunks=count)
    there.kill(signal.SIGSTOP)
    try:
        here.run(enqueue, (1 << 20) - 1000, count)
        error, text, _, took = here.run(enqueue_error, (1 << 20) - 1000, STOPPED)
    finally:
        there.kill(signal.SIGCONT)
    assert error == "TimeoutError"
    assert "rank 0" in text
    assert took >= STOPPED
    there.start(take_payloads)
    here.run(enqueue, 100)
    here.run(close)
    there.result()


@pytest.mark.slow
def test_a_stopped_writer_on_another_host_is_late_and_not_lost(fresh_hosts: tuple[Host, Host]) -> None:
    here, there = fresh_hosts
    start_queue(here, here.ip, [there], 0)
    here.kill(signal.SIGSTOP)
    try:
        assert there.run(dequeue_error, STOPPED)[0] == "TimeoutError"
    finally:
        here.kill(signal.SIGCONT)
    here.run(enqueue, 100)
    assert there.run(dequeue_error, 1.0)[0] == "TimeoutError"
    here.run(close)
    assert there.run(dequeue_error)[0] == QueueClosedError.__name__
