"""A forked child of a process that is connected to a queue."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
from hazard_checks import content, is_content, outcome
from injection import (
    HANG,
    Forked,
    wait_for,
)
from queue_ends import Ends, blocked

from ray_shm import queue_end
from ray_shm.errors import QueueClosedError
from ray_shm.message_queue import MessageQueue

FAILED = (AssertionError, pytest.fail.Exception)
SOON = 0.1  # seconds: a timeout that is meant to run out


SOON = 0.1  # seconds: a timeout that is meant to run out


pytestmark = pytest.mark.usefixtures("what_stays")


def forked_use(ends: Ends) -> dict[str, str]:
    writer, reader = ends.writer, ends.readers[0]
    said = {
        "enqueue": outcome(lambda: writer.enqueue(1, SOON)),
        "enqueue large": outcome(lambda: writer.enqueue(bytes(1 << 20), SOON)),
        "writer waits": outcome(lambda: writer.wait_until_ready(SOON)),
        "dequeue": outcome(lambda: reader.dequeue(SOON)),
        "poll": outcome(lambda: reader.dequeue(0)),
        "reader waits": outcome(lambda: reader.wait_until_ready(SOON)),
        "read raw": outcome(lambda: reader.acquire_read(SOON).__enter__()),
        "stats": outcome(lambda: (writer.stats().messages, reader.stats().messages)),
    }
    for end in (reader, writer):
        end.close()
        end.close()
        end.shutdown()
    return said


def check_fork(ends: Ends) -> None:
    """A child can use neither end, tells nobody anything, and the parent's queue goes on."""

    def go_on() -> None:
        for k in range(50):
            obj = k if k % 10 else content(k, 1 << 20)
            ends.writer.enqueue(obj, HANG)
            got = ends.readers[0].dequeue(HANG)
            assert is_content(got, k, 1 << 20) if k % 10 == 0 else got == k

    go_on()
    child = Forked(lambda: forked_use(ends))
    go_on()
    ends.writer.enqueue("unread while the child lives")
    said = child.go()
    stats = said.pop("stats")
    assert stats.startswith("returned")
    for what, text in said.items():
        assert text.startswith(
            f"QueueClosedError: this end of the queue belongs to process {os.getpid()}, of which this one "
            f"(pid {child.pid}) was forked"
        ), f"{what}: {text}"
    assert ends.readers[0].dequeue(HANG) == "unread while the child lives"
    go_on()


def test_a_forked_child_cannot_use_its_parents_queue() -> None:
    with Ends() as ends:
        check_fork(ends)
        check_fork(ends)


def test_a_queue_that_forgets_forks_would_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_end, "_ends", weakref.WeakSet())
    with Ends() as ends:
        queue_end._ends.clear()
        with pytest.raises((AssertionError, QueueClosedError)):
            check_fork(ends)


def test_fork_while_other_threads_hold_both_locks() -> None:
    """One sleeps in dequeue, one in enqueue, at the time of the fork."""
    with Ends(max_chunk_bytes=1000, max_chunks=1) as full, Ends() as empty:
        said: list[str] = []
        taken: list[Any] = []
        full.writer.enqueue(bytes(900))
        writer = blocked(full.writer, b"x" * 900, said)
        reader = threading.Thread(target=lambda: taken.append(empty.readers[0].dequeue(HANG)))
        reader.start()
        wait_for(lambda: empty.readers[0]._reader._waiter.parks, "the reader sleeps")  # type: ignore[union-attr]
        child = Forked(lambda: [forked_use(full), forked_use(empty)])
        for uses in child.go():
            uses.pop("stats")
            assert all(text.startswith("QueueClosedError") for text in uses.values()), uses
        empty.writer.enqueue("woken")
        full.readers[0].dequeue(HANG)
        for thread in (reader, writer):
            thread.join(HANG)
        assert (taken, said) == (["woken"], ["returned None"])
        assert full.readers[0].dequeue(HANG) == b"x" * 900


def test_a_forked_child_attaches_anew() -> None:
    with MessageQueue(2, 2) as writer, MessageQueue.create_from_handle(writer.export_handle(), 0) as reader:

        def attach_and_take() -> tuple[str, Any, int]:
            taken = outcome(lambda: MessageQueue.create_from_handle(writer.export_handle(), 0))
            with MessageQueue.create_from_handle(writer.export_handle(), 1) as mine:
                return taken, mine.dequeue(HANG), len(mine.dequeue(HANG))

        writer.enqueue("for both")
        writer.enqueue(content(1, 1 << 20))
        taken, small, large = Forked(attach_and_take).go()
        assert (small, large) == ("for both", 1 << 20)
        assert taken.startswith("StartError: cannot attach to the queue of pid")
        assert f"process {os.getpid()} reads or has read there" in taken
        assert reader.dequeue(HANG) == "for both"


def test_fork_inside_of_a_read() -> None:
    """The child leaves the `with` without an error, and without telling anybody."""
    with Ends(max_chunk_bytes=100) as ends:
        with ends.writer.acquire_write() as buffer:
            buffer[:] = b"a" * 100
        ends.writer.enqueue("next")
        reading = ends.readers[0].acquire_read(HANG)
        with reading as got:
            child = Forked(lambda: outcome(lambda: reading.__exit__(None, None, None)))
            assert bytes(got) == b"a" * 100
            said = child.go()
        assert ends.readers[0].dequeue(HANG) == "next"
        assert said == "returned None" or said.startswith("returned False"), said  # __exit__ swallows nothing


FORK_AND_EXIT = """
import os, sys
import numpy as np
from ray_shm.message_queue import MessageQueue
writer = MessageQueue(1, 1)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
writer.wait_until_ready(10)
writer.enqueue(np.full(1 << 20, 5, np.uint8))
kept = reader.dequeue()
if os.fork() == 0:
    sys.exit(0)  # with all that an interpreter does at its end
os.wait()
writer.enqueue(np.full(1 << 20, 6, np.uint8))
assert kept[0] == kept[-1] == 5 and reader.dequeue(10)[-1] == 6
reader.close()
writer.close()
"""


def test_a_forked_child_exits_as_programs_do() -> None:
    done = subprocess.run([sys.executable, "-c", FORK_AND_EXIT], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
