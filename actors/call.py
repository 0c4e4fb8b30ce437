"""One call in flight, as the driver's process keeps it: who has to reply, who has, and when it is over.

Pure state, changed only by the thread that holds the dispatcher's lead; readers look at `done` first.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray_shm.actors import wire
from ray_shm.actors.comparison import require_equal
from ray_shm.deadline import Deadline
from ray_shm.errors import (
    GroupClosedError,
    PeerLostError,
    QueueClosedError,
    RemoteError,
    RpcCancelledError,
    RpcError,
    RpcTimeoutError,
    WorkerDiedError,
)

logger = logging.getLogger("ray_shm")

SHOWN_LATE = 8  # late ranks whose place and doing an error names
UNIQUE_GRACE = 0.05  # seconds that others get to fail, too, after the one rank that was to reply has failed

REDUCTIONS = ("equal", "min", "max", "sum")
Reduce = str | Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What all calls of a group have in common.

    Attributes:
        failure_grace: seconds that the other ranks get after one has raised; none after a death.
        slow_call_warning: seconds until an awaited call is logged as slow, then after twice as long; None: never.
        max_in_flight: calls under way at once; one more waits until one has ended.
        where: rank → where it is and stands, in words.
    """

    failure_grace: float = 2.0
    slow_call_warning: float | None = 10.0
    max_in_flight: int = 10_000
    where: Callable[[int], str] = str


class Call:
    """State of one call.

    Attributes:
        targets: ranks in the order asked for. missing: those without an outcome. reply_rank: the only rank whose
            result is wanted, or None. results, failures: rank → outcome. over: error that ended the call early.
        done: nothing more will change. Set last. ready: a waiter has something to look at.
        release_at: time.monotonic() when ranks that wait for a failed one are to be released.
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
        "options",
        "over",
        "reduce",
        "release_at",
        "reply_rank",
        "results",
        "since",
        "targets",
        "wakeup",
        "warn_at",
    )

    def __init__(
        self,
        call_id: int,
        method: str,
        targets: Sequence[int],
        reply_rank: int | None,
        reduce: Reduce | None,
        deadline: Deadline,
        options: CallOptions,
    ) -> None:
        self.call_id = call_id
        self.method = method
        self.targets = targets
        self.missing = set(targets)
        self.reply_rank = reply_rank
        self.reduce = reduce
        self.deadline = deadline  # given with the call; a waiter may bring a shorter one
        self.options = options
        self.results: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self.over: Exception | None = None
        self.grace_at: float | None = None  # time.monotonic() when the wait for ranks after a failure ends
        self.release_at: float | None = None
        self.since = time.monotonic()
        self.warn_at = None if options.slow_call_warning is None else self.since + options.slow_call_warning
        self.done = False
        self.wakeup: threading.Event | None = None  # of a thread that waits while another one leads
        self.callbacks: list[Callable[[], object]] = []

    @property
    def ready(self) -> bool:
        return self.done

    def take(self, reply: wire.Reply) -> None:
        """A rank's reply; unpickles it."""
        if reply.status == wire.FAILED:
            self.add_failure(reply.rank, reply.error())
            return
        try:
            result = reply.result()
        except Exception as exc:  # whatever the user's class raises while unpickling
            self.add_failure(reply.rank, _unreadable(reply.rank, exc))
        else:
            self.add_result(reply.rank, result)

    def add_result(self, rank: int, result: Any) -> None:
        self.missing.discard(rank)
        self.results[rank] = result
        if not self.missing or rank == self.reply_rank:
            self.finish()

    def add_failure(self, rank: int, error: Exception) -> None:
        """A death ends the call at once; an exception gives the others the grace to come in."""
        self.missing.discard(rank)
        self.failures[rank] = error
        if not self.missing or isinstance(error, WorkerDiedError):
            self.finish()
        elif self.grace_at is None:
            # Where only this rank's reply was wanted, the others say nothing unless they fail.
            grace = self.options.failure_grace if self.reply_rank != rank else UNIQUE_GRACE
            now = time.monotonic()
            self.release_at, self.grace_at = now + grace / 2, now + grace

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
            raise self.failure()
        if self.reply_rank is not None:
            return self.results[self.reply_rank]
        results = [self.results[rank] for rank in self.targets]
        return results if self.reduce is None else reduce_results(self.reduce, results, self.targets)

    def failure(self) -> RpcError:
        """Some rank failed."""
        late = sorted(self.missing - self.failures.keys())
        where = {rank: self.options.where(rank) for rank in late[:SHOWN_LATE]}
        what = f"call {self.call_id} {self.method!r}"
        return RpcError(what, self.failures, late, targets=len(self.targets), late_where=where)

    def timeout_error(self, timeout: float | None) -> Exception:
        """What to raise when a deadline came before the call was done."""
        if self.failures:
            return self.failure()
        late = sorted(self.missing)
        return RpcTimeoutError(
            f"call {self.call_id} {self.method!r}: {self.progress()} after {timeout} s. "
            "They go on, and their late replies will be dropped; the group stays usable.",
            late,
            self.results,
        )

    def progress(self) -> str:
        """How many have replied, and who has not."""
        late = sorted(self.missing)
        who = "; ".join(f"rank {r} ({self.options.where(r)})" for r in late[:SHOWN_LATE])
        more = f"; and {len(late) - SHOWN_LATE} more" if len(late) > SHOWN_LATE else ""
        return f"{len(self.targets) - len(late)}/{len(self.targets)} replied; no reply from {who}{more}"

    def next_look(self, deadline: Deadline) -> Deadline:
        """Until when to wait: `deadline`, or earlier where the call is to be logged as slow before."""
        at = self.warn_at
        return deadline if at is None or (deadline.at is not None and deadline.at <= at) else Deadline(at, None)

    def warn_slow(self) -> None:
        """Log who is awaited, and set `warn_at` to when that is to be done again."""
        now = time.monotonic()
        seconds = now - self.since
        self.warn_at = now + seconds
        logger.warning("call %d %r: %s after %.0f s", self.call_id, self.method, self.progress(), seconds)


class StreamCall(Call):
    """A call whose ranks send items before they end. Ends with the first failure.

    Attributes:
        items: (rank, item) as they came, not yet taken by the consumer.
        on_news: called, by whoever leads, after each item; for a consumer that does not wait in a thread.
    """

    __slots__ = ("items", "on_news")

    def __init__(
        self, call_id: int, method: str, targets: Sequence[int], deadline: Deadline, options: CallOptions
    ) -> None:
        super().__init__(call_id, method, targets, None, None, deadline, options)
        self.items: deque[tuple[int, Any]] = deque()
        self.on_news: Callable[[], object] | None = None

    @property
    def ready(self) -> bool:
        return self.done or bool(self.items)

    def take(self, reply: wire.Reply) -> None:
        if reply.status != wire.ITEM:
            super().take(reply)
        else:
            try:
                self.items.append((reply.rank, reply.result()))
            except Exception as exc:  # whatever the user's class raises while unpickling
                self.failures[reply.rank] = _unreadable(reply.rank, exc)
                self.finish()  # the rank stays in `missing`: its generator goes on, until it is told to stop
            if self.wakeup is not None:
                self.wakeup.set()
        if self.on_news is not None:
            self.on_news()

    def add_failure(self, rank: int, error: Exception) -> None:
        self.missing.discard(rank)
        self.failures[rank] = error
        self.finish()


def _unreadable(rank: int, exc: Exception) -> RemoteError:
    error = RemoteError(f"the result of rank {rank} cannot be unpickled here: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error


def closed_error() -> GroupClosedError:
    return GroupClosedError("the actor group is closed; launch a new one")


def cancelled_error(call: Call) -> RpcCancelledError:
    return RpcCancelledError(
        f"call {call.call_id} {call.method!r} was cancelled by its caller; its workers were told to stop"
    )


def unsent_error(exc: Exception, call: Call) -> Exception:
    """What the caller gets where sending its call raised `exc`; `exc` itself where that says it all."""
    if isinstance(exc, QueueClosedError):
        return closed_error()
    if isinstance(exc, PeerLostError) and exc.ranks:
        lost: dict[int, Exception] = dict.fromkeys(exc.ranks, exc)
        return RpcError(
            f"call {call.call_id} {call.method!r} did not reach all ranks", lost, sorted(call.missing - lost.keys())
        )
    if isinstance(exc, TimeoutError) and not isinstance(exc, RpcTimeoutError):
        return RpcTimeoutError(f"call {call.call_id} {call.method!r} was not sent: {exc}", sorted(call.missing))
    return exc


def reduce_results(reduce: Reduce, results: list[Any], ranks: Sequence[int]) -> Any:
    """Reduce results in rank order: "equal", "min", "max", "sum" (by + without a start value), or a callable.

    Raises:
        MismatchError: "equal" and a result differs from the first rank's, shown side by side.
    """
    if callable(reduce):
        return reduce(results)
    if reduce == "equal":
        return require_equal(results, ranks)
    if reduce == "sum":
        total = results[0]
        for result in results[1:]:
            total = total + result
        return total
    return (min if reduce == "min" else max)(results)
