"""The connection of one coordinator group: made once, used by one thread at a time, ended once.

Runs in every worker.

    (made) ── connect ──► connected ── close ──► ended (GroupClosedError)
       │                      └─── a peer is gone or late ──► ended (PeerLostError)
       └── no store, members absent ──► ended (StartError)

An ended connection repeats its error and is not connected again: the keys that its members left on the store
would lead the next formation to sockets that are gone. Form the group again under the next epoch. Importing this
module imports no torch.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray_shm.errors import GroupClosedError, PeerLostError, RayShmError, StartError
from ray_shm.membership import Membership
from ray_shm.store import GroupStore, first_line

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from ray_shm.process_group import ProcessGroups

BACKENDS = ("auto", "gloo", "nccl")
TENSOR_TAG, OBJECT_TAG = 0, 1  # and process_group.SUM_TAG; gloo matches messages by (source, destination, tag)


class GroupConnection:
    """Holds the process groups of one coordinator while they are of use.

    Attributes:
        groups: None before `connect` and after the end; written by this class only.
        store: where the members met, once connected.
        backend: as asked for; once connected, what the members agreed on.
    """

    def __init__(
        self,
        members: Membership,
        name: str,
        backend: str,
        *,
        store: Store | GroupStore | Callable[[], GroupStore] | None,
        store_address: tuple[str, int | None],
        bind_host: str,
        timeout: float,
        device: Callable[[], torch.device],
    ) -> None:
        """Args are the coordinator's; without a store, the first member serves one on `store_address`."""
        self.groups: ProcessGroups | None = None
        self.store: Any = None
        self.backend = backend
        self._members, self._name = members, name
        self._given_store, self._store_address = store, store_address
        self._bind_host, self._timeout, self._device = bind_host, timeout, device
        self._own_store: GroupStore | None = None
        self._ended: RayShmError | None = None
        self._connecting = threading.Lock()

    @property
    def members(self) -> Membership:
        return self._members

    @property
    def label(self) -> str:
        """The group in words, for errors."""
        m = self._members
        return f"coordinator group {self._name!r} (global ranks {list(m.ranks)}, this rank {m.ranks[m.rank_in_group]})"

    def connect(self) -> ProcessGroups:
        """The process groups; connects if nobody did yet.

        Raises:
            StartError: could not connect. GroupClosedError, PeerLostError: ended before.
        """
        with self._connecting:
            if self.groups is not None:
                return self.groups
            if self._ended is not None:
                raise type(self._ended)(str(self._ended))
            try:
                self.groups = self._form()
            except StartError as exc:
                self._end(StartError(str(exc)))
                raise
            except BaseException as exc:
                self._end(StartError(f"{self.label} was not formed: {type(exc).__name__}: {exc}"))
                raise
            return self.groups

    def run(self, operation: str, primitive: str, *args: Any) -> None:
        """Runs the primitive of `ProcessGroups`; `operation` names it in the error.

        Raises:
            PeerLostError: a peer is gone or late; the connection has ended.
        """
        run = getattr(self.groups or self.connect(), primitive)
        try:
            run(*args)
        except RuntimeError as exc:
            raise self.lost(operation, exc) from exc

    def lost(self, operation: str, exc: RuntimeError) -> RayShmError:
        """The error to raise after `exc`. Closes the sockets, so that peers that wait for this rank raise as well."""
        if self._ended is not None:  # closed by another thread during the operation
            return type(self._ended)(str(self._ended))
        text = (
            f"{operation} failed in {self.label}: {first_line(exc)}. A peer is gone, was later than "
            f"{self._timeout} s, or called with another shape or dtype. The group is of no use any more: destroy() it "
            "and form it again under the next epoch"
        )
        self._end(PeerLostError(text))  # not the one that is raised: its traceback would keep every frame alive
        return PeerLostError(text)

    def close(self) -> None:
        """Idempotent."""
        if not isinstance(self._ended, GroupClosedError):
            self._end(
                GroupClosedError(f"{self.label} was destroyed by this process; form it again under the next epoch")
            )

    def _end(self, reason: RayShmError) -> None:
        groups, self.groups, self._ended = self.groups, None, reason
        if groups is not None:
            groups.close()
        if self._own_store is not None:
            self._own_store.close()
        self.store = self._own_store = self._given_store = None

    def _form(self) -> ProcessGroups:
        from ray_shm.process_group import ProcessGroups, Rendezvous, gpu_id

        self.store = self._open_store()
        meeting = Rendezvous(
            _prefixed(self.store, self._name), self.label, self._members, self._bind_host, self._timeout
        )
        device = self._device()
        wanted = f"auto:{gpu_id(device)}" if self.backend == "auto" else self.backend
        if wanted == "nccl" and device.type == "cpu":
            raise StartError(f"{self.label}: backend nccl needs a GPU, and this process sees none; use auto or gloo")
        self.backend = meeting.agree(wanted)
        return ProcessGroups(meeting, self.backend, device)

    def _open_store(self) -> Any:
        if callable(self._given_store):
            return self._given_store()
        if self._given_store is not None:
            return self._given_store
        host, port = self._store_address
        if port is None:  # a group of one
            from torch.distributed import HashStore

            return HashStore()
        if self._members.rank_in_group == 0:
            self._own_store = GroupStore.serve(_bound(host, port, self.label), self._timeout)
        else:
            self._own_store = GroupStore.connect(host, port, self._timeout)
        return self._own_store


def _prefixed(store: Any, name: str) -> Any:
    if isinstance(store, GroupStore):
        return store.prefix(name)
    from torch.distributed import PrefixStore

    return PrefixStore(name, store)


def _bound(host: str, port: int, label: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as exc:
        raise StartError(
            f"{label}: its first rank could not bind {host}:{port} for the store: {exc.strerror or exc}. Pass a free "
            "port of this node in group_ports, or a coord_store whose port was bound to 0 and held"
        ) from exc
