"""Frees ranks that wait in a collective for a rank that will not come, and has their groups formed again.

    a rank raised or died, or the call was cancelled
      -> RELEASE to the others' control threads -> those inside a collective with it raise
      -> before the next call: REFORM to all ranks, in order with the calls -> the same coordinators, a new epoch

Runs in the driver's process, on the threads of callers; the leader only sends the first order.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ray_shm.actors import wire
from ray_shm.actors.call import Call
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.spec import Reform
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError, RpcCancelledError, RpcError

logger = logging.getLogger("ray_shm")

ANSWER_WAIT = 1.0  # seconds for the control threads' answers; one that does not answer holds the interpreter's lock


class Releaser:
    """Releases and re-forms the coordinator groups of one actor group.

    Args:
        store: the address of the groups' store, as it is now.
    """

    def __init__(self, dispatcher: Dispatcher, store: Callable[[], tuple[str, int]]) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._lock = threading.RLock()
        self._asked: list[Call] = []  # RELEASE orders whose answers are awaited
        self._broken: set[str] = set()
        self._epoch = 0
        dispatcher.on_failure = self.release_others
        dispatcher.on_late_failure = self.release_left_behind
        dispatcher.on_cancel = self.release_cancelled

    def release_others(self, call: Call) -> None:
        """Ranks of `call` raised, and others are still in it: free those that wait for them. By the leader."""
        failed = sorted(call.failures)
        first = next(iter(call.failures.values()))
        reason = f"rank {failed[0]} raised {type(first).__name__} in call {call.call_id} {call.method!r}"
        self._ask(sorted(call.missing), failed, reason, call.call_id, idle=True)

    def release_left_behind(self, reply: wire.Reply) -> None:
        """A rank raised in a call whose caller waits no longer: free those who are still in it. By the leader."""
        error = reply.error()
        if not isinstance(error, RpcCancelledError):
            ranks = [rank for rank in self._dispatcher.alive if rank != reply.rank]
            reason = f"rank {reply.rank} raised {type(error).__name__} in call {reply.call_id}"
            self._ask(ranks, [reply.rank], reason, reply.call_id, idle=True)

    def release_cancelled(self, call: Call) -> None:
        """`call` was cancelled: free the ranks that wait for each other in it, where no signal reaches them."""
        reason = f"call {call.call_id} {call.method!r} was cancelled"
        self._ask(sorted(call.missing), call.targets, reason, call.call_id, idle=False)

    def release_dead(self, rank: int, why: str) -> None:
        """Rank is gone: nobody shall wait for it, now or later, until the groups are formed again."""
        dead = sorted({rank, *self._dispatcher.dead})  # all: the order after another death may not have been sent
        self._ask([r for r in self._dispatcher.alive if r != rank], dead, f"rank {rank} is gone: {why}", 0, True)

    def settle(self, deadline: Deadline) -> None:
        """Have the groups that were released formed again, ahead of the next call. Dispatcher.before_call."""
        with self._lock:
            self._dispatcher.before_call = None
            self._take_answers(Deadline.after(deadline.slice(ANSWER_WAIT)))
            names, self._broken = sorted(self._broken), set()
            if names:
                self._epoch += 1
                self.order_reform(names, self._epoch, self._dispatcher.alive, deadline)

    @contextlib.contextmanager
    def new_epoch(self) -> Iterator[int]:
        """The number of a formation of all groups that the caller is about to order; what was broken is settled."""
        with self._lock:
            self._epoch += 1
            self._asked, self._broken = [], set()
            yield self._epoch

    def order_reform(self, names: Sequence[str], epoch: int, ranks: Sequence[int], deadline: Deadline) -> None:
        """Order `ranks` to form `names` again, in order with the calls; not those that die meanwhile.

        Raises as Dispatcher.submit, but for deaths.
        """
        while ranks := self._living(ranks):
            order = Reform(list(names), epoch, self._store(), sorted(self._dispatcher.dead))
            with contextlib.suppress(RpcError):  # one has just died
                call = self._dispatcher.submit_order(wire.REFORM, "re-form groups", order, ranks, deadline)
                call.callbacks.append(partial(_log_failures, call, "form its groups again"))
                return

    def _living(self, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if rank not in self._dispatcher.dead]

    def _ask(self, ranks: Sequence[int], failed: Sequence[int], reason: str, call_id: int, idle: bool) -> None:
        """call_id: only ranks that still run this call; 0: all. idle: also those that have not come to a collective."""
        ranks = self._living(ranks)
        if not ranks:
            return
        with contextlib.suppress(RayShmError, TimeoutError):
            payload = (list(failed), reason, self._epoch, call_id, idle)
            order = self._dispatcher.submit_order(wire.RELEASE, "release groups", payload, ranks, Deadline.after(0))
            self._asked.append(order)
            if call_id:
                self._dispatcher.before_call = self.settle

    def _take_answers(self, deadline: Deadline) -> None:
        asked, self._asked = self._asked, []
        for order in asked:
            with contextlib.suppress(RayShmError, TimeoutError):
                self._dispatcher.wait(order, deadline)
            _log_failures(order, "release its groups")
            for names in order.results.values():
                self._broken.update(names)


def _log_failures(order: Call, what: str) -> None:
    for rank, error in order.failures.items():
        logger.warning("rank %d could not %s: %s", rank, what, error)
