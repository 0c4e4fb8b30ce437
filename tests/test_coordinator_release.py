"""Coordinator groups that another thread releases, and that are formed again in place, over real processes."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from free_ports import free_port
from rank_pool import (
    HANG,
    LOOPBACK,
    WATCHDOG,
    Pool,
    Rank,
    alongside,
    growth,
    open_handles,
    total,
    wait_until,
)

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError, PeerLostError, StartError
from ray_shm.store import GroupStore

REASON = "rank 2 raised ValueError('no such token')"


# While an operation waits for a rank that does not come

OPERATIONS: dict[str, Callable[[StatelessGroupCoordinator], Any]] = {
    "all_reduce": total,
    "all_reduce of much": lambda group: total(group, 1 << 20),  # another algorithm
    "barrier": lambda group: group.barrier(),
    "all_gather": lambda group: group.all_gather(__import__("torch").ones(4)),
    "reduce_scatter": lambda group: group.reduce_scatter(__import__("torch").ones(3)),
    "irecv_tensor_dict": lambda group: group.recv_tensor_dict(2),
    "broadcast_object": lambda group: group.broadcast_object(None, 2),
    "recv_object": lambda group: group.recv_object(2),
    "recv": lambda group: group.recv(__import__("torch").Size([4]), __import__("torch").float32, 2),
}


def check_released(me: Rank, name: str) -> tuple[bool, str]:
    """Rank 1 is released first; that may end rank 0's operation as well, or not."""
    group = me.kept["group"] = me.group(name)
    operation = name.split()[0]
    inside: list[bool] = []
    if me.rank == 2:
        return True, ""
    # The control threads keep step by a group of their own, which shares both ends of every connection
    with me.group(f"control of {name}", [[0, 1], [2]]) as control:

        def release() -> None:
            wait_until(lambda: group.operation == operation or bool(inside))
            control.barrier()
            if me.rank == 0:
                control.barrier()
            inside.append(group.release(REASON))
            if me.rank == 1:
                control.barrier()

        thread = alongside(release)
        with pytest.raises(PeerLostError) as caught:
            OPERATIONS[name](group)
        thread.join()
        assert group.operation is None
        assert total(control) == 11.0  # untouched
    for again in (group.barrier, lambda: total(group), lambda: group.cpu_group):
        with pytest.raises(PeerLostError):
            again()
    assert caught.value.ray_shm_victim
    return inside[0], str(caught.value)


def check_reformed(me: Rank, epoch: int, connect: bool = False, name: str = "") -> None:
    group = me.kept["group"]
    group.reform(epoch, connect=connect)
    assert group.operation is None
    assert (group.epoch, group.unique_name) == (epoch, f"{group.group_name}/{epoch}/0")
    assert total(group) == 111.0
    group.barrier()
    assert group.broadcast_object(me.rank, 2) == 2
    me.kept.pop("group").destroy()


@pytest.mark.parametrize("name", OPERATIONS)
def test_release_ends_an_operation_and_the_group_is_formed_again(pool: Pool, name: str) -> None:
    first = None
    for rank, (inside, text) in enumerate(pool.run(check_released, name)[:2]):
        where = f"coordinator group '{name}/0/0' (global ranks [0, 1, 2], this rank {rank})"
        assert where in text
        assert text.startswith(name.split()[0])
        assert (REASON in text) is inside
        first = inside
    assert first  # rank 1
    pool.run(check_reformed, 1, name == "barrier")


# While the group is being formed


def released_while(forming: Callable[[], Any], group: StatelessGroupCoordinator, reached: Callable[[], bool]) -> str:
    def release() -> None:
        wait_until(lambda: group.operation is not None and reached())
        assert group.release(REASON)

    thread = alongside(release)
    with pytest.raises(PeerLostError, match=r"this process: rank 2 raised ValueError") as caught:
        forming()
    thread.join()
    return str(caught.value)


def check_absent_member(me: Rank) -> None:
    before = open_handles()
    group = me.kept["group"] = me.group("absent", lazy=True)
    if me.rank == 2:
        return
    text = released_while(lambda: total(group), group, lambda: me.store.prefix("absent/0/0").check(["rank/0"]))
    assert text.startswith("all_reduce in coordinator group 'absent/0/0'")
    assert growth(before) == (0, 0)  # nobody waits in the store any more
    group.reform(1)
    released_while(lambda: group.cpu_group, group, lambda: me.store.prefix("absent/1/0").check(["rank/0"]))


def test_released_while_members_are_absent(pool: Pool) -> None:
    pool.run(check_absent_member)
    pool.run(check_reformed, 2)


def check_half_connected(me: Rank) -> None:
    """Rank 2 gives gloo's address, and then neither accepts nor connects: the others wait in gloo's own code."""
    from ray_shm.process_group import ProcessGroups
    from ray_shm.release import Release
    from ray_shm.rendezvous import MeetingStore, ReleasedError, Rendezvous

    before = open_handles()
    prefix = me.store.prefix("half/0/0")
    group = me.kept["group"] = me.group("half", lazy=True)
    if me.rank != 2:
        text = released_while(group.barrier, group, lambda: prefix.check(["0/0", "0/1", "0/2"]))
        assert text.startswith("barrier in")
        prefix.set(f"released/{me.rank}", "")
        assert growth(before) == (0, 0)  # nothing waits in gloo
        return

    class SilentStore(MeetingStore):
        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            if "0/0" in keys:
                prefix.wait(["released/0", "released/1"], timedelta(seconds=HANG))
                release.request()
            super().wait(keys, timeout)

        def check(self, keys: list[str]) -> bool:
            return "0/0" not in keys and super().check(keys)

    import torch

    release = Release()
    meeting = Rendezvous(
        SilentStore(prefix, release, HANG), "half", group._link.members, "127.0.0.1", WATCHDOG, release
    )
    meeting.agree("gloo")
    with pytest.raises(ReleasedError):
        ProcessGroups(meeting, "gloo", torch.device("cpu"))


def test_released_while_gloo_waits_for_a_member_that_stopped_half_way(pool: Pool) -> None:
    pool.run(check_half_connected)
    pool.run(check_reformed, 1)


def check_no_store(me: Rank, port: int) -> None:
    before = open_handles()
    own = {"coord_store": None, "group_ports": [[port]], "host": LOOPBACK, "lazy": True}
    group = me.group("no store", **own)
    released_while(group.barrier, group, lambda: True)
    assert growth(before) == (0, 0)
    asked, answer = threading.Event(), threading.Event()

    def slow() -> GroupStore:
        asked.set()
        answer.wait(HANG)
        return me.store

    group.reform(1, slow)
    released_while(group.barrier, group, asked.is_set)
    answer.set()  # too late: the formation that was left behind finds nobody
    assert growth(before) == (0, 0)


def test_released_while_waiting_for_the_store(pool: Pool) -> None:
    pool.run(check_no_store, free_port(LOOPBACK), ranks=(1,))


class InterruptError(Exception):
    pass


def check_interrupted(me: Rank) -> None:
    def interrupt(*_: Any) -> None:
        raise InterruptError

    before = open_handles()
    group = me.kept["group"] = me.group("interrupted", lazy=True)
    if me.rank == 2:
        return
    previous = signal.signal(signal.SIGUSR1, interrupt)
    keys = [f"rank/{me.rank}"]

    def send() -> None:
        wait_until(lambda: me.store.prefix("interrupted/0/0").check(keys))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    thread = alongside(send)
    try:
        with pytest.raises(InterruptError):
            group.barrier()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    thread.join()
    with pytest.raises(StartError, match="was not formed: InterruptError"):
        group.barrier()
    assert not group.release(REASON)  # it has ended already
    assert growth(before) == (0, 0)


def test_a_signal_interrupts_the_forming(pool: Pool) -> None:
    pool.run(check_interrupted)
    pool.run(check_reformed, 1)


def check_interrupted_inside(me: Rank) -> None:
    """Rank 0 has got its part from rank 1 when the handler runs, and none from rank 2, which does not come."""
    import torch

    def interrupt(*_: Any) -> None:
        raise InterruptError

    group, store = me.group("interrupted inside"), me.store.prefix("signal")
    me.kept["group"] = group
    group.barrier()
    if me.rank == 0:
        previous = signal.signal(signal.SIGUSR1, interrupt)

        def send() -> None:
            wait_until(lambda: group.operation == "reduce_scatter")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            store.set("sent", "")

        thread = alongside(send)
        try:
            with pytest.raises(InterruptError):
                group.reduce_scatter(torch.ones(3))
        finally:
            signal.signal(signal.SIGUSR1, previous)
        thread.join()
        assert group.is_lost
        with pytest.raises(PeerLostError, match="interrupted in an operation, reduce_scatter, by InterruptError"):
            group.barrier()
    elif me.rank == 1:
        store.get("sent")
        with pytest.raises(PeerLostError):  # it waits for rank 2 if it has its part from rank 0
            group.reduce_scatter(torch.ones(3), timeout=0.5)


def test_a_signal_in_an_operation_ends_the_group(pool: Pool) -> None:
    """Else what is under way would be taken for a part of the next operation, or be waited for in vain."""
    pool.run(check_interrupted_inside)
    pool.run(check_reformed, 1)


# Idle, destroyed


def check_idle(me: Rank) -> None:
    before = open_handles()
    used, unused = me.group("used"), me.group("unused", lazy=True)
    assert total(used) == 111.0
    for group in (used, unused):
        assert group.operation is None
        for reason in (REASON, "another"):
            alongside(lambda g=group, r=reason: g.release(r)).join()
        for operation in (lambda g=group: total(g), group.barrier, lambda g=group: g.cpu_group):
            with pytest.raises(PeerLostError, match="no such token"):
                operation()
        group.reform(1)
        assert total(group) == 111.0
        group.destroy()
        assert not group.release(REASON)
        for operation in (group.barrier, lambda g=group: g.reform(2)):
            with pytest.raises(GroupClosedError, match="destroyed by this process"):
                operation()
    unused.destroy()
    broken = me.group("broken")
    broken.release(REASON)
    broken.destroy()
    with pytest.raises(GroupClosedError):
        broken.barrier()
    assert growth(before) == (0, 0)


def test_released_while_idle(pool: Pool) -> None:
    pool.run(check_idle)


def check_destroyed_inside(me: Rank) -> None:
    group = me.group("destroyed inside")
    if me.rank == 2:
        me.kept["group"] = group
        return

    def destroy() -> None:
        wait_until(lambda: group.operation == "recv_object")
        group.destroy()

    thread = alongside(destroy)
    with pytest.raises(GroupClosedError, match="destroyed by this process"):
        group.recv_object(2)
    thread.join()


def test_destroyed_by_another_thread_during_an_operation(pool: Pool) -> None:
    pool.run(check_destroyed_inside)
    pool.run(check_destroy, ranks=(2,))


def check_destroy(me: Rank) -> None:
    me.kept.pop("group").destroy()


def check_released_by_a_handler(me: Rank) -> None:
    group = me.group("handler")
    assert total(group) == 111.0
    previous = signal.signal(signal.SIGUSR1, lambda *_: group.release(REASON))
    with group._link._ending:  # which the thread that the signal interrupts may hold just then
        signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, previous)
    with pytest.raises(PeerLostError, match="rank 2 raised ValueError"):
        total(group)
    group.destroy()


def test_released_by_a_signals_handler_amid_a_change_of_state(pool: Pool) -> None:
    pool.run(check_released_by_a_handler)


# What does not belong to the group


def check_own_connections(me: Rank) -> None:
    """The user connects and listens on the address of the group before, while and after it is formed."""
    pairs: list[tuple[socket.socket, socket.socket, socket.socket]] = []
    stop = threading.Event()

    def connect() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        caller = socket.create_connection(listener.getsockname())
        pairs.append((listener, caller, listener.accept()[0]))

    def keep_connecting() -> None:
        while not stop.is_set() and len(pairs) < 100:
            connect()
            time.sleep(0.0005)

    connect()
    thread = alongside(keep_connecting)
    group, other = me.group("with strangers"), me.group("other")
    stop.set()
    thread.join()
    connect()
    groups = group._link.connect(), other._link.connect()
    assert [len(g.sockets) for g in groups] == [2, 2]  # one connection to each peer
    assert total(group) == total(other) == 111.0
    group.release(REASON)
    assert total(other) == 111.0
    for listener, caller, called in pairs:
        caller.sendall(b"x")
        assert called.recv(1) == b"x"
        called.sendall(b"y")
        assert caller.recv(1) == b"y"
        for mine in (listener, caller, called):
            mine.close()
    group.destroy()
    other.destroy()


def test_connections_of_others_are_not_touched(pool: Pool) -> None:
    pool.run(check_own_connections)


def test_a_closed_descriptor_that_is_used_again_is_not_shut_down() -> None:
    from ray_shm.release import open_sockets

    known = open_sockets()
    first, peer = socket.socketpair()
    (ref,) = [r for r in open_sockets() - known if r.descriptor == first.fileno()]
    first.close()
    peer.close()
    again, other = socket.socketpair()
    with again, other:
        assert ref.descriptor in (again.fileno(), other.fileno())
        ref.shut_down()
        again.sendall(b"x")
        assert other.recv(1) == b"x"
        assert ref.addresses() == (None, None)
