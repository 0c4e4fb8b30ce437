"""Connecting a group on a thread of its own, so that whoever waits for it can be released.

Runs in every worker. Opening a store, gloo's connecting and nccl's wait in C++ code where nothing reaches them, for as
long as the group's timeout. Whoever is released, or interrupted by a signal, leaves them behind: they end by
themselves, at once where a release reaches them, else at the timeout; what they connected by then is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ray_shm.errors import StartError
from ray_shm.release import Release


class _Closes(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closes)


class Formation(Generic[T]):
    """Runs `form` once."""

    def __init__(self, form: Callable[[], T], release: Release) -> None:
        self._form, self._release = form, release
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._formed: T | None = None
        self._error: BaseException | None = None
        self._left = False
        release.on_request(self._woken.set)
        threading.Thread(target=self._run, name="ray-shm-formation", daemon=True).start()

    def over(self, seconds: float) -> bool:
        """Waits that long; whether it has come to an end, or was released."""
        return self._woken.wait(seconds)

    def leave(self) -> None:
        """Nobody will ask for the result: ends the waits of `form`, and closes what it returned or will return."""
        with self._lock:
            self._left = True
            formed, self._formed = self._formed, None
        self._release.request()
        if formed is not None:
            formed.close()

    def result(self, timeout: float) -> T | None:
        """What `form` returned, or None after a release.

        Raises:
            What `form` raised. StartError: it took longer than `timeout` seconds, and is left behind.
        """
        try:
            if not self._woken.wait(timeout):
                raise StartError(f"the group was not formed within {timeout:.1f} s: a member stopped half-way")
        finally:
            with self._lock:
                self._left = True
                formed, self._formed = self._formed, None
                error, self._error = self._error, None
        if error is None or self._release.requested.is_set():  # what a release makes of `form` is no error of its own
            return formed
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def _run(self) -> None:
        formed: T | None = None
        try:
            formed = self._form()
        except BaseException as exc:
            with self._lock:
                self._error = None if self._left else exc
        with self._lock:
            left = self._left
            if not left:
                self._formed = formed
        if left and formed is not None:
            formed.close()
        self._woken.set()
