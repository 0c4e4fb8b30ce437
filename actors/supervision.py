"""Notices that workers died, and tells the dispatcher. Runs in the driver's process.

Two sources: Ray, which resolves a worker's `run` reference with the reason (any node, 10-20 ms), and the kernel, which
makes a pidfd readable when a process of this node is gone, also where Ray itself is down. The kernel's word waits
REASON_GRACE for Ray's, which says why.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray_shm.errors import WorkerDiedError
from ray_shm.placement.topology import RankPlace

REASON_GRACE = 0.25  # seconds


class DeathWatch:
    """Watches the ranks from the moment their loops run.

    Args:
        places: rank → where it runs. runs: rank → reference of the actor's `run`. local: ranks whose pid we can watch.
        report: called once or more for a rank that died, from any thread.
    """

    def __init__(
        self,
        places: Mapping[int, RankPlace],
        runs: Mapping[int, Any],
        local: set[int],
        report: Callable[[WorkerDiedError], None],
    ) -> None:
        self._places = places
        self._report = report
        self._stopped = False
        self._reason_came = {rank: threading.Event() for rank in runs}
        for rank, run in runs.items():
            run.future().add_done_callback(lambda future, rank=rank: self._ended(rank, future))
        self._pidfds = {fd: rank for rank in local if (fd := _pidfd(places[rank].place.pid)) is not None}
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="ray_shm-death-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on ends are expected. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for fd in (*self._pidfds, self._stop):
            os.close(fd)

    def _ended(self, rank: int, future: Any) -> None:
        error = future.exception()
        self._died(rank, "its loop ended" if error is None else reason(error))
        self._reason_came[rank].set()

    def _died(self, rank: int, cause: str) -> None:
        if not self._stopped:
            place = self._places[rank].place
            self._report(WorkerDiedError(rank, place.pid, place.node_ip, cause))

    def _watch(self) -> None:
        poller = select.poll()
        for fd in (*self._pidfds, self._stop):
            poller.register(fd, select.POLLIN)
        while not self._stopped:
            for fd, _ in poller.poll():
                if fd == self._stop:
                    return
                poller.unregister(fd)
                rank = self._pidfds[fd]
                if not self._reason_came[rank].wait(REASON_GRACE):
                    self._died(rank, "its process is gone; Ray has not said why")


def reason(error: BaseException) -> str:
    """What Ray says about an actor's end, in one line."""
    text = str(getattr(error, "error_msg", "") or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return " ".join(kept[:6])[:600] or type(error).__name__


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel, or gone already; Ray's word remains
        return None
