"""Every way a group can end: nothing of it is left, whatever its workers are doing at that moment.

Drivers that die are processes of their own, which join this module's Ray or start one. Their workers are made busy in
ways that no signal handler or thread of the worker could interrupt. The leak fixture looks for what remains, too.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

import ray_shm

HANG = 60.0  # seconds; a watchdog. What blocks a worker blocks it for longer
LONG = 600


class Worker:
    """Its methods first leave a note in `folder`, so that the test knows that they have begun."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.rank = ray_shm.get_context().rank

    def note(self, text="began"):
        (self.folder / f"{self.rank}-{text}").touch()

    def idle(self):
        self.note()

    def in_sleep(self, seconds=LONG):
        self.note()
        time.sleep(seconds)
        return "slept"

    def in_c_with_the_gil(self):
        self.note()
        ctypes.PyDLL(None).sleep(LONG)

    def swallowing_everything(self):
        self.note()
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(LONG)

    def stopped(self):
        self.note()
        os.kill(os.getpid(), signal.SIGSTOP)

    def with_children(self):
        forked = multiprocessing.get_context("fork")
        processes = [forked.Process(target=time.sleep, args=(LONG,), daemon=daemon) for daemon in (True, False)]
        for process in processes:
            process.start()
        shell = subprocess.Popen(["sh", "-c", f"sleep {LONG} & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        self.children = [*processes, shell]
        pids = [shell.pid, int(shell.stdout.readline()), *(process.pid for process in processes)]
        (self.folder / "children").write_text(json.dumps(pids))
        self.note()

    def with_exit_handlers(self):
        atexit.register(self.note, "exit-handler-ran")
        threading.Thread(target=lambda: (time.sleep(0.5), self.note("thread-ended"))).start()

    def with_a_thread_that_never_ends(self):
        threading.Thread(target=time.sleep, args=(LONG,)).start()


STATES = ("idle", "in_sleep", "in_c_with_the_gil", "swallowing_everything", "stopped", "with_children")


def occupy(group, folder, states=STATES):
    """Bring rank k of `group` into state k; every pid that must go when the group does."""
    for rank, state in enumerate(states):
        group.collective_rpc(state, target_ranks=[rank], non_block=True)
    await_true(lambda: len(list(Path(folder).glob("*-began"))) == len(states))
    children = Path(folder) / "children"
    return [w.pid for w in group.workers] + (json.loads(children.read_text()) if children.exists() else [])


def await_true(condition):
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_there(pid):
    """A process that ended, and that nobody has reaped yet, is gone: it holds no memory and no GPU."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def await_gone(pids):
    await_true(lambda: not any(is_there(pid) for pid in pids))


def used_gpus():
    return ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0)


@pytest.fixture(autouse=True)
def gpus_are_free_in_the_end(ray_local):
    yield
    await_true(lambda: used_gpus() == 0)


DRIVER = """
    import os, signal, sys, threading
    import ray, ray_shm
    from test_lifecycle import STATES, Worker, occupy

    address, folder = sys.argv[1:]
    more = dict(num_cpus=8, num_gpus=8, include_dashboard=False) if address == "local" else {}
    ray.init(address=address, log_to_driver=False, **more)
    states = STATES if {occupied} else ("idle",)
    group = ray_shm.launch(Worker, num_workers=len(states), gpus_per_worker=1, args=(folder,))
    print(*occupy(group, folder, states), flush=True)
    sys.stdin.readline()
    {end}
    memory = [fd for fd in os.listdir("/proc/self/fd") if "ray_shm" in (os.path.realpath(f"/proc/self/fd/{fd}"))]
    print("closed", len(memory), flush=True)
"""


class Driver:
    """A driver in a process of its own. pids: what has to go when it does."""

    def __init__(self, folder, end="pass", address="local", occupied=True):
        folder.mkdir()
        code = textwrap.dedent(DRIVER).replace("{occupied}", str(occupied)).replace("{end}", end)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", code, address, str(folder)], text=True, **pipes)
        self.own_ray = address == "local"

    def await_ready(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.pids = [int(pid) for pid in line.split()]
        self.below = psutil.Process(self.process.pid).children(recursive=True) if self.own_ray else []
        return self

    def process_of_ray(self, name):
        return next(p for p in self.below if p.name() == name)

    def go_on(self):
        """Let it run to its end; its exit status, the lines it printed, and its error output."""
        out, err = self.process.communicate("\n", timeout=HANG)
        return self.process.returncode, out.splitlines(), err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        for process in self.below if self.own_ray else ():  # Ray's agents outlive a raylet for a while
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def this_cluster():
    return ray.get_runtime_context().gcs_address


def test_sigkill_of_a_driver_that_joined(tmp_path):
    with Driver(tmp_path / "d", address=this_cluster()).await_ready() as driver:
        assert used_gpus() == len(STATES)
        driver.process.kill()
        await_gone(driver.pids)
        await_true(lambda: used_gpus() == 0)


@pytest.mark.slow  # most of this path is in the next test, too
def test_sigkill_of_a_driver_that_started_ray(tmp_path):
    with Driver(tmp_path / "d").await_ready() as driver:
        raylet = driver.process_of_ray("raylet")
        driver.process.kill()
        await_gone([*driver.pids, raylet.pid])


def test_sigkill_of_the_raylet_and_close_after_it(tmp_path):
    with Driver(tmp_path / "d", end="group.close()").await_ready() as driver:
        driver.process_of_ray("raylet").kill()
        await_gone(driver.pids)
        status, out, err = driver.go_on()
        assert (status, out[-1]) == (0, "closed 0"), err


@pytest.mark.slow
def test_close_after_rays_head_was_killed(tmp_path):
    with Driver(tmp_path / "d", end="group.close(timeout=1)").await_ready() as driver:
        driver.process_of_ray("gcs_server").kill()
        driver.process.stdin.write("\n")
        driver.process.stdin.flush()
        assert "closed 0\n" in iter(driver.process.stdout.readline, "")  # what Ray does afterwards is its own
        await_gone(driver.pids)


@pytest.mark.slow
def test_sigkill_of_an_actor_that_drives_a_group(tmp_path):
    @ray.remote(num_cpus=0)
    class Driving:
        def start(self, folder):
            self.group = ray_shm.launch(Worker, num_workers=len(STATES), gpus_per_worker=1, args=(folder,))
            placement_group = self.group._runtime.reservation.placement_group
            return os.getpid(), occupy(self.group, folder), placement_group

    driving = Driving.remote()
    pid, pids, placement_group = ray.get(driving.start.remote(str(tmp_path)), timeout=HANG)
    os.kill(pid, signal.SIGKILL)
    await_gone(pids)
    ray.util.remove_placement_group(placement_group)  # Ray would keep it until the actor's job has ended, too


ENDS = {
    "end of the script": ("group.in_use = True", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise LookupError('on purpose')", 1),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", None),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", None),
    "ray.shutdown, then close": ("ray.shutdown(); group.close()", 0),
}


def test_each_way_a_driver_ends_by_itself(tmp_path):
    with contextlib.ExitStack() as stack:
        drivers = {
            name: stack.enter_context(Driver(tmp_path / str(i), end, this_cluster(), occupied=False))
            for i, (name, (end, _)) in enumerate(ENDS.items())
        }
        for driver in drivers.values():
            driver.await_ready()
        for driver in drivers.values():
            driver.process.stdin.write("\n")
            driver.process.stdin.flush()
        for name, driver in drivers.items():
            status, out, err = driver.go_on()
            expected = ENDS[name][1]
            assert status == expected if expected is not None else status != 0, (name, err)
            await_gone(driver.pids)
            if "close" in name:
                assert out[-1] == "closed 0"


@pytest.fixture
def launch(tmp_path):
    """Launch a group of Worker, which is closed by force if the test fails."""
    groups = []

    def _launch(num_workers=1):
        groups.append(ray_shm.launch(Worker, num_workers=num_workers, gpus_per_worker=1, args=(str(tmp_path),)))
        return groups[-1]

    yield _launch
    for group in groups:
        group.close(timeout=0)


def test_children_go_with_a_worker_that_is_killed(launch, tmp_path):
    group = launch()
    pids = occupy(group, tmp_path, ["with_children"])
    os.kill(pids[0], signal.SIGKILL)
    await_gone(pids)


@pytest.mark.parametrize("timeout", [0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_close_ends_ranks_that_cannot_be_asked(launch, tmp_path, timeout):
    group = launch(len(STATES))
    pids = occupy(group, tmp_path)
    group.close(timeout)
    await_true(lambda: not any(is_there(pid) for pid in pids[: len(STATES)]))
    await_gone(pids)


def test_close_lets_exit_handlers_and_threads_of_user_code_run(launch, tmp_path):
    group = launch(2)
    group.collective_rpc("with_exit_handlers")
    pids = [w.pid for w in group.workers]
    long = group.collective_rpc("in_sleep", target_ranks=[1], non_block=True)
    group.close(timeout=0.5)  # of rank 1, nothing but its end
    assert not any(is_there(pid) for pid in pids)
    assert sorted(path.name for path in tmp_path.glob("0-*")) == ["0-exit-handler-ran", "0-thread-ended"]
    with pytest.raises(ray_shm.GroupClosedError):
        long.result()


def test_a_thread_that_never_ends_does_not_keep_close(launch):
    group = launch()
    group.collective_rpc("with_a_thread_that_never_ends")
    group.close(timeout=1)
    assert not is_there(group.workers[0].pid)


def test_callers_get_what_comes_in_time(launch):
    group = launch(2)
    outcomes = {}

    def call(rank, seconds):
        try:
            outcomes[rank] = group.collective_rpc("in_sleep", args=(seconds,), target_ranks=[rank])
        except ray_shm.GroupClosedError as exc:
            outcomes[rank] = exc

    callers = [threading.Thread(target=call, args=args) for args in ((0, 1.0), (1, LONG))]
    for caller in callers:
        caller.start()
    await_true(lambda: len(group._runtime.dispatcher._pending) == 2)
    group.close(timeout=3)
    for caller in callers:
        caller.join(HANG)
    assert outcomes[0] == ["slept"]
    assert isinstance(outcomes[1], ray_shm.GroupClosedError)


def test_close_from_a_done_callback_and_from_another_thread(launch):
    group = launch()
    pid = group.workers[0].pid
    in_callback, ended = threading.Event(), threading.Event()

    def close(_future):
        in_callback.set()
        await_true(lambda: group._runtime.closed)  # the other thread is inside close()
        group.close()
        ended.set()

    group.collective_rpc("in_sleep", args=(0.2,), non_block=True).add_done_callback(close)
    in_callback.wait(HANG)
    group.close()
    assert ended.wait(HANG)
    assert not is_there(pid)


def test_close_from_a_done_callback_alone(launch):
    group = launch()
    ended = threading.Event()
    future = group.collective_rpc("in_sleep", args=(0.2,), non_block=True)
    future.add_done_callback(lambda _: (group.close(), ended.set()))
    assert ended.wait(HANG)
    assert not is_there(group.workers[0].pid)


def test_ctrl_c_during_close_ends_everything(launch, tmp_path):
    group = launch(2)
    pids = occupy(group, tmp_path, ["in_sleep", "with_children"])

    def interrupt():
        await_true(lambda: group._runtime.closed)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        group.close(timeout=None)
    thread.join()
    await_gone(pids)
    group.close()
