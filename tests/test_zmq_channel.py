"""The channel between nodes on its own: both ends in this process, or readers in spawned ones."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
from injection import wait_for
from interrupts import Interrupted
from reader_pool import WATCHDOG, Me, Peer
from zmq_ends import BOUND, LOCALHOST, MakeChannel, has_room, peek, send, take, wait, wait_for_error, wait_heard

from ray_shm.errors import PeerLostError
from ray_shm.handle import ZmqAddress
from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_wire import PIECE, Head, Hello, WireError, unpack_count
from ray_shm.zmq_writer import ZmqWriter


@pytest.fixture(scope="module", autouse=True)
def _resource_tracker() -> None:
    """Python's own helper process, which the first spawn starts and the interpreter's exit ends."""
    resource_tracker.ensure_running()


@pytest.fixture
def make_peer() -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def make() -> Peer:
        made.append(Peer())
        return made[-1]

    yield make
    for peer in made:
        peer.close()


# Checks: these run in readers' processes


def attach(me: Me, address: ZmqAddress, rank: int) -> int:
    me.queue = ZmqReader(address, rank, os.getpid())
    return os.getpid()


def take_sizes(me: Me) -> tuple[list[int], bool]:
    """Of all messages until the writer's end, and whether that was in good order."""
    sizes: list[int] = []
    while True:
        if me.queue.peek() is not None:
            sizes.append(sum(len(frame) for frame in me.queue.peek()))
            me.queue.release()
        elif me.queue.closed_by_writer or me.queue.broken():
            if me.queue.peek() is None:
                return sizes, me.queue.closed_by_writer
        else:
            me.queue.poll(WATCHDOG)


def close(me: Me) -> None:
    me.queue.close()
    me.queue = None


def send_and_exit(me: Me, count: int, size: int) -> None:
    """The writer's process ends as soon as its close() has returned."""
    for _ in range(count):
        send(me.queue, bytes(size))
    me.queue.close(WATCHDOG)
    os._exit(0)


def make_writer(me: Me, n_reader: int) -> ZmqAddress:
    me.queue = ZmqWriter(range(n_reader), 64 << 20, LOCALHOST)
    return me.queue.address


def fork_a_sleeper(me: Me) -> int:
    """A child that inherits every descriptor and keeps them until it is killed."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    return pid


def start_readers(writer: ZmqWriter, peers: list[Peer]) -> list[int]:
    pids = [peer.run(attach, writer.address, rank) for rank, peer in enumerate(peers)]
    wait(lambda: not writer.missing(), writer)
    return pids


# Frames


@pytest.mark.parametrize("ip", [LOCALHOST, "::1", "localhost"])
def test_frames_of_every_size_arrive(make_channel: MakeChannel, ip: str) -> None:
    writer, readers = make_channel(2, 8 << 20, ip)
    rng = random.Random(3)
    sizes = [0, 1, 33, 1023, 1024, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 77]
    messages = [[rng.randbytes(n)] for n in sizes]
    messages += [[], [b""] * 50, [rng.randbytes(n) for n in (9, 3 * PIECE, 0, PIECE + 5, PIECE)]]
    for message in messages:
        send(writer, *message)
    for reader in readers:
        assert [take(reader) for _ in messages] == messages
        assert reader.peek() is None


def test_what_was_sent_does_not_follow_later_changes(make_channel: MakeChannel) -> None:
    """Nobody has read, nor may zmq have sent it, when the caller's buffers change."""
    writer, readers = make_channel(2, 64 << 20)
    for size in (10, 5000, 100_000, 3_000_000):
        block = bytearray(b"1" * size)
        send(writer, b"first", block)
        block[:] = b"9" * size
    for reader in readers:
        for size in (10, 5000, 100_000, 3_000_000):
            assert take(reader) == [b"first", b"1" * size]


def test_frames_are_the_readers_own(make_channel: MakeChannel) -> None:
    """Writable, seen by nobody else, and kept as long as somebody refers to them."""
    writer, readers = make_channel(2, 64 << 20)
    sizes = (5, 200, 70_000, PIECE + 1)
    send(writer, *[b"a" * n for n in sizes])
    kept = peek(readers[0])
    for frame in kept:
        assert not frame.readonly
        frame[:] = b"b" * len(frame)
    readers[0].release()
    for _ in range(20):
        send(writer, *[b"c" * n for n in sizes])
        take(readers[0])
    assert take(readers[1]) == [b"a" * n for n in sizes]
    readers[0].close()
    writer.close(0)
    gc.collect()
    assert [bytes(frame) for frame in kept] == [b"b" * n for n in sizes]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_readers_do_not_take_is_held_once(make_peer: Callable[[], Peer]) -> None:
    """Three stopped readers, 96 MiB: the kernels take a few MiB for each, and the rest is here, not three times."""
    peers = [make_peer() for _ in range(3)]
    writer = ZmqWriter(range(3), 96 << 20, LOCALHOST)
    pids = start_readers(writer, peers)
    payload = bytes(512 << 10)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would be used again, and not show
    before = resident()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(192):
            send(writer, payload)
        assert 60 << 20 < resident() - before < 150 << 20
        assert not has_room(writer, 1)
        assert [n for _, n in writer.late()] == [96 << 20] * 3
    finally:
        for peer in peers:
            peer.kill()
        writer.close()


def test_words_that_do_not_parse() -> None:
    without_its_frame = Head.of(0, True, [bytes(PIECE + 1)]).pack()
    for word in (b"", b"M", bytes(40), without_its_frame, without_its_frame[:-1]):
        for parse in (Hello.unpack, unpack_count, partial(Head.unpack, n_parts=1)):
            with pytest.raises(WireError):
                parse(word)


# Waiting


@pytest.mark.parametrize("end", ["writer", "reader"])
def test_wake_ends_a_wait_in_another_thread(make_channel: MakeChannel, end: str) -> None:
    writer, [reader] = make_channel()
    waiting = writer if end == "writer" else reader
    while waiting.poll(0.2):  # what is left of the greeting
        writer.room(0)
        reader.peek()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(waiting.poll(WATCHDOG)))
    thread.start()
    start = time.monotonic()
    waiting.wake()
    thread.join(WATCHDOG)
    assert results == [False]
    assert time.monotonic() - start < WATCHDOG / 2


def test_other_threads_may_ask_while_the_owner_waits(make_channel: MakeChannel) -> None:
    """And what they hear of does not leave the owner waiting for it."""
    writer, [reader] = make_channel(1, 1000)
    stop = threading.Event()
    got: list[bytes] = []

    def ask() -> None:
        while not stop.is_set():
            writer.missing(), writer.refused, writer.late(), writer.pid(0)

    def read() -> None:
        while len(got) < 100:
            got.append(take(reader)[0])

    threads = [threading.Thread(target=ask), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    for k in range(100):
        while not writer.room(900):
            writer.poll(WATCHDOG)
        writer.send([b"%d" % k + bytes(890)], 900)
    threads[1].join(WATCHDOG)
    assert time.monotonic() - start < WATCHDOG
    stop.set()
    threads[0].join(WATCHDOG)
    assert [int(one.rstrip(b"\0")) for one in got] == list(range(100))


# Loss


def test_a_lost_reader_can_be_dropped(make_peer: Callable[[], Peer], make_channel: MakeChannel) -> None:
    """The others get every message once, also the one that was under way."""
    peer = make_peer()
    writer = ZmqWriter([0, 1], BOUND, LOCALHOST)
    with contextlib.closing(writer), contextlib.closing(ZmqReader(writer.address, 0, os.getpid())) as reader:
        pid = peer.run(attach, writer.address, 1)
        wait(lambda: not writer.missing(), writer)
        send(writer, b"before")
        assert writer.room(5)
        peer.kill()
        wait_for_error(PeerLostError, writer.probe, writer)
        with pytest.raises(PeerLostError, match="The message is sent") as lost:
            writer.send([b"amid"], 4)
        assert lost.value.ranks == [1]
        for look in (writer.probe, lambda: writer.room(5)):
            with pytest.raises(PeerLostError, match=rf"rank 1 \(pid {pid}\) at 127.0.0.1 is gone.*Nothing was") as lost:
                look()
            assert lost.value.ranks == [1]
        writer.drop(1)
        send(writer, b"after")
        assert [take(reader) for _ in range(3)] == [[b"before"], [b"amid"], [b"after"]]
        wait_heard(lambda: not writer.late(), writer)
        assert reader.peek() is None


def test_a_reader_that_left_is_told_from_one_that_is_gone(make_channel: MakeChannel) -> None:
    writer, readers = make_channel(2)
    readers[1].close()
    text = str(wait_for_error(PeerLostError, lambda: writer.room(1), writer))
    assert f"rank 1 (pid {os.getpid()}) at 127.0.0.1 closed its end of the queue. Nothing was sent" in text


def test_a_dropped_reader_does_not_take_the_end_for_good_order(make_channel: MakeChannel) -> None:
    """It lives, and has missed messages."""
    writer, readers = make_channel(2)
    writer.drop(1)
    send(writer, b"not for 1")
    writer.close(0)
    wait(lambda: readers[1].broken(), readers[1])
    assert readers[1].peek() is None
    assert not readers[1].closed_by_writer
    assert take(readers[0]) == [b"not for 1"]
    wait(lambda: readers[0].peek() is None and readers[0].closed_by_writer, readers[0])


def test_an_exception_amid_a_message_ends_the_queue(make_channel: MakeChannel) -> None:
    """Nobody gets half of it, or the next one in its place."""
    writer, readers = make_channel(2)
    send(writer, b"whole")
    with pytest.raises(BufferError):
        writer.send([b"head", memoryview(bytes(200))[::2]], 104)
    for look in (writer.probe, lambda: writer.room(1), lambda: writer.send([b"x"], 1)):
        with pytest.raises(PeerLostError, match="amid a message"):
            look()
    writer.close()
    for reader in readers:
        assert take(reader) == [b"whole"]
        wait(reader.broken, reader)
        assert reader.peek() is None
        assert not reader.closed_by_writer


# Closing


def test_close_delivers_to_a_slow_reader(make_peer: Callable[[], Peer]) -> None:
    """24 MiB for one that only begins to read when the writer is gone, and acknowledges to nobody."""
    peer = make_peer()
    writer = ZmqWriter([0], 64 << 20, LOCALHOST)
    start_readers(writer, [peer])
    sizes = [10, 1 << 20, 100_000, 3000] * 22
    for size in sizes:
        send(writer, bytes(size))
    start = time.monotonic()
    writer.close(1.0)
    assert 1.0 <= time.monotonic() - start < WATCHDOG / 2
    assert peer.run(take_sizes) == (sizes, True)
    peer.run(close)


def test_close_awaits_readers_that_read(make_peer: Callable[[], Peer]) -> None:
    """Nothing is lost though the writer's process ends when close() returns."""
    writing, reading = make_peer(), make_peer()
    address = writing.run(make_writer, 1)
    reading.run(attach, address, 0)
    reading.start(take_sizes)
    writing.start(send_and_exit, 60, 300_000)
    assert reading.result() == ([300_000] * 60, True)
    reading.run(close)


def test_close_does_not_wait_for_what_is_gone(make_peer: Callable[[], Peer]) -> None:
    writer = ZmqWriter([0, 1], BOUND, LOCALHOST)
    peers = [make_peer(), make_peer()]
    start_readers(writer, peers)
    send(writer, b"unread")
    peers[0].kill()
    writer.drop(1)
    writer.close(WATCHDOG)  # at once, or the test's time is over
    writer.close()


# Forks


def test_a_forked_child_closes_what_another_thread_of_the_parent_was_using() -> None:
    writer = ZmqWriter([0], BOUND, LOCALHOST)
    polling = threading.Thread(target=writer.poll, args=(WATCHDOG,))
    polling.start()
    while writer._using.acquire(blocking=False):
        writer._using.release()
        time.sleep(0.001)
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            writer.close()
            failed = 0
        finally:
            os._exit(failed)
    try:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        wait_for(lambda: os.waitid(os.P_PID, pid, ended) is not None, "the child's end")
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == 0
        writer.wake()
        polling.join()
        writer.close()


def test_a_forked_child_leaves_the_queue_alone(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    send(writer, b"before")
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            for end in (writer, reader):
                end.abandon()
                end.close()
            del writer, reader, end
            gc.collect()
            failed = int(use_in_child())
        finally:
            os._exit(failed)
    assert os.waitpid(pid, 0)[1] == 0
    send(writer, bytes(500_000))
    assert take(reader) == [b"before"]
    assert take(reader) == [bytes(500_000)]
    writer.abandon()  # does nothing in the process that made it
    send(writer, b"after")
    assert take(reader) == [b"after"]


def use_in_child() -> bool:
    """A queue of the child's own works; true if it does not."""
    with contextlib.closing(ZmqWriter([0], BOUND, LOCALHOST)) as writer:
        with contextlib.closing(ZmqReader(writer.address, 0, os.getpid())) as reader:
            send(writer, b"own")
            return take(reader) != [b"own"]


def test_a_forked_child_does_not_hide_the_death_of_its_parent(make_peer: Callable[[], Peer]) -> None:
    peer = make_peer()
    writer = ZmqWriter([0], BOUND, LOCALHOST)
    [pid] = start_readers(writer, [peer])
    child = peer.run(fork_a_sleeper)
    try:
        os.kill(pid, signal.SIGKILL)
        wait_for_error(PeerLostError, writer.probe, writer)
    finally:
        os.kill(child, signal.SIGKILL)
        peer.kill()
        writer.close()


def test_a_hello_whose_hearing_was_interrupted_is_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ZmqWriter([0], BOUND, LOCALHOST)
    reader = ZmqReader(writer.address, 0, os.getpid())
    with contextlib.closing(writer), contextlib.closing(reader):
        refuse, left = ZmqWriter._reason_to_refuse, [1]

        def interrupted_once(self: ZmqWriter, *args: Any) -> str:
            if left:
                left.pop()
                raise Interrupted
            return refuse(self, *args)

        monkeypatch.setattr(ZmqWriter, "_reason_to_refuse", interrupted_once)
        with pytest.raises(Interrupted):
            wait_heard(lambda: not writer.missing(), writer)
        wait_heard(lambda: not writer.missing(), writer)


def test_an_event_whose_user_was_interrupted_comes_again() -> None:
    writer = ZmqWriter([0], BOUND, LOCALHOST)
    monitor = writer._end.monitor
    port = int(writer.address.endpoint.rpartition(":")[2])
    with contextlib.closing(writer), socket.create_connection((LOCALHOST, port)):
        assert monitor.socket.poll(1000 * WATCHDOG)
        events = monitor.events()
        first = next(events)
        events.close()  # as an exception at its user does
        assert next(monitor.events()) == first
