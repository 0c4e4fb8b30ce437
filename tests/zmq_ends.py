"""Ends of the channel between nodes, used by hand: what the tests of that channel do with them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from reader_pool import WATCHDOG

from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_writer import ZmqWriter

BOUND = 1 << 20
LOCALHOST = "127.0.0.1"
MakeChannel = Callable[..., tuple[ZmqWriter, list[ZmqReader]]]


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


@contextlib.contextmanager
def channels() -> Iterator[MakeChannel]:
    """Makes a writer and its readers, all in this process and connected."""
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
