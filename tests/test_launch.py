"""From launch to close: what starts, what is refused, what dies, and that nothing is left over.

The leak fixture checks after every test that no process, placement group, memory, port or thread remains.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
import ray

import ray_shm
from ray_shm import Scatter


class Worker:
    def __init__(self, *args, fail_on=None, exit_on=None, **kwargs):
        self.context = ray_shm.get_context()
        self.args, self.kwargs = args, kwargs
        if self.context.rank == fail_on:
            raise RuntimeError(f"constructor of rank {fail_on} was told to fail")
        if self.context.rank == exit_on:
            os._exit(7)

    def rank(self):
        return self.context.rank

    def arguments(self):
        return self.args, self.kwargs

    def gpus(self):
        return self.context.gpu_ids, os.environ.get("CUDA_VISIBLE_DEVICES")

    def echo(self, value):
        return value

    def sleep(self, seconds):
        time.sleep(seconds)
        return "slept"

    def exit_process(self, rank):
        if self.context.rank == rank:
            os._exit(3)
        return "alive"

    def groups_of(self):
        return {name: self.context.group(name).ranks for name in ("tp", "pp")}

    def sum_in(self, name):
        import torch

        return int(self.context.group(name).all_reduce(torch.tensor([self.context.rank]))[0])


def used_resources():
    total, free = ray.cluster_resources(), ray.available_resources()
    return {name: total[name] - free.get(name, 0) for name in ("CPU", "GPU") if total[name] != free.get(name, 0)}


@pytest.fixture
def all_free(ray_local):
    """Every test starts and ends with all of Ray's resources free."""
    yield
    deadline = time.monotonic() + 30
    while used_resources() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert used_resources() == {}


pytestmark = pytest.mark.usefixtures("all_free")


def test_constructor_arguments_and_scatter():
    with ray_shm.launch(Worker, num_workers=2, args=(1, Scatter("ab")), kwargs={"x": Scatter([5, 6]), "y": 0}) as group:
        assert group.collective_rpc("arguments") == [((1, "a"), {"x": 5, "y": 0}), ((1, "b"), {"x": 6, "y": 0})]


def test_gpus_are_pinned_and_never_shared():
    with ray_shm.launch(Worker, num_workers=4, gpus_per_worker=1) as first:
        with ray_shm.launch(Worker, num_workers=2, gpus_per_worker=2) as second:
            seen = [*first.collective_rpc("gpus"), *second.collective_rpc("gpus")]
            assert [len(ids) for ids, _ in seen] == [1] * 4 + [2] * 2
            assert sorted(gpu for ids, _ in seen for gpu in ids) == [str(i) for i in range(8)]
            assert all(visible == ",".join(ids) for ids, visible in seen)
            assert [w.gpu_ids for w in first.workers] == [ids for ids, _ in seen[:4]]
            with pytest.raises(ray_shm.PlacementError) as info:
                ray_shm.launch(Worker, num_workers=4, gpus_per_worker=1, start_timeout=1)
            assert "4 × {GPU: 1}" in str(info.value)
        with ray_shm.launch(Worker, num_workers=1, gpus_per_worker=4) as third:
            assert third.collective_rpc("rank") == [0]


def test_more_gpus_than_the_cluster_has():
    with pytest.raises(ray_shm.PlacementError) as info:
        ray_shm.launch(Worker, num_workers=9, gpus_per_worker=1, start_timeout=1)
    text = str(info.value)
    assert "9 × {GPU: 1}" in text
    assert "the cluster has 8 CPU, 8 GPU" in text
    assert re.search(r"after [\d.]+ s", text)


def test_visible_devices_replaced_by_the_user_are_refused():
    with pytest.raises(ray_shm.PlacementError, match="CUDA_VISIBLE_DEVICES"):
        ray_shm.launch(
            Worker, num_workers=2, gpus_per_worker=1, runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "0"}}
        )


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "num_workers=0", {"num_workers": 0}),
        (TypeError, "num_workers", {"num_workers": "2"}),
        (ValueError, "transport", {"transport": "tcp"}),
        (ValueError, "backend", {"backend": "mpi"}),
        (ValueError, "start_timeout", {"start_timeout": 0}),
        (ValueError, "Scatter has 3 elements for 2", {"args": (Scatter([1, 2, 3]),)}),
        (TypeError, "args must be", {"args": "abc"}),
        (TypeError, "cannot be pickled", {"args": (threading.Lock(),)}),
        (ValueError, "reserved", {"groups": {"world": [[0, 1]]}}),
        (ValueError, "there is no rank", {"groups": {"tp": [[0, 2]]}}),
        (ValueError, "appear twice", {"groups": {"tp": [[0, 1], [1]]}}),
        (ValueError, "whole GPUs", {"gpus_per_worker": 1.5}),
        (ValueError, "0 or more", {"cpus_per_worker": -1}),
        (ValueError, "SPRAED", {"strategy": "SPRAED"}),
    ],
)
def test_wrong_arguments_start_nothing(error, match, change):
    with pytest.raises(error, match=match):
        ray_shm.launch(**{"worker_cls": Worker, "num_workers": 2, **change})
    with pytest.raises(TypeError, match="worker_cls must be a class"):
        ray_shm.launch("Worker", num_workers=1)


def test_a_constructor_that_raises_on_one_rank():
    with pytest.raises(ray_shm.StartError) as info:
        ray_shm.launch(Worker, num_workers=3, kwargs={"fail_on": 1})
    error = info.value
    assert "rank 1 (pid " in str(error)
    assert "failed in its constructor: RuntimeError: constructor of rank 1 was told to fail" in str(error)
    assert isinstance(error.__cause__, RuntimeError)
    assert list(error.failures) == [1]
    assert "in __init__" in str(error.__cause__.__cause__)  # the remote traceback


def test_a_worker_that_dies_in_its_constructor():
    with pytest.raises(ray_shm.StartError, match=r"rank 1 \(pid \d+, node .*\) failed in start: .*process died"):
        ray_shm.launch(Worker, num_workers=2, kwargs={"exit_on": 1})


def test_a_constructor_that_takes_too_long():
    class Slow:
        def __init__(self):
            time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(ray_shm.StartError, match=r"did not start within"):
        ray_shm.launch(Slow, num_workers=1, start_timeout=8)
    assert time.monotonic() - begun < 40


def test_coordinator_groups_exist_before_the_constructor_runs():
    class InConstructor(Worker):
        def __init__(self):
            super().__init__()
            import torch

            self.total = int(self.context.group("tp").all_reduce(torch.tensor([self.context.rank + 1]))[0])

        def totals(self):
            return self.total

    groups = {"tp": [[0, 1], [2]], "pp": [[0, 2], [1]]}
    with ray_shm.launch(InConstructor, num_workers=3, groups=groups) as group:
        assert group.collective_rpc("totals") == [3, 3, 3]
        expected = [{"tp": [0, 1], "pp": [0, 2]}, {"tp": [0, 1], "pp": [1]}, {"tp": [2], "pp": [0, 2]}]
        assert group.collective_rpc("groups_of") == expected
        assert group.collective_rpc("sum_in", args=("pp",), timeout=60) == [2, 1, 2]
        assert group.collective_rpc("sum_in", args=("world",), timeout=60) == [3, 3, 3]
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("sum_in", args=("dp",))
        assert isinstance(info.value.failures[0], LookupError)


def test_a_group_without_rank_0():
    with ray_shm.launch(Worker, num_workers=3, groups={"pp": [[1, 2]]}) as group:
        assert group.collective_rpc("sum_in", args=("pp",), target_ranks=[2, 1], timeout=60) == [3, 3]


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_worker_killed_during_a_call(transport):
    with ray_shm.launch(Worker, num_workers=3, transport=transport) as group:
        victim = group.workers[1]
        future = group.collective_rpc("sleep", args=(30,), non_block=True)
        group.collective_rpc("rank", target_ranks=[0], non_block=True).cancel()
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(ray_shm.RpcError) as info:
            future.result(timeout=30)
        death = info.value.root_cause
        assert isinstance(death, ray_shm.WorkerDiedError)
        assert (death.rank, death.pid, death.node) == (1, victim.pid, victim.node_ip)
        assert info.value.late_ranks == [0, 2]
        assert [w.state for w in group.workers] == ["alive", "dead", "alive"]
        with pytest.raises(ray_shm.RpcError, match="was not sent"):
            group.collective_rpc("rank")
        begun = time.monotonic()
        group.close(timeout=1)  # the others still sleep: they are ended by force
        assert time.monotonic() - begun < 20


def test_the_others_live_on_after_a_death():
    with ray_shm.launch(Worker, num_workers=3) as group:
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("exit_process", args=(2,))
        assert isinstance(info.value.failures[2], ray_shm.WorkerDiedError)
        for i in range(1000):  # 2 KiB each: more than the ring holds: nobody waits for the dead reader
            echoes = group.collective_rpc("echo", args=((i, b"x" * 2048),), target_ranks=[0, 1])
            assert [echo[0] for echo in echoes] == [i, i]
        with pytest.raises(ray_shm.RpcError):
            group.check_health()


def test_a_worker_that_died_while_idle_is_noticed_by_the_next_call():
    with ray_shm.launch(Worker, num_workers=2) as group:
        os.kill(group.workers[0].pid, signal.SIGKILL)
        with pytest.raises(ray_shm.RpcError) as info:
            group.collective_rpc("rank", timeout=30)
        assert isinstance(info.value.root_cause, ray_shm.WorkerDiedError)


def test_close_lets_calls_finish_and_is_idempotent():
    group = ray_shm.launch(Worker, num_workers=2)
    future = group.collective_rpc("sleep", args=(0.5,), non_block=True)
    assert group.close() is None
    assert future.result() == ["slept"] * 2
    group.close()
    with pytest.raises(ray_shm.GroupClosedError):
        group.collective_rpc("rank")
    with pytest.raises(ray_shm.GroupClosedError):
        group.check_health()
    assert "closed" in repr(group)
    assert [w.state for w in group.workers] == ["closed"] * 2


def test_close_from_two_threads_while_a_third_calls():
    group = ray_shm.launch(Worker, num_workers=2)
    outcome = []

    def call_for_ever():
        try:
            while True:
                group.collective_rpc("rank")
        except ray_shm.GroupClosedError as exc:
            outcome.append(exc)

    caller = threading.Thread(target=call_for_ever)
    closers = [threading.Thread(target=group.close) for _ in range(2)]
    for thread in (caller, *closers):
        thread.start()
    for thread in (caller, *closers):
        thread.join(60)
        assert not thread.is_alive()
    assert len(outcome) == 1


def test_a_stuck_worker_is_ended_by_force():
    group = ray_shm.launch(Worker, num_workers=2)
    future = group.collective_rpc("sleep", args=(100,), target_ranks=[1], non_block=True)
    group.close(timeout=0.5)
    with pytest.raises(ray_shm.GroupClosedError):
        future.result()


def test_a_dropped_group_closes_itself_with_a_warning():
    group = ray_shm.launch(Worker, num_workers=1)
    pid = group.workers[0].pid
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del group
        gc.collect()
    assert any(issubclass(w.category, ResourceWarning) and "without close" in str(w.message) for w in caught)
    assert not Path(f"/proc/{pid}").exists()


def test_a_placement_group_of_the_user_is_used_and_kept():
    pg = ray.util.placement_group([{"CPU": 1}, {"GPU": 1, "CPU": 1}, {"GPU": 1}])
    try:
        with ray_shm.launch(Worker, num_workers=2, gpus_per_worker=1, placement_group=pg) as group:
            assert len({ids for ids, _ in group.collective_rpc("gpus")}) == 2
        assert ray.util.placement_group_table(pg)["state"] == "CREATED"
        with pytest.raises(ray_shm.PlacementError):
            ray_shm.launch(Worker, num_workers=3, gpus_per_worker=1, placement_group=pg, start_timeout=1)
    finally:
        ray.util.remove_placement_group(pg)


def test_it_prints_as_a_table():
    with ray_shm.launch(Worker, num_workers=2) as group:
        assert "2 × Worker on 1 node through shm, ready" in repr(group)
        assert f"<td>{group.workers[1].pid}</td>" in group._repr_html_()


def test_outside_of_a_worker_there_is_no_context():
    with pytest.raises(RuntimeError, match="inside a worker"):
        ray_shm.get_context()


SCRIPT = """
    import os, signal, sys, threading, time
    import ray, ray_shm

    class Adder:
        def add(self, box): return box.value + 1

    class Box:
        def __init__(self, value): self.value = value

    ray.init(address=sys.argv[1], log_to_driver=False)
    group = ray_shm.launch(Adder, num_workers=2)
    assert group.collective_rpc("add", args=(Box(4),)) == [5, 5]
    assert group.collective_rpc(lambda w, b: type(b) is Box and Box(b.value), args=(Box(1),))[1].value == 1
    print(*(w.pid for w in group.workers), flush=True)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("group.close()", 0),
        pytest.param("pass", 0, marks=pytest.mark.slow),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
    ids=["close", "exit-without-close", "sigkill"],
)
def test_main_classes_work_and_no_end_of_the_driver_leaves_a_worker(end, status):
    code = textwrap.dedent(SCRIPT).replace("{end}", end)
    # Ray itself leaves processes behind when a driver that had started it is killed; so that one joins a cluster.
    address = "local" if end == "pass" else ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
