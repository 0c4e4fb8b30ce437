"""Deaths and starts, timed by ``ray-shm bench rpc`` for our groups and for plain Ray actors, in turns. In the driver.

A killed worker is replaced by `ActorGroup.heal`, and a killed Ray actor by another one, before the next kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_shm.actors.launch import launch
from ray_shm.actors.rpc_peers import CALLS, OURS, PAYLOAD, Noop, plain_actor, plain_actors
from ray_shm.actors.rpc_report import Row, make_row
from ray_shm.actors.wire import Scatter
from ray_shm.errors import RpcError

_UNDER_WAY = 0.3  # seconds from a call to the death of the worker that executes it
_SETTLE = 0.5  # seconds for the processes of the last launch to go
_LONG = 600.0  # seconds


class Mortal:
    """A worker with torch imported, as a model's is: the more a process has mapped, the longer the kernel ends it."""

    def __init__(self) -> None:
        import torch

        torch.ones(1)

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, asleep: bool) -> None:
        if asleep:
            time.sleep(_LONG)


# ---- kills --------------------------------------------------------------------------------------------------------


def measure_kills(count: int, kills: int, say: Callable[[str], None]) -> list[Row]:
    """From just before the SIGKILL of one worker of `count` until the caller, who waits for all, has the exception.

    Args:
        kills: of each peer, in turns, of one rank after the other. Between kills every worker is ready again.
        say: told what is being done.

    Raises:
        RayShmError, RayError: something else failed.
    """
    times: dict[str, list[float]] = {OURS: [], CALLS: []}
    say(f"kill: starting {count} workers, and as many Ray actors")
    with contextlib.ExitStack() as stack:
        actors = stack.enter_context(plain_actors(count, Mortal))  # they start while ours do
        group = stack.enter_context(_Group(count))
        for number in range(kills):
            say(f"kill: {number + 1} of {kills}")
            victim = number % count
            pids = ray.get([actor.pid.remote() for actor in actors])  # now all of them are ready
            times[OURS].append(_time_death(group.pid(victim), partial(group.call, victim), RpcError))
            times[CALLS].append(_time_death(pids[victim], partial(_call_actors, actors, victim), RayActorError))
            if number + 1 < kills:
                actors[victim] = plain_actor(Mortal)
                group.replace()
    return [make_row("kill", peer, count, None, values) for peer, values in times.items()]


class _Group:
    """A group of Mortals. A context manager."""

    def __init__(self, count: int) -> None:
        self._group = launch(Mortal, num_workers=count)

    def pid(self, rank: int) -> int:
        return self._group.workers[rank].pid

    def call(self, victim: int) -> None:
        asleep = Scatter([rank == victim for rank in range(self._group.world_size)])
        self._group.collective_rpc("sleep", args=(asleep,))

    def replace(self) -> None:
        """Make it whole after a kill."""
        heal = getattr(self._group, "heal", None)
        if heal is not None:
            heal()
        else:
            self._group.close()
            self._group = launch(Mortal, num_workers=self._group.world_size)

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        self._group.close()


def _call_actors(actors: Sequence[Any], victim: int) -> None:
    ray.get([actor.sleep.remote(rank == victim) for rank, actor in enumerate(actors)])


def _time_death(pid: int, call: Callable[[], object], raised: type[Exception]) -> float:
    """µs from the kill of `pid` to what `call` raises of it. Raises RuntimeError: it returned."""
    killed_at = 0

    def kill() -> None:
        nonlocal killed_at
        killed_at = time.perf_counter_ns()
        os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(_UNDER_WAY, kill)
    timer.start()
    try:
        call()
    except raised:
        return (time.perf_counter_ns() - killed_at) / 1000
    finally:
        timer.cancel()
        timer.join()
    raise RuntimeError(f"the call of a worker that sleeps has returned, and pid {pid} should be dead")


# ---- launches -----------------------------------------------------------------------------------------------------


def measure_launches(count: int, launches: int, say: Callable[[str], None]) -> list[Row]:
    """From the first line that makes them to the first reply of all of `count` workers.

    Args:
        launches: of each peer, in turns; who begins changes. say: told what is being done.

    Raises:
        RayShmError, RayError: a start failed.
    """
    starts = {OURS: _time_launch, CALLS: _time_plain_launch}
    times: dict[str, list[float]] = {peer: [] for peer in starts}
    for number in range(launches):
        say(f"launch: {number + 1} of {launches}, {count} workers each")
        for peer in list(starts)[:: -1 if number % 2 else 1]:
            time.sleep(_SETTLE)
            times[peer].append(starts[peer](count))
    return [make_row("launch", peer, count, None, values) for peer, values in times.items()]


def _time_launch(count: int) -> float:
    begun = time.perf_counter_ns()
    with launch(Noop, num_workers=count) as group:
        group.collective_rpc("noop", args=(PAYLOAD,))
        return (time.perf_counter_ns() - begun) / 1000


def _time_plain_launch(count: int) -> float:
    begun = time.perf_counter_ns()
    with plain_actors(count) as actors:
        ray.get([actor.noop.remote(PAYLOAD) for actor in actors])
        return (time.perf_counter_ns() - begun) / 1000
