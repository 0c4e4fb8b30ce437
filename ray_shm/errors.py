"""Every error that ray-shm raises on purpose, each saying who is at fault and what state remains.

Runs in every process. Imports nothing outside the standard library, so that an error can always be unpickled.
Programming mistakes that can be found before anything is sent are plain ``ValueError`` and ``TypeError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class RayShmError(Exception):
    """Base of every ray-shm error."""


class StartError(RayShmError):
    """A queue or an actor group could not be started.

    At fault: the environment (memory, a worker that died) or the worker's constructor (see ``__cause__``).
    Remains: nothing; workers, placement group, memory and ports made for the start are gone.

    Attributes:
        failures: rank → the exception of that rank's start, where ranks were involved.
    """

    def __init__(self, message: str, failures: Mapping[int, BaseException] | None = None) -> None:
        super().__init__(message)
        self.failures: dict[int, BaseException] = dict(failures or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.failures)


class PlacementError(RayShmError):
    """The cluster cannot place the group as asked, or did not keep its promise.

    At fault: the request (more than the cluster has) or the cluster (a GPU given twice).
    Remains: nothing; a placement group made for the request is removed.
    """


class QueueClosedError(RayShmError):
    """This end of the queue was closed here, or the writer closed the queue in good order.

    At fault: nobody, or a caller that uses a queue after ``close()``. Remains: nothing.
    """


class QueueCancelledError(RayShmError):
    """The ``cancel`` event given to ``dequeue`` was set. Remains: the queue, intact; no message was taken."""


class PeerLostError(RayShmError):
    """The process at the other end of a queue is gone without a goodbye.

    At fault: the peer. Remains: this end, to be closed.

    Attributes:
        ranks: the readers that are lost, where a queue's writer knows them.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = list(ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.ranks)


class GroupClosedError(RayShmError):
    """The actor group was closed before or during the call. At fault: the caller. Remains: nothing."""


class RpcCancelledError(RayShmError):
    """The call was cancelled by its caller. Remains: the group, usable."""


class MismatchError(RayShmError):
    """``reduce="equal"`` met results that differ between ranks.

    At fault: the workers. Remains: the group, usable.

    Attributes:
        results: rank → result.
    """

    def __init__(self, message: str, results: Mapping[int, Any] | None = None) -> None:
        super().__init__(message)
        self.results: dict[int, Any] = dict(results or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.results)


class WorkerDiedError(RayShmError):
    """A worker process is gone.

    At fault: the worker (crash, ``os._exit``), or whoever killed it. Remains: the other ranks, usable by
    ``target_ranks``; a call that needs this rank raises again.

    Attributes:
        rank: rank in the group. pid: process id on its node. node: that node's IP address.
        cause: what is known of the reason, as text.
    """

    def __init__(self, rank: int, pid: int, node: str, cause: str, doing: str = "") -> None:
        self.rank, self.pid, self.node, self.cause, self.doing = rank, pid, node, cause, doing
        what = f" while {doing}" if doing else ""
        super().__init__(
            f"worker rank {rank} (pid {pid}, node {node}) died{what}: {cause}. "
            "Its ranks' results are lost; close the group and launch a new one."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.pid, self.node, self.cause, self.doing)


class RemoteExitError(RayShmError):
    """User code in a worker raised SystemExit or KeyboardInterrupt; the worker caught it and lives.

    At fault: the worker's code. Remains: the group, usable.
    """


class RemoteError(RayShmError):
    """Stands for a worker's exception or result that could not be pickled; its text and traceback are kept.

    At fault: the worker's code. Remains: the group, usable.
    """


class RemoteTraceback(Exception):
    """The traceback of an exception as the worker printed it; set as ``__cause__`` of the exception itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text,)


class RpcError(RayShmError, ExceptionGroup[Exception]):
    """One or more ranks failed in a call. An ExceptionGroup, so ``except* ValueError`` works.

    At fault: the workers. Remains: the group, usable, but for the ranks that died.

    Attributes:
        failures: rank → the original exception, with the remote traceback as its ``__cause__``.
        late_ranks: ranks that had given no outcome when the error was raised.
        root_cause: the failure to look at first: a death before an exception, else the earliest to arrive.
    """

    failures: dict[int, Exception]
    late_ranks: list[int]

    def __new__(cls, message: str, failures: Mapping[int, Exception], late_ranks: Sequence[int] = ()) -> RpcError:
        if not isinstance(failures, Mapping):
            # Ray gives callers a subclass made of the bare exceptions; the rest is read off the original.
            return super().__new__(cls, message, list(failures))
        self = super().__new__(cls, message, list(failures.values()))
        self.failures = dict(failures)
        self.late_ranks = list(late_ranks)
        return self

    def __init__(self, message: str, failures: Mapping[int, Exception], late_ranks: Sequence[int] = ()) -> None:
        super().__init__(message, list(failures.values()))

    @property
    def root_cause(self) -> Exception:
        dead = [e for e in self.failures.values() if isinstance(e, WorkerDiedError)]
        return dead[0] if dead else next(iter(self.failures.values()))

    def derive(self, excs: Sequence[Exception]) -> RpcError:  # type: ignore[override]
        """Part of an ``except*`` split: keeps the ranks of the exceptions that stay."""
        kept = {rank: e for rank, e in self.failures.items() if any(e is x for x in excs)}
        if len(kept) != len(excs):  # a nested group was split: number what has no rank of its own
            kept = dict(enumerate(excs))
        return RpcError(self.message, kept, self.late_ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.failures, self.late_ranks)


class RpcTimeoutError(RayShmError, TimeoutError):
    """Ranks were late. A timeout cancels nothing: a late rank finishes, and its late reply is dropped.

    At fault: the late ranks, or a timeout that is too short. Remains: the group, usable.

    Attributes:
        late_ranks: the ranks without a reply. results: rank → result of those that did reply.
    """

    def __init__(self, message: str, late_ranks: Sequence[int] = (), results: Mapping[int, Any] | None = None) -> None:
        super().__init__(message)
        self.late_ranks = list(late_ranks)
        self.results: dict[int, Any] = dict(results or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.late_ranks, self.results)
