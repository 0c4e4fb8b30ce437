"""Ends a worker whose raylet or driver is gone: one thread, asleep in poll on their pidfds. Runs in the worker.

Ray ends the workers of a driver that died, but not those whose raylet was killed; and the main thread, asleep on a
futex or inside user code, cannot look.
"""

from __future__ import annotations

import os
import select
import threading


class OrphanWatch:
    """Watches the parent process (the raylet) and, where it is on this node, the driver."""

    def __init__(self, driver_pid: int | None) -> None:
        self._fds = [fd for pid in (os.getppid(), driver_pid) if (fd := _pidfd(pid)) is not None]
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="ray_shm-orphan-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for fd in (*self._fds, self._stop):
            os.close(fd)

    def _run(self) -> None:
        poller = select.poll()
        for fd in (*self._fds, self._stop):
            poller.register(fd, select.POLLIN)
        if self._stop not in [fd for fd, _ in poller.poll()]:
            # Nobody is left to report to, and user code may hold the main thread: no exit handlers, free the GPU.
            os._exit(1)


def _pidfd(pid: int | None) -> int | None:
    if pid is None or pid <= 1:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel, or the process is gone already; Ray's own supervision remains
        return None
