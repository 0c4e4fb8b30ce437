"""A memory cgroup that is full: refused in time, and no process is killed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import hazard_checks as checks
import numpy as np
import pytest
from hazard_checks import content, is_content
from injection import HANG
from reader_pool import Me, Peer

from ray_shm import arena, segment
from ray_shm.message_queue import MessageQueue

MIB = 1 << 20


MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("what_stays")


class MemoryCgroup:
    """One of this test, below our own; v1 or v2."""

    def __init__(self) -> None:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        v1 = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
        self.v1 = bool(v1)
        root = Path("/sys/fs/cgroup/memory") / v1[0].lstrip("/") if v1 else Path("/sys/fs/cgroup")
        self.folder = root / f"ray_shm_test_{os.getpid()}"
        self.folder.mkdir()
        self._limit = self.folder / ("memory.limit_in_bytes" if self.v1 else "memory.max")
        if not self._limit.exists():
            self.folder.rmdir()
            raise OSError("the memory controller is not delegated")

    def put(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def leave(self, nbytes: int) -> None:
        """Set the limit to so much more than is used."""
        self._limit.write_text(str(self.used + nbytes))

    @property
    def used(self) -> int:
        return int((self.folder / ("memory.usage_in_bytes" if self.v1 else "memory.current")).read_text())

    @property
    def kills(self) -> int:
        rows = (self.folder / ("memory.oom_control" if self.v1 else "memory.events")).read_text().splitlines()
        return sum(int(row.split()[1]) for row in rows if row.split()[0] == "oom_kill")

    def remove(self) -> None:
        deadline = time.monotonic() + HANG
        while True:
            try:
                return self.folder.rmdir()
            except OSError:  # a process is on its way out
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


@pytest.fixture
def tight(peer: Peer) -> Iterator[MemoryCgroup]:
    """Holds the peer."""
    try:
        made = MemoryCgroup()
    except OSError as exc:
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    try:
        assert peer.process.pid is not None
        made.put(peer.process.pid)
        yield made
    finally:
        peer.kill()
        made.remove()


def open_queues(_me: Me) -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += "memfd:ray_shm" in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


def try_to_make(_me: Me) -> str:
    return checks.outcome(lambda: MessageQueue(1, 1))


def try_to_send(me: Me, size: int) -> str:
    zeros = np.zeros(size, np.uint8)  # pages that are only read take no memory
    return checks.outcome(lambda: me.queue.enqueue(zeros, HANG))


def test_a_full_cgroup_at_creation(peer: Peer, tight: MemoryCgroup) -> None:
    tight.leave(40 * MIB)
    said = peer.run(try_to_make)
    assert said.startswith("StartError: cannot reserve ")
    assert re.search(
        r"cannot reserve [\d,]+ bytes of shared memory for queue: memory cgroup \S+ leaves [\d,]+ bytes", said
    )
    assert str(tight.folder) in said
    assert peer.run(open_queues) == 0
    assert tight.kills == 0


def check_a_full_cgroup(peer: Peer, tight: MemoryCgroup, size: int) -> None:
    tight.leave(100 * MIB)
    handle = peer.run(checks.make_queue)
    with MessageQueue.create_from_handle(handle, 0) as reader:
        peer.run(checks.await_ready)
        for k in range(3):
            said = peer.run(try_to_send, size)
            numbers = re.match(r"StartError: cannot reserve ([\d,]+) bytes of shared memory for a large message", said)
            assert numbers, said
            assert size <= int(numbers[1].replace(",", "")) < 1.1 * size
            assert f"memory cgroup {tight.folder} leaves " in said
            peer.run(checks.put, k, content(k, MIB))
            assert reader.dequeue(HANG) == k
            assert is_content(reader.dequeue(HANG), k, MIB)
        assert tight.kills == 0
        peer.run(checks.close_all)


def test_a_full_cgroup_at_a_large_message(peer: Peer, tight: MemoryCgroup) -> None:
    check_a_full_cgroup(peer, tight, 200 * MIB)


def test_a_queue_that_does_not_look_would_be_killed(peer: Peer, tight: MemoryCgroup) -> None:
    peer.run(look_at_no_limit)
    with pytest.raises((AssertionError, pytest.fail.Exception, EOFError, ConnectionError)):
        check_a_full_cgroup(peer, tight, 200 * MIB)


def look_at_no_limit(_me: Me) -> None:
    for module in (segment, arena):
        module.require_memory = lambda *_: None  # type: ignore[attr-defined]


def send_and_drop(me: Me, size: int, count: int) -> str:
    zeros = np.zeros(size, np.uint8)

    def send() -> None:
        for _ in range(count):
            me.queue.enqueue(zeros, HANG)

    return checks.outcome(send)


def test_free_blocks_make_way_in_a_cgroup(peer: Peer, tight: MemoryCgroup) -> None:
    """Memory that the queue itself holds in free blocks is given back before a message is refused."""
    tight.leave(180 * MIB)
    with MessageQueue.create_from_handle(peer.run(checks.make_queue), 0) as reader:
        peer.run(checks.await_ready)
        assert peer.run(send_and_drop, 10 * MIB, 8) == "returned None"
        for _ in range(8):
            reader.dequeue(HANG)
        assert peer.run(send_and_drop, 60 * MIB, 1) == "returned None"
        assert reader.dequeue(HANG).nbytes == 60 * MIB
        assert tight.kills == 0
