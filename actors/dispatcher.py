"""Sends calls and sorts replies, without a thread of its own on the hot path. Runs in the driver's process.

    caller -> submit -> request queue (one, to all ranks)        worker -> reply queue (one per rank) -> drain -> Call

Whoever waits leads: it sleeps on one word, the bell, and drains every reply queue when that rings, completing other
threads' calls too. The others sleep on an event until their call is done or the lead is theirs. Waiters that never
call in (asyncio, callbacks) are served by one lazily started thread, which hands the lead to whoever calls.

Everything that a leader must notice rings the bell: workers after each request, the reader of remote replies, the
death watch, and close.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_shm.actors import wire
from ray_shm.actors.call import Call, Reduce, cancelled_error, closed_error
from ray_shm.actors.callback_server import CallbackServer
from ray_shm.actors.remote_replies import RemoteReplies
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError, RemoteError, RpcError, RpcTimeoutError, WorkerDiedError
from ray_shm.futex import Word
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Bell, Buffer
from ray_shm.waiting import Waiter

_YIELD = 0.001  # seconds that the callback thread leaves a caller to take the lead from it


class Dispatcher:
    """Calls in flight from one driver process to one group of workers. Any thread may call in.

    Args:
        requests: queue to all ranks. replies: rank → that rank's reply queue. where: rank → its node and pid, in words.
    """

    def __init__(
        self, requests: QueueWriter, replies: Mapping[int, QueueReader], where: Callable[[int], str], epoch: int = 0
    ) -> None:
        self.epoch = epoch
        self.world_size = len(replies)
        self._requests = requests
        self._local = [(rank, r.shm.ring.readable, r) for rank, r in replies.items() if r.shm is not None]
        self._where = where
        self._every_rank = range(self.world_size)
        self._pending: dict[int, Call] = {}
        self._next_id = 0
        self._refusing = False  # new calls
        self._closed = False
        self._dead: dict[int, WorkerDiedError] = {}
        self._deaths: deque[WorkerDiedError] = deque()  # reported, and not yet told to the calls
        self.bell = requests.bell or _private_bell()
        remote = {rank: reader for rank, reader in replies.items() if reader.zmq is not None}
        self._remote = RemoteReplies(remote, self.bell.ring) if remote else None
        self._mutex = threading.Lock()  # guards the fields below, the pending table and the call ids
        self._leading = False
        self._leader: int | None = None  # its thread
        self._finished: deque[Call] = deque()  # calls whose callbacks are due, once the lead is given back
        self._followers: list[Call] = []
        self._waiter = Waiter()  # the leader's
        self._lost: set[int] = set()  # ranks whose reply queue cannot be read any more; the leader's
        self._failed: list[Call] = []  # calls with a failure whose other ranks still have time; the leader's
        self._server: CallbackServer | None = None
        self.yield_lead = False  # a caller waits while the callback thread leads

    def submit(
        self,
        method: wire.Method,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        targets: Sequence[int] | None,
        reply_rank: int | None,
        reduce: Reduce | None,
        deadline: Deadline,
    ) -> Call:
        """Send a call; `targets` None means all ranks.

        Raises:
            GroupClosedError. ValueError: a Scatter of the wrong length. TypeError and others: pickling failed.
            RpcError: a target is dead. RpcTimeoutError: no room to send until the deadline; nothing was sent.
            StartError: no memory for a large argument; nothing was sent.
        """
        ranks = self._every_rank if targets is None else targets
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        with self._mutex:
            if self._refusing:
                raise closed_error()
            call_id = self._next_id = self._next_id + 1
        call = Call(call_id, name, ranks, reply_rank, reduce, deadline)
        only = wire.EVERY_RANK if reply_rank is None else reply_rank
        frames = wire.encode_call(call_id, self.epoch, method, args, kwargs, targets, len(ranks), only)
        self._pending[call_id] = call  # before the look at the dead: a death from now on is told to this call
        try:
            if self._dead:
                self._require_alive(call)
            self._requests.send(frames, deadline, self.drain_if_free)
            if self._closed:
                raise closed_error()
        except BaseException as exc:
            self._pending.pop(call_id, None)
            translated = self._translated(exc, call, deadline)
            if translated is exc:
                raise
            raise translated from exc
        return call

    def wait(self, call: Call, deadline: Deadline) -> None:
        """Until `call` is done. Whatever ends the wait early, the call is then forgotten: its replies are dropped.

        Raises:
            RpcTimeoutError, or RpcError where some rank had failed: the deadline came first.
        """
        while not call.done:
            self.wait_once(call, deadline)

    def wait_once(self, call: Call, deadline: Deadline) -> None:
        """One turn at leading or following; may end before the call is done. Raises as `wait`."""
        try:
            if self._take_lead(call):
                try:
                    self._lead(call, deadline)
                finally:
                    asked = self.yield_lead
                    self._give_lead()
                if asked and self._server is not None and self._server.is_this_thread():
                    time.sleep(_YIELD)
            elif call.wakeup is not None and not call.done:  # done is set before wakeup is looked at
                self._follow(call, call.wakeup, deadline)
        except BaseException:  # Ctrl-C
            if self._leader == threading.get_ident():  # it came on the way into the lead, or out of it
                self._give_lead()
            self.forget(call)
            call.give_up(cancelled_error(call))
            raise
        self._run_callbacks()
        if not call.done and deadline.expired():
            self.forget(call)
            raise call.timeout_error(deadline.timeout, self._where)

    def poll(self, call: Call) -> bool:
        """Whether `call` is done, after a look at what has arrived."""
        if not call.done:
            self.drain_if_free()
        if not call.done and call.deadline.expired():
            self.forget(call)
            call.give_up(call.timeout_error(call.deadline.timeout, self._where))
        return call.done

    def cancel(self, call: Call) -> bool:
        """Give a call up: its replies will be dropped. False if it was done before."""
        if self.poll(call):
            return False
        self.forget(call)
        call.give_up(cancelled_error(call))
        return True

    def forget(self, call: Call) -> None:
        self._pending.pop(call.call_id, None)

    def on_done(self, call: Call, callback: Callable[[], object]) -> None:
        """Run `callback` once the call is done, from whatever thread completes it; at once if it is."""
        call.callbacks.append(callback)
        if call.done:
            call.run_callbacks()
            return
        with self._mutex:
            if self._server is None:
                self._server = CallbackServer(self)
        self._server.watch(call)

    def report_death(self, death: WorkerDiedError) -> None:
        """A worker is gone. From any thread; the first report for a rank counts."""
        if death.rank in self._dead:
            return
        self._dead[death.rank] = death
        self._requests.drop(death.rank)
        self._deaths.append(death)
        self.bell.ring()

    @property
    def dead(self) -> Mapping[int, WorkerDiedError]:
        return self._dead

    def send_stop(self, deadline: Deadline) -> None:
        """Ask every worker to end its loop after the calls sent so far. Raises as QueueWriter.send."""
        self._requests.send(wire.encode_stop(self.epoch), deadline, self.drain_if_free)

    def refuse_calls(self) -> None:
        """From now on `submit` raises GroupClosedError. Calls in flight go on."""
        self._refusing = True

    def close(self) -> None:
        """Fail what is still pending with GroupClosedError, and free the threads. Idempotent."""
        self._refusing = self._closed = True
        for call in list(self._pending.values()):
            call.give_up(closed_error())
        self._pending.clear()
        self.bell.ring()
        if self._server is not None:
            self._server.close()
        if self._remote is not None:
            self._remote.close()
        self._local = []  # with the bell, what would keep the memory mapped
        self.bell = _private_bell()

    def _require_alive(self, call: Call) -> None:
        dead = {rank: self._dead[rank] for rank in call.targets if rank in self._dead}
        if dead:
            late = [rank for rank in call.targets if rank not in dead]
            text = " | ".join(str(e) for e in dead.values())
            raise RpcError(f"call {call.call_id} {call.method!r} was not sent: {text}", dead, late)

    def _translated(self, exc: BaseException, call: Call, deadline: Deadline) -> BaseException:
        if isinstance(exc, QueueClosedError):
            return closed_error()
        if isinstance(exc, PeerLostError) and exc.ranks:
            lost: dict[int, Exception] = dict.fromkeys(exc.ranks, exc)
            text = f"call {call.call_id} {call.method!r} did not reach all ranks: {exc}"
            return RpcError(text, lost, sorted(call.missing - lost.keys()))
        if isinstance(exc, TimeoutError) and not isinstance(exc, RpcTimeoutError):
            return RpcTimeoutError(f"call {call.call_id} {call.method!r} was not sent: {exc}", sorted(call.missing))
        return exc

    def _take_lead(self, call: Call) -> bool:
        with self._mutex:
            if not self._leading:
                self._leader = threading.get_ident()
                self._leading = True
                return True
            if call.wakeup is None:
                call.wakeup = threading.Event()
            self._followers.append(call)
            ask = self._server is not None and not self._server.is_this_thread()
        if ask:
            self.yield_lead = True
            self.bell.ring()
        return False

    def _give_lead(self) -> None:
        with self._mutex:
            self._leading = False
            self._leader = None
            self.yield_lead = False
            followers, self._followers = self._followers, []
        for call in followers:  # one of them takes the lead, the others follow it
            if call.wakeup is not None:
                call.wakeup.set()

    def _lead(self, call: Call, deadline: Deadline) -> None:
        server = self._server if self._server is not None and self._server.is_this_thread() else None

        def ready() -> bool:
            self._drain()
            if call.done or self._finished:
                return True
            return server is not None and (self.yield_lead or server.has_news())

        self._waiter.wait(ready, self.bell.word, deadline)

    def _follow(self, call: Call, wakeup: threading.Event, deadline: Deadline) -> None:
        wakeup.wait(deadline.remaining())
        wakeup.clear()
        if call.done:
            wakeup.set()  # for others that wait for the same call
        with self._mutex, contextlib.suppress(ValueError):
            self._followers.remove(call)

    def _run_callbacks(self) -> None:
        """Of the calls that ended while this thread led; never while it leads."""
        while self._finished:
            with contextlib.suppress(IndexError):
                self._finished.popleft().run_callbacks()

    def _settle(self, call: Call) -> None:
        """A call has just ended."""
        self.forget(call)
        if call.callbacks:
            self._finished.append(call)

    def drain_if_free(self) -> None:
        """Drain unless another thread leads, and so drains. Called while a full request queue is awaited, too."""
        if self._closed:
            raise closed_error()
        with self._mutex:
            if self._leading:
                return
            self._leader = threading.get_ident()
            self._leading = True
        try:
            self._drain()
        finally:
            self._give_lead()
        self._run_callbacks()

    def _drain(self) -> None:
        """Complete calls with all that has arrived. By the leader only."""
        for rank, readable, reader in self._local:
            while readable() and rank not in self._lost and (frames := self._next_frames(rank, reader)) is not None:
                try:
                    self._accept(rank, frames, reader.owned)
                finally:
                    reader.release()
        if self._remote is not None:
            for rank, frames in self._remote.take():
                self._accept(rank, frames, owned=True)
        if self._failed:
            for call in [c for c in self._failed if c.grace_is_over()]:
                self._failed.remove(call)
                self._settle(call)
        while self._deaths:  # after the replies: what a worker had answered before it died counts
            self._tell_death(self._deaths.popleft())

    def _next_frames(self, rank: int, reader: QueueReader) -> list[memoryview] | None:
        try:
            return reader.poll()
        except PeerLostError:  # a large reply went with its worker; the death watch says what became of it
            self._lost.add(rank)
            return None

    def _accept(self, rank: int, frames: Sequence[Buffer], owned: bool = False) -> None:
        reply = wire.decode_reply(frames, owned)
        call = self._pending.get(reply.call_id)
        if call is None or reply.epoch != self.epoch or call.done:
            return  # nobody waits for it: the call timed out, was cancelled, or has failed already
        if reply.status == wire.OK:
            try:
                result = reply.result()
            except Exception as exc:  # whatever the user's class raises while unpickling
                error = RemoteError(f"the result of rank {rank} cannot be unpickled here: {type(exc).__name__}: {exc}")
                error.__cause__ = exc
                call.add_failure(rank, error)
            else:
                call.add_result(rank, result)
        else:
            call.add_failure(rank, reply.error())
        if call.done:
            self._settle(call)
        elif call.failures and call not in self._failed:
            self._failed.append(call)

    def _tell_death(self, death: WorkerDiedError) -> None:
        for call in list(self._pending.values()):
            if death.rank in call.missing:
                doing = f"call {call.call_id} {call.method!r} was pending"
                call.add_failure(death.rank, WorkerDiedError(death.rank, death.pid, death.node, death.cause, doing))
                if call.done:
                    self._settle(call)


def _private_bell() -> Bell:
    """A bell for a group without shared memory: only this process rings it."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    return Bell(Word(page, memoryview(page).cast("I"), 0), 0)
