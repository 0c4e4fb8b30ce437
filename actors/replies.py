"""What comes back from the workers, and what it does to the calls that wait. Runs in the driver's process.

The half of the dispatcher that the leader drives: it takes replies from shared memory, from other sources (ZeroMQ, a
driver actor), and the news of deaths, and completes calls with them. No waiting here (dispatcher.py, lead.py).
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ray_shm.actors import wire
from ray_shm.actors.call import Call
from ray_shm.actors.lead import Lead
from ray_shm.errors import PeerLostError, RpcError, WorkerDiedError
from ray_shm.futex import Word
from ray_shm.queue_reader import QueueReader
from ray_shm.ring import Bell, Buffer

_PEER_LOST = "PeerLostError"


class Source(Protocol):
    """Where replies come from besides shared memory; rings the bell when there are some."""

    def take(self) -> Iterator[list[memoryview]]: ...

    def close(self) -> None: ...


class Replies:
    """Base of the Dispatcher: the table of pending calls, and all that ends them.

    Args:
        readers: queues in shared memory, by rank. bell: rings when there may be something new.

    Attributes:
        lead: who waits. dropped: replies that nobody waited for any more.
        on_failure: called with a call of which ranks failed while others are still awaited, by the leader.
        on_failed_call: called with a call that has ended with failures, by the leader.
        on_late_failure: called with a failure that nobody waited for any more, by the leader.
        on_peer_lost: called when a rank has failed for want of another, in a collective, say; by the leader.
        on_news: called with what a driver actor tells its clients, by the leader.
        on_death: called with each death once the calls know of it, by the leader.
    """

    def __init__(self, readers: Mapping[int, QueueReader], world_size: int, bell: Bell | None) -> None:
        self.lead = Lead(bell or private_bell())
        self.dropped = 0
        self.on_failure: Callable[[Call], None] | None = None
        self.on_failed_call: Callable[[Call], None] | None = None
        self.on_late_failure: Callable[[wire.Reply], None] | None = None
        self.on_peer_lost: Callable[[], None] | None = None
        self.on_news: Callable[[Any], None] | None = None
        self.on_death: Callable[[WorkerDiedError], None] | None = None
        self._every_rank = range(world_size)
        self._pending: dict[int, Call] = {}
        self._local: list[tuple[int, Callable[[], bool], QueueReader]] = []
        self._sources: list[Source] = []
        self._polls: list[Callable[[], object]] = []
        self._dead: dict[int, WorkerDiedError] = {}
        self._deaths: deque[WorkerDiedError] = deque()  # reported, and not yet told to the calls
        self._fatal: Exception | None = None
        self._finished: deque[Call] = deque()  # calls whose callbacks are due, once the lead is given back
        self._calling_back: set[int] = set()  # threads that run callbacks
        self._taken = False  # the reply at hand has changed its call
        self._graced = False  # a call has newly got a grace: the leader has to look earlier than it thought
        self._lost: set[int] = set()  # ranks whose reply queue cannot be read any more
        self._failed: list[Call] = []  # calls with a failure whose other ranks still have time
        for rank, reader in readers.items():
            self._read_from(rank, reader)

    def busy(self) -> set[int]:
        """Ranks that calls under way still wait for; not those that are silent once the only reply wanted has come."""
        calls = [c for c in list(self._pending.values()) if c.reply_rank is None or c.reply_rank in c.missing]
        return {rank for call in calls for rank in call.missing}

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    # ---- what a group consists of ---------------------------------------------------------------------------------

    def add_source(self, source: Source) -> None:
        """Read replies from `source`, too, and close it at the end."""
        self._sources.append(source)

    def add_poll(self, poll: Callable[[], object]) -> None:
        """Have whoever leads call `poll` at every look; short, and never waiting."""
        self._polls.append(poll)

    def readmit(self, rank: int, reader: QueueReader | None) -> None:
        """A new process has taken a dead rank's place; `reader`: its reply queue, if that is in shared memory."""
        with self.lead.held():
            self.drain()  # nobody may have led since: the old process's death is not to be told of the new one
            self._local = [entry for entry in self._local if entry[0] != rank]
            if reader is not None:
                self._read_from(rank, reader)
            self._lost.discard(rank)
            self._dead.pop(rank, None)
            finished = bool(self._finished)
        if finished:  # not here: the caller holds locks that a callback may want
            self.run_callbacks_elsewhere()

    def _read_from(self, rank: int, reader: QueueReader) -> None:
        if reader.shm is not None:
            self._local.append((rank, reader.shm.ring.readable, reader))

    def drain(self) -> None:
        """Complete calls with all that has arrived. By the leader only."""
        for rank, readable, reader in self._local:
            while readable() and rank not in self._lost and (frames := self._next_frames(rank, reader)) is not None:
                self._taken = False
                try:
                    self._accept(frames, reader.owned)
                except BaseException as exc:
                    # Ctrl-C amid the unpickling of another thread's result: the next leader takes it anew.
                    if self._taken or isinstance(exc, Exception):
                        reader.release()
                    raise
                reader.release()
        for source in self._sources:
            for frames in source.take():
                self._accept(frames, True)
        if self._failed:
            self._look_at_failed()
        while self._deaths:  # after the replies: what a worker had answered before it died counts
            self._tell_death(self._deaths.popleft())
        for poll in self._polls:
            poll()
        if self._fatal is not None:
            self._end_all(self._fatal)

    def _next_frames(self, rank: int, reader: QueueReader) -> list[memoryview] | None:
        try:
            return reader.poll()
        except PeerLostError:  # a large reply went with its worker; the death watch says what became of it
            self._lost.add(rank)
            return None

    def _accept(self, frames: Sequence[Buffer], owned: bool) -> None:
        reply = wire.decode_reply(frames, owned)
        if reply.status == wire.NEWS:
            if self.on_news is not None:
                self.on_news(reply.result())
            return
        if reply.status == wire.FAILED and self.on_peer_lost is not None and reply.what().startswith(_PEER_LOST):
            self.on_peer_lost()
        call = self._pending.get(reply.call_id)
        if call is None or call.done:
            self.dropped += 1  # nobody waits for it: the call timed out, was cancelled, or has failed already
            if reply.status == wire.FAILED and self.on_late_failure is not None:
                self.on_late_failure(reply)
            return
        call.take(reply)
        self._taken = True
        if call.done:
            self._settle(call)
        elif call.failures and call not in self._failed:
            self._failed.append(call)
            self._graced = True

    def next_grace(self) -> float | None:
        """time.monotonic() when a call with failures needs the next look; None: there is none. By the leader."""
        times = [call.grace_at if call.release_at is None else call.release_at for call in self._failed]
        return min((at for at in times if at is not None), default=None)

    def _look_at_failed(self) -> None:
        now = time.monotonic()
        for call in list(self._failed):
            if call.release_at is not None and (call.done or now >= call.release_at):
                call.release_at = None
                if self.on_failure is not None:
                    self.on_failure(call)
            if call.grace_is_over():  # also where nobody looked in between
                self._failed.remove(call)
                self._settle(call)

    def _settle(self, call: Call) -> None:
        """A call has just ended."""
        self.forget(call)
        if call.failures and self.on_failed_call is not None:
            self.on_failed_call(call)
        if call.callbacks:
            self._finished.append(call)

    # ---- deaths ---------------------------------------------------------------------------------------------------

    def report_death(self, death: WorkerDiedError) -> None:
        """A worker is gone. From any thread; the first report for a rank counts."""
        if death.rank in self._dead:
            return
        self._dead[death.rank] = death
        self._forget_rank(death.rank)
        self._deaths.append(death)
        self.lead.bell.ring()

    @property
    def dead(self) -> Mapping[int, WorkerDiedError]:
        return self._dead

    @property
    def alive(self) -> list[int]:
        return [rank for rank in self._every_rank if rank not in self._dead]

    def _require_alive(self, call: Call) -> None:
        dead: dict[int, Exception] = {rank: self._dead[rank] for rank in call.targets if rank in self._dead}
        if dead:
            what = f"call {call.call_id} {call.method!r} was not sent to any rank; heal() replaces the dead"
            raise RpcError(what, dead)

    def _tell_death(self, death: WorkerDiedError) -> None:
        for call in list(self._pending.values()):
            if death.rank in call.missing:
                call.add_failure(death.rank, death.during(f"call {call.call_id} {call.method!r} was pending"))
                if call.done:
                    self._settle(call)
        if self.on_death is not None:
            self.on_death(death)

    def revive(self, rank: int) -> None:
        """The driver actor has replaced a rank. By the leader."""
        self._dead.pop(rank, None)

    def forget(self, call: Call) -> None:
        self._pending.pop(call.call_id, None)

    def fail(self, error: Exception) -> None:
        """Nothing will come any more: the leader ends all calls with `error`. From any thread."""
        self._fatal = error
        self.lead.bell.ring()

    def _end_all(self, error: Exception) -> None:
        for call in list(self._pending.values()):
            call.over = error
            call.finish()
            self._settle(call)

    def _run_callbacks(self) -> None:
        """Of the calls that ended while this thread led; never while it leads, nor inside of a callback."""
        me = threading.get_ident()
        if not self._finished or me in self._calling_back:
            return
        try:
            self._calling_back.add(me)
            while self._finished:
                with contextlib.suppress(IndexError):
                    self._finished.popleft().run_callbacks()
        finally:
            self._calling_back.discard(me)

    def without_callbacks(self, work: Callable[[], object]) -> None:
        """This thread runs none amid `work`, though it waits: it holds a lock that a callback may want."""
        me = threading.get_ident()
        inside = me in self._calling_back
        try:
            self._calling_back.add(me)
            work()
        finally:
            if not inside:
                self._calling_back.discard(me)
                if self._finished:
                    self.run_callbacks_elsewhere()

    def _forget_rank(self, rank: int) -> None:
        """Send nothing to it any more."""
        raise NotImplementedError

    def run_callbacks_elsewhere(self) -> None:
        """On the thread for callbacks."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Of what would keep memory mapped. Idempotent."""
        for source in self._sources:
            source.close()
        self._local, self._sources, self._polls = [], [], []
        self.lead.bell = private_bell()


def private_bell() -> Bell:
    """A bell for a group without shared memory: only this process rings it."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    return Bell(Word(page, memoryview(page).cast("I"), 0), 0)
