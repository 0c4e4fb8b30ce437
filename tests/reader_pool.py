"""Spawned processes that hold the reading ends of a queue under test and run checks on command.

A check is a module's function, `check(me, *args)`, that runs in the reader's process; its result or its traceback
comes back. No torch here: a process is up in a third of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ray_shm.handle import Handle
from ray_shm.message_queue import MessageQueue

WATCHDOG = 60.0  # seconds; only a hang comes near
LOCAL_READERS = {"local": 2, "mixed": 1, "remote": 0}  # of two
spawn = mp.get_context("spawn")


class Me:
    """A reader's process: its end of the queue under test, and what it keeps from one check to the next."""

    def __init__(self) -> None:
        self.queue: Any = None  # a MessageQueue
        self.kept: list[Any] = []


def serve_checks(pipe: Any) -> None:
    me = Me()
    while (message := pipe.recv()) is not None:
        check, args = message
        try:
            pipe.send((True, check(me, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Peer:
    """A spawned process and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=serve_checks, args=(there,), daemon=True)
        self.process.start()
        there.close()

    def start(self, check: Callable[..., Any], *args: Any) -> None:
        self.pipe.send((check, args))

    def result(self) -> Any:
        if not self.pipe.poll(WATCHDOG):
            pytest.fail("a reader's process hangs")
        passed, value = self.pipe.recv()
        if not passed:
            pytest.fail(f"in the reader's process:\n{value}")
        return value

    def run(self, check: Callable[..., Any], *args: Any) -> Any:
        self.start(check, *args)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(WATCHDOG)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has ended, or is about to
            self.pipe.send(None)
            self.process.join(WATCHDOG)
        self.kill()
        self.pipe.close()
        self.process.close()


@contextlib.contextmanager
def peers_for(count: int) -> Iterator[list[Peer]]:
    """Processes that a test may kill or leave hanging."""
    peers = [Peer() for _ in range(count)]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.kill()
            peer.close()


class Wire:
    """A writing end here, with a reading end in each peer (rank = position)."""

    def __init__(self, kind: str, peers: list[Peer], **bounds: int) -> None:
        self.peers = peers
        n_local = min(LOCAL_READERS[kind], len(peers))
        self.queue = MessageQueue(len(peers), n_local, **bounds)
        for rank, peer in enumerate(peers):
            peer.start(attach, self.queue.export_handle(), rank)
        self.queue.wait_until_ready(WATCHDOG)
        for peer in peers:
            assert peer.result() == "ready"

    def run(self, check: Callable[..., Any], *args: Any) -> Any:
        """The check's result, which has to be the same at every reader."""
        self.start(check, *args)
        results = self.results()
        assert all(repr(result) == repr(results[0]) for result in results)
        return results[0]

    def start(self, check: Callable[..., Any], *args: Any) -> None:
        for peer in self.peers:
            peer.start(check, *args)

    def results(self) -> list[Any]:
        return [peer.result() for peer in self.peers]

    def late_text(self, *ranks: int) -> str:
        """Pattern of what a writer says of late readers."""
        return ", ".join(rf"rank {r} \(pid {self.peers[r].process.pid}\) is [\d,]+ bytes behind" for r in ranks)

    def close_readers(self) -> None:
        for peer in self.peers:
            if peer.process.is_alive():
                peer.run(close)

    def close(self) -> None:
        self.queue.close()
        self.close_readers()


def attach(me: Me, handle: Handle, rank: int) -> str:
    me.queue = MessageQueue.create_from_handle(handle, rank)
    me.queue.wait_until_ready(WATCHDOG)
    return "ready"


def take_bytes(me: Me) -> bytes:
    """Of the tensor that is the next message. This process need not have imported torch before."""
    data: bytes = me.queue.dequeue(WATCHDOG).cpu().numpy().tobytes()
    return data


def attach_only(me: Me, handle: Handle, rank: int) -> None:
    me.queue = MessageQueue.create_from_handle(handle, rank)


def close(me: Me) -> None:
    """Idempotent, as a queue's close is; nothing of the queue remains in the process."""
    if me.queue is not None:
        me.queue.close()
        me.queue.close()
    me.queue = None
    me.kept.clear()
