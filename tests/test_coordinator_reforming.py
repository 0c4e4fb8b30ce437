"""Coordinator groups formed again: many times, on their own store, with another process in place of a killed one."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from free_ports import free_port
from rank_pool import (
    LOOPBACK,
    WATCHDOG,
    Pool,
    Rank,
    alongside,
    growth,
    open_handles,
    serve_checks,
    total,
    wait_until,
)

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import PeerLostError
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
    port = free_port(LOOPBACK)
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
