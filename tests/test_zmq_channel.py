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
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import zmq
from reader_pool import WATCHDOG, Me, Peer

from ray_shm.errors import PeerLostError, StartError
from ray_shm.handle import ZmqAddress
from ray_shm.zmq_credit import ASK_EVERY, WINDOW, Credit, Terms
from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_wire import PIECE, Head, Hello, WireError, unpack_count
from ray_shm.zmq_writer import ZmqWriter

BOUND = 1 << 20
LOCALHOST = "127.0.0.1"
MakeChannel = Callable[..., tuple[ZmqWriter, list[ZmqReader]]]


@pytest.fixture(scope="module", autouse=True)
def _resource_tracker() -> None:
    """Python's own helper process, which the first spawn starts and the interpreter's exit ends."""
    resource_tracker.ensure_running()


@pytest.fixture
def make_channel() -> Iterator[MakeChannel]:
    with contextlib.ExitStack() as ends:

        def make(n_reader: int = 1, bound: int = BOUND, ip: str = LOCALHOST) -> tuple[ZmqWriter, list[ZmqReader]]:
            writer = ZmqWriter(range(n_reader), bound, ip)
            ends.callback(writer.close, 0)
            readers = [ZmqReader(writer.address, rank, os.getpid()) for rank in range(n_reader)]
            for reader in readers:
                ends.callback(reader.close)
            wait(lambda: not writer.missing(), writer)
            return writer, readers

        yield make


@pytest.fixture
def make_peer() -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def make() -> Peer:
        made.append(Peer())
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def wait(condition: Callable[[], bool], end: ZmqWriter | ZmqReader) -> None:
    deadline = time.monotonic() + WATCHDOG
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        end.poll(0.05)


def send(writer: ZmqWriter, *frames: Any) -> None:
    nbytes = sum(len(frame) for frame in frames)
    wait(lambda: writer.room(nbytes), writer)
    writer.send(frames, nbytes)


def take(reader: ZmqReader) -> list[bytes]:
    frames = peek(reader)
    taken = [bytes(frame) for frame in frames]
    reader.release()
    return taken


def peek(reader: ZmqReader) -> list[memoryview]:
    wait(lambda: reader.peek() is not None, reader)
    frames = reader.peek()
    assert frames is not None
    return frames


def wait_heard(condition: Callable[[], bool], writer: ZmqWriter) -> None:
    """Until what the writer has heard makes it true."""

    def heard() -> bool:
        writer.probe()
        return condition()

    wait(heard, writer)


def wait_for_error(kind: type[Exception], step: Callable[[], object], *ends: ZmqWriter | ZmqReader) -> Exception:
    deadline = time.monotonic() + WATCHDOG
    while time.monotonic() < deadline:
        for end in ends:
            end.poll(0.02)
        try:
            step()
        except kind as exc:
            return exc
    raise AssertionError(f"no {kind.__name__} came")


def has_room(writer: ZmqWriter, nbytes: int) -> bool:
    """Once everything that readers have said is in: their words take no longer than an answer does."""
    for _ in range(3):
        writer.poll(0.01)
    return writer.room(nbytes)


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


# Credit


def test_the_bound_is_exact(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    for size, fits in ((100_000, 10), (BOUND, 1), (BOUND // 2 + 1, 1), (BOUND // 4, 4)):
        for _ in range(fits):
            assert has_room(writer, size)
            send(writer, bytes(size))
        assert not has_room(writer, size)
        assert writer.late() == [(0, size * fits)]
        take(reader)
        wait(lambda size=size: writer.room(size), writer)  # type: ignore[misc]
        assert [n for _, n in writer.late()] == ([size * (fits - 1)] if fits > 1 else [])
        for _ in range(fits - 1):
            take(reader)


def test_a_message_larger_than_the_bound_goes_alone(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    send(writer, b"small")
    assert not has_room(writer, 3 * BOUND)
    take(reader)
    send(writer, bytes(3 * BOUND))
    assert not has_room(writer, 1)
    assert take(reader) == [bytes(3 * BOUND)]
    send(writer, b"small")
    assert take(reader) == [b"small"]


def test_messages_are_bounded_too(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel(1, 240 << 20)
    while writer.room(10):
        send(writer, bytes(10))
    assert writer.late() == [(0, 10 * (WINDOW + ASK_EVERY - 1))]
    for _ in range(ASK_EVERY):
        assert not writer.room(10)
        take(reader)
    wait(lambda: writer.room(10), writer)


def test_room_follows_what_is_unread() -> None:
    """A writer with credit is never kept waiting for room that is there, nor goes a 64th beyond the bound.

    The reader reads at any time, says so only when asked or when all is read, and may pause anywhere.
    """
    for bound in (1000, 70_000, 10_000_000):
        check_room(bound, random.Random(bound))


def check_room(bound: int, rng: random.Random) -> None:
    credit = Credit(Terms(bound))
    unread: list[tuple[int, int]] = []
    read = 0
    for _ in range(20_000):
        nbytes = rng.choice([0, 10, bound // 5000, bound // 100, bound // 7, 2 * bound])
        true_room = not unread or (len(unread) < WINDOW and sum(n for _, n in unread) + nbytes <= bound)
        if true_room:
            assert credit.fits(nbytes)
        if credit.fits(nbytes) and rng.random() < 0.6:
            assert not unread or sum(n for _, n in unread) + nbytes <= bound + bound // 64
            unread.append((credit.sent, nbytes))
            credit.spend(nbytes)
        elif unread:
            sequence, consumed = unread.pop(0)
            read += 1
            if credit.terms.asks(sequence, consumed) or not unread:
                credit.acknowledge(read)
            assert credit.late == bool(unread)
    assert read > 1000


def test_few_acknowledgements_for_many_small_messages(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel(1, 240 << 20)
    said: list[bytes] = []
    tell, reader._tell = reader._tell, lambda word: (said.append(word), tell(word))[1]  # type: ignore[method-assign]
    rounds = []
    for _ in range(5):
        said.clear()
        for k in range(512):
            send(writer, b"%d" % k)
        assert [take(reader)[0] for k in range(512)] == [b"%d" % k for k in range(512)]
        wait_heard(lambda: not writer.late(), writer)
        rounds.append(len(said))
    assert min(rounds) < 128


def test_late_readers_are_named_and_no_others(make_channel: MakeChannel) -> None:
    writer, readers = make_channel(3)
    for k in range(5):
        send(writer, b"%d" % k * 100)
    for _ in range(5):
        take(readers[1])
    for _ in range(2):
        take(readers[2])
    wait_heard(lambda: 1 not in dict(writer.late()), writer)
    assert sorted(dict(writer.late())) == [0, 2]
    for _ in range(3):
        take(readers[2])
    wait_heard(lambda: 2 not in dict(writer.late()), writer)
    assert writer.late() == [(0, 500)]
    assert [writer.pid(rank) for rank in (0, 1, 2, 3)] == [os.getpid()] * 3 + [0]


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


# Strangers


def test_a_rank_is_taken_once(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    with contextlib.closing(ZmqReader(writer.address, 0, 1)) as second:
        error = wait_for_error(StartError, lambda: (writer.room(1), second.peek()), writer, second)
        assert f"refused this reader: rank 0 (pid {os.getpid()}) at 127.0.0.1 reads it as that rank" in str(error)
    wait(lambda: writer.refused == 2, writer)  # both of its connections
    send(writer, b"for the first")
    assert take(reader) == [b"for the first"]


def test_a_rank_that_is_none_and_a_wrong_token(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    with contextlib.closing(ZmqReader(writer.address, 7, 1)) as other:
        error = wait_for_error(StartError, lambda: (writer.room(1), other.peek()), writer, other)
        assert "no remote reader 7" in str(error)
    with contextlib.closing(ZmqReader(replace(writer.address, token=bytes(16)), 0, 1)) as other:
        wait(lambda: writer.refused == 4, writer)
        assert other.peek() is None
        assert not other.ready
    send(writer, b"for the reader")
    assert take(reader) == [b"for the reader"]


def test_a_reader_hears_nobody_but_its_writer() -> None:
    """An impostor at the writer's address, who knows everything but its secret key."""
    writer = ZmqWriter([0], BOUND, LOCALHOST)
    address = writer.address
    writer.close()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    impostor = context.socket(zmq.ROUTER)
    impostor.setsockopt(zmq.LINGER, 0)
    impostor.curve_server = True
    impostor.curve_publickey, impostor.curve_secretkey = address.server_key, zmq.curve_keypair()[1]
    try:
        bind_once_free(impostor, address.endpoint)
        with contextlib.closing(ZmqReader(address, 0, 1)) as reader:
            wait(reader.broken, reader)
            assert reader.peek() is None
            assert not impostor.poll(0)
    finally:
        impostor.close()
        context.term()


def bind_once_free(bound: zmq.Socket[bytes], endpoint: str) -> None:
    """zmq closes sockets in the background."""
    deadline = time.monotonic() + WATCHDOG
    while True:
        try:
            bound.bind(endpoint)
            return
        except zmq.ZMQError as exc:
            if exc.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


# Addresses


def test_addresses_that_cannot_be_bound() -> None:
    for wildcard in ("0.0.0.0", "*", "", "::", "[::]", "0:0::0", "::ffff:0.0.0.0"):
        with pytest.raises(ValueError, match="pass this node's address"):
            ZmqWriter([0], BOUND, wildcard)
    with pytest.raises(StartError, match=r"cannot bind a queue's socket to 192.0.2.1.*Is it this node's address"):
        ZmqWriter([0], BOUND, "192.0.2.1")
    with pytest.raises(StartError, match=r"cannot resolve 'no-such-host.invalid'"):
        ZmqWriter([0], BOUND, "no-such-host.invalid")


@pytest.mark.parametrize("ip", [LOCALHOST, "::1"])
def test_the_first_free_port_of_a_range(ip: str) -> None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with contextlib.ExitStack() as ends:
        first = hold_ports(ends, family, ip)
        writers = []
        for _ in range(2):
            writers.append(ZmqWriter([0], BOUND, ip, (first, first + 2)))
            ends.callback(writers[-1].close)
        host = f"[{ip}]" if ":" in ip else ip
        assert [w.address.endpoint for w in writers] == [f"tcp://{host}:{first + k}" for k in (1, 2)]
        with pytest.raises(StartError, match=rf"to {ip}: all ports of port_range {first}-{first + 2} are taken"):
            ZmqWriter([0], BOUND, ip, (first, first + 2))
    for none in ((0, 10), (10, 9), (65535, 65536)):
        with pytest.raises(ValueError, match="port_range"):
            ZmqWriter([0], BOUND, ip, none)


def hold_ports(ends: contextlib.ExitStack, family: int, ip: str) -> int:
    """The first of three neighbouring ports, of which it is taken and the others are free."""
    while True:
        with contextlib.ExitStack() as tried:
            taken = tried.enter_context(socket.socket(family))
            taken.bind((ip, 0))
            taken.listen()
            port: int = taken.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for k in (1, 2):
                    with socket.socket(family) as probe:
                        probe.bind((ip, port + k))
                ends.push(tried.pop_all())
                return port


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
