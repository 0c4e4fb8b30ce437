"""Calls in flight: futures of every kind, back-pressure, cancelling, and streams of items."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import signal
import threading
import time

import pytest
from inflight_worker import Waits

import ray_shm
from ray_shm.actors import wire

SIZE = 3
RANKS = list(range(SIZE))
LONG = 600  # seconds that nobody waits for: whatever ends earlier was ended
HANG = 60


@pytest.fixture(scope="module", params=["shm", pytest.param("zmq", marks=pytest.mark.slow)])
def group(request, ray_local):
    with ray_shm.launch(Waits, num_workers=SIZE, transport=request.param, max_in_flight=500) as group:
        came = threading.Event()
        group.collective_rpc("rank", non_block=True).add_done_callback(lambda future: came.set())
        came.wait(HANG)  # the thread for callbacks stays
        group.collective_rpc("asleep", args=(0,))  # so do the workers' event loops
        yield group


def until(condition):
    """Wait for what another process does at its own time."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def collect(stream, seen):
    """Append the stream's items to `seen`, also those before an exception."""
    for item in stream:
        seen.append(item)


def await_running(group, method, ranks=RANKS):
    until(lambda: all(group.status()[r].method == method and group.status()[r].state == "running" for r in ranks))


# Futures


def test_futures_work_with_concurrent_futures(group):
    futures = [group.collective_rpc("echo", args=(i,), non_block=True) for i in range(20)]
    assert all(isinstance(f, concurrent.futures.Future) for f in futures)
    done, left = concurrent.futures.wait(futures, timeout=HANG)
    assert (len(done), len(left)) == (20, 0)
    results = {f.result()[0] for f in concurrent.futures.as_completed(futures, timeout=HANG)}
    assert results == set(range(20))


def test_wait_returns_the_first_to_end(group):
    slow = group.collective_rpc("sleep", args=(LONG,), non_block=True, target_ranks=[0])
    quick = group.collective_rpc("echo", args=("x",), non_block=True, target_ranks=[1])
    done, left = concurrent.futures.wait([slow, quick], HANG, concurrent.futures.FIRST_COMPLETED)
    assert (done, left) == ({quick}, {slow})
    assert slow.cancel()
    assert slow.cancelled()
    with pytest.raises(ray_shm.RpcCancelledError):
        slow.result()
    done, _ = concurrent.futures.wait([slow], HANG)
    assert done == {slow}
    assert group.collective_rpc("recall", target_ranks=[0]) == [["RpcCancelledError"]]


def test_futures_in_asyncio(group):
    async def main():
        futures = [group.collective_rpc("echo", args=(i,), non_block=True) for i in range(50)]
        return await asyncio.gather(*futures, *(group.collective_rpc_async("echo", args=(i,)) for i in range(50)))

    assert asyncio.run(main()) == [[i] * SIZE for i in [*range(50), *range(50)]]


def test_more_calls_than_may_be_in_flight_wait_their_turn(group):
    futures = [group.collective_rpc("echo", args=(i,), non_block=True) for i in range(2000)]
    assert group.stats().in_flight <= 500
    assert [f.result()[0] for f in futures] == list(range(2000))


def test_a_call_beyond_max_in_flight_runs_into_its_timeout(group):
    blocked = group.collective_rpc("sleep", args=(LONG,), non_block=True, target_ranks=[0])
    rest = [group.collective_rpc("echo", args=(i,), non_block=True, target_ranks=[0]) for i in range(499)]
    with pytest.raises(ray_shm.RpcTimeoutError, match=r"was not sent within 0\.05 s: 500 calls are under way"):
        group.collective_rpc("echo", 0.05, ("late",), target_ranks=[0])
    assert blocked.cancel()
    assert [f.result()[0] for f in rest] == list(range(499))
    assert group.collective_rpc("recall", target_ranks=[0]) == [["RpcCancelledError"]]


def test_an_event_loop_is_not_blocked_by_calls_beyond_max_in_flight(group):
    async def main():
        blocked = group.collective_rpc("sleep", args=(LONG,), non_block=True, target_ranks=[0])
        calls = [group.collective_rpc_async("echo", args=(i,), target_ranks=[0]) for i in range(600)]
        many = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.05)  # the loop still turns
        assert blocked.cancel()
        return await asyncio.gather(*many)

    assert asyncio.run(main()) == [[i] for i in range(600)]
    group.collective_rpc("recall")


# Cancelling


@pytest.mark.parametrize("method", ["sleep", "spin", "await_lock", "await_event", "asleep_blocking"])
def test_a_cancelled_call_is_interrupted_at_once_and_the_workers_live(group, method):
    pids = [w.pid for w in group.workers]
    future = group.collective_rpc(method, args=(LONG,), non_block=True)
    await_running(group, method)
    assert future.cancel()
    with pytest.raises(ray_shm.RpcCancelledError, match=f"{method}' was cancelled by its caller"):
        future.result()
    assert group.collective_rpc("recall") == [["RpcCancelledError"]] * SIZE
    assert [w.pid for w in group.workers] == pids


def test_a_cancelled_async_method_is_cancelled_where_it_awaits(group):
    future = group.collective_rpc("asleep", args=(LONG,), non_block=True)
    await_running(group, "asleep")
    assert future.cancel()
    assert group.collective_rpc("recall") == [["cancelled in an await"]] * SIZE
    assert group.collective_rpc("asleep", args=(0,)) == ["slept"] * SIZE  # its event loop is whole


def test_a_cancelled_call_that_has_not_begun_is_skipped(group):
    first = group.collective_rpc("sleep", args=(LONG,), non_block=True)
    await_running(group, "sleep")
    second = group.collective_rpc("sleep", args=(0,), non_block=True)
    assert second.cancel()
    assert first.cancel()
    assert group.collective_rpc("recall") == [["RpcCancelledError"]] * SIZE  # of the first; the second left no trace


def test_a_cancel_is_over_once_its_call_is(group):
    for _ in range(50):  # the next call of the same worker is never hit
        future = group.collective_rpc("sleep", args=(0,), non_block=True)
        future.cancel()
        assert group.collective_rpc("echo", args=("next",)) == ["next"] * SIZE
    group.collective_rpc("recall")


def test_user_code_may_clean_up(group):
    future = group.collective_rpc("swallow", args=(LONG,), non_block=True, target_ranks=[1])
    await_running(group, "swallow", [1])
    assert future.cancel()
    assert group.collective_rpc("rank") == RANKS


def test_a_timeout_does_not_cancel(group):
    with pytest.raises(ray_shm.RpcTimeoutError):
        group.collective_rpc("sleep", 0.05, (0.3,))
    assert group.collective_rpc("recall") == [[]] * SIZE


def test_cancelling_the_awaiting_task_cancels_the_call(group):
    async def main():
        task = asyncio.ensure_future(group.collective_rpc_async("sleep", args=(LONG,)))
        await asyncio.to_thread(await_running, group, "sleep")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert group.collective_rpc("recall") == [["RpcCancelledError"]] * SIZE


def test_ctrl_c_in_the_caller_cancels_the_call(group):
    def interrupt():
        await_running(group, "sleep")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        group.collective_rpc("sleep", args=(LONG,))
    thread.join()
    assert group.collective_rpc("recall") == [["RpcCancelledError"]] * SIZE


def test_a_cancel_hits_the_call_and_not_a_background_task(group):
    group.collective_rpc("begin_background")
    future = group.collective_rpc("asleep", args=(LONG,), non_block=True)
    await_running(group, "asleep")
    assert future.cancel()
    assert group.collective_rpc("end_background", HANG) == [True] * SIZE
    assert group.collective_rpc("recall") == [["cancelled in an await"]] * SIZE


def test_a_call_is_watched_once_however_many_wait_for_it(group):
    server = group._runtime.dispatcher._server
    future = group.collective_rpc("sleep", args=(LONG,), non_block=True)
    called = threading.Semaphore(0)
    for _ in range(20):
        future.add_done_callback(lambda future: called.release())
        until(lambda: not server._arrived)
    last = group.collective_rpc("sleep", args=(LONG,), non_block=True)
    last.add_done_callback(lambda future: called.release())
    until(lambda: last._call in list(server._watched))  # so all before it are, too
    assert list(server._watched).count(future._call) == 1
    assert last.cancel()
    assert future.cancel()
    assert all(called.acquire(timeout=HANG) for _ in range(21))
    group.collective_rpc("recall")


# Streams


def test_a_stream_gives_each_ranks_items_in_order(group):
    seen = list(group.stream("items", args=(100,)))
    assert [[i for r, i in seen if r == rank] for rank in RANKS] == [list(range(100))] * SIZE
    group.collective_rpc("recall")


def test_streams_of_callables_and_async_generators(group):
    assert sorted(group.stream(lambda worker: (x for x in [worker.rank()]))) == [(r, r) for r in RANKS]
    assert sorted(group.stream("aitems", args=(40,), target_ranks=[2])) == [(2, i) for i in range(40)]
    assert group.collective_rpc("recall", target_ranks=[2]) == [["async generator closed"]]


def test_a_stream_is_consumed_in_an_event_loop(group):
    async def main():
        return [item async for item in group.stream("items", args=(50,), target_ranks=[1])]

    assert asyncio.run(main()) == [(1, i) for i in range(50)]
    group.collective_rpc("recall")


def test_a_generator_is_not_far_ahead_of_its_consumer(group):
    with group.stream("items", args=(10**9,), target_ranks=[0]) as stream:
        assert [next(stream) for _ in range(50)] == [(0, i) for i in range(50)]
        until(lambda: group.status()[0].state == "running")
    log = group.collective_rpc("recall", target_ranks=[0])[0]
    assert log[-1] == "closed"
    assert len(log) - 1 <= 50 + 2 * 16  # what it was ahead by, the consumer's last message included


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stream_given_up_closes_the_generators(group, how):
    stream = group.stream("items", args=(10**9,))
    begun = set()
    for rank, _ in stream:
        begun.add(rank)
        if len(begun) == SIZE:  # one that has not begun would be skipped
            break
    if how == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    del stream
    gc.collect()
    assert [log[-1] for log in group.collective_rpc("recall")] == ["closed"] * SIZE


def test_a_generator_that_computes_is_interrupted(group):
    stream = group.stream("slow_items", args=(LONG,), target_ranks=[1])
    assert next(stream) == (1, 0)
    await_running(group, "slow_items", [1])
    stream.close()
    log = group.collective_rpc("recall", target_ranks=[1])[0]
    assert log in (["begun", "RpcCancelledError"], ["begun"])  # asleep, or still waiting to go on
    assert group.collective_rpc("rank") == RANKS


def test_an_exception_arrives_in_its_place_and_ends_the_stream_everywhere(group):
    stream = group.stream("fail_on", args=(2, 5))
    seen = []
    with pytest.raises(ray_shm.RpcError) as info:
        collect(stream, seen)
    assert [item for rank, item in seen if rank == 2] == [0, 1, 2, 3]
    assert str(info.value.failures[2]) == "no item 4"
    assert list(stream) == []
    for log in group.collective_rpc("recall")[:2]:
        assert log == [] or log[-1] == "closed"  # it may have been skipped


def test_a_stream_that_failed_ends_on_all_ranks_though_its_consumer_does_not_come_back(group):
    stream = group.stream("fail_on", args=(2, 5))
    next(stream)
    for log in group.collective_rpc("recall", HANG, target_ranks=[0, 1]):  # behind endless generators
        assert log == [] or log[-1] == "closed"
    stream.close()


def test_an_item_that_cannot_be_unpickled_ends_the_stream_on_its_rank_too(group):
    with pytest.raises(ray_shm.RpcError) as info:
        list(group.stream("broken_items", target_ranks=[0]))
    assert "cannot be unpickled here: ValueError" in str(info.value.failures[0])
    assert (list(info.value.failures), info.value.late_ranks) == ([0], [])
    log = group.collective_rpc("recall", HANG, target_ranks=[0])[0]
    assert log == [] or log[-1] == "closed"


@pytest.mark.parametrize(
    ("method", "swallowed"), [("stubborn_items", "RpcCancelledError"), ("astubborn_items", "CancelledError")]
)
def test_a_generator_that_swallows_its_cancel_ends_all_the_same(group, method, swallowed):
    with group.stream(method, target_ranks=[1]) as stream:
        assert next(stream) == (1, 0)
        until(lambda: any(place in group.stacks([1])[1] for place in ("time.sleep(600)", "in run_task")))
    log = group.collective_rpc("recall", HANG, target_ranks=[1])[0]
    assert log[-1:] in ([swallowed], [])  # none: it was on its way to fall asleep


@pytest.fixture
def no_room(group, monkeypatch):
    """The control queue has no room for the first twelve credits: more tries than there are items to try it after."""
    dispatcher, refused = group._runtime.dispatcher, []
    tell = dispatcher.tell

    def refuse(kind, *args):
        if kind != wire.CREDIT or len(refused) >= 12:
            return tell(kind, *args)
        refused.append(args)
        return False

    monkeypatch.setattr(dispatcher, "tell", refuse)
    return refused


def test_credits_for_which_there_was_no_room_are_given_later(group, no_room):
    assert list(group.stream("items", HANG, (100,), target_ranks=[0])) == [(0, i) for i in range(100)]
    assert len(no_room) == 12
    group.collective_rpc("recall")


def test_credits_for_which_there_was_no_room_are_given_later_in_an_event_loop(group, no_room):
    async def main():
        return [item async for item in group.stream("items", HANG, (100,), target_ranks=[0])]

    assert asyncio.run(main()) == [(0, i) for i in range(100)]
    assert len(no_room) == 12
    group.collective_rpc("recall")


def test_a_credit_heard_twice_counts_once(group, monkeypatch):
    dispatcher = group._runtime.dispatcher
    tell = dispatcher.tell
    monkeypatch.setattr(dispatcher, "tell", lambda kind, *args: [tell(kind, *args) for _ in range(50)][-1])
    with group.stream("items", args=(10**9,), target_ranks=[0]) as stream:
        assert [next(stream) for _ in range(50)] == [(0, i) for i in range(50)]
    monkeypatch.undo()
    log = group.collective_rpc("recall", target_ranks=[0])[0]
    assert len(log) - 1 <= 50 + 16


def test_what_is_no_generator_cannot_be_streamed_and_the_other_way_round(group):
    with pytest.raises(ray_shm.RpcError) as info:
        list(group.stream("rank", target_ranks=[0]))
    assert "'rank' returned int, not a generator" in str(info.value.failures[0])
    with pytest.raises(ray_shm.RpcError) as info:
        group.collective_rpc("items", args=(3,))
    assert "to get a generator's items use stream()" in str(info.value.failures[0])
    with pytest.raises(ray_shm.RpcError) as info:
        list(group.stream("one", target_ranks=[0]))
    assert "cannot be pickled" in str(info.value.failures[0])
    group.collective_rpc("recall")


def test_a_streams_timeout_is_for_all_of_it(group):
    stream = group.stream("slow_items", 0.3, (LONG,), target_ranks=[0])
    assert next(stream) == (0, 0)
    with pytest.raises(ray_shm.RpcTimeoutError, match="no reply from rank 0"):
        next(stream)
    log = group.collective_rpc("recall", target_ranks=[0])[0]
    assert log == ["begun", "RpcCancelledError"]


# What is going on


def test_status_shows_ranks_that_are_stuck_in_c(group):
    future = group.collective_rpc("hold_the_interpreter", args=(3.0,), non_block=True, target_ranks=[1])
    until(lambda: group.status(timeout=0)[1].state in ("running", "silent"))
    until(lambda: [row.state for row in group.status(timeout=0.05)][::2] == ["idle", "idle"])
    rows = group.status(timeout=0.05)
    assert rows[1].state in ("running", "silent")  # silent: on another node nobody else can tell
    if group.workers[1].transport == "shm":
        assert (rows[1].method, rows[1].pid) == ("hold_the_interpreter", group.workers[1].pid)
        assert "hold_the_interpreter" in str(rows)
        assert "hold_the_interpreter" in rows._repr_html_()
    stacks = group.stacks([1], timeout=0.5)
    assert "in hold_the_interpreter" in stacks[1]
    assert "=== rank 1 ===" in str(stacks)
    assert future.result() == ["held"]


def test_stacks_of_ranks_that_answer(group):
    future = group.collective_rpc("sleep", args=(LONG,), non_block=True)
    await_running(group, "sleep")
    stacks = group.stacks(timeout=HANG)
    assert list(stacks) == RANKS
    assert all("in sleep" in text and text.startswith("thread 'MainThread'") for text in stacks.values())
    future.cancel()
    group.collective_rpc("recall")


def test_a_late_rank_is_named_with_what_it_does(group):
    future = group.collective_rpc("sleep", args=(0.6,), non_block=True, target_ranks=[1])
    with pytest.raises(ray_shm.RpcTimeoutError) as info:
        group.collective_rpc("rank", 0.2)
    assert info.value.late_ranks == [1]
    assert "2/3 replied; no reply from rank 1" in str(info.value)
    if group.workers[1].transport == "shm":
        assert f"pid {group.workers[1].pid}, running 'sleep' (call " in str(info.value)
    assert future.result() == ["done"]


def test_a_slow_call_is_logged(ray_local, caplog):
    with (
        caplog.at_level(logging.WARNING, "ray_shm"),
        ray_shm.launch(Waits, num_workers=2, slow_call_warning=0.1) as group,
    ):
        caplog.clear()
        assert group.collective_rpc("sleep", args=(0.5,), target_ranks=[1]) == ["done"]
    lines = [record.getMessage() for record in caplog.records if "'sleep'" in record.getMessage()]
    assert 2 <= len(lines) <= 3  # after 0.1, 0.2 and 0.4 s; the last may be late
    assert all("0/1 replied; no reply from rank 1 (node " in line and "running 'sleep'" in line for line in lines)
