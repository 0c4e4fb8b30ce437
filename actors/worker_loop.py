"""Serves calls on a worker's main thread: takes requests, runs the user's code, sends replies. Runs in the workers.

Beside it runs the control thread (control.py), which answers while user code holds this one, and asks it to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from ray_shm.actors import status_board, wire
from ray_shm.actors.cancellation import Cancellation
from ray_shm.actors.status_board import StatusRow
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError, RemoteError, StartError
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Buffer

logger = logging.getLogger("ray_shm")

STREAM_WINDOW = 16  # items of one rank that may be under way, unread by the stream's consumer
_MOST_INTERRUPTIONS = 1000  # of one wait for a request, before it is given up
_NEVER = Deadline.after(None)

Orders = Mapping[int, Callable[[Any], None]]


class WorkerLoop:
    """One per worker; `run` on the main thread.

    Args:
        orders: what a request of the library's own calls, with its payload, by the kind of request.

    Attributes:
        cancellation: for the control thread to cancel calls.
    """

    def __init__(
        self,
        worker: Any,
        rank: int,
        requests: QueueReader,
        replies: QueueWriter,
        row: StatusRow,
        orders: Orders,
    ) -> None:
        self._worker = worker
        self._rank = rank
        self._requests = requests
        self._replies = replies
        self._row = row
        self._orders = orders
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self.cancellation = Cancellation(rank)
        self._interruptions = 0  # since the last request
        self._credits: _Credits | None = None  # of the stream whose items are sent
        shm = requests.shm
        self._ring_driver: Callable[[], None] = shm.ring.bell.ring if shm is not None else lambda: None

    def run(self) -> None:
        """Until a stop request.

        Raises:
            QueueClosedError, PeerLostError: the driver is gone.
        """
        self._replies.wait_until_ready(_NEVER)
        self._row.rest(status_board.IDLE)
        while self._serve_one():
            self._ring_driver()

    def close(self) -> None:
        self.cancellation.close()
        if self._asyncio is not None:
            self._asyncio.close()
        self._requests.close()
        self._replies.close()

    def reply(self, frames: list[Buffer]) -> None:
        """Send a reply, from any thread, without ringing for it."""
        try:
            self._replies.send(frames)
        except StartError as exc:  # no memory for a large result
            reply = wire.decode_reply(frames)
            self._replies.send(wire.encode_failure(reply.call_id, reply.epoch, self._rank, exc))

    def ring(self) -> None:
        self._ring_driver()

    def grant(self, call_id: int, taken: int) -> None:
        """The stream's consumer has taken so many items in all. By the control thread."""
        credits = self._credits
        if credits is not None and credits.call_id == call_id:
            credits.grant(taken)

    def _serve_one(self) -> bool:
        try:
            self._requests.await_message(_NEVER)
        except (QueueClosedError, PeerLostError):
            raise
        except Exception:  # not SystemExit, nor KeyboardInterrupt (SIGINT): these end the worker
            self._interruptions += 1
            if self._interruptions > _MOST_INTERRUPTIONS:  # no signal handler does that
                raise
            logger.exception("rank %d: a signal handler raised while no call ran; the worker goes on", self._rank)
            return True
        self._interruptions = 0
        frames = self._requests.poll()
        if frames is None:
            return True
        request = wire.decode_request(frames, self._rank, self._requests.owned)
        kind = request.kind
        if request.position is None or kind == wire.STOP:
            self._requests.release()
            return kind != wire.STOP
        self._row.begin(request.call_id)
        try:
            call: Any = self._decode(request, kind)
        except BaseException as exc:  # whatever the user's class raises while unpickling: an error of this call
            call = exc
            self._row.show("")
        self._requests.release()
        del frames
        request.frames = ()  # the method alone keeps the memory of large arguments
        reply = self._failure(request, call) if isinstance(call, BaseException) else self._perform(request, call)
        del call
        self._row.replying()
        if reply is not None:
            self.reply(reply)
        self._row.idle()
        return True

    def _decode(self, request: wire.Request, kind: int) -> Any:
        cancellation = self._cancellable(request)
        try:
            return request.payload() if kind in self._orders else request.decode()
        finally:
            cancellation.running = 0

    def _cancellable(self, request: wire.Request) -> Cancellation:
        cancellation = self.cancellation
        cancellation.running = request.call_id
        if cancellation.pending:
            cancellation.check(request.call_id)
        return cancellation

    def _perform(self, request: wire.Request, call: Any) -> list[Buffer] | None:
        """The reply's frames, or None where no reply is wanted."""
        try:
            if request.kind in self._orders:
                self._row.show(wire.ORDERS[request.kind])
                self._orders[request.kind](call)
                return wire.encode_result(request.call_id, request.epoch, self._rank, None)
            cancellation = self._cancellable(request)
            try:
                return self._run(request, *call)
            finally:
                cancellation.running = 0
                self._credits = None
        except BaseException as exc:  # SystemExit and KeyboardInterrupt, too: the worker lives
            return self._failure(request, exc, call)

    def _run(
        self, request: wire.Request, method: wire.Method, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Buffer] | None:
        if isinstance(method, str):
            self._row.show(method)
            result = getattr(self._worker, method)(*args, **kwargs)
        else:
            self._row.show(wire.method_name(method))
            result = method(self._worker, *args, **kwargs)
        if result is not None and hasattr(type(result), "__await__"):
            result = self._await(result)
        if request.kind == wire.STREAM:
            self._send_items(request, method, result)
            result = None
        elif request.reply_rank not in (wire.EVERY_RANK, self._rank):
            return None
        return self._encode(request, method, result)

    def _await(self, awaitable: Any) -> Any:
        """Run an async method to its end. One event loop for the worker's life: what was started there goes on."""
        if self._asyncio is None:
            self._asyncio = asyncio.new_event_loop()
        return self.cancellation.run_task(self._asyncio, _coroutine(awaitable))

    # ---- streams --------------------------------------------------------------------------------------------------

    def _send_items(self, request: wire.Request, method: wire.Method, items: Any) -> None:
        is_async = hasattr(type(items), "__anext__")
        if not is_async and not hasattr(type(items), "__next__"):
            raise TypeError(
                f"{method!r} returned {type(items).__name__}, not a generator: its items cannot be streamed; "
                "call it with collective_rpc"
            )
        credits = self._credits = _Credits(request.call_id)
        try:
            while True:
                self.cancellation.require_running(request.call_id)
                credits.take()  # a cancel breaks this wait, too
                try:
                    item = self._await(anext(items)) if is_async else next(items)
                except (StopIteration, StopAsyncIteration):
                    return
                frames = self._encode(request, method, item, wire.ITEM)
                self._send_item(request.call_id, frames)
        finally:
            self._close_generator(items, is_async)

    def _send_item(self, call_id: int, frames: list[Buffer]) -> None:
        """A reply sent while the call runs: a cancel that comes meanwhile waits until it is out, whole."""
        cancellation = self.cancellation
        cancellation.require_running(call_id)
        cancellation.running = 0
        self.reply(frames)
        self._ring_driver()
        cancellation.running = call_id
        if cancellation.pending:
            cancellation.check(call_id)

    def _close_generator(self, items: Any, is_async: bool) -> None:
        if is_async:
            if hasattr(items, "aclose"):
                self._await(items.aclose())
        elif hasattr(items, "close"):
            items.close()

    # ---- outcomes -------------------------------------------------------------------------------------------------

    def _encode(self, request: wire.Request, method: wire.Method, result: Any, status: int = wire.OK) -> list[Buffer]:
        try:
            return wire.encode_result(request.call_id, request.epoch, self._rank, result, status)
        except Exception as exc:
            hint = "; to get a generator's items use stream()" if hasattr(type(result), "__next__") else ""
            raise RemoteError(
                f"the result of {method!r} on rank {self._rank} ({type(result).__name__}) cannot be pickled: {exc}; "
                f"return plain data, NumPy arrays or CPU tensors{hint}"
            ) from exc

    def _failure(self, request: wire.Request, exc: BaseException, call: Any = None) -> list[Buffer]:
        with contextlib.suppress(Exception):  # a frozen dataclass refuses even this
            exc.__traceback__ = _without_own_frames(exc)
        method = call[0] if isinstance(call, tuple) else None
        if isinstance(exc, AttributeError) and isinstance(method, str) and not hasattr(self._worker, method):
            exc = AttributeError(self._no_method(method))
        return wire.encode_failure(request.call_id, request.epoch, self._rank, exc)

    def _no_method(self, name: str) -> str:
        cls, own = type(self._worker), vars(self._worker) if hasattr(self._worker, "__dict__") else {}
        # Looked up on the class: a property is user code, which may raise anything.
        methods = [
            n
            for n in sorted({*dir(cls), *own})
            if not n.startswith("_") and callable(own.get(n, getattr(cls, n, None)))
        ]
        return f"worker class {cls.__name__} has no method {name!r}; it has: {', '.join(methods) or 'none'}"


class _Credits:
    """What a stream's generator needs to go on, one for each item."""

    def __init__(self, call_id: int) -> None:
        self.call_id = call_id
        self._granted = 0
        self._queue: SimpleQueue[None] = SimpleQueue()
        for _ in range(STREAM_WINDOW):
            self._queue.put(None)

    def grant(self, taken: int) -> None:
        """So many items have been taken in all; hearing it twice, or late, does no harm. By the control thread."""
        while self._granted < taken:
            self._granted += 1
            self._queue.put(None)

    def take(self) -> None:
        """Wait for one. By the main thread."""
        self._queue.get()


async def _coroutine(awaitable: Any) -> Any:
    return await awaitable


def _without_own_frames(exc: BaseException) -> Any:
    """The traceback from the user's code on."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
