"""Three or four spawned processes that run checks on command, each with its end of one coordinator store.

Torch takes seconds to import, so a module's tests share a pool: a check is a function of the test module that runs on
all ranks at once, `check(me, *args)`, and whose result or traceback comes back.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.store import GroupStore

SETTLE = 5.0  # seconds for threads and sockets that are on their way out
WATCHDOG = 60.0  # seconds; only a hang comes near
HANG = 20.0  # seconds; far below WATCHDOG, the timeout of the groups
WORLD = [[0, 1, 2]]
LOOPBACK = "127.0.77.1"  # nobody outside of the tests binds here


class Rank:
    """What a check gets: its rank, the shared store, and a place to keep things for the next check."""

    def __init__(self, rank: int, store: GroupStore, size: int) -> None:
        self.rank, self.store, self.size = rank, store, size
        self.kept: dict[str, Any] = {}

    def group(self, name: str, ranks: list[list[int]] = WORLD, **kwargs: Any) -> StatelessGroupCoordinator:
        kwargs = {"coord_store": self.store, "timeout": WATCHDOG, "global_world_size": self.size, **kwargs}
        return StatelessGroupCoordinator(
            ranks, self.rank, "gloo", False, group_name=name, global_rank=self.rank, **kwargs
        )

    def queue_group(self, name: str, **kwargs: Any) -> StatelessGroupCoordinator:
        """One whose objects go through queues."""
        return self.group(name, use_message_queue_broadcaster=True, **kwargs)


def serve_checks(rank: int, listener: socket.socket, port: int, pipe: Any, size: int = 3) -> None:
    if rank == 0:
        store = GroupStore.serve(listener, WATCHDOG)
    else:
        listener.close()
        store = GroupStore.connect("127.0.0.1", port, WATCHDOG)
    me = Rank(rank, store, size)
    while (message := pipe.recv()) is not None:
        check, args = message
        try:
            pipe.send((True, check(me, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Pool:
    def __init__(self, size: int = 3) -> None:
        self.ranks = tuple(range(size))
        spawn = mp.get_context("spawn")
        listener = socket.create_server(("127.0.0.1", 0))
        self.pipes, self.processes = [], []
        for rank in self.ranks:
            here, there = spawn.Pipe()
            process = spawn.Process(
                target=serve_checks, args=(rank, listener, listener.getsockname()[1], there, size), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self.listener = listener

    def start(self, check: Callable[..., Any], *args: Any, ranks: tuple[int, ...] | None = None) -> None:
        for rank in self.ranks if ranks is None else ranks:
            self.pipes[rank].send((check, args))

    def result(self, rank: int) -> Any:
        if not self.pipes[rank].poll(WATCHDOG):
            pytest.fail(f"rank {rank} hangs")
        passed, value = self.pipes[rank].recv()
        if not passed:
            pytest.fail(f"rank {rank}:\n{value}")
        return value

    def run(self, check: Callable[..., Any], *args: Any, ranks: tuple[int, ...] | None = None) -> list[Any]:
        self.start(check, *args, ranks=ranks)
        return [self.result(rank) for rank in (self.ranks if ranks is None else ranks)]

    def close(self) -> list[int | None]:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            process.join(WATCHDOG)
            process.kill()
            process.join()
            pipe.close()
        self.listener.close()
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.close()
        return codes


def total(group: StatelessGroupCoordinator, length: int = 3) -> float:
    """The sum of 10 ** rank: it shows whose numbers are in it."""
    import torch

    return float(group.all_reduce(torch.full((length,), 10.0**group.rank))[0])


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError("this did not come about")
        time.sleep(0.001)


def alongside(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def open_handles() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def growth(before: tuple[int, int]) -> tuple[int, int]:
    """What `open_handles` has gained; waits until that is nothing: the kernel lists a joined thread a moment longer."""
    deadline = time.monotonic() + SETTLE
    while True:
        files, threads = open_handles()
        more = max(0, files - before[0]), max(0, threads - before[1])
        if more == (0, 0) or time.monotonic() > deadline:
            return more
        time.sleep(0.01)
