"""Every error that ray-shm raises on purpose, each saying who is at fault and what state remains.

Runs in every process. Needs nothing outside the standard library, so that an error can always be unpickled.
Programming mistakes that can be found before anything is sent are plain ``ValueError`` and ``TypeError``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from ray_shm.late_cause import DeathCause, LateCause


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
        ranks: the readers that are lost, where a queue's writer knows them; the global ranks that a coordinator group's
            operation waited for in vain, where they are known.
        ray_shm_victim: True: in an RpcError whoever raised this comes after the rank that failed by itself.
    """

    ray_shm_victim = True

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = list(ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.ranks)


class GroupClosedError(RayShmError):
    """The actor group was closed before or during the call. At fault: the caller. Remains: nothing."""


class RpcCancelledError(RayShmError):
    """The call was cancelled by its caller.

    Raised at the caller, and at once in the worker's code that still runs the call: in loops, sleeps, locks and waits;
    let it pass, after clean-up. At fault: nobody. Remains: the group, usable; the workers live.
    """


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

    Raised at once, its cause is filled in some milliseconds later: reading `cause`, `signal`, `exit_code` or the text,
    and pickling, wait for it until 1 s after the death at most, and then say that it is unknown.

    At fault: the worker (crash, ``os._exit``), or whoever killed it. Remains: the other ranks, usable by
    ``target_ranks``; a call that needs this rank raises again until ``heal()`` has replaced it.

    Attributes:
        rank: rank in the group. pid: process id on its node. node: that node's IP address.
        doing: what was under way, "" if nothing.
    """

    def __init__(self, rank: int, pid: int, node: str, cause: str | DeathCause | LateCause, doing: str = "") -> None:
        super().__init__(rank, pid, node)
        self.rank, self.pid, self.node, self.doing = rank, pid, node, doing
        self._cause = DeathCause(cause) if isinstance(cause, str) else cause

    @property
    def cause(self) -> str:
        """What is known of the reason, as text: "killed by signal 9 (SIGKILL)"."""
        return self._known().text

    @property
    def signal(self) -> int | None:
        """Number of the signal that killed it; None: none did, or it is not known."""
        return self._known().signal

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None: a signal killed it, or it is not known."""
        return self._known().exit_code

    def during(self, doing: str) -> WorkerDiedError:
        """The same death for one call, say; waits for nothing."""
        return type(self)(self.rank, self.pid, self.node, self._cause, doing)

    def _known(self) -> DeathCause:
        return self._cause.get() if isinstance(self._cause, LateCause) else self._cause

    def __str__(self) -> str:
        what = f" while {self.doing}" if self.doing else ""
        return (
            f"worker rank {self.rank} (pid {self.pid}, node {self.node}) died{what}: {self.cause}. Its results are "
            "lost; heal() replaces it, and until then the other ranks can be called by target_ranks."
        )

    def __copy__(self) -> WorkerDiedError:
        return self.during(self.doing)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.pid, self.node, self._known(), self.doing)


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

    Its text is made when it is read, since causes of death come late: identical failures together, root cause first,
    and where the late ranks stand::

        call 412 'train' failed on 8 of 8 ranks: rank 3: killed by signal 9 (SIGKILL) (pid 81, node 10.0.0.2);
        ranks 0-2,4-7: OutOfMemoryError: CUDA out of memory (model.py:80)

    At fault: the workers. Remains: the group, usable, but for the ranks that died.

    Attributes:
        failures: rank → the original exception, with the remote traceback as its ``__cause__``.
        late_ranks: ranks that had given no outcome when the error was raised.
        root_cause: the failure to look at first: a death, else an exception, else a victim of another rank's failure
            (a PeerLostError, or whatever has ``ray_shm_victim = True``); among equals the earliest to arrive.
    """

    failures: dict[int, Exception]
    late_ranks: list[int]
    _targets: int | None
    _late_where: dict[int, str]

    def __new__(
        cls,
        what: str,
        failures: Mapping[int, Exception],
        late_ranks: Sequence[int] = (),
        *,
        targets: int | None = None,
        late_where: Mapping[int, str] | None = None,
    ) -> RpcError:
        """
        Args:
            what: the call, as in "call 412 'train'". targets: how many ranks it was for; without it `what` says what
                happened: "call 412 'train' was not sent". late_where: late rank → where it stands, in words.
        """
        if not isinstance(failures, Mapping):
            # Ray gives callers a subclass made of the bare exceptions; the rest is read off the original.
            return super().__new__(cls, what, list(failures))
        self = super().__new__(cls, what, list(failures.values()))
        self.failures = dict(failures)
        self.late_ranks = list(late_ranks)
        self._targets = targets
        self._late_where = dict(late_where or {})
        return self

    def __init__(self, what: str, failures: Mapping[int, Exception], *_: object, **__: object) -> None:
        super().__init__(what, list(failures.values()))

    def __str__(self) -> str:
        from ray_shm import failure_text  # it knows the classes of this file

        counts = "" if self._targets is None else f" failed on {len(self.failures)} of {self._targets} ranks"
        late = failure_text.describe_late(self.late_ranks, self._late_where)
        return f"{self.message}{counts}: {failure_text.describe(self.failures)}" + (
            f"; no outcome yet from {late}" if late else ""
        )

    @property
    def root_cause(self) -> Exception:
        from ray_shm import failure_text

        return failure_text.root_first(self.failures)[0][1]

    def derive(self, excs: Sequence[Exception]) -> RpcError:  # type: ignore[override]
        """Part of an ``except*`` split: keeps the ranks of the exceptions that stay."""
        kept = {rank: e for rank, e in self.failures.items() if any(e is x for x in excs)}
        if len(kept) != len(excs):  # a nested group was split: number what has no rank of its own
            kept = dict(enumerate(excs))
        return RpcError(self.message, kept, self.late_ranks, targets=self._targets, late_where=self._late_where)

    def __copy__(self) -> RpcError:
        return self.derive(self.exceptions)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling an exception drops its __cause__: the remote tracebacks go separately.
        tracebacks = {
            rank: e.__cause__ for rank, e in self.failures.items() if isinstance(e.__cause__, RemoteTraceback)
        }
        return _restored, (
            type(self),
            self.message,
            self.failures,
            self.late_ranks,
            self._targets,
            self._late_where,
            tracebacks,
        )


def _restored(
    cls: type[RpcError],
    what: str,
    failures: Mapping[int, Exception],
    late_ranks: Sequence[int],
    targets: int | None,
    late_where: Mapping[int, str],
    tracebacks: Mapping[int, RemoteTraceback],
) -> RpcError:
    """An RpcError out of a pickle."""
    for rank, remote in tracebacks.items():
        with contextlib.suppress(Exception):  # a frozen dataclass refuses even this
            failures[rank].__cause__ = remote
    return cls(what, failures, late_ranks, targets=targets, late_where=late_where)


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


def raise_unless_same(error: BaseException, cause: BaseException) -> None:
    """Raises `error` from `cause`. Returns where they are the same, for the caller's bare `raise`.

    For callers: kept in a variable of theirs, `error` would hold itself, by its traceback and their frame in it.
    """
    try:
        if error is not cause:
            raise error from cause
    finally:
        del error, cause
