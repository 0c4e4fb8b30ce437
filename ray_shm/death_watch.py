"""Tells when a process of this node ends: one thread per process, asleep on pidfds. Runs in every process.

A pidfd and a futex cannot be awaited together, so this thread waits for the former and wakes those who sleep on the
latter. It exists while something is watched, and wakes up only for an end or for a change of what is watched. Where the
kernel refuses pidfds nothing is told, and whoever waits finds out by looking twice a second (`segment.start_time`).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from ray_shm.segment import start_time

_lock = threading.RLock()  # a collection amid a change of the watches may end one of them
_watches: dict[int, _Watch] = {}  # pidfd -> watch
_changed = -1  # eventfd that wakes the thread
_thread: threading.Thread | None = None


class _Watch:
    __slots__ = ("on_death", "pidfd")

    def __init__(self, pidfd: int, on_death: Callable[[], object]) -> None:
        self.pidfd = pidfd
        self.on_death = on_death


def watch(pid: int, started: int, on_death: Callable[[], object]) -> Callable[[], None] | None:
    """Call `on_death` once, on the watching thread, when process `pid` that started at `started` has ended.

    Args:
        started: as `segment.start_time` gives it, to tell it from another with the same pid; 0: whoever has it now.
        on_death: short, and without locks that somebody may hold while they start or end a watch. It is kept until the
            watch ends, and with it what it refers to.

    Returns:
        a function that ends the watch, idempotent; None where nothing will be told.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        on_death()
        return _nothing
    except OSError:  # an old kernel, or a seccomp filter
        return None
    if started and start_time(pid) != started:
        os.close(pidfd)
        on_death()
        return _nothing
    entry = _Watch(pidfd, on_death)
    with _lock:
        _watches[pidfd] = entry
        _notify()
    return lambda: _end(entry)


def _nothing() -> None:
    return None


def _end(entry: _Watch) -> None:
    with _lock:
        if _watches.get(entry.pidfd) is entry:
            del _watches[entry.pidfd]
            os.close(entry.pidfd)
        _notify()  # also again: a signal's handler may have come in between


def _notify() -> None:
    """Have the thread look at the watches; start it for the first. The caller holds the lock."""
    global _thread, _changed
    if _thread is None:
        if not _watches:
            return
        _changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _thread = threading.Thread(target=_run, name="ray_shm-death-watch", daemon=True)
        _thread.start()
    else:
        os.eventfd_write(_changed, 1)


def _run() -> None:
    global _thread, _changed
    while True:
        poll = select.poll()
        with _lock:
            if not _watches:
                changed, _thread, _changed = _changed, None, -1
                os.close(changed)
                return
            poll.register(_changed, select.POLLIN)
            for pidfd in list(_watches):
                poll.register(pidfd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        ended = []
        with _lock:
            if _changed in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(_changed)
            for fd in ready:
                # Another look: it may have been closed meanwhile, and its number given to another watch.
                if fd in _watches and _has_ended(fd):
                    ended.append(_watches.pop(fd))
                    os.close(fd)
        for entry in ended:
            entry.on_death()


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _forget() -> None:
    """In a forked child: the thread is the parent's, and so are the ends that asked."""
    global _lock, _thread, _changed
    _lock = threading.RLock()  # a collection amid a change of the watches may end one of them
    for pidfd in _watches:
        with contextlib.suppress(OSError):
            os.close(pidfd)
    if _changed >= 0:
        with contextlib.suppress(OSError):
            os.close(_changed)
    _watches.clear()
    _thread, _changed = None, -1


os.register_at_fork(after_in_child=_forget)
