"""RpcStream: the items of generator methods, as they come. Runs in the driver's process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from ray_shm.actors import wire
from ray_shm.actors.call import StreamCall, cancelled_error
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.worker_loop import STREAM_WINDOW
from ray_shm.errors import GroupClosedError, RpcCancelledError

_GRANT = STREAM_WINDOW // 2  # items taken between two messages to the worker
_RETRY = 0.05  # seconds until a message for which there was no room is tried again


class RpcStream:
    """Iterator, and async iterator, over (rank, item): each rank's items in order, the ranks' as they come.

    A rank is at most 16 items ahead of the consumer; then its generator waits. A failure comes in its place, after the
    items that arrived before it, as RpcError, and ends the stream on all ranks. So does `close`, which leaving a
    ``with``, a ``break`` out of the last reference, and Ctrl-C do, too: generators on the workers are closed (where one
    is computing, RpcCancelledError is raised in it). Used by one thread or task at a time.
    """

    _over = True  # while it is made

    def __init__(self, dispatcher: Dispatcher, call: StreamCall) -> None:
        self._dispatcher = dispatcher
        self._call = call
        self._taken: dict[int, int] = {}  # rank → items taken in all
        self._owed: set[int] = set()  # ranks that are to be told of it
        call.callbacks.append(partial(_stop_the_rest, dispatcher, call))  # not a method: `__del__` has to come
        if call.done:
            call.run_callbacks()
        self._over = False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        """The next item.

        Raises:
            StopIteration: every rank has come to its end, or the stream was closed here.
            RpcError: a rank raised or died. RpcTimeoutError: the stream's timeout came. GroupClosedError.
        """
        if self._over:
            raise StopIteration
        call = self._call
        try:
            self._pay()
            while not call.ready:
                self._wait_once()
            if call.items:
                return self._take()
        except BaseException:  # Ctrl-C; its traceback may keep this object for long
            self.close()
            raise
        self._end()
        raise StopIteration

    def _wait_once(self) -> None:
        if not self._owed:
            self._dispatcher.wait_once(self._call, self._call.deadline)
        elif not self._dispatcher.poll(self._call) and not self._call.ready:
            time.sleep(_RETRY)  # nothing tells when there is room, and without its credit the rank sends nothing
            self._pay()

    def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        return self

    async def __anext__(self) -> tuple[int, Any]:
        """As `__next__`, without blocking the event loop; ends with StopAsyncIteration."""
        if self._over:
            raise StopAsyncIteration
        self._pay()
        if not self._call.ready:
            await self._news()
        if self._call.items:
            return self._take()
        self._end()
        raise StopAsyncIteration

    async def _news(self) -> None:
        call, loop = self._call, asyncio.get_running_loop()
        came = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(came.set)

        call.on_news = tell
        self._dispatcher.on_done(call, tell)  # serves the call, too
        try:
            while not call.ready:
                retry = loop.call_later(_RETRY, came.set) if self._owed else None
                await came.wait()
                came.clear()
                if retry is not None:
                    retry.cancel()
                    self._pay()
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            call.on_news = None
            with contextlib.suppress(ValueError):
                call.callbacks.remove(tell)

    def close(self) -> None:
        """Close the generators on the workers, and drop what has not been taken. Idempotent."""
        if not self._over:
            self._over = True
            self._call.items.clear()
            if not self._call.done:
                self._dispatcher.abandon(self._call, cancelled_error(self._call))

    async def aclose(self) -> None:
        """As `close`, which does not wait."""
        self.close()

    def _take(self) -> tuple[int, Any]:
        rank, item = self._call.items.popleft()
        taken = self._taken[rank] = self._taken.get(rank, 0) + 1
        if taken % _GRANT == 0:
            self._owed.add(rank)
            self._pay()
        return rank, item

    def _pay(self) -> None:
        """Tell ranks how many of their items have been taken. Those for which there is no room now stay owed."""
        call = self._call
        for rank in list(self._owed):
            over = call.done or rank not in call.missing
            if over or self._dispatcher.tell(wire.CREDIT, call.call_id, [rank], self._taken[rank]):
                self._owed.discard(rank)

    def _end(self) -> None:
        """Every item has been taken, and no more will come. Raises what ended the stream, if not its end."""
        self._over = True
        with contextlib.suppress(RpcCancelledError):  # closed in another thread
            self._call.outcome()

    def __enter__(self) -> RpcStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._over:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._over else f"open on ranks {sorted(self._call.missing)}"
        return f"<RpcStream of call {self._call.call_id} {self._call.method!r}: {state}>"


def _stop_the_rest(dispatcher: Dispatcher, call: StreamCall) -> None:
    """The call has ended: so do its generators, also where the consumer never comes back."""
    if call.missing and not isinstance(call.over, RpcCancelledError | GroupClosedError):  # who gave it up has told them
        dispatcher.abandon_rest(call)
