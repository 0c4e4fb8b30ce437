"""Why a process died, which is known some milliseconds after the death itself is. Runs in every process.

A death is told to waiting callers at once; the reason (exit status, Ray's word) is filled in behind their back, and
whoever reads it waits for it, at most WAIT after the death. Imports nothing outside the standard library.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

WAIT = 1.0  # seconds after the death that readers wait for its cause

_thread = threading.local()


@dataclass(frozen=True, slots=True)
class DeathCause:
    """Why a process died. signal, exit_code: how it ended; both None where that is not known."""

    text: str
    signal: int | None = None
    exit_code: int | None = None


NOT_KNOWN_YET = DeathCause("unknown: its process is gone, and nobody has said why")


class LateCause:
    """A DeathCause that is filled in once, from any thread. Made at the moment of the death."""

    __slots__ = ("_cause", "_filled", "_until")

    def __init__(self, wait: float = WAIT) -> None:
        self._cause: DeathCause | None = None
        self._filled = threading.Event()
        self._until = time.monotonic() + wait

    def fill(self, cause: DeathCause) -> None:
        """The first one counts."""
        if self._cause is None:
            self._cause = cause
        self._filled.set()

    def get(self) -> DeathCause:
        """The cause, or NOT_KNOWN_YET where it did not come in time; at once within `never_waiting`."""
        if self._cause is None and not getattr(_thread, "never_waits", False):
            self._filled.wait(max(0.0, self._until - time.monotonic()))
        return self._cause or NOT_KNOWN_YET


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """For a thread that fills causes in, or that delivers what they are made of: it would wait for itself."""
    before = getattr(_thread, "never_waits", False)
    _thread.never_waits = True
    try:
        yield
    finally:
        _thread.never_waits = before
