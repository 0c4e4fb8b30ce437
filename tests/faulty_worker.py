"""A worker that fails where and how it is told to, and how a test kills, stops and watches it.

`act` runs in the workers; signals are real ones, that a process sends itself. The rest runs in the pytest process.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import leaks
import psutil
import pytest

import ray_shm

HANG = 60.0  # seconds: whatever takes longer hangs
SIZE = 3
RANKS = [0, 1, 2]
VICTIM = 1
OTHERS = [0, 2]
SUM = 6  # of `total`
_LOOK = 0.002  # seconds between two looks at what another process does
_GRACE = 5.0  # seconds for what is on its way out after a test


def act(what: str | None) -> None:
    """Fail: "exception", "os._exit", or a signal's name; None: do not. Returns after SIGSTOP, once that is over."""
    if what is None:
        return
    if what == "exception":
        raise ValueError("told to fail")
    if what == "os._exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, what))


def await_gate(gate: str) -> None:
    """Until the test opens it."""
    while not os.path.exists(gate):
        time.sleep(_LOOK)


class OnArrival:
    """Acts while it is unpickled, and is a None then."""

    def __init__(self, what: str | None) -> None:
        self.what = what

    def __reduce__(self):
        return act, (self.what,)


class OnPickling:
    """Acts while it is pickled, and is a rank's number then."""

    def __init__(self, what: str, rank: int) -> None:
        self.what, self.rank = what, rank

    def __reduce__(self):
        act(self.what)
        return int, (self.rank,)


class Faulty:
    """`orders`: a file with what the victim's constructor does: "kill PID", "await GATE", or an act; none: nothing."""

    def __init__(self, orders: str = "") -> None:
        self.number = ray_shm.get_context().rank
        self.armed: str | None = None
        self.kept: object = None
        if self.number == VICTIM and orders and os.path.exists(orders):
            order = Path(orders).read_text()
            if order.startswith("kill "):
                os.kill(int(order.split()[1]), signal.SIGKILL)
            elif order.startswith("await "):
                gate = order.split()[1]
                Path(f"{gate}.reached").touch()
                await_gate(gate)
            else:
                act(order)

    def rank(self):
        return self.number

    def arm(self, what):
        self.armed = what

    @property
    def trap(self):
        """Acts when it is looked up."""
        what, self.armed = self.armed, None
        act(what)
        return self.rank

    def echo(self, value):
        return self.number if value is None else value

    def perform(self, what):
        act(what)
        return self.number

    def give(self, what):
        return self.number if what is None else OnPickling(what, self.number)

    def later(self, what, gate):
        """Acts on a thread, once the test has the reply and says so."""

        def run():
            await_gate(gate)
            act(what)

        if what is not None:
            threading.Thread(target=run, daemon=True).start()
        return self.number

    def hold(self, gate):
        await_gate(gate)
        return self.number

    def perform_at_gate(self, what, gate):
        if what is not None:
            await_gate(gate)
            act(what)
        return self.number

    def total(self, what=None, gate=None):
        """A collective, to which a rank that acts comes late, or never."""
        import torch

        if what is not None:
            await_gate(gate)
            act(what)
        return int(ray_shm.get_context().group("tp").all_reduce(torch.tensor([self.number + 1]))[0])

    def keep(self, value):
        self.kept = value

    def kept_value(self):
        return self.kept


class Background:
    """A function on a thread, and what became of it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run, args=(function,))
        self._thread.start()

    def _run(self, function: Callable[[], object]) -> None:
        try:
            self._outcome = function()
        except Exception as exc:
            self._outcome = exc

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout: float = HANG) -> object:
        self._thread.join(timeout)
        assert not self._thread.is_alive()
        return self._outcome


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never came: {what}")
        time.sleep(_LOOK)


def pids(group: ray_shm.ActorGroup) -> list[int]:
    return [worker.pid for worker in group.workers]


def kill(group: ray_shm.ActorGroup, *ranks: int) -> None:
    """Returns once the driver knows."""
    for rank in ranks:
        os.kill(group.workers[rank].pid, signal.SIGKILL)
    wait_for(lambda: all(group.workers[rank].state == "dead" for rank in ranks), f"the deaths of ranks {ranks}")


def wait_until_stopped(pid: int) -> None:
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"process {pid} stops")


def wait_until_in_collective(group: ray_shm.ActorGroup, *ranks: int) -> None:
    def inside() -> bool:
        rows = group.status()
        return all("all_reduce" in rows[rank].operation for rank in ranks)

    wait_for(inside, f"ranks {ranks} in their collective")


def tells_exit_status() -> bool:
    """Whether this kernel says how a process ended that somebody else has reaped (Linux 6.15)."""
    from ray_shm.exit_cause import ExitWatch

    watch = ExitWatch(os.getpid())
    watch.close()
    return watch.events == 0


def check_for_leaks(group: ray_shm.ActorGroup) -> Iterator[None]:
    """In place of the fixture `no_leaks` where tests share a group and heal it: its present workers do not count."""

    def things() -> Counter[str]:
        own = tuple(f"process {pid}:" for pid in pids(group))
        return Counter({line: n for line, n in leaks.snapshot().items() if not line.startswith(own)})

    before = things()
    yield
    deadline = time.monotonic() + _GRACE
    while left := things() - before:
        if time.monotonic() > deadline:
            pytest.fail("the test left behind:\n  " + "\n  ".join(sorted(left.elements())), pytrace=False)
        gc.collect()  # an exception's traceback may still hold the frame that owns a resource
        time.sleep(0.05)
