"""One call in flight, as the driver's process keeps it: who has to reply, who has, and when it is over.

Pure state, changed only by the thread that holds the dispatcher's lead; readers look at `done` first.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray_shm.actors.wire import text_of
from ray_shm.deadline import Deadline
from ray_shm.errors import (
    GroupClosedError,
    MismatchError,
    RpcCancelledError,
    RpcError,
    RpcTimeoutError,
    WorkerDiedError,
)

FAILURE_GRACE = 2.0  # seconds that the other ranks get after one has raised; none after a death

UNIQUE_GRACE = 0.05  # seconds that others get to fail, too, after the one rank that was to reply has failed

Reduce = str | Callable[[list[Any]], Any]


class Call:
    """State of one call.

    Attributes:
        targets: ranks in the order asked for. missing: those without an outcome. reply_rank: the only rank whose
            result is wanted, or None. results, failures: rank → outcome. over: error that ended the call early.
        done: nothing more will change. Set last.
    """

    __slots__ = (
        "call_id",
        "callbacks",
        "deadline",
        "done",
        "failures",
        "grace_at",
        "method",
        "missing",
        "over",
        "reduce",
        "reply_rank",
        "results",
        "since",
        "targets",
        "wakeup",
    )

    def __init__(
        self,
        call_id: int,
        method: str,
        targets: Sequence[int],
        reply_rank: int | None,
        reduce: Reduce | None,
        deadline: Deadline,
    ) -> None:
        self.call_id = call_id
        self.method = method
        self.targets = targets
        self.missing = set(targets)
        self.reply_rank = reply_rank
        self.reduce = reduce
        self.deadline = deadline  # given with the call; a waiter may bring a shorter one
        self.results: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self.over: Exception | None = None
        self.grace_at: float | None = None  # time.monotonic() when the wait for ranks after a failure ends
        self.since = time.monotonic()
        self.done = False
        self.wakeup: threading.Event | None = None  # of a thread that waits while another one leads
        self.callbacks: list[Callable[[], object]] = []

    def add_result(self, rank: int, result: Any) -> None:
        self.missing.discard(rank)
        self.results[rank] = result
        if not self.missing or rank == self.reply_rank:
            self.finish()

    def add_failure(self, rank: int, error: Exception) -> None:
        """A death ends the call at once; an exception gives the others FAILURE_GRACE to come in."""
        self.missing.discard(rank)
        self.failures[rank] = error
        if not self.missing or isinstance(error, WorkerDiedError):
            self.finish()
        elif self.grace_at is None:
            # Where only this rank's reply was wanted, the others say nothing unless they fail.
            self.grace_at = time.monotonic() + (FAILURE_GRACE if self.reply_rank != rank else UNIQUE_GRACE)

    def grace_is_over(self) -> bool:
        """Whether nothing more is awaited; ends the call when its grace has passed."""
        if self.grace_at is not None and time.monotonic() >= self.grace_at:
            self.finish()
        return self.done

    def give_up(self, error: Exception) -> None:
        """End the call early: cancelled, late, or the group was closed. Runs the callbacks."""
        if not self.done:
            self.over = error
            self.finish()
        self.run_callbacks()

    def finish(self) -> None:
        if self.done:
            return
        self.done = True
        if self.wakeup is not None:
            self.wakeup.set()

    def run_callbacks(self) -> None:
        """Run each callback once; whoever pops it runs it. Never by a thread that leads: a callback may call."""
        while self.callbacks:
            with contextlib.suppress(IndexError):
                self.callbacks.pop()()

    def outcome(self) -> Any:
        """The call's value; only once `done`.

        Raises:
            RpcError, GroupClosedError, RpcCancelledError, MismatchError, or what `reduce` raises.
        """
        if self.over is not None:
            raise copy.copy(self.over)  # the same exception raised twice would grow its traceback
        if self.failures:
            raise RpcError(self._failure_text(), self.failures, sorted(self.missing))
        if self.reply_rank is not None:
            return self.results[self.reply_rank]
        results = [self.results[rank] for rank in self.targets]
        return results if self.reduce is None else reduce_results(self.reduce, results, self.targets)

    def timeout_error(self, timeout: float | None, where: Callable[[int], str]) -> Exception:
        """What to raise when a deadline came before the call was done; `where` describes a rank."""
        if self.failures:
            return RpcError(self._failure_text(), self.failures, sorted(self.missing))
        late = sorted(self.missing)
        who = "; ".join(f"rank {r} ({where(r)})" for r in late)
        replied = len(self.targets) - len(late)
        return RpcTimeoutError(
            f"call {self.call_id} {self.method!r}: {replied}/{len(self.targets)} replied within {timeout} s; "
            f"no reply from {who}. They go on, and their late replies will be dropped; the group stays usable.",
            late,
            self.results,
        )

    def _failure_text(self) -> str:
        lines = [
            f"rank {rank}: {type(e).__name__}: {(text_of(e).splitlines() or [''])[0]}"
            for rank, e in self.failures.items()
        ]
        late = f"; no outcome yet from ranks {sorted(self.missing)}" if self.missing else ""
        return f"call {self.call_id} {self.method!r} failed on {len(lines)} of {len(self.targets)} ranks: " + (
            " | ".join(lines) + late
        )


def closed_error() -> GroupClosedError:
    return GroupClosedError("the actor group is closed; launch a new one")


def cancelled_error(call: Call) -> RpcCancelledError:
    return RpcCancelledError(
        f"call {call.call_id} {call.method!r} was cancelled by its caller; its replies are dropped"
    )


def reduce_results(reduce: Reduce, results: list[Any], ranks: Sequence[int]) -> Any:
    """Reduce results in rank order: "equal", "min", "max", "sum" (by + without a start value), or a callable.

    Raises:
        MismatchError: "equal" and a result differs from the first rank's, shown side by side.
    """
    if callable(reduce):
        return reduce(results)
    if reduce == "equal":
        return _require_equal(results, ranks)
    if reduce == "sum":
        total = results[0]
        for result in results[1:]:
            total = total + result
        return total
    return (min if reduce == "min" else max)(results)


def _require_equal(results: list[Any], ranks: Sequence[int]) -> Any:
    first = results[0]
    different = [rank for rank, result in zip(ranks, results, strict=True) if not equal_values(first, result)]
    if not different:
        return first
    shown = "; ".join(f"rank {rank}: {result!r:.200}" for rank, result in zip(ranks, results, strict=True))
    raise MismatchError(
        f"ranks {different} differ from rank {ranks[0]}: {shown}", dict(zip(ranks, results, strict=True))
    )


def equal_values(a: Any, b: Any) -> bool:
    """Equality by value; element-wise for torch tensors, NumPy arrays and the usual containers of them."""
    if type(a) is not type(b):
        return bool(a == b) if not hasattr(a, "shape") and not hasattr(b, "shape") else False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_values(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal_values(x, y) for x, y in zip(a, b, strict=True))
    if type(a).__module__.split(".")[0] == "torch" and hasattr(a, "untyped_storage"):
        import torch

        return bool(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    equal = a == b
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


REDUCTIONS = ("equal", "min", "max", "sum")
