"""RpcFuture: the handle of a call sent with ``non_block=True``. Runs in the driver's process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from typing import Any

from ray_shm.actors.call import Call
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.deadline import Deadline
from ray_shm.errors import RpcCancelledError

logger = logging.getLogger("ray_shm")


class RpcFuture(concurrent.futures.Future[Any]):
    """The outcome of a call, later. Calls overlap freely; each future gets its own call's replies.

    A future of `concurrent.futures`, for its `wait` and `as_completed`; awaitable, for `asyncio.gather` and the like.
    The `timeout` given with the call counts from its sending; ``result(timeout)`` may bring a shorter one. A timeout
    cancels nothing on the workers; the late replies are dropped, and the future stays failed.
    """

    # What concurrent.futures.wait and as_completed look at, made when they do: most futures never meet them.

    def __init__(self, dispatcher: Dispatcher, call: Call) -> None:
        self._dispatcher = dispatcher
        self._call = call
        self._lock: threading.Condition | None = None
        self._watchers: list[Any] = []

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        if self._lock is None:
            self._lock = threading.Condition()
            self._dispatcher.on_done(self._call, self._tell_watchers)
        return self._lock

    @property
    def _state(self) -> str:  # type: ignore[override]
        if not self._call.done:
            return "PENDING"
        return "CANCELLED_AND_NOTIFIED" if self.cancelled() else "FINISHED"

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        return self._watchers

    def _tell_watchers(self) -> None:
        with self._condition:
            for watcher in self._watchers:
                watcher.add_cancelled(self) if self.cancelled() else watcher.add_result(self)

    def result(self, timeout: float | None = None) -> Any:
        """Wait at most `timeout` seconds (None: as long as the call's own timeout allows) for the call's value.

        Raises:
            RpcError: ranks failed. RpcTimeoutError: ranks were late. RpcCancelledError, GroupClosedError.
        """
        call = self._call
        deadline = call.deadline
        if timeout is not None:
            shorter = Deadline.after(timeout)
            if deadline.at is None or (shorter.at is not None and shorter.at < deadline.at):
                deadline = shorter
        if not call.done:
            try:
                self._dispatcher.wait(call, deadline)
            except Exception as exc:  # a timeout: the call is forgotten, so its outcome can never come
                call.give_up(exc)
        return call.outcome()

    def running(self) -> bool:
        return not self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, or None. Waits as `result` does."""
        try:
            self.result(timeout)
        except Exception as exc:  # the very thing asked for
            return exc
        return None

    def done(self) -> bool:
        """Whether `result` would return or raise at once. Takes in what has arrived."""
        return self._dispatcher.poll(self._call)

    def cancel(self) -> bool:
        """Give the call up: `result` raises RpcCancelledError, its replies are dropped. False if it was done.

        Ranks that have not begun it skip it; in one that runs it, RpcCancelledError is raised in the user's code, also
        in sleeps, locks and waits (in a C function that does not look for signals: once that returns). Workers live.
        """
        return self._dispatcher.cancel(self._call)

    def cancelled(self) -> bool:
        return isinstance(self._call.over, RpcCancelledError)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], object]) -> None:
        """Call ``fn(self)`` once done, from whatever thread completes the call; at once if it is done."""

        def run() -> None:
            try:
                fn(self)
            except Exception:  # as concurrent.futures does: a callback cannot fail the call
                logger.exception("a done-callback of call %d %r raised", self._call.call_id, self._call.method)

        self._dispatcher.on_done(self._call, run)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._await().__await__()

    async def _await(self) -> Any:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def from_any_thread() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake)

        self._dispatcher.on_done(self._call, from_any_thread)
        try:
            await waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._call.outcome()

    def __repr__(self) -> str:
        state = "done" if self._call.done else f"waits for ranks {sorted(self._call.missing)}"
        return f"<RpcFuture of call {self._call.call_id} {self._call.method!r}: {state}>"
