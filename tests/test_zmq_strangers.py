"""Who gets to be an end of the channel between nodes, and which addresses can be bound."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import replace

import pytest
import zmq
from reader_pool import WATCHDOG
from zmq_ends import BOUND, LOCALHOST, MakeChannel, send, take, wait, wait_for_error

from ray_shm.errors import StartError
from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_writer import ZmqWriter

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
