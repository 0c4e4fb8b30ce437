"""Ends worker actors: asked first, killed after, and gone for sure where we can see. Runs in the driver's process.

Ladder: the loop has ended at a stop request -> ``__ray_terminate__`` (exit handlers run) -> ``ray.kill`` (10 ms, none
run) -> SIGKILL to a pid of this node that is still there. Works, as far as it can, with Ray already shut down.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Sequence
from typing import Any

import ray

from ray_shm.deadline import Deadline

EXIT_GRACE = 2.0  # seconds for the exit handlers of user code
GONE = 5.0  # seconds until a killed process must have left


def end(actors: Sequence[Any], local_pids: Sequence[int], ended: Sequence[bool], deadline: Deadline) -> None:
    """End actors whose loops have ended (`ended`) in good order, and the others by force."""
    with _Pids(local_pids) as pids:
        if ray.is_initialized():
            exits = [actor.__ray_terminate__.remote() for actor, over in zip(actors, ended, strict=True) if over]
            if exits:
                grace = max(deadline.slice(EXIT_GRACE), 0.2)
                ray.wait(exits, num_returns=len(exits), timeout=grace)
            _kill(actors)
        pids.await_gone(GONE)


def kill(actors: Sequence[Any], local_pids: Sequence[int]) -> None:
    """End actors at whatever step they are."""
    with _Pids(local_pids) as pids:
        _kill(actors)
        pids.await_gone(GONE)


def _kill(actors: Sequence[Any]) -> None:
    if not ray.is_initialized():
        return
    for actor in actors:
        with contextlib.suppress(Exception):  # already gone, or Ray on its way down
            ray.kill(actor)


class _Pids:
    """Processes of this node, held by pidfd so that a reused pid is never mistaken for them."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._fds: list[int] = []
        for pid in pids:
            with contextlib.suppress(OSError):
                self._fds.append(os.pidfd_open(pid))

    def await_gone(self, seconds: float) -> None:
        """Wait for all to leave; kill what has not after `seconds`."""
        deadline = Deadline.after(seconds)
        poller = select.poll()
        waiting = set(self._fds)
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        while waiting and not deadline.expired():
            for fd, _ in poller.poll(int(deadline.slice(GONE) * 1000) + 1):
                poller.unregister(fd)
                waiting.discard(fd)
        for fd in waiting:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)

    def __enter__(self) -> _Pids:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)
