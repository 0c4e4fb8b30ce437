"""Broadcasts through queues that end early: late, released, interrupted, destroyed, killed; over real processes."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rank_pool import WATCHDOG, Pool, Rank, alongside, growth, open_handles, wait_until

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, PeerLostError

REASON = "rank 2 raised ValueError('no such token')"


def queue_maps() -> int:
    """Mappings of queues' memory in this process, but for what a traceback of an earlier test keeps."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:ray_shm:")


# Late


def fill(group: StatelessGroupCoordinator, kept: dict[str, Any], timeout: float | None = None) -> None:
    for kept["filled"] in range(1000):
        group.broadcast_object(bytes(50_000), group.rank, timeout=timeout)


def check_late_source(me: Rank) -> str:
    group = me.queue_group("late source")
    assert group.broadcast_object(me.rank, 2) == 2
    if me.rank == 2:
        me.kept["group"] = group
        return ""
    with pytest.raises(PeerLostError) as caught:
        group.broadcast_object(None, 2, timeout=0.3 if me.rank == 0 else None)  # rank 1 hears of it from rank 2's end
    return str(caught.value)


def check_came_late(me: Rank) -> str:
    """The others are gone, and that is noticed although there would be room."""
    with pytest.raises(PeerLostError) as caught:
        me.kept["group"].broadcast_object(1, 2)
    return str(caught.value)


def test_late_source_is_named_and_learns_of_it(pool: Pool) -> None:
    pool.start(check_late_source)
    first, _ = pool.result(0), pool.result(2)
    assert "broadcast_object failed in coordinator group 'late source/0/0'" in first
    assert "nothing came from global rank 2 (pid" in first
    assert "within 0.3 s" in first
    late = pool.run(check_came_late, ranks=(2,))[0]
    assert "reader rank 0 (pid" in late
    assert "closed its end of the queue" in late
    assert "global rank 2 (pid" in pool.result(1)
    pool.run(check_destroyed, ranks=(2,))


def check_destroyed(me: Rank) -> None:
    me.kept.pop("group").destroy()


def check_late_readers(me: Rank) -> tuple[str, int]:
    """Rank 0 fills the queue, and counts what went in; the others do not read."""
    group = me.queue_group("late readers")
    group.broadcast_object(None)
    if me.rank:
        me.kept["group"] = group
        return "", 0
    with pytest.raises(PeerLostError) as caught:
        fill(group, me.kept, timeout=0.3)
    return str(caught.value), me.kept.pop("filled")


def check_read_late(me: Rank, count: int) -> None:
    """What was sent before the end can still be read."""
    group = me.kept.pop("group")
    for _ in range(count):
        assert group.broadcast_object() == bytes(50_000)
    with pytest.raises(PeerLostError, match="global rank 0"):
        group.broadcast_object()


def test_a_source_whose_readers_do_not_read_waits_and_names_them(pool: Pool) -> None:
    text, count = pool.run(check_late_readers)[0]
    assert 10 < count < 1000
    assert "was full for 0.3 s: rank 1 (pid" in text
    assert "rank 2 (pid" in text
    pool.run(check_read_late, count, ranks=(1, 2))


def check_third_is_late(me: Rank) -> tuple[str, list[int]]:
    me.kept["group"] = group = me.queue_group("third")
    assert group.broadcast_object(me.rank) == 0
    if me.rank == 2:
        return "", []
    with pytest.raises(PeerLostError) as caught:
        fill(group, me.kept, timeout=0.3) if me.rank == 0 else [group.broadcast_object() for _ in range(1000)]
    return str(caught.value), caught.value.ranks


def test_a_source_that_waited_for_another_reader_is_not_called_late(pool: Pool) -> None:
    (by_source, late), (by_reader, unknown), _ = pool.run(check_third_is_late)
    assert late == [2], by_source
    assert unknown == [], by_reader
    assert "ranks [0] gave up after their timeout; the source of the object has come to it" in by_reader
    pool.run(check_destroyed)


# Released, interrupted, destroyed


def parks(group: StatelessGroupCoordinator, src: int) -> int:
    """How often this rank has slept in the queue of `src`."""
    groups = group._link.groups
    return sum(end.parks for end in groups.queues.stats().get(src, [])) if groups is not None else 0


def released_in(group: StatelessGroupCoordinator, src: int, operation: Callable[[], Any], laid: bool = False) -> None:
    """Releases it once it sleeps in the queue of `src`. `laid`: that queue is there."""
    before = parks(group, src)
    laid = laid or before > 0

    def release() -> None:
        wait_until(lambda: parks(group, src) > before if laid else group.operation == "broadcast_object")
        assert group.release(REASON)

    thread = alongside(release)
    with pytest.raises(PeerLostError, match="was ended by this process: rank 2 raised"):
        operation()
    thread.join()


def use_once(me: Rank, name: str) -> None:
    """What a process keeps from its first queue on (the thread that watches for deaths) is no leak."""
    with me.queue_group(name) as group:
        group.broadcast_object(None)
        group.barrier()


def check_released(me: Rank) -> None:
    use_once(me, "before release")
    before = open_handles(), queue_maps()
    group, control = me.queue_group("released", lazy=True), me.group("control")
    if me.rank == 0:  # while the queue is made
        released_in(group, 2, lambda: group.broadcast_object(None, 2))
    control.barrier()
    group.reform(1)
    for _ in range(2):
        assert group.broadcast_object(me.rank, 2) == 2
        control.barrier()
    if me.rank == 0:  # while a member waits for the source
        released_in(group, 2, lambda: group.broadcast_object(None, 2))
    control.barrier()
    group.reform(2)
    assert group.broadcast_object(me.rank) == 0
    if me.rank == 0:  # while the source waits for room
        released_in(group, 0, lambda: fill(group, me.kept))
    control.barrier()
    group.reform(3)
    assert group.broadcast_object(me.rank, 1) == 1
    control.barrier()
    if me.rank == 1:  # while the source is elsewhere; the others learn of it
        assert not group.release(REASON)
    else:
        with pytest.raises(PeerLostError, match=r"nothing came from global rank 1 .*: .* closed the queue"):
            group.broadcast_object(None, 1)
    group.reform(4)
    assert [group.broadcast_object(me.rank, src) for src in (2, 1, 0)] == [2, 1, 0]
    group.barrier()
    group.destroy()
    control.destroy()
    with pytest.raises(GroupClosedError):
        group.broadcast_object(1)
    assert [growth(before[0]), queue_maps() - before[1]] == [(0, 0), 0], os.listdir("/proc/self/fd")


def test_a_release_ends_every_wait_and_the_group_is_formed_again(pool: Pool) -> None:
    pool.run(check_released)


class BroadcastsAgain:
    """Unpickled, it is what rank 1 broadcasts, or `count` broadcasts of the reader's own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __reduce__(self) -> Any:
        return broadcast_in_turn, (self.count,)


nesting: list[StatelessGroupCoordinator] = []  # the group of `broadcast_in_turn`


def broadcast_in_turn(count: int) -> Any:
    for _ in range(count):
        nesting[0].broadcast_object(bytes(50_000), 2)
    return nesting[0].broadcast_object(None, 1)


def check_released_amid_an_object(me: Rank, count: int) -> None:
    use_once(me, f"before nested {count}")
    before = open_handles(), queue_maps()
    group, control = me.queue_group(f"nested {count}"), me.group(f"control of nested {count}")
    nesting[:] = [group]
    for turn in range(2):
        assert [group.broadcast_object(me.rank, src) for src in range(3)] == [0, 1, 2]
        if me.rank == 0:
            group.broadcast_object(BroadcastsAgain(count))
        if me.rank == 2:
            released_in(group, 2 if count else 1, group.broadcast_object, laid=True)
        control.barrier()
        group.reform(turn + 1)
    nesting.clear()
    group.barrier()
    group.destroy()
    control.destroy()
    assert [growth(before[0]), queue_maps() - before[1]] == [(0, 0), 0], os.listdir("/proc/self/fd")


@pytest.mark.parametrize("count", [0, 1000], ids=["reading", "sending"])
def test_a_release_ends_what_an_object_does_while_it_is_unpickled(pool: Pool, count: int) -> None:
    pool.run(check_released_amid_an_object, count)


class InterruptError(Exception):
    pass


def check_interrupted(me: Rank) -> None:
    def interrupt(*_: Any) -> None:
        raise InterruptError

    group, control = me.queue_group("interrupted"), me.group("control of interrupted")
    for _ in range(2):
        assert group.broadcast_object(me.rank, 2) == 2
        control.barrier()
    if me.rank == 0:
        previous = signal.signal(signal.SIGUSR1, interrupt)
        main = threading.main_thread().ident or 0

        before = parks(group, 2)

        def send() -> None:
            wait_until(lambda: parks(group, 2) > before)
            signal.pthread_kill(main, signal.SIGUSR1)

        thread = alongside(send)
        try:
            with pytest.raises(InterruptError):
                group.broadcast_object(None, 2)
        finally:
            signal.signal(signal.SIGUSR1, previous)
        thread.join()
        with pytest.raises(PeerLostError, match="an earlier broadcast was interrupted"):
            group.broadcast_object(None, 2)
    control.barrier()
    group.reform(1)
    assert group.broadcast_object(me.rank, 2) == 2
    control.barrier()
    for used in (group, control):
        used.destroy()


def test_an_interrupted_broadcast_ends_the_group_until_it_is_formed_again(pool: Pool) -> None:
    pool.run(check_interrupted)


_to_be_destroyed: list[StatelessGroupCoordinator] = []


def check_interrupted_before(me: Rank) -> None:
    """A signal's handler raises where nothing is done yet: nothing is counted, and the group stays in step."""
    with me.queue_group("before") as group:
        assert group.broadcast_object(me.rank) == 0
        counted = group.operations
        if me.rank == 1:
            for timeout in (None, WATCHDOG):  # straight to the queue, and as all operations go
                with mock.patch.object(Deadline, "after", side_effect=InterruptError), pytest.raises(InterruptError):
                    group.broadcast_object(None, timeout=timeout)
                assert (group.operation, group.operations) == (None, counted)
        assert group.broadcast_object("next" if me.rank == 0 else None) == "next"
        group.barrier()


def test_interrupted_before_anything_is_done(pool: Pool) -> None:
    pool.run(check_interrupted_before)


class Destroyer:
    """Destroys the group that it comes through."""

    def __reduce__(self) -> Any:
        return _destroy, ()


def _destroy() -> str:
    _to_be_destroyed.pop().destroy()
    return "came all the same"


def check_destroyed_inside(me: Rank) -> None:
    with me.group("beside") as control:
        for name in ("first", "second"):  # the first one leaves what is made once in a process
            before = open_handles(), queue_maps()
            group = me.queue_group(f"destroyed inside, {name}")
            _to_be_destroyed[:] = [group]
            got = group.broadcast_object(Destroyer() if me.rank == 0 else None)
            control.barrier()
            if me.rank == 0:
                group.destroy()
            else:
                assert got == "came all the same"
            with pytest.raises(GroupClosedError):
                group.barrier()
        assert (growth(before[0]), queue_maps() - before[1]) == ((0, 0), 0)


def test_destroyed_in_an_operation_that_comes_through(pool: Pool) -> None:
    """Its thread frees what it used, since whoever destroys must not."""
    pool.run(check_destroyed_inside)


def check_cycles(me: Rank) -> None:
    import torch

    group = me.queue_group("cycles")
    before = open_handles(), queue_maps()
    for epoch in range(1, 11):
        for src in (epoch % 3, 1):
            got = group.broadcast_object(torch.full((1 << 17,), float(src)) if me.rank == src else None, src)
            assert got[-1].item() == src
        if epoch % 2:
            group.barrier()
            if me.rank == epoch % 3:
                group.release(REASON)
        group.reform(epoch)
        del got
    assert (growth(before[0]), max(0, queue_maps() - before[1])) == ((0, 0), 0)
    kept = group.broadcast_object(torch.ones(1 << 17))
    group.barrier()
    group.destroy()
    assert kept.sum().item() == 1 << 17  # outlives the group


def test_cycles_leave_descriptors_threads_and_memory_flat(pool: Pool) -> None:
    pool.run(check_cycles)


# Deaths; the last tests of the module, whose pool is short of ranks afterwards


def for_ever(work: Callable[[], Any]) -> None:
    while True:
        work()


def check_dead_reader(me: Rank) -> str:
    """Rank 2 is killed while it waits for rank 0, which then broadcasts; rank 1 reads on until the end."""
    group = me.queue_group("dead reader")
    group.broadcast_object(None)
    if me.rank == 2:
        alongside(lambda: (wait_until(lambda: group.operation is not None), os.kill(os.getpid(), signal.SIGKILL)))
    with pytest.raises(PeerLostError) as caught:
        for_ever(lambda: (group.broadcast_object(None), time.sleep(0.001)))
    return str(caught.value)


def test_a_killed_reader_is_named_by_the_source_and_ends_the_group(pool: Pool) -> None:
    pid = pool.processes[2].pid
    pool.start(check_dead_reader)
    assert f"reader rank 2 (pid {pid}) is gone" in pool.result(0)
    assert "from global rank 0" in pool.result(1) or "global rank 0 " in pool.result(1)


def check_dead_source(me: Rank) -> str:
    group = me.queue_group("dead source", ranks=[[0, 1], [2]])
    group.broadcast_object(None, 1)
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        group.broadcast_object(None, 1)
    return str(caught.value)


def test_a_killed_source_is_named(pool: Pool) -> None:
    pid = pool.processes[1].pid
    pool.start(check_dead_source, ranks=(0, 1))
    text = pool.result(0)
    assert f"global rank 1 (pid {pid} on " in text
    assert "is gone" in text
