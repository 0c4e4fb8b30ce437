"""What collective calls promise, whatever the transport: run over shared memory, ZeroMQ, and two nodes.

A module that runs the suite provides the fixture `group`: four `Probe` workers, ready.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import ray_shm
from ray_shm import Scatter


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("this object refuses to be pickled")


class UnpicklableError(Exception):
    def __init__(self, a, b):  # pickles, and cannot be unpickled
        super().__init__(f"{a} and {b}")


@dataclass(frozen=True)
class FrozenError(Exception):  # takes no __traceback__ and no __cause__
    code: int

    def __str__(self):
        raise RuntimeError("nor can it be shown")


class BreaksOnArrival:
    def __reduce__(self):
        return _raise, ("broken on arrival",)


def _raise(text):
    raise OSError(text)


class Probe:
    def __init__(self, base=0):
        self.base = base
        self.seen = []

    def rank(self):
        return ray_shm.get_context().rank

    def echo(self, *args, **kwargs):
        return (*args, kwargs) if kwargs else args

    def add(self, a, b=0):
        return self.base + a + b

    def fail_on(self, rank):
        if self.rank() == rank:
            raise ValueError(f"rank {rank} was told to fail")
        return "fine"

    def remember(self, value):
        self.seen.append(value)

    def recall(self):
        seen, self.seen = self.seen, []
        return seen

    def sleep(self, seconds):
        time.sleep(seconds)
        return "slept"

    def fail_or_sleep(self, rank, seconds):
        if self.rank() == rank:
            raise KeyError("first")
        time.sleep(seconds)

    def exit(self, kind):
        raise kind("goodbye")

    def unpicklable(self):
        return Unpicklable()

    def raise_unpicklable(self):
        raise UnpicklableError(1, 2)

    def raise_frozen(self):
        raise FrozenError(3)

    def result_that_breaks(self):
        return BreaksOnArrival()

    def gil_free_ranks(self):
        context = ray_shm.get_context()
        return context.rank, context.local_rank, context.world_size, context.node_rank


def warm_up(group):
    """Make what a group makes lazily and keeps: it belongs to the fixture, not to the test that needs it first."""
    came = threading.Event()
    group.collective_rpc("rank", non_block=True).add_done_callback(lambda future: came.set())
    came.wait(30)
    for _ in range(3):
        group.collective_rpc("echo", args=(np.zeros(4_000_000, dtype=np.uint8),))


SIZE = 4
RANKS = list(range(SIZE))


class RpcSuite:
    def test_results_come_in_rank_order(self, group):
        assert group.world_size == SIZE
        assert group.collective_rpc("rank") == RANKS
        assert [w.rank for w in group.workers] == RANKS
        assert len({w.pid for w in group.workers}) == SIZE

    def test_arguments_by_position_and_name(self, group):
        assert group.collective_rpc("add", args=(1,), kwargs={"b": 2}) == [3] * SIZE
        assert group.collective_rpc("add", None, [5]) == [5] * SIZE

    def test_a_callable_gets_the_worker(self, group):
        offset = 10
        assert group.collective_rpc(lambda worker, x: worker.rank() + x + offset, args=(1,)) == [11, 12, 13, 14]

    def test_target_ranks_in_the_order_given(self, group):
        assert group.collective_rpc("rank", target_ranks=[3, 1]) == [3, 1]
        group.collective_rpc("remember", args=("x",), target_ranks=[2])
        assert group.collective_rpc("recall") == [[], [], ["x"], []]

    def test_scatter(self, group):
        assert group.collective_rpc("add", args=(Scatter([1, 2, 3, 4]),)) == [1, 2, 3, 4]
        results = group.collective_rpc("add", args=(100,), kwargs={"b": Scatter([7, 8])}, target_ranks=[2, 0])
        assert results == [107, 108]
        arrays = [np.full(5000, i) for i in RANKS]
        for rank, (got,) in enumerate(group.collective_rpc("echo", args=(Scatter(arrays),))):
            np.testing.assert_array_equal(got, arrays[rank])

    def test_scatter_of_the_wrong_length(self, group):
        with pytest.raises(ValueError, match="Scatter has 3 elements for 4 target ranks"):
            group.collective_rpc("add", args=(Scatter([1, 2, 3]),))
        assert group.collective_rpc("rank") == RANKS

    def test_unique_reply_rank(self, group):
        assert group.collective_rpc("rank", unique_reply_rank=2) == 2
        group.collective_rpc("remember", args=(1,), unique_reply_rank=0)
        assert group.collective_rpc("recall") == [[1]] * SIZE  # the others executed, too
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("fail_on", args=(3,), unique_reply_rank=3)
        assert list(info.value.failures) == [3]

    def test_reduce(self, group):
        assert group.collective_rpc("rank", reduce="min") == 0
        assert group.collective_rpc("rank", reduce="max") == 3
        assert group.collective_rpc("rank", reduce="sum") == 6
        assert group.collective_rpc("echo", args=("a",), reduce="sum") == ("a",) * SIZE  # no start value of 0
        assert group.collective_rpc("rank", reduce=lambda results: results[::-1]) == RANKS[::-1]
        assert group.collective_rpc("add", args=(1,), reduce="equal") == 1
        tensor = torch.arange(6.0).reshape(2, 3)
        (same,) = group.collective_rpc("echo", args=(tensor,), reduce="equal")
        assert torch.equal(same, tensor)

    def test_reduce_equal_shows_the_difference(self, group):
        with pytest.raises(
            ray_shm.MismatchError, match=r"ranks \[1, 2, 3\] differ from rank 0: rank 1 has 1, rank 0 has 0"
        ):
            group.collective_rpc("rank", reduce="equal")

    @pytest.mark.parametrize(
        ("error", "call"),
        [
            (ValueError, {"target_ranks": [4]}),
            (ValueError, {"target_ranks": [-1]}),
            (ValueError, {"target_ranks": []}),
            (ValueError, {"target_ranks": [1, 1]}),
            (ValueError, {"unique_reply_rank": 9}),
            (ValueError, {"unique_reply_rank": 0, "target_ranks": [1]}),
            (ValueError, {"unique_reply_rank": 0, "reduce": "sum"}),
            (ValueError, {"reduce": "mean"}),
            (TypeError, {"reduce": 5}),
            (TypeError, {"args": "abc"}),
            (TypeError, {"kwargs": [1]}),
        ],
    )
    def test_wrong_arguments_are_refused_before_sending(self, group, error, call):
        with pytest.raises(error):
            group.collective_rpc("remember", **call)
        assert group.collective_rpc("recall") == [[]] * SIZE

    def test_one_rank_raises(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("fail_on", args=(1,))
        error = info.value
        assert list(error.failures) == [1]
        assert isinstance(error.root_cause, ValueError)
        assert "in fail_on" in str(error.failures[1].__cause__)  # the remote traceback
        assert error.late_ranks == []
        assert group.collective_rpc("rank") == RANKS

    def test_except_star_finds_the_original(self, group):
        caught = []
        try:
            group.collective_rpc("fail_on", args=(0,))
        except* ValueError as found:
            caught = [(type(found), list(found.failures))]
        assert caught == [(ray_shm.RpcError, [0])]

    def test_a_failure_does_not_wait_for_the_others_for_ever(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("fail_or_sleep", args=(2, 3.5))  # beyond the grace of 2 s
        assert info.value.late_ranks == [0, 1, 3]
        assert group.collective_rpc("rank", timeout=30) == RANKS  # queues behind the sleepers, gets its own replies

    def test_a_missing_method_names_what_there_is(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("no_such_method")
        assert sorted(info.value.failures) == RANKS
        assert "has no method 'no_such_method'; it has: add, echo" in str(info.value.failures[0])

    def test_a_timeout_names_the_late_and_drops_their_replies(self, group):
        with pytest.raises(ray_shm.RpcTimeoutError) as info:
            group.collective_rpc(lambda worker: time.sleep(worker.rank() % 2 * 1.0) or "late", timeout=0.4)
        assert info.value.late_ranks == [1, 3]
        assert info.value.results == {0: "late", 2: "late"}
        assert f"pid {group.workers[1].pid}" in str(info.value)
        assert group.collective_rpc("rank") == RANKS

    def test_unpicklable_argument_is_the_callers_error(self, group):
        with pytest.raises(RuntimeError, match="refuses to be pickled"):
            group.collective_rpc("echo", args=(Unpicklable(),))
        with pytest.raises(TypeError):
            group.collective_rpc("echo", args=(threading.Lock(),))
        assert group.collective_rpc("rank") == RANKS

    def test_argument_that_cannot_be_unpickled(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("echo", args=(BreaksOnArrival(),))
        assert sorted(info.value.failures) == RANKS
        assert isinstance(info.value.failures[0], OSError)
        assert group.collective_rpc("rank") == RANKS

    def test_unpicklable_result_is_that_calls_error(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("unpicklable")
        assert "'unpicklable' on rank 0 (Unpicklable) cannot be pickled" in str(info.value.failures[0])
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("result_that_breaks")
        assert "cannot be unpickled here: OSError: broken on arrival" in str(info.value.failures[3])
        assert group.collective_rpc("rank") == RANKS

    def test_unpicklable_exception_keeps_its_text(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("raise_unpicklable")
        error = info.value.failures[0]
        assert isinstance(error, ray_shm.RemoteError)
        assert "UnpicklableError: 1 and 2" in str(error)
        assert "in raise_unpicklable" in str(error.__cause__)

    def test_an_exception_that_nothing_can_be_done_with(self, group):
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("raise_frozen")
        assert sorted(info.value.failures) == RANKS
        assert group.collective_rpc("rank") == RANKS  # every worker lives

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
    def test_exit_in_a_method_leaves_the_worker_alive(self, group, kind):
        pids = [w.pid for w in group.workers]
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("exit", args=(kind,))
        assert isinstance(info.value.failures[0], ray_shm.RemoteExitError)
        assert group.collective_rpc("rank") == RANKS
        assert [w.pid for w in group.workers] == pids

    def test_futures_overlap_and_never_cross(self, group):
        futures = [group.collective_rpc("add", args=(i,), non_block=True) for i in range(200)]
        assert [f.result() for f in reversed(futures)] == [[i] * SIZE for i in reversed(range(200))]
        assert all(f.done() and f.exception() is None for f in futures)

    def test_more_futures_than_the_ring_holds(self, group):
        payload = b"x" * 2000
        futures = [group.collective_rpc("echo", args=(i, payload), non_block=True) for i in range(3000)]
        assert [f.result(60)[0][0] for f in futures] == list(range(3000))

    def test_a_future_times_out_and_stays_failed(self, group):
        future = group.collective_rpc("sleep", args=(0.8,), non_block=True)
        assert not future.done()
        with pytest.raises(ray_shm.RpcTimeoutError):
            future.result(timeout=0.1)
        assert isinstance(future.exception(), ray_shm.RpcTimeoutError)
        assert group.collective_rpc("rank") == RANKS

    def test_a_cancelled_future(self, group):
        future = group.collective_rpc("sleep", args=(0.5,), non_block=True)
        assert future.cancel()
        assert future.cancelled()
        with pytest.raises(ray_shm.RpcCancelledError):
            future.result()
        assert group.collective_rpc("rank") == RANKS
        done = group.collective_rpc("rank", non_block=True)
        done.result()
        assert not done.cancel()

    def test_done_callbacks_run_without_a_waiter(self, group):
        came = threading.Event()
        future = group.collective_rpc("sleep", args=(0.2,), non_block=True)
        future.add_done_callback(lambda f: came.set() if f is future else None)
        assert came.wait(20)
        assert future.result() == ["slept"] * SIZE
        again = threading.Event()
        future.add_done_callback(lambda f: again.set())  # done already: at once
        assert again.is_set()

    def test_a_done_callback_may_call(self, group):
        outcome, came = [], threading.Event()

        def call_again(future):
            outcome.append(group.collective_rpc("add", args=(5,)))
            came.set()

        group.collective_rpc("sleep", args=(0.1,), non_block=True).add_done_callback(call_again)
        assert group.collective_rpc("rank") == RANKS
        assert came.wait(20)
        assert outcome == [[5] * SIZE]

    def test_done_turns_true_when_the_calls_timeout_has_passed(self, group):
        future = group.collective_rpc("sleep", timeout=0.2, args=(1.0,), non_block=True)
        deadline = time.monotonic() + 20
        while not future.done() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(future.exception(), ray_shm.RpcTimeoutError)
        assert group.collective_rpc("rank") == RANKS

    def test_asyncio(self, group):
        async def both():
            slow = group.collective_rpc_async("sleep", args=(0.3,))
            quick = [group.collective_rpc_async("add", args=(i,)) for i in range(20)]
            with pytest.raises(ray_shm.RpcTimeoutError):
                await group.collective_rpc_async("sleep", timeout=0.1, args=(0.5,))
            return await asyncio.gather(slow, *quick)

        slow, *quick = asyncio.run(both())
        assert slow == ["slept"] * SIZE
        assert quick == [[i] * SIZE for i in range(20)]

    def test_cancelling_a_task_drops_its_call(self, group):
        async def cancelled():
            task = asyncio.create_task(group.collective_rpc_async("sleep", args=(0.5,)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await group.collective_rpc_async("rank")

        assert asyncio.run(cancelled()) == RANKS

    def test_many_threads(self, group):
        wrong = []

        def caller(k):
            for i in range(50):
                value = k * 1000 + i
                targets = [(k + i) % SIZE, (k + i + 1) % SIZE]
                if group.collective_rpc("add", args=(value,), target_ranks=targets) != [value] * 2:
                    wrong.append(value)

        threads = [threading.Thread(target=caller, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []

    def test_a_thread_is_not_held_up_by_another_ones_slow_call(self, group):
        future = group.collective_rpc("sleep", args=(120.0,), target_ranks=[0], non_block=True)
        slow = threading.Thread(target=future.exception)
        slow.start()
        try:
            for _ in range(20):
                assert group.collective_rpc("rank", target_ranks=[1, 2, 3], timeout=60) == [1, 2, 3]
            assert slow.is_alive()
        finally:
            future.cancel()
            slow.join()

    def test_large_arguments_and_results(self, group):
        array = np.random.default_rng(0).integers(0, 255, 3_000_000, dtype=np.uint8)
        tensor = torch.randn(300, 700).to(torch.bfloat16)
        for _ in range(3):
            for got, same in group.collective_rpc("echo", args=(array, tensor)):
                np.testing.assert_array_equal(got, array)
                assert torch.equal(same, tensor)
                got[0] += 1  # the receiver's own memory

    def test_check_health(self, group):
        assert group.check_health(timeout=20) is None
        future = group.collective_rpc("sleep", args=(120.0,), target_ranks=[2], non_block=True)
        with pytest.raises(ray_shm.RpcTimeoutError) as info:
            group.check_health(timeout=0.2)
        assert info.value.late_ranks == [2]
        future.cancel()
        group.check_health(timeout=20)

    def test_context(self, group):
        rows = group.collective_rpc("gil_free_ranks")
        assert [(rank, size) for rank, _, size, _ in rows] == [(r, SIZE) for r in RANKS]
        assert [w.local_rank for w in group.workers] == [local for _, local, _, _ in rows]

    def test_the_world_group_needs_no_declaration(self, group):
        def total(worker):
            import torch

            return int(ray_shm.get_context().group().all_reduce(torch.tensor([worker.rank() + 1]))[0])

        assert group.collective_rpc(total, timeout=60) == [10] * SIZE
