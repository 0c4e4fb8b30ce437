"""Connecting a group on a thread of its own, so that whoever waits for it can be released.

Runs in every worker. Opening a store, gloo's connecting and nccl's wait in C++ code where nothing reaches them, for as
long as the group's timeout. Whoever is released, or interrupted by a signal, leaves them behind: they end by
themselves, at once where a release reaches them, else at the timeout; what they connected by then is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ray_shm.arrivals import Arrivals
from ray_shm.errors import StartError
from ray_shm.meeting_place import prefixed
from ray_shm.membership import Membership
from ray_shm.release import Release
from ray_shm.store import GroupStore

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from ray_shm.process_group import ProcessGroups


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


@dataclass(slots=True)
class Formed:
    """A group that has come about: what its members use, where they met, and who has come to its operations."""

    groups: ProcessGroups
    store: Any
    arrivals: Arrivals

    def close(self) -> None:
        self.groups.close()
        self.store = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forming:
    """How a group is formed; called, it does so. Imports torch.

    Attributes:
        label: the group in words. name: prefix of its keys on the store. bind_host: this node's address.
        timeout: seconds, of the group's operations. seconds: for forming it.
        store: where the members meet, or a callable that opens it; None: it is served at `store_address`; without a
            port there, the group has one member, and needs none.
    """

    label: str
    name: str
    members: Membership
    backend: str
    device: torch.device
    bind_host: str
    timeout: float
    seconds: float
    release: Release
    store: Store | GroupStore | Callable[[], GroupStore] | None
    store_address: tuple[str, int | None]

    def __call__(self) -> Formed:
        """Raises StartError: the store or a member could not be reached in time. ReleasedError."""
        from ray_shm.process_group import ProcessGroups
        from ray_shm.rendezvous import MeetingStore, Rendezvous

        store = self._open_store()
        meeting = Rendezvous(
            MeetingStore(prefixed(store, self.name), self.release, self.seconds),
            self.label,
            self.members,
            self.bind_host,
            self.timeout,
            self.release,
            self.seconds,
        )
        groups = ProcessGroups(meeting, meeting.agree(self.backend), self.device)
        return Formed(groups, store, Arrivals(meeting.store.inner, self.members, meeting.processes))

    def _open_store(self) -> Any:
        if callable(self.store):
            return self.store()
        if self.store is not None:
            return self.store
        host, port = self.store_address
        if port is None:  # a group of one
            from torch.distributed import HashStore

            return HashStore()
        return GroupStore.connect(host, port, self.seconds, cancel=self.release.requested)
