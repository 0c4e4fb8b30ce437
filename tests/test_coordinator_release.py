"""Coordinator groups that another thread releases, and that are formed again in place, over real processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from rank_pool import (
    HANG,
    LOOPBACK,
    WATCHDOG,
    Pool,
    Rank,
    alongside,
    free_port,
    growth,
    open_handles,
    serve_checks,
    wait_until,
)

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError, PeerLostError, StartError
from ray_shm.store import GroupStore

REASON = "rank 2 raised ValueError('no such token')"


class ReplacingPool(Pool):
    """After `start_reserve`, ranks 2 and 0 have another process each; the one for rank 0 serves a store of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.reserve: dict[int, tuple[Any, Any]] = {}

    def start_reserve(self) -> None:
        spawn = mp.get_context("spawn")
        self.new_listener = socket.create_server(("127.0.0.1", 0))
        self.new_port = self.new_listener.getsockname()[1]
        for rank, listener in ((2, self.listener), (0, self.new_listener)):
            here, there = spawn.Pipe()
            args = (rank, listener, listener.getsockname()[1], there)
            process = spawn.Process(target=serve_checks, args=args, daemon=True)
            process.start()
            there.close()
            self.reserve[rank] = here, process

    def bury(self, rank: int) -> None:
        """Waits for the end of the rank's process, and puts the one in reserve in its place."""
        self.processes[rank].join(WATCHDOG)
        self._swap(rank)

    def _swap(self, rank: int) -> None:
        pipe, process = self.pipes[rank], self.processes[rank]
        process.kill()
        process.join()
        pipe.close()
        process.close()
        self.pipes[rank], self.processes[rank] = self.reserve.pop(rank)

    def close(self) -> list[int | None]:
        for rank in list(self.reserve):
            self._swap(rank)
        return super().close()


@pytest.fixture(scope="module")
def pool() -> Iterator[ReplacingPool]:
    pool = ReplacingPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def mortal_pool(pool: ReplacingPool) -> Iterator[ReplacingPool]:
    pool.start_reserve()
    yield pool
    pool.new_listener.close()


def total(group: StatelessGroupCoordinator, size: int = 3) -> float:
    import torch

    return float(group.all_reduce(torch.full((size,), 10.0**group.rank))[0])


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
def test_release_ends_an_operation_and_the_group_is_formed_again(pool: ReplacingPool, name: str) -> None:
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


def test_released_while_members_are_absent(pool: ReplacingPool) -> None:
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


def test_released_while_gloo_waits_for_a_member_that_stopped_half_way(pool: ReplacingPool) -> None:
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


def test_released_while_waiting_for_the_store(pool: ReplacingPool) -> None:
    pool.run(check_no_store, free_port(), ranks=(1,))


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


def test_a_signal_interrupts_the_forming(pool: ReplacingPool) -> None:
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


def test_a_signal_in_an_operation_ends_the_group(pool: ReplacingPool) -> None:
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


def test_released_while_idle(pool: ReplacingPool) -> None:
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


def test_destroyed_by_another_thread_during_an_operation(pool: ReplacingPool) -> None:
    pool.run(check_destroyed_inside)
    pool.run(check_destroy, ranks=(2,))


def check_destroy(me: Rank) -> None:
    me.kept.pop("group").destroy()


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


def test_connections_of_others_are_not_touched(pool: ReplacingPool) -> None:
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


# Again and again


def check_many_cycles(me: Rank, cycles: int) -> tuple[int, int]:
    group = me.group("many")
    before = open_handles()
    for epoch in range(1, cycles + 1):
        assert total(group) == 111.0
        if epoch % 2 or me.rank == 2:
            group.release(REASON)
        else:
            over = threading.Event()  # rank 2 may have ended the operation before this thread could see it
            inside = partial(lambda over: over.is_set() or group.operation is not None, over)
            thread = alongside(lambda inside=inside: (wait_until(inside), group.release(REASON)))
            with pytest.raises(PeerLostError):
                group.recv_object(2)
            over.set()
            thread.join()
        group.reform(epoch)
    assert total(group) == 111.0
    grown = growth(before)
    group.destroy()
    return grown


def test_cycles_leave_descriptors_and_threads_flat(pool: ReplacingPool) -> None:
    assert pool.run(check_many_cycles, 100) == [(0, 0)] * 3


def check_own_store_cycles(me: Rank, port: int) -> None:
    with me.group("own store", coord_store=None, group_ports=[[port]], host=LOOPBACK) as group:
        for epoch in range(1, 6):
            assert total(group) == 111.0
            group.release(REASON)
            group.reform(epoch)
        assert total(group) == 111.0
        group.barrier()


def test_a_group_with_its_own_store_is_formed_again_on_it(pool: ReplacingPool) -> None:
    port = free_port()
    pool.run(check_own_store_cycles, port)
    socket.create_server((LOOPBACK, port)).close()  # free again


# The store


def check_closed_while_waiting(me: Rank) -> None:
    listener = socket.create_server((LOOPBACK, 0))
    server = GroupStore.serve(listener)
    client = GroupStore.connect(LOOPBACK, server.port)
    errors: list[BaseException] = []

    def wait(store: Any, key: str) -> None:
        try:
            store.set(f"{key} waits", "")
            store.wait([key], timedelta(seconds=1))
        except RuntimeError as exc:
            errors.append(exc)

    other = client.prefix("")
    stores = {"client": GroupStore.connect(LOOPBACK, server.port), "server": server}
    threads = [alongside(partial(wait, store.prefix(""), key)) for key, store in stores.items()]
    wait_until(lambda: other.check(["client waits", "server waits"]))
    for store in stores.values():
        store.close()
    client.close()
    other.set("client", "")  # one gets its key, the other its timeout
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    del stores, threads
    with GroupStore.serve(socket.create_server((LOOPBACK, 0))) as new:
        GroupStore.connect(LOOPBACK, new.port).prefix("").set("key", "1")
        assert new.prefix("").get("key") == b"1"


def test_a_store_is_closed_while_threads_wait_in_it(pool: ReplacingPool) -> None:
    pool.run(check_closed_while_waiting, ranks=(1,))


# Deaths; the last tests of the module


def reduce_for_ever(group: StatelessGroupCoordinator) -> None:
    while True:
        total(group)


def check_death(me: Rank, victim: int) -> str:
    """The victim is killed in a reduction; a survivor that got no error from its own connections is released."""
    me.kept["group"] = group = me.group(f"death of {victim}")
    survivors = me.group(f"survivors of {victim}", [[r for r in range(3) if r != victim], [victim]])
    pid = group.broadcast_object(os.getpid(), victim)

    def die_or_release() -> None:
        if me.rank == victim:
            wait_until(lambda: group.operation == "all_reduce")
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
        group.release(REASON)

    thread = threading.Thread(target=die_or_release)
    total(group)
    thread.start()
    with pytest.raises(PeerLostError) as caught:
        reduce_for_ever(group)
    thread.join()
    assert total(survivors) == sum(10.0**r for r in survivors.ranks)
    survivors.destroy()
    return str(caught.value)


def check_new_member(me: Rank, name: str, port: int | None) -> None:
    if port is not None and me.rank != 0:
        me.store = GroupStore.connect("127.0.0.1", port, WATCHDOG)
    if "group" in me.kept:
        me.kept["group"].reform(1, me.store)
    else:
        me.kept["group"] = me.group(name, epoch=1)
    assert total(me.kept["group"]) == 111.0
    me.kept["group"].barrier()
    me.kept.pop("group").destroy()


@pytest.mark.parametrize("victim", [2, 0], ids=["a member", "the owner of the store"])
def test_killed_rank_is_replaced_and_the_group_formed_again(mortal_pool: ReplacingPool, victim: int) -> None:
    mortal_pool.start(check_death, victim)
    mortal_pool.bury(victim)
    for rank in sorted({0, 1, 2} - {victim}):
        text = mortal_pool.result(rank)
        assert text.startswith("all_reduce ")
        assert f"coordinator group 'death of {victim}/0/0' (global ranks [0, 1, 2], this rank {rank})" in text
    mortal_pool.run(check_new_member, f"death of {victim}", None if victim else mortal_pool.new_port)
