"""Groups whose queues live in a driver actor: several clients at once, names, detached life, and every kind of end.

Clients in other processes are Ray actors (`Caller`) or scripts with a driver of their own.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import ray

import ray_shm

pytestmark = pytest.mark.usefixtures("ray_local")

HANG = 60.0  # seconds; only a hang takes that long


class Worker:
    def __init__(self):
        self.context = ray_shm.get_context()
        self.begun = []

    def rank(self):
        return self.context.rank

    def echo(self, value):
        return value

    def sleep(self, seconds, mark=None):
        self.begun.append(mark)
        try:
            time.sleep(seconds)
        except ray_shm.RpcCancelledError:
            self.begun.append("cancelled")
            raise
        return "slept"

    def history(self):
        begun, self.begun = self.begun, []
        return begun

    def count(self, n):
        yield from range(n)

    def endless(self):
        try:
            i = 0
            while True:
                yield i
                i += 1
        finally:
            self.begun.append("generator closed")

    def fail_or_meet(self, rank):
        import torch

        if self.context.rank == rank:
            raise ValueError("does not come")
        self.context.group().all_reduce(torch.ones(1))

    def hear(self):
        return self.context.group().broadcast_object(f"from {self.context.rank}", 1)

    def meet(self):
        import torch

        return float(self.context.group().all_reduce(torch.ones(1))[0])


class Caller:
    """A client in another process."""

    def __init__(self, name):
        self.group = ray_shm.connect(name)
        self.futures = []

    def pid(self):
        return os.getpid()

    def overlap(self, base, calls):
        """How many of the overlapping calls got another one's replies."""
        futures = [
            (base + i, self.group.collective_rpc("echo", args=(base + i,), non_block=True, target_ranks=[i % 2]))
            for i in range(calls)
        ]
        return sum(future.result(HANG) != [value] for value, future in futures)

    def begin(self, method, *args, ranks=None):
        self.futures.append(self.group.collective_rpc(method, args=args, non_block=True, target_ranks=ranks))

    def outcome(self):
        return type(self.futures.pop().exception(HANG)).__name__

    def call(self, method, *args):
        return self.group.collective_rpc(method, args=args, timeout=HANG)

    def states(self):
        return [w.state for w in self.group.workers]


@pytest.fixture(scope="module")
def group(ray_local):
    with ray_shm.launch(Worker, num_workers=2, name="shared") as group:
        group.collective_rpc("meet", timeout=HANG)
        for _ in range(3):
            group.collective_rpc("echo", args=(np.zeros(4_000_000, dtype=np.uint8),))
        yield group


@pytest.fixture
def caller(ray_local):
    made = []

    def make(name="shared"):
        made.append(ray.remote(Caller).options(num_cpus=0).remote(name))
        return made[-1]

    yield make
    pids = []
    for one in made:
        try:
            pids.append(ray.get(one.pid.remote()))
        except ray.exceptions.RayActorError:
            continue
        ray.kill(one)
    await_gone(pids)


def await_gone(pids):
    deadline = time.monotonic() + HANG
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def driver_pid(group):
    """From outside: the parent of nobody, but the process that holds the queues."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    assert {"name": "shared", "namespace": "ray_shm"} in actors
    return group._runtime._line.welcome.pid


# ---- one client ----------------------------------------------------------------------------------------------------


def test_it_shows_where_it_lives(group):
    assert "2 × Worker on 1 node through shm and driver actor 'shared', ready" in repr(group)
    assert [w.state for w in group.workers] == ["alive"] * 2
    assert os.getpid() != driver_pid(group)
    assert type(group._runtime._line).__name__ == "ShmDriverLine"
    group.check_health(timeout=HANG)
    assert group.stats().dead == ()


def test_large_arrays_both_ways(group):
    array = np.random.default_rng(0).integers(0, 255, 5_000_000, dtype=np.uint8)
    for got in group.collective_rpc("echo", args=(array,)):
        np.testing.assert_array_equal(got, array)
        got[0] += 1  # the receiver's own memory


def test_streams(group):
    items = list(group.stream("count", args=(40,)))
    for rank in (0, 1):
        assert [item for r, item in items if r == rank] == list(range(40))
    with group.stream("endless", target_ranks=[1]) as stream:
        assert [next(stream) for _ in range(50)] == [(1, i) for i in range(50)]
    assert group.collective_rpc("history", target_ranks=[1], timeout=HANG) == [["generator closed"]]


@pytest.mark.parametrize(
    ("method", "operation", "results"),
    [("meet", "all_reduce", [2.0, 2.0]), ("hear", "broadcast_object", ["from 1", "from 1"])],
)
def test_a_cancelled_collective_is_released(group, method, operation, results):
    """Whether a signal interrupts the wait (in a queue) or not (in gloo)."""
    assert group.collective_rpc(method, timeout=HANG) == results
    future = group.collective_rpc(method, non_block=True, target_ranks=[0])  # rank 1 does not come
    deadline = time.monotonic() + HANG
    while operation not in group.status()[0].operation:
        assert time.monotonic() < deadline, str(group.status())
        time.sleep(0.01)
    assert future.cancel()
    assert group.collective_rpc(method, timeout=HANG) == results


def test_cancel_reaches_the_workers(group):
    future = group.collective_rpc("sleep", args=(300, "x"), non_block=True)
    while group.status()[0].method != "sleep" or group.status()[1].method != "sleep":
        time.sleep(0.01)
    assert future.cancel()
    assert group.collective_rpc("history", timeout=HANG) == [["x", "cancelled"]] * 2


def test_status_and_stacks_while_workers_are_busy(group):
    future = group.collective_rpc("sleep", args=(300,), non_block=True, target_ranks=[1])
    while group.status()[1].state != "running":
        time.sleep(0.01)
    row = group.status()[1]
    assert (row.method, row.call_id) == ("sleep", future._call.call_id)
    assert "time.sleep(seconds)" in group.stacks([1], timeout=HANG)[1]
    assert "running 'sleep'" in future._call.progress()
    future.cancel()
    group.collective_rpc("history", timeout=HANG)


def test_a_failure_amid_a_collective_releases_the_others_and_the_group_meets_again(group):
    with pytest.raises(ray_shm.RpcError) as info:
        group.collective_rpc("fail_or_meet", args=(0,), timeout=HANG)
    assert isinstance(info.value.root_cause, ValueError)
    assert group.collective_rpc("meet", timeout=HANG) == [2.0, 2.0]


def test_ray_users_call_the_actor_itself(group):
    actor = ray.get_actor("shared", "ray_shm")
    assert ray.get(actor.collective_rpc.remote("rank", reduce="sum")) == 1
    with pytest.raises(ray_shm.RpcError):
        ray.get(actor.collective_rpc.remote("no_such_method"))


# ---- several clients ------------------------------------------------------------------------------------------------


def test_two_processes_at_once_never_get_each_others_replies(group, caller):
    one, other = caller(), caller()
    running = [one.overlap.remote(10_000, 1500), other.overlap.remote(20_000, 1500)]
    wrong = 0
    while ray.wait(running, num_returns=2, timeout=0)[1]:
        wrong += group.collective_rpc("echo", args=(7,)) != [7, 7]
    assert ray.get(running) == [0, 0]
    assert wrong == 0


def test_a_killed_client_takes_its_calls_along_and_nothing_else(group, caller):
    doomed, other = caller(), caller()
    assert ray.get(other.call.remote("rank")) == [0, 1]
    ray.get(doomed.begin.remote("sleep", 300, "doomed"))
    while [row.method for row in group.status()] != ["sleep"] * 2:
        time.sleep(0.01)
    queued = group.collective_rpc("history", non_block=True)
    os.kill(ray.get(doomed.pid.remote()), signal.SIGKILL)
    assert queued.result(HANG) == [["doomed", "cancelled"]] * 2
    assert ray.get(other.call.remote("rank")) == [0, 1]


def test_a_handle_passes_into_a_task(group):
    @ray.remote(num_cpus=0)
    def task(group, value):
        try:
            return group.collective_rpc("echo", args=(value,)), group.world_size, os.getpid()
        finally:
            group.close()

    replies, size, pid = ray.get(task.remote(group, 5))
    assert (replies, size) == ([5, 5], 2)
    assert pid != os.getpid()
    assert group.collective_rpc("rank") == [0, 1]


def test_a_local_group_does_not_travel():
    with ray_shm.launch(Worker, num_workers=1) as local, pytest.raises(TypeError, match='driver="actor"'):
        pickle.dumps(local)


def test_a_connected_handle_detaches(group):
    with ray_shm.connect("shared") as handle:
        late = handle.collective_rpc("sleep", args=(0.3,), non_block=True)
    assert late.result() == ["slept"] * 2  # close lets calls finish
    with pytest.raises(ray_shm.GroupClosedError):
        handle.collective_rpc("rank")
    dropped = ray_shm.connect("shared")
    assert dropped.collective_rpc("rank") == [0, 1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del dropped
        gc.collect()
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]
    assert group.collective_rpc("rank") == [0, 1]


def test_names(group):
    with pytest.raises(ValueError, match=r"'shared' is taken .* ray_shm.connect\('shared'"):
        ray_shm.launch(Worker, num_workers=1, name="shared")
    with pytest.raises(ValueError, match="no actor group 'nobody' in namespace 'ray_shm'; it has 'shared'"):
        ray_shm.connect("nobody")
    with pytest.raises(ValueError, match="in namespace 'elsewhere'; it has none"):
        ray_shm.connect("shared", namespace="elsewhere")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"driver": "remote"}, "none of"),
        ({"driver": "local", "name": "x"}, "name='x'"),
        ({"lifetime": "detached"}, "needs name"),
        ({"lifetime": "long", "name": "x"}, "detached"),
        ({"name": ""}, "not empty"),
    ],
)
def test_arguments_that_contradict_each_other(words, match):
    with pytest.raises(ValueError, match=match):
        ray_shm.launch(Worker, num_workers=1, **words)


# ---- deaths and ends ------------------------------------------------------------------------------------------------


def test_a_death_and_a_heal_reach_every_client(caller):
    group = ray_shm.launch(Worker, num_workers=2, name="healed")
    other = caller("healed")
    ray.get(other.begin.remote("sleep", 300, ranks=[1]))
    told, came = [], threading.Event()
    end = group.on_worker_death(lambda death: (told.append(death), came.set()))
    before = [w.pid for w in group.workers]
    os.kill(before[1], signal.SIGKILL)
    assert ray.get(other.outcome.remote()) == "RpcError"
    assert came.wait(HANG)
    end()
    assert (told[0].rank, told[0].pid, told[0].signal) == (1, before[1], signal.SIGKILL)
    assert [w.state for w in group.workers] == ["alive", "dead"]
    with pytest.raises(ray_shm.RpcError) as info:
        group.collective_rpc("rank")
    assert "killed by signal 9" in str(info.value)
    assert group.collective_rpc("rank", target_ranks=[0]) == [0]
    assert group.heal(timeout=math.inf) == [1]
    after = [w.pid for w in group.workers]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert group.collective_rpc("rank", timeout=HANG) == [0, 1]
    assert ray.get(other.call.remote("rank")) == [0, 1]
    assert ray.get(other.states.remote()) == ["alive"] * 2
    assert group.stats().heals == 1
    group.close()


def test_calls_wait_while_the_group_heals_itself():
    with ray_shm.launch(Worker, num_workers=1, driver="actor", auto_heal=True) as group:
        pid = group.workers[0].pid
        os.kill(pid, signal.SIGKILL)
        replies = None
        while replies is None:  # a call may be under way as the rank dies
            try:
                replies = group.collective_rpc("rank", timeout=HANG)
            except ray_shm.RpcError:
                continue
        assert replies == [0]
        assert group.workers[0].pid != pid


def test_shutdown_ends_the_group_for_every_client():
    creator = ray_shm.launch(Worker, num_workers=1, name="ended", lifetime="detached")
    creator.close()  # which only detaches
    group, other = ray_shm.connect("ended"), ray_shm.connect("ended")
    pending = group.collective_rpc("sleep", args=(300,), non_block=True)
    other.shutdown(timeout=0.2)
    with pytest.raises(ray_shm.GroupClosedError):
        pending.result(HANG)
    with pytest.raises(ray_shm.GroupClosedError, match=f"pid {os.getpid()} has shut it down"):
        group.collective_rpc("rank")
    assert "closed" in repr(group)
    group.close()
    with pytest.raises(ValueError, match="no actor group 'ended'"):
        ray_shm.connect("ended")


def test_close_on_the_launching_handle_lets_calls_finish_and_ends_the_group():
    group = ray_shm.launch(Worker, num_workers=1, driver="actor")
    pids = [w.pid for w in group.workers]
    future = group.collective_rpc("sleep", args=(0.5,), non_block=True)
    group.close()
    assert future.result() == ["slept"]
    await_gone(pids)


def test_a_constructor_that_raises_leaves_nothing():
    class Broken:
        def __init__(self):
            raise RuntimeError("cannot be made")

    with pytest.raises(ray_shm.StartError, match="cannot be made") as info:
        ray_shm.launch(Broken, num_workers=1, name="broken")
    assert isinstance(info.value.failures[0], RuntimeError)
    with pytest.raises(ValueError, match="no actor group 'broken'"):
        ray_shm.connect("broken")


@pytest.mark.parametrize("lifetime", [None, "detached"])
def test_the_driver_actors_death_ends_everything(lifetime):
    gpus = ray.available_resources()["GPU"]
    group = ray_shm.launch(Worker, num_workers=1, gpus_per_worker=1, name="mortal", lifetime=lifetime)
    pids = [w.pid for w in group.workers]
    future = group.collective_rpc("sleep", args=(300,), non_block=True)
    os.kill(group._runtime._line.welcome.pid, signal.SIGKILL)
    with pytest.raises(ray_shm.GroupClosedError, match=r"driver actor of the group is gone.* ended"):
        future.result(HANG)
    with pytest.raises(ray_shm.GroupClosedError):
        group.collective_rpc("rank")
    await_gone(pids)
    group.close()
    deadline = time.monotonic() + HANG
    while ray.available_resources().get("GPU") != gpus:
        assert time.monotonic() < deadline, "the GPU is still reserved"
        time.sleep(0.05)


SCRIPT = """
    import os, signal, sys
    import ray, ray_shm

    class Counter:
        def __init__(self): self.n = 0
        def add(self, k):
            self.n += k
            return self.n

    ray.init(address=sys.argv[1], log_to_driver=False)
    group = ray_shm.launch(Counter, num_workers=1, name="survivor", lifetime=LIFETIME)
    group.collective_rpc("add", args=(3,))
    print(group.workers[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_creator(lifetime):
    code = textwrap.dedent(SCRIPT).replace("LIFETIME", repr(lifetime))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", code, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout)


def test_a_detached_group_survives_its_creators_death():
    pid = run_creator("detached")
    with ray_shm.connect("survivor") as handle:
        assert handle.collective_rpc("add", args=(4,)) == [7]
    again = ray_shm.connect("survivor")
    assert again.collective_rpc("add", args=(1,)) == [8]
    again.shutdown()
    await_gone([pid])


def test_a_group_that_is_not_detached_ends_with_its_creator():
    await_gone([run_creator(None)])
