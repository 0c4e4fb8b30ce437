"""Sends calls and sorts replies, without a thread of its own on the hot path. Runs in the driver's process.

    caller -> submit -> request queue (one, to all ranks)        worker -> reply queue (one per rank) -> drain -> Call

Whoever waits leads (lead.py): it sleeps on one word, the bell, and drains every reply queue when that rings, completing
other threads' calls too. Waiters that never call in (asyncio, callbacks) are served by one lazily started thread.

Everything that a leader must notice rings the bell: workers after each request, the reader of remote replies, the
death watch, and close. A client of a driver actor has a dispatcher, too; its one "worker" is the actor, which relays.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_shm.actors import wire
from ray_shm.actors.call import Call, CallOptions, Reduce, StreamCall, cancelled_error, closed_error, unsent_error
from ray_shm.actors.callback_server import CallbackServer
from ray_shm.actors.orders import Orders
from ray_shm.actors.outbox import Outbox
from ray_shm.actors.replies import Replies
from ray_shm.deadline import Deadline
from ray_shm.errors import RpcError, RpcTimeoutError
from ray_shm.queue_reader import QueueReader
from ray_shm.ring import Bell, Buffer

logger = logging.getLogger("ray_shm")

_YIELD = 0.001  # seconds that the callback thread leaves a caller to take the lead from it
_NEXT_LOOK = 0.05  # seconds between looks where nobody tells that there is room
_AT_ONCE = Deadline.after(0)


class Dispatcher(Replies):
    """Calls in flight from one process to one group of workers. Any thread may call in.

    Args:
        requests: to all ranks. control: to all ranks' control threads. replies: queues in shared memory, by rank.
        first_id: of the calls. bell: what to sleep on where `requests` has none.

    Attributes:
        calls: sent so far. For others see Replies.
        before_call: called before each call is sent, while it is set; see release.py.
        await_heal: called before a call to a dead rank is refused; waits for its replacement, as long as the call may;
            False: there may still be one.
        on_cancel: called with a call that was cancelled while ranks were still in it, by whatever thread did that.
    """

    def __init__(
        self,
        requests: Outbox,
        control: Outbox,
        replies: Mapping[int, QueueReader],
        world_size: int,
        options: CallOptions,
        *,
        first_id: int = 1,
        bell: Bell | None = None,
    ) -> None:
        super().__init__(replies, world_size, requests.bell or bell)
        self.epoch = 0
        self.world_size = world_size
        self.options = options
        self._requests = requests
        self._control = control
        self._ids = itertools.count(first_id)
        self.calls = 0
        self._refusing = False  # new calls
        self._closed = False
        self.before_call: Callable[[Deadline], None] | None = None
        self.await_heal: Callable[[Deadline], bool] | None = None
        self.on_cancel: Callable[[Call], None] | None = None
        self._server: CallbackServer | None = None
        self._mutex = threading.Lock()  # guards the making of the callback server
        self._orders = Orders(control)
        self.add_poll(self._orders.send)

    # ---- calls ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        method: wire.Method,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        targets: Sequence[int] | None,
        reply_rank: int | None,
        reduce: Reduce | None,
        deadline: Deadline,
        at_once: bool = False,
    ) -> Call:
        """Send a call; `targets` None means all ranks. `at_once`: RpcTimeoutError rather than to wait for anything.

        Raises:
            GroupClosedError. ValueError: a Scatter of the wrong length. TypeError and others: pickling failed.
            RpcError: a target is dead. RpcTimeoutError: no room to send until the deadline; nothing was sent.
            StartError: no memory for a large argument; nothing was sent.
        """
        ranks = self._every_rank if targets is None else targets
        call = Call(next(self._ids), wire.method_name(method), ranks, reply_rank, reduce, deadline, self.options)
        only = wire.EVERY_RANK if reply_rank is None else reply_rank
        frames = wire.encode_call(call.call_id, self.epoch, method, args, kwargs, targets, len(ranks), only)
        self._send(call, frames, _AT_ONCE if at_once else deadline)
        return call

    def call(self, method: wire.Method, timeout: float | None) -> list[Any]:
        """A plain call of all ranks without arguments: their results, in rank order. Raises as `submit` and `wait`."""
        deadline = Deadline.after(timeout)
        call = self.submit(method, (), {}, None, None, None, deadline)
        self.wait(call, deadline)
        results: list[Any] = call.outcome()
        return results

    def submit_stream(
        self,
        method: wire.Method,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        targets: Sequence[int] | None,
        deadline: Deadline,
    ) -> StreamCall:
        """Send a call whose items are wanted. Raises as `submit`."""
        ranks = self._every_rank if targets is None else targets
        call = StreamCall(next(self._ids), wire.method_name(method), ranks, deadline, self.options)
        frames = wire.encode_call(
            call.call_id, self.epoch, method, args, kwargs, targets, len(ranks), wire.EVERY_RANK, wire.STREAM
        )
        try:
            self._send(call, frames, deadline)
        except BaseException as exc:
            if not isinstance(exc, Exception):  # Ctrl-C: nobody takes the items, and its generators would wait for ever
                self.abandon(call, cancelled_error(call))
            raise
        return call

    def submit_order(self, kind: int, name: str, payload: object, targets: Sequence[int], deadline: Deadline) -> Call:
        """Send a request of the library's own, through the request queue (wire.ORDERS) or the control queue. Raises as
        `submit`."""
        call = Call(next(self._ids), name, targets, None, None, deadline, self.options)
        frames = wire.encode_order(kind, call.call_id, self.epoch, targets, payload)
        try:
            if kind == wire.RELEASE:
                self._register(call)
                self._orders.give(frames)  # never lost, and never waited for
            else:
                self._post(call, frames, deadline, self._requests if kind in wire.ORDERS else self._control)
                if self._finished and not self.lead.is_mine():
                    self.run_callbacks_elsewhere()  # not here: who orders may hold locks that a callback wants
        except BaseException:  # Ctrl-C: nobody takes the answers
            self.forget(call)
            raise
        return call

    def tell(self, kind: int, call_id: int, targets: Sequence[int] | None, payload: object) -> bool:
        """Tell control threads something that has no reply. See Orders.give."""
        return self._orders.give(wire.encode_order(kind, call_id, self.epoch, targets, payload))

    def forward(self, call: Call, frames: Sequence[Buffer], to_control: bool) -> None:
        """Send frames that somebody else made for `call`, without waiting. Raises as `submit`."""
        self._post(call, frames, _AT_ONCE, self._control if to_control else self._requests)

    def new_id(self) -> int:
        return next(self._ids)

    def _send(self, call: Call, frames: Sequence[Buffer], deadline: Deadline) -> None:
        """A user's call. Whatever it may have to wait for is a RpcTimeoutError where it is to be sent _AT_ONCE."""
        if self._refusing:
            raise closed_error()
        if self.before_call is not None:
            if deadline is _AT_ONCE:
                raise RpcTimeoutError(f"call {call.call_id} {call.method!r} was not sent: groups are being re-formed")
            self.before_call(deadline)
        if self._dead and self.await_heal is not None and any(rank in self._dead for rank in call.targets):
            # Not pending yet: the death that it waits out is none of its own.
            healed = self.await_heal(deadline)
            if deadline is _AT_ONCE and not healed:
                raise RpcTimeoutError(f"call {call.call_id} {call.method!r} was not sent: a rank is being replaced")
        if len(self._pending) >= self.options.max_in_flight:
            self._await_room(call, deadline)
        self._post(call, frames, deadline, self._requests)
        if self._finished and not self.lead.is_mine():
            self._run_callbacks()

    def _register(self, call: Call) -> None:
        if self._closed:
            raise closed_error()
        self.calls += 1
        self._pending[call.call_id] = call  # before the look at the dead: a death from now on is told to this call
        try:
            if self._dead:
                self._require_alive(call)
        except RpcError:
            self.forget(call)
            raise

    def _post(self, call: Call, frames: Sequence[Buffer], deadline: Deadline, outbox: Outbox) -> None:
        self._register(call)
        try:
            outbox.send(frames, deadline, self._drain_quietly)
            if self._closed:
                raise closed_error()
        except Exception as exc:
            self.forget(call)
            translated = unsent_error(exc, call)
            if translated is exc:
                raise
            raise translated from exc
        except BaseException:  # Ctrl-C: it may have gone out
            self.abandon(call, cancelled_error(call))
            raise

    def _await_room(self, call: Call, deadline: Deadline) -> None:
        """Until fewer than max_in_flight calls are under way."""
        while len(self._pending) >= self.options.max_in_flight:
            if self.lead.take_or_follow(turn := self.lead.turn(), self._server is not None):
                try:
                    self.lead.sleep(lambda: self._look() or len(self._pending) < self.options.max_in_flight, deadline)
                finally:
                    self.lead.give()
            else:
                self.lead.follow(turn, Deadline.after(deadline.slice(_NEXT_LOOK)))
            self._run_callbacks()
            if deadline.expired():
                raise RpcTimeoutError(
                    f"call {call.call_id} {call.method!r} was not sent within {deadline.timeout} s: "
                    f"{len(self._pending)} calls are under way, and max_in_flight={self.options.max_in_flight}",
                    sorted(call.missing),
                )
            if self._closed:
                raise closed_error()

    # ---- waiting --------------------------------------------------------------------------------------------------

    def wait(self, call: Call, deadline: Deadline) -> None:
        """Until `call` is done. Whatever ends the wait early, the call is then forgotten: its replies are dropped.

        Raises:
            RpcTimeoutError, or RpcError where some rank had failed: the deadline came first.
        """
        while not call.done:
            self.wait_once(call, deadline)

    def wait_once(self, call: Call, deadline: Deadline) -> None:
        """One turn at leading or following; may end before the call is ready. Raises as `wait`."""
        until = call.next_look(deadline)
        try:
            self._turn(call, until)
        except BaseException:  # Ctrl-C
            if self.lead.is_mine():  # it came on the way into the lead, or out of it
                self.lead.give()
            self.abandon(call, cancelled_error(call))
            raise
        self._run_callbacks()
        if call.done or (call.ready and not self._is_server()):
            return
        if call.warn_at is not None and until is not deadline and time.monotonic() >= call.warn_at:
            call.warn_slow()
        if deadline.expired():
            self.forget(call)
            raise call.timeout_error(deadline.timeout)

    def _lead_until(self, ready: Callable[[], bool], deadline: Deadline) -> None:
        """Sleep as the leader; no longer than until a call's grace has to be looked at."""
        at = self.next_grace() if self._failed else None
        if self._orders.waiting:  # nobody tells when there is room
            at = time.monotonic() + _NEXT_LOOK
        if at is not None and (deadline.at is None or at < deadline.at):
            deadline = Deadline(at, None)
        self.lead.sleep(ready, deadline)

    def poll(self, call: Call) -> bool:
        """Whether `call` is done, after a look at what has arrived."""
        if not call.done:
            self.drain_if_free()
        if not call.done and call.deadline.expired():
            self.forget(call)
            call.give_up(call.timeout_error(call.deadline.timeout))
        return call.done

    def cancel(self, call: Call, error: Exception | None = None) -> bool:
        """End a call here and on its workers: its replies will be dropped. False if it was done before."""
        if self.poll(call):
            return False
        self.abandon(call, error or cancelled_error(call))
        return True

    def on_done(self, call: Call, callback: Callable[[], object]) -> None:
        """Run `callback` once the call is done, from whatever thread completes it; at once if it is."""
        call.callbacks.append(callback)
        if call.done:
            call.run_callbacks()
            return
        self.serve(call)

    def serve(self, call: Call) -> None:
        """Have the callback thread wait for `call`, as if it had called."""
        with self._mutex:
            if self._server is None:
                self._server = CallbackServer(self)
                self._server.start()
        self._server.watch(call)

    def abandon(self, call: Call, error: Exception) -> None:
        """Nobody wants the call any more: its workers are told, and it ends here."""
        self.forget(call)
        self.abandon_rest(call)
        call.give_up(error)

    def abandon_rest(self, call: Call) -> None:
        """Cancel `call` on the ranks that are still in it."""
        missing = sorted(call.missing - self._dead.keys())
        if missing and not self._closed:
            told = self.tell(wire.CANCEL, call.call_id, missing, [(call.call_id, "its caller gave it up")])
            if not told:
                logger.warning("call %d %r: ranks %s could not be told to stop", call.call_id, call.method, missing)
            if self.on_cancel is not None:
                self.on_cancel(call)

    def _is_server(self) -> bool:
        return self._server is not None and self._server.is_this_thread()

    def _turn(self, call: Call, deadline: Deadline) -> None:
        server = self._server
        if server is not None and server.is_this_thread():
            self._turn_of_server(call, deadline, server)
        elif self.lead.take_or_follow(call, server is not None):
            try:
                self._lead_until(lambda: self._look() or call.ready, deadline)
            finally:
                self.lead.give()
        else:
            self.lead.follow(call, deadline)

    def _turn_of_server(self, call: Call, deadline: Deadline, server: CallbackServer) -> None:
        if not self.lead.take_or_follow(server, False):
            self.lead.follow(server, deadline)
            return
        try:
            self._lead_until(lambda: self._look() or call.done or self.lead.wanted or server.has_news(), deadline)
        finally:
            asked = self.lead.wanted
            self.lead.give()
        if asked:
            time.sleep(_YIELD)

    def _look(self) -> bool:
        """Drain; whether the lead has to be given back whatever this thread waits for."""
        self.drain()
        if self._graced:
            self._graced = False
            return True
        return bool(self._finished) or self.lead.claimed

    def drain_if_free(self) -> None:
        """Drain unless another thread leads, and so drains."""
        self._drain_quietly()
        if not self.lead.is_mine():
            self._run_callbacks()

    def _drain_quietly(self) -> None:
        """Called while a full request queue is awaited, too: without callbacks, which could send through it."""
        if self._closed:
            raise closed_error()
        mine = self.lead.is_mine()
        try:
            if self.lead.take():
                try:
                    self.drain()
                finally:
                    self.lead.give()
        except BaseException:
            if not mine and self.lead.is_mine():  # Ctrl-C, on the way into the lead, or out of it
                self.lead.give()
            raise

    def run_callbacks_elsewhere(self) -> None:
        silent = CallOptions(slow_call_warning=None)
        call = Call(next(self._ids), "callbacks", (), None, None, _AT_ONCE, silent)
        self.serve(call)

    def _forget_rank(self, rank: int) -> None:
        self._requests.drop(rank)
        self._control.drop(rank)

    # ---- the end --------------------------------------------------------------------------------------------------

    def send_stop(self, deadline: Deadline) -> None:
        """Ask every worker to end its loop after the calls sent so far. Raises as QueueWriter.send."""
        self._requests.send(wire.encode_stop(self.epoch), deadline, self._drain_quietly)

    @property
    def refusing(self) -> bool:
        """Calls, because the group is being closed."""
        return self._refusing

    def refuse_calls(self) -> None:
        """From now on `submit` raises GroupClosedError. Calls in flight go on, but for streams, which are cancelled."""
        self._refusing = True
        for call in list(self._pending.values()):
            if isinstance(call, StreamCall):
                self.abandon(call, closed_error())

    def close(self) -> None:
        """Fail what is still pending with GroupClosedError, and free the threads. Idempotent."""
        self._refusing = self._closed = True
        for call in list(self._pending.values()):
            call.give_up(closed_error())
        self._pending.clear()
        self.lead.bell.ring()
        if self._server is not None:
            self._server.close()
        self._let_go()
