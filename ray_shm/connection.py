"""The connection of one coordinator group: made once for each epoch, used by one thread at a time, ended by any.

Runs in every worker.

    (made) ─┬ connect ┬─► connected ── close ──► ended (GroupClosedError), for good
       │    └ begin ┄─┘       ├─── a peer is gone or late ──► ended (PeerLostError)
       │         └────────────┴─── release, by another thread ──► ended (PeerLostError)
       └── no store, members absent ──► ended (StartError)          └── reform, next epoch ──► (made)

An ended connection repeats its error and is not connected again under its epoch: the keys that its members left on
the store would lead the next formation to sockets that are gone. Importing this module imports no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray_shm.arrivals import Arrivals, Attempt
from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, PeerLostError, RayShmError, StartError, raise_unless_same
from ray_shm.formation import Formation, Formed, Forming
from ray_shm.meeting_place import bound
from ray_shm.membership import Membership
from ray_shm.release import Release
from ray_shm.store import GroupStore, first_line

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from ray_shm.process_group import ProcessGroups

BACKENDS = ("auto", "gloo", "nccl")
_OUTCOME = 5.0  # seconds in which a forming that ran out of time says why; the store's client takes one of them
NOT_LAID = object()  # see GroupConnection.run_laid
REDUCE_OPS = ("sum", "product", "min", "max")
# Gloo matches messages by (source, destination, tag); 2 is process_group.SUM_TAG.
TENSOR_TAG, OBJECT_TAG, DICT_TAG, PART_TAG = 0, 1, 3, 4


class GroupConnection:
    """Holds the process groups of one coordinator while they are of use.

    Attributes:
        groups: None before `connect` and after the end; written by this class only.
        operation: what the owner's thread is in, as "all_reduce", or None. Written by that thread only.
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
        reason_wait: float = 0.0,
    ) -> None:
        """Args are the coordinator's; without a store, the first member serves one on `store_address`."""
        self.groups: ProcessGroups | None = None
        self.operation: str | None = None
        self.store: Any = None
        self.backend = self._wanted = backend
        self._members, self._name = members, name
        self._arrivals: Arrivals = Arrivals(None, members, {})  # of the current formation
        self._given_store, self._store_address = store, store_address
        self._bind_host, self._timeout, self.device = bind_host, timeout, device
        self._reason_wait = reason_wait
        self._own_store: GroupStore | None = None  # this rank serves it; it stays for the next epoch
        self._connecting = threading.Lock()
        # Held for a few instructions: `release` never waits for the owner's thread. Reentrant for a signal's handler.
        self._ending = threading.RLock()
        self._release = Release()
        self._begun: Formation[Formed] | None = None  # by `begin`, which did not wait for its end
        self._ended: RayShmError | None = None
        self._released_for: str | None = None  # the reason, if `release` was what ended it
        self._dropped: ProcessGroups | None = None  # after a release, until the owner's thread is out of them

    @property
    def members(self) -> Membership:
        return self._members

    @property
    def label(self) -> str:
        """The group in words, for errors."""
        m = self._members
        return f"coordinator group {self._name!r} (global ranks {list(m.ranks)}, this rank {m.ranks[m.rank_in_group]})"

    @property
    def operations(self) -> int:
        """Collectives called in the present formation."""
        return self._arrivals.count

    @property
    def is_lost(self) -> bool:
        """Whether every operation raises PeerLostError or StartError, or a broadcast through queues would."""
        groups = self.groups
        return isinstance(self._ended, PeerLostError | StartError) or (groups is not None and groups.queues.ended)

    def connect(self, operation: str = "connect", timeout: float | None = None) -> ProcessGroups:
        """The process groups; connects if nobody did yet.

        Args:
            operation: what for. timeout: seconds; default: the group's.

        Raises:
            StartError: could not connect. GroupClosedError, PeerLostError: ended before, or meanwhile.
        """
        with self._connecting:
            if self.groups is not None:
                return self.groups
            if self._ended is not None:
                raise self._again(operation)
            outer, self.operation = self.operation, self.operation or operation
            try:
                groups: ProcessGroups = self._connect(self.operation, self._timeout if timeout is None else timeout)
            finally:
                self.operation = outer
            return groups

    def begin(self, patience: float | None) -> None:
        """Connects, but waits `patience` seconds at the longest: it then goes on, and the first operation waits for it.

        Members that begin several groups in different orders would otherwise wait for each other.

        Raises:
            As `connect`.
        """
        with self._connecting:
            self.operation = "connect"
            try:
                self._connect("connect", self._timeout, patience)
            finally:
                self._leave()

    def run(self, operation: str, primitive: str, *args: Any, timeout: float | None = None) -> Any:
        """Runs the primitive of `ProcessGroups`; `operation` names it in the error, and to other threads meanwhile.

        Args:
            timeout: seconds, for forming the group if that is to be done yet, and again for the operation. Default:
                the group's. Operations on CUDA tensors are only queued; torch's watchdog ends those at the group's.

        Raises:
            ValueError: `timeout` is not positive.
            StartError: the group could not be formed.
            PeerLostError: a peer is gone or late, or the group was released; the connection has ended.
        """
        seconds = self._timeout if timeout is None else timeout
        if seconds <= 0:
            raise ValueError(f"{operation}: timeout={timeout}: give seconds, more than 0")
        self.operation = operation
        try:
            groups = self.groups or self.connect(operation, seconds)
            attempt = self._attempt(groups, operation, primitive, args, seconds)
            try:
                value = getattr(groups, primitive)(*args, attempt)
            except BaseException as exc:
                raise_unless_same(self._after(exc, groups, attempt), exc)
                raise
            attempt.finish()
            return value
        finally:
            self._leave()

    def run_laid(self, operation: str, primitive: str, src: int, message: Any) -> Any:
        """`run`, at the group's timeout, for broadcasts whose way from `src` is laid: a third less Python.

        Args:
            primitive: "publish", `message`: frames; or "take", `message`: a function for them, whose value is returned.

        Returns:
            NOT_LAID: nothing was done.
        """
        groups = self.groups
        step = None if groups is None else groups.queues.steps.get(src)
        if groups is None or step is None:
            return NOT_LAID
        deadline = Deadline.after(self._timeout)
        self.operation = operation
        self._arrivals.count += 1  # no call from here to `try`: a signal's handler may raise in one
        try:
            return step(message, deadline)
        except BaseException as exc:
            attempt = self._arrivals.attempt(operation, primitive, (src,), deadline, self._arrivals.count)
            raise_unless_same(self._after(groups.queues.failure(exc, src, deadline), groups, attempt), exc)
            raise
        finally:
            self.operation = None
            if self._ended is not None:
                self._leave()

    def _after(self, exc: BaseException, groups: ProcessGroups, attempt: Attempt) -> BaseException:
        """What to raise for what an operation raised."""
        if isinstance(exc, RuntimeError | TimeoutError):
            # Gloo knows the broken connection's port, whoever watches the processes knows which rank died.
            self._release.requested.wait(attempt.slice(self._reason_wait))
            return self._lost(attempt, exc)
        if isinstance(exc, TypeError | ValueError):
            attempt.uncount()
        elif isinstance(exc, StartError):
            pass  # the whole group's: no queue could be made
        elif not groups.is_in_step(attempt.primitive):
            # Of a signal's handler: which of its messages are under way is not known.
            self._interrupted(attempt.operation, exc)
        return exc

    def _attempt(
        self, groups: ProcessGroups, operation: str, primitive: str, args: Sequence[Any], seconds: float
    ) -> Attempt:
        on_gpu = groups.nccl is not None and any(getattr(arg, "is_cuda", False) for arg in args)
        return self._arrivals.begin(operation, primitive, args, None if on_gpu else seconds)

    def _lost(self, attempt: Attempt, exc: Exception) -> RayShmError:
        """The error to raise after `exc`. Closes the sockets, so that peers that wait for this rank raise as well."""
        late = getattr(exc, "late", None)
        gave_up = isinstance(exc, TimeoutError) or attempt.expired()
        if self._ended is None:
            attempt.arrivals.end(attempt, gave_up)
        if not self._end(PeerLostError(f"{attempt.operation} failed in {self.label}"), wake=True):
            return self._again(attempt.operation)
        account = attempt.arrivals.account(attempt, gave_up, late)
        attempt.arrivals.close()
        text = (
            f"{attempt.operation} failed in {self.label}{account.text}. {first_line(exc)}. "
            f"{'' if account.ranks else 'A peer is gone, or called with another shape or dtype. '}"
            "The group is of no use any more: reform() it, or destroy() it and form another, under the next epoch"
        )
        with self._ending:  # not the one that is raised: its traceback would keep every frame alive
            if isinstance(self._ended, PeerLostError):
                self._ended = PeerLostError(text, account.ranks)
        return PeerLostError(text, account.ranks)

    def _interrupted(self, operation: str, exc: BaseException) -> None:
        """Ends the connection, so that peers that wait for this rank raise, and none takes one message for another."""
        text = f"{self.label}: this rank was interrupted in an operation, {operation}, by {type(exc).__name__}"
        self._end(PeerLostError(f"{text}. It is of no use any more: reform() it under the next epoch"), wake=True)

    def release(self, reason: str) -> bool:
        """See StatelessGroupCoordinator.release."""
        with self._ending:
            if self._ended is not None:
                return False
            self._ended, self._released_for = PeerLostError(reason), reason
            self._set_aside()
            inside = self.operation is not None
        self._release.request()
        return inside

    def reform(self, name: str, store: Any) -> None:
        """Back to the state before `connect`, under another name; `store` replaces the one given, if it is not None.

        Raises:
            GroupClosedError: it was closed.
        """
        if isinstance(self._ended, GroupClosedError):
            raise self._again("reform")
        self._end(StartError(f"{self.label} is being formed again as {name!r}"))
        if store is not None:
            self._close_own_store()
            self._given_store = store
        with self._ending:
            if isinstance(self._ended, GroupClosedError):  # by another thread, just now
                raise self._again("reform")
            self._name, self.backend = name, self._wanted
            self._release = Release()
            self._ended = self._released_for = None

    def close(self) -> None:
        """Idempotent. Another thread that is in an operation raises GroupClosedError from it."""
        with self._ending:
            if isinstance(self._ended, GroupClosedError):
                return
            self._ended, self._released_for = GroupClosedError(f"{self.label} was destroyed by this process"), None
            self._set_aside()
            inside = self.operation is not None
        if inside:
            self._release.request()
        else:
            self._drop()
        self._close_own_store()
        self._given_store = None

    def _again(self, operation: str) -> RayShmError:
        """The error of an operation on what has ended; a new object, which collects no tracebacks."""
        if self._released_for is not None:
            return PeerLostError(
                f"{operation} in {self.label} was ended by this process: {self._released_for}. The group is of no use "
                "any more: reform() it under the next epoch"
            )
        if isinstance(self._ended, GroupClosedError):
            return GroupClosedError(f"{self._ended}; form it again under the next epoch")
        if isinstance(self._ended, PeerLostError):
            return PeerLostError(str(self._ended), self._ended.ranks)
        return type(self._ended)(str(self._ended)) if self._ended else StartError(f"{self.label} was not formed")

    def _end(self, reason: RayShmError, *, wake: bool = False) -> bool:
        """Frees the sockets, on the owner's thread. False: it had ended before, for another reason, which stays.

        wake: gloo's threads may still be in an operation, and would be waited for: end their connections first.
        """
        with self._ending:
            first = self._ended is None
            self._ended = self._ended or reason
            self._set_aside()
        if wake:
            self._release.request()
        self._drop()
        return first

    def _set_aside(self) -> None:
        """So that no operation begins on them. Not yet dropped: that joins threads, and another may be inside."""
        self._dropped, self.groups = self.groups or self._dropped, None

    def _leave(self) -> None:
        """The owner's thread is out of its operation. A `close` meanwhile has left the rest to it."""
        self.operation = None
        if self._ended is not None and isinstance(self._ended, GroupClosedError):
            self._drop()

    def _drop(self) -> None:
        with self._ending:  # `close` may be at it as well
            begun, self._begun = self._begun, None
            dropped, self._dropped = self._dropped, None
        if begun is not None:
            begun.leave()
        if dropped is not None:
            dropped.close()
        self.store = None
        self._arrivals = Arrivals(None, self._members, {})

    def _close_own_store(self) -> None:
        served, self._own_store = self._own_store, None
        if served is not None:
            served.close()

    # Forming: what may wait runs on a thread of its own, see formation.py

    def _connect(self, operation: str, seconds: float, patience: float | None = None) -> Any:
        """The process groups; None if they are not formed after `patience` seconds, but `seconds` are not over."""
        release = self._release
        try:
            begun = self._begun = self._begun or Formation(self._forming(release, seconds), release)
            if patience is not None and not begun.over(patience):
                return None
            self._begun = None
            formed = begun.result(seconds + _OUTCOME)
        except StartError as exc:
            release.request()  # what was left behind, if anything
            first = self._end(StartError(str(exc)))
            self._close_own_store()
            raise exc if first else self._again(operation) from exc
        except BaseException as exc:
            release.request()  # mostly an exception of a signal's handler: nobody waits for the formation any more
            self._end(StartError(f"{self.label} was not formed: {type(exc).__name__}: {exc}"))
            self._close_own_store()
            raise
        with self._ending:
            if formed is not None and self._ended is None:
                self.groups, self.store, self.backend = formed.groups, formed.store, formed.groups.backend
                self._arrivals = formed.arrivals
                return formed.groups
        if formed is not None:
            formed.close()
        raise self._again(operation)

    def _forming(self, release: Release, seconds: float) -> Forming:
        """What is quick, and belongs on the owner's thread; returns the rest."""
        from ray_shm.process_group import gpu_id

        device = self.device()
        wanted = f"auto:{gpu_id(device)}" if self.backend == "auto" else self.backend
        if wanted == "nccl" and device.type == "cpu":
            raise StartError(f"{self.label}: backend nccl needs a GPU, and this process sees none; use auto or gloo")
        host, port = self._store_address
        if self._given_store is None and port is not None and self._members.rank_in_group == 0 and not self._own_store:
            self._own_store = GroupStore.serve(bound(host, port, self.label), self._timeout)
        return Forming(
            label=self.label,
            name=self._name,
            members=self._members,
            backend=wanted,
            device=device,
            bind_host=self._bind_host,
            timeout=self._timeout,
            seconds=seconds,
            release=release,
            store=self._own_store or self._given_store,
            store_address=self._store_address,
        )


def choose_device(backend: str, local_rank: int, device_index: int | None) -> torch.device:
    import torch

    if backend == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    fitting = local_rank if 0 <= local_rank < torch.cuda.device_count() else 0
    return torch.device("cuda", fitting if device_index is None else device_index)
