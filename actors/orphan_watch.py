"""Ends a worker whose raylet or driver is gone, and the worker's own children with it. Runs in the worker.

Who ends a worker, when the one it works for is killed:

    driver that joined a cluster ── Ray: the raylet kills the worker's process group, whatever the worker does
    driver that started Ray ─────── the kernel: raylet and driver share their fate, then as the next line
    raylet ──────────────────────── the kernel: SIGKILL to the worker (PR_SET_PDEATHSIG), also where the main thread
                                    sits in C code with the GIL, or is stopped by SIGSTOP
    either, on this node ────────── the thread of ray_shm/death_watch.py, which needs the GIL: for kernels and sandboxes
                                    that have no PR_SET_PDEATHSIG, and raylets whose main thread is not the parent

Ray's own look at the raylet (once a second) takes a killed one that nobody has reaped for alive. The worker's children
(the process group that Ray gives each worker) are killed by the raylet; where that is gone, by the kernel: both ends of
a socket pair are told to kill the group when the other end closes, and a process that ends closes one of them first.

A driver that is itself a Ray actor or task: as the first line; but Ray keeps the placement group that it made, and with
it the GPUs reserved, until the job of that actor has ended, too.

Not ended by this: children that left the process group (``start_new_session=True``), which are the user's to end; the
worker, for as long as it is in an uninterruptible wait (state D) in the kernel; a worker that holds the GIL in C code
where PR_SET_PDEATHSIG is not to be had: Ray ends it 1-2 s after the raylet was reaped, or it ends when the GIL is free.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
from pathlib import Path

from ray_shm import death_watch

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_group_ends: list[int] = []  # descriptors: an object would be closed, and so kill, when the interpreter is torn down


class OrphanWatch:
    """Watches the parent process (the raylet) and, where it is on this node, the driver. Made on the main thread.

    `close` ends the watch of this process only: what the kernel was told holds until the worker is gone.
    """

    def __init__(self, driver_pid: int | None) -> None:
        raylet = os.getppid()
        with contextlib.suppress(OSError, AttributeError):  # refused in a sandbox: the watch below remains
            _end_children_with_me()
        with contextlib.suppress(OSError, AttributeError):
            _end_with_parent(raylet)
        pids = [pid for pid in (raylet, driver_pid) if pid is not None and pid > 1]
        self._ends = [death_watch.watch(pid, 0, _leave) for pid in pids]

    def close(self) -> None:
        for end in self._ends:
            if end is not None:
                end()


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. Raises OSError.

    The kernel means the parent's *thread* that forked; only a main thread is sure to live as long as its process.
    """
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    if str(os.getpid()) not in children:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended just before
        _leave()


def _end_children_with_me() -> None:
    """Have the kernel kill this process's group when this process ends, however it does. Raises OSError."""
    if _group_ends:
        return
    os.setpgid(0, 0)  # changes nothing where Ray did it already
    ends = [end.detach() for end in socket.socketpair()]
    for end in ends:
        fcntl.fcntl(end, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    _group_ends.extend(ends)
    os.register_at_fork(after_in_child=_close_group_ends)


def _close_group_ends() -> None:
    """In a forked child, which would keep the ends open beyond its parent's life."""
    for end in _group_ends:
        with contextlib.suppress(OSError):
            os.close(end)
    _group_ends.clear()


def _leave() -> None:
    # Nobody is left to report to, and user code may hold the main thread: no exit handlers, free the GPU.
    os._exit(1)
