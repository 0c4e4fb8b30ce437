"""Taking a lock that no `with` can take: with a time limit, or only if it is free. Runs in every process."""

from __future__ import annotations

import threading


def acquired(lock: threading.Lock | threading.RLock, blocking: bool, seconds: float = -1) -> bool:
    """`lock.acquire(blocking, seconds)`, whose caller learns of it before a signal's handler can raise.

    Python runs handlers after each call of C code that Python code makes, so also between `acquire` and the note that
    the lock is taken. `map` makes that call from C.
    """
    [taken] = map(lock.acquire, (blocking,), (seconds,))
    return taken
