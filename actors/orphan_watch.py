"""Ends a worker whose raylet or driver is gone. Runs in the worker, on the thread of ray_shm/death_watch.py.

Ray ends the workers of a driver that died, but not those whose raylet was killed; and the main thread, asleep on a
futex or inside user code, cannot look.
"""

from __future__ import annotations

import os

from ray_shm import death_watch


class OrphanWatch:
    """Watches the parent process (the raylet) and, where it is on this node, the driver."""

    def __init__(self, driver_pid: int | None) -> None:
        pids = [pid for pid in (os.getppid(), driver_pid) if pid is not None and pid > 1]
        self._ends = [death_watch.watch(pid, 0, _leave) for pid in pids]

    def close(self) -> None:
        for end in self._ends:
            if end is not None:
                end()


def _leave() -> None:
    # Nobody is left to report to, and user code may hold the main thread: no exit handlers, free the GPU.
    os._exit(1)
