"""What happens when things meet: callbacks that call, Ctrl-C in a thread that serves others, groups that broke."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import ray_shm

HANG = 60  # seconds; only a hang takes that long
armed = threading.Event()


def interrupt_once():
    """Runs while the result is unpickled, by whatever thread leads."""
    if armed.is_set():
        armed.clear()
        raise KeyboardInterrupt
    return "unpickled"


class Interrupts:
    def __reduce__(self):
        return interrupt_once, ()


class Meets:
    def __init__(self):
        self.group = ray_shm.get_context().group("pair")

    def rank(self):
        return ray_shm.get_context().rank

    def pid(self):
        return os.getpid()

    def echo(self, value):
        return value

    def sleep(self, seconds):
        time.sleep(seconds)

    def interrupting(self):
        return Interrupts()

    def meet(self):
        import torch

        return self.group.all_reduce(torch.ones(1)).item()

    def break_it(self):
        self.group.release("it was told to")
        return self.meet()

    def fail_or_come_late(self, rank, seconds):
        if self.rank() == rank:
            raise ValueError("does not come")
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # no thread of this process can answer meanwhile
        return self.meet()


@pytest.fixture(scope="module")
def group(ray_local):
    with ray_shm.launch(Meets, num_workers=2, groups={"pair": [[0, 1]]}, failure_grace=0.2) as group:
        came = threading.Event()
        group.collective_rpc("meet", non_block=True).add_done_callback(lambda future: came.set())
        came.wait(HANG)  # the thread for callbacks stays
        yield group


def test_done_callbacks_may_call_although_there_is_no_room(group):
    outcomes, failures = [], []
    all_came = threading.Event()

    def call_again(future):
        try:
            again = group.collective_rpc("echo", args=("again",), non_block=True)
            again.add_done_callback(note)
        except Exception as exc:
            failures.append(exc)

    def note(future):
        outcomes.append(future.result())
        if len(outcomes) == 2000:
            all_came.set()

    for _ in range(2000):  # of 2 KiB, into a ring of 1 MiB
        group.collective_rpc("echo", args=(b"x" * 2048,), non_block=True).add_done_callback(call_again)
    assert all_came.wait(HANG), (len(outcomes), failures[:1])
    assert failures == []
    assert outcomes == [["again"] * 2] * 2000


def test_ctrl_c_in_the_leading_thread_costs_no_other_its_reply(group):
    results = []
    main_leads = threading.Event()

    def other():
        main_leads.wait(HANG)
        results.append(group.collective_rpc("interrupting", HANG, target_ranks=[1]))

    thread = threading.Thread(target=other)
    thread.start()
    armed.set()
    future = group.collective_rpc("sleep", args=(HANG,), target_ranks=[0], non_block=True)
    threading.Timer(0.2, main_leads.set).start()
    with pytest.raises(KeyboardInterrupt):
        future.result()
    thread.join(HANG)
    assert results == [["unpickled"]]
    assert group.collective_rpc("rank") == [0, 1]


def test_groups_are_formed_again_though_a_rank_could_not_answer_in_time(group):
    with pytest.raises(ray_shm.RpcError) as info:
        group.collective_rpc("fail_or_come_late", args=(0, 2.0))
    assert isinstance(info.value.failures[0], ValueError)
    assert info.value.late_ranks == [1]
    assert group.collective_rpc("rank") == [0, 1]  # ahead of this, the groups are settled without rank 1's answer
    assert group.collective_rpc("meet", HANG) == [2.0, 2.0]


def test_groups_that_broke_without_any_rank_missing_are_formed_again(group):
    with pytest.raises(ray_shm.RpcError) as info:
        group.collective_rpc("break_it")
    assert {type(e) for e in info.value.failures.values()} == {ray_shm.PeerLostError}
    assert group.collective_rpc("meet", HANG) == [2.0, 2.0]


def test_calls_of_other_threads_wait_until_the_groups_are_formed_again(group):
    for _ in range(5):
        with pytest.raises(ray_shm.RpcError):
            group.collective_rpc("break_it", target_ranks=[0])
        with ThreadPoolExecutor(4) as threads:
            results = [f.result(HANG) for f in [threads.submit(group.collective_rpc, "meet", HANG) for _ in range(4)]]
        assert results == [[2.0, 2.0]] * 4


def test_an_awaited_call_waits_for_a_replacement_and_the_event_loop_does_not(ray_local):
    with ray_shm.launch(Meets, num_workers=2, groups={"pair": [[0, 1]]}, auto_heal=True) as group:
        pids = group.collective_rpc("pid")
        future = group.collective_rpc("sleep", args=(HANG,), target_ranks=[1], non_block=True)
        os.kill(pids[1], signal.SIGKILL)
        with contextlib.suppress(ray_shm.RpcError):
            future.result(HANG)

        async def main():
            call = asyncio.ensure_future(group.collective_rpc_async("pid", HANG))
            turns = 0
            while not call.done():
                await asyncio.sleep(0.01)
                turns += 1
            return await call, turns

        new, turns = asyncio.run(main())
        assert new[0] == pids[0]
        assert new[1] != pids[1]
        assert turns > 1
        assert group.collective_rpc("meet", HANG) == [2.0, 2.0]
