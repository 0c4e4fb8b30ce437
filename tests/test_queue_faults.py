"""What a queue's end hears when the other end is killed, stopped, or is a stranger."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from reader_pool import WATCHDOG, Me, Peer, Wire, attach_only

from ray_shm.errors import PeerLostError, QueueClosedError
from ray_shm.handle import Handle
from ray_shm.message_queue import MessageQueue
from ray_shm.zmq_wire import HELLO, MESSAGE, Hello

SOON = 0.15  # seconds: a timeout that is meant to run out


pytestmark = pytest.mark.usefixtures("what_stays")


# Checks: these run in the other process


def make_queue(me: Me, n_local: int) -> Handle:
    me.queue = MessageQueue(2, n_local)
    return me.queue.export_handle()


def send_numbers(me: Me, count: int, size: int) -> None:
    me.queue.wait_until_ready(WATCHDOG)
    for k in range(count):
        me.queue.enqueue((k, bytes(size)), WATCHDOG)


def take(me: Me, count: int) -> list[Any]:
    return [me.queue.dequeue(WATCHDOG) for _ in range(count)]


def wait_for_nothing(me: Me) -> None:
    me.queue.dequeue(indefinite=True)


def take_all(queue: MessageQueue) -> tuple[list[int], Exception]:
    numbers = []
    while True:
        try:
            numbers.append(queue.dequeue(WATCHDOG)[0])
        except Exception as exc:
            return numbers, exc


# The writer


@pytest.mark.parametrize("n_local", [2, 0], ids=["local", "remote"])
def test_a_killed_writer_is_lost_once_its_messages_are_read(peer: Peer, n_local: int) -> None:
    handle = peer.run(make_queue, n_local)
    with MessageQueue.create_from_handle(handle, 0) as reader, MessageQueue.create_from_handle(handle, 1) as blocked:
        peer.run(send_numbers, 30, 100)
        for k in range(30):
            assert blocked.dequeue(WATCHDOG)[0] == k
        errors: list[Exception] = []
        thread = threading.Thread(target=lambda: errors.append(take_all(blocked)[1]))
        thread.start()
        peer.kill()
        numbers, error = take_all(reader)
        assert numbers == list(range(30))
        assert isinstance(error, PeerLostError)
        assert f"pid {peer.process.pid}" in str(error)
        thread.join(WATCHDOG)
        assert isinstance(errors[0], PeerLostError)
        with pytest.raises(PeerLostError):
            reader.dequeue(0)


@pytest.mark.parametrize("size", [100_000, 500_000], ids=["copied", "leased"])
def test_a_large_message_outlives_its_writer(peer: Peer, size: int) -> None:
    """Its memory is in the memfd that the readers opened when they attached."""
    handle = peer.run(make_queue, 2)
    with MessageQueue.create_from_handle(handle, 0) as reader, MessageQueue.create_from_handle(handle, 1):
        peer.run(send_numbers, 3, size)
        peer.kill()
        assert [reader.dequeue(WATCHDOG) for _ in range(3)] == [(k, bytes(size)) for k in range(3)]
        with pytest.raises(PeerLostError):
            reader.dequeue(WATCHDOG)


def test_a_writer_killed_before_the_barrier(peer: Peer) -> None:
    handle = peer.run(make_queue, 2)
    with MessageQueue.create_from_handle(handle, 0) as reader:
        peer.kill()
        with pytest.raises(PeerLostError):
            reader.wait_until_ready(WATCHDOG)


def test_a_remote_reader_comes_after_the_writer_is_gone(peer: Peer) -> None:
    handle = peer.run(make_queue, 0)
    peer.kill()
    with MessageQueue.create_from_handle(handle, 0) as reader:
        with pytest.raises(PeerLostError, match="connection"):
            reader.wait_until_ready(WATCHDOG)


# Readers


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_killed_reader_is_lost_to_a_full_writer(peer: Peer, kind: str) -> None:
    wire = Wire(kind, [peer], max_chunk_bytes=1000, max_chunks=2)
    with wire.queue as queue:
        queue.enqueue(bytes(900))
        queue.enqueue(bytes(900))
        errors: list[Exception] = []
        thread = threading.Thread(target=lambda: errors.append(enqueue_error(queue)))
        thread.start()
        peer.kill()
        thread.join(WATCHDOG)
        assert isinstance(errors[0], PeerLostError)
        assert f"rank 0 (pid {peer.process.pid})" in str(errors[0])
        with pytest.raises(PeerLostError):
            queue.enqueue(bytes(900), 1.0)


def enqueue_error(queue: MessageQueue) -> Exception:
    try:
        queue.enqueue(bytes(900))
    except Exception as exc:
        return exc
    return AssertionError("it was sent")


def test_a_reader_killed_while_others_are_awaited(peer: Peer) -> None:
    with MessageQueue(2, 2) as queue:
        peer.run(attach_only, queue.export_handle(), 0)
        peer.kill()
        with pytest.raises(PeerLostError, match="rank 0"):
            queue.wait_until_ready(WATCHDOG)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_stopped_reader_is_late_and_not_lost(peer: Peer, kind: str) -> None:
    wire = Wire(kind, [peer], max_chunk_bytes=1000, max_chunks=2)
    assert peer.process.pid is not None
    with wire.queue as queue:
        os.kill(peer.process.pid, signal.SIGSTOP)
        try:
            queue.enqueue(b"0" * 900)
            queue.enqueue(b"1" * 900)
            with pytest.raises(TimeoutError, match="rank 0"):
                queue.enqueue(b"2" * 900, 1.2)  # long enough for two looks at the reader's process
        finally:
            os.kill(peer.process.pid, signal.SIGCONT)
        peer.start(take, 3)
        queue.enqueue(b"3" * 900, WATCHDOG)
        assert peer.result() == [b"0" * 900, b"1" * 900, b"3" * 900]
        wire.close()


# Strangers on the TCP port


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def speak_plain_tcp(handle: Handle, bomb: bytes) -> Callable[[], None]:
    assert handle.zmq is not None
    host, port = handle.zmq.endpoint.removeprefix("tcp://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), WATCHDOG) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bomb)
        stranger.settimeout(WATCHDOG)
        try:
            while stranger.recv(4096):
                pass
        except ConnectionError:
            pass
    return lambda: None


def speak_zmq(handle: Handle, bomb: bytes, **curve: bytes) -> Callable[[], None]:
    assert handle.zmq is not None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RECONNECT_IVL, 3_600_000)
    for option, value in curve.items():
        setattr(dealer, option, value)
    dealer.connect(handle.zmq.endpoint)
    dealer.send(Hello(HELLO, handle.zmq.token, 0, 1, bytes(16)).pack())
    dealer.send_multipart([MESSAGE, bomb])

    def close() -> None:
        dealer.close()
        context.term()

    return close


def speak_without_keys(handle: Handle, bomb: bytes) -> Callable[[], None]:
    return speak_zmq(handle, bomb)


def speak_with_a_guessed_key(handle: Handle, bomb: bytes) -> Callable[[], None]:
    (server, _), (public, secret) = zmq.curve_keypair(), zmq.curve_keypair()
    return speak_zmq(handle, bomb, curve_serverkey=server, curve_publickey=public, curve_secretkey=secret)


def speak_with_a_wrong_token(handle: Handle, bomb: bytes) -> Callable[[], None]:
    assert handle.zmq is not None
    public, secret = zmq.curve_keypair()
    wrong = replace(handle, zmq=replace(handle.zmq, token=bytes(16)))
    keys = {"curve_publickey": public, "curve_secretkey": secret}
    return speak_zmq(wrong, bomb, curve_serverkey=handle.zmq.server_key, **keys)


@pytest.mark.parametrize(
    "speak", [speak_plain_tcp, speak_without_keys, speak_with_a_guessed_key, speak_with_a_wrong_token]
)
def test_a_stranger_is_refused_and_counted(speak: Callable[..., Callable[[], None]], tmp_path: Path) -> None:
    """And the queue serves its own reader before and after; nothing of the stranger's is unpickled."""
    with MessageQueue(1, 0) as queue:
        writer = queue._writer
        assert writer is not None
        assert writer.refused == 0
        go = speak(queue.export_handle(), pickle.dumps(Bomb(tmp_path / "exploded")))
        deadline = time.monotonic() + WATCHDOG
        while not writer.refused and time.monotonic() < deadline:
            with pytest.raises(TimeoutError, match=r"readers \[0\]"):
                queue.wait_until_ready(0.01)
        assert writer.refused >= 1
        with MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
            queue.wait_until_ready(WATCHDOG)
            queue.enqueue("for rank 0", WATCHDOG)
            assert reader.dequeue(WATCHDOG) == "for rank 0"
            go()
            queue.close()
            with pytest.raises(QueueClosedError):
                reader.dequeue(WATCHDOG)
    assert not (tmp_path / "exploded").exists()


def test_many_strangers_do_not_stop_other_queues() -> None:
    with MessageQueue(1, 0) as attacked, MessageQueue(1, 0) as other:
        endpoint = attacked.export_handle().zmq.endpoint  # type: ignore[union-attr]
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        for _ in range(1500):
            with socket.create_connection((host, int(port)), WATCHDOG) as stranger:
                stranger.sendall(b"x" * 64)
        with MessageQueue.create_from_handle(other.export_handle(), 0) as reader:
            other.enqueue("through", WATCHDOG)
            assert reader.dequeue(WATCHDOG) == "through"
        deadline = time.monotonic() + WATCHDOG
        while attacked._writer.refused < 1500 and time.monotonic() < deadline:  # type: ignore[union-attr]
            time.sleep(0.02)
        assert attacked._writer.refused >= 1500  # type: ignore[union-attr]
