"""Ends worker actors: asked first, killed after, and gone for sure where we can see. Runs in the driver's process.

Ladder: the loop has ended at a stop request -> ``__ray_terminate__`` (user threads are joined, exit handlers run) ->
``ray.kill`` (none run; it does not cut short an exit that has begun) -> SIGKILL to a pid of this node that is still
there. Works, as far as it can, with Ray already shut down.

SIGTERM to the pid in place of ``__ray_terminate__`` was tried: no quicker, and Ray reports a crash. What takes
the time (0.4 s; with torch imported 1 s and more) is the interpreter's own end, after the exit handlers. It is waited
for: it flushes files that user code left open.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from collections.abc import Sequence
from typing import Any

import ray

from ray_shm.deadline import Deadline

logger = logging.getLogger("ray_shm")

EXIT_GRACE = 2.0  # seconds for an exit to begin once asked for, and at least for exit handlers and user threads
GONE = 5.0  # seconds for these at most, and until a killed process must have left
_KILL_GRACE = 0.5  # seconds for ray.kill, before a signal that Ray would report as a crash


def end(actors: Sequence[Any], local_pids: Sequence[int | None], ended: Sequence[bool], deadline: Deadline) -> None:
    """End actors whose loops have ended (`ended`) in good order, and the others by force; on Ctrl-C, all by force.

    local_pids: of each actor, where this process can see it.
    """
    with _Pids(local_pids) as pids:
        try:
            exiting = [actor for actor, over in zip(actors, ended, strict=True) if over]
            exits = [actor.__ray_terminate__.remote() for actor in exiting] if ray.is_initialized() else []
            if len(exiting) < len(actors):
                _kill([actor for actor, over in zip(actors, ended, strict=True) if not over])
                with _Pids([pid for pid, over in zip(local_pids, ended, strict=True) if not over]) as forced:
                    forced.await_gone(_KILL_GRACE)
            if exits:
                ray.wait(exits, num_returns=len(exits), timeout=EXIT_GRACE)
        finally:
            _kill(actors)
        pids.await_gone(max(deadline.slice(GONE), EXIT_GRACE))


def kill(actors: Sequence[Any], local_pids: Sequence[int | None]) -> None:
    """End actors at whatever step they are."""
    with _Pids(local_pids) as pids:
        _kill(actors)
        pids.await_gone(_KILL_GRACE)


def _kill(actors: Sequence[Any]) -> None:
    if not ray.is_initialized():
        return
    for actor in actors:
        with contextlib.suppress(Exception):  # already gone, or Ray on its way down
            ray.kill(actor)


class _Pids:
    """Processes of this node, held by pidfd so that a reused pid is never mistaken for them; killed on exit."""

    def __init__(self, pids: Sequence[int | None]) -> None:
        self._waiting: dict[int, int] = {}  # pidfd -> pid, of those that may still be there
        for pid in pids:
            if pid is not None:
                with contextlib.suppress(OSError):
                    self._waiting[os.pidfd_open(pid)] = pid

    def await_gone(self, seconds: float) -> None:
        """Until all have left, at most `seconds`."""
        deadline = Deadline.after(seconds)
        poller = select.poll()
        for fd in self._waiting:
            poller.register(fd, select.POLLIN)
        while self._waiting and not deadline.expired():
            for fd, _ in poller.poll(int(deadline.slice(seconds) * 1000) + 1):
                poller.unregister(fd)
                del self._waiting[fd]
                os.close(fd)

    def _kill(self) -> None:
        """SIGKILL to those that are still there, and wait until they have left."""
        for fd in self._waiting:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        if self._waiting:
            self.await_gone(GONE)
        if self._waiting:
            logger.error(
                "worker processes %s of this node are still there %s s after SIGKILL: they hang in the kernel (state D "
                "in ps; often a GPU driver or network file system), and free their GPUs when that ends",
                sorted(self._waiting.values()),
                GONE,
            )

    def __enter__(self) -> _Pids:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._kill()
        finally:
            for fd in self._waiting:
                os.close(fd)
