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
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from ray_shm.actors import wire
from ray_shm.actors.call import Call
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.spec import Plans, Reform
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError, RpcCancelledError, RpcError, RpcTimeoutError
from ray_shm.locks import acquired

logger = logging.getLogger("ray_shm")

_FREE_WAIT = 0.1  # seconds for ranks to come out of other calls
_LOOK = 0.001  # seconds between two looks whether they have
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
        self._asked: deque[Call] = deque()  # RELEASE orders whose answers are awaited
        self._broken: set[str] = set()  # names of groups
        self._all_broken = False  # it is not known which
        self._doubtful: set[int] = set()  # ranks of calls that failed: they may be out of step
        self._counting: Call | None = None
        self._epoch = 0
        dispatcher.on_failure = self.release_others
        dispatcher.on_failed_call = self.doubt
        dispatcher.on_late_failure = self.release_left_behind
        dispatcher.on_cancel = self.release_cancelled
        dispatcher.on_peer_lost = self.peer_lost

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
            self._doubtful.update(self._dispatcher.alive)
            reason = f"rank {reply.rank} raised {type(error).__name__} in call {reply.call_id}"
            self._ask(ranks, [reply.rank], reason, reply.call_id, idle=True)

    def doubt(self, call: Call) -> None:
        """A rank that raised may have left out a collective which others are through with: a broadcast, above all,
        whose object it would then take for the next one. Looked into before the next call, among the ranks of this one:
        others may rightly be ahead. From any thread."""
        if call is not self._counting:
            self._doubtful.update(call.targets)
            self._dispatcher.before_call = self.settle

    def release_cancelled(self, call: Call) -> None:
        """`call` was cancelled: free the ranks that wait for each other in it, where no signal reaches them.

        Some may have been ahead of others, or amid the forming of a group, which is then of no use.
        """
        self.doubt(call)
        reason = f"call {call.call_id} {call.method!r} was cancelled"
        self._ask(sorted(call.missing), call.targets, reason, call.call_id, idle=False)

    def release_dead(self, rank: int, why: str) -> None:
        """Rank is gone: nobody shall wait for it, now or later, until the groups are formed again."""
        dead = sorted({rank, *self._dispatcher.dead})  # all: the order after another death may not have been sent
        self._ask([r for r in self._dispatcher.alive if r != rank], dead, f"rank {rank} is gone: {why}", 0, True)

    def peer_lost(self) -> None:
        """A rank failed for want of another: a group of it is of no use any more, whoever released it."""
        self._all_broken = True
        self._dispatcher.before_call = self.settle

    def settle(self, deadline: Deadline) -> None:
        """Have the groups that were released formed again, ahead of the next call. Dispatcher.before_call.

        Raises:
            RpcTimeoutError: other threads are at it for longer than the call may take. What submit_order raises.
        """
        dispatcher = self._dispatcher
        taken = False
        try:
            taken = acquired(self._lock, True, deadline.slice(threading.TIMEOUT_MAX))
            if not taken:
                raise RpcTimeoutError(f"no call was sent within {deadline.timeout} s: groups are being formed again")
            if dispatcher.before_call is None:
                return  # somebody has done it meanwhile
            dispatcher.without_callbacks(lambda: self._find_broken(deadline))
            self._reform_broken(deadline)
        finally:
            if taken:
                self._lock.release()

    def _find_broken(self, deadline: Deadline) -> None:
        self._take_answers(Deadline.after(deadline.slice(ANSWER_WAIT)))
        self._compare_counts(deadline)

    def _reform_broken(self, deadline: Deadline) -> None:
        dispatcher = self._dispatcher
        broken: set[str] = set()
        everything = False
        try:
            dispatcher.before_call = None  # what breaks from now on sets it again
            if self._asked or self._doubtful:  # came amid the waits
                dispatcher.before_call = self.settle
            broken, self._broken = self._broken, broken
            everything, self._all_broken = self._all_broken, False  # the leader may set it, before or after this
            if broken or everything:
                self._epoch += 1
                names = [] if everything else sorted(broken)
                self.order_reform(names, self._epoch, dispatcher.alive, deadline)
        except BaseException:  # no time was left, or a signal's handler raised: before the next call, then
            self._broken |= broken
            if everything:
                self._all_broken = True
            dispatcher.before_call = self.settle
            raise

    def new_epoch(self) -> int:
        """The number of a formation of all groups that the caller is about to order."""
        with self._lock:
            self._epoch += 1
            return self._epoch

    def order_reform(
        self,
        names: Sequence[str],
        epoch: int,
        ranks: Sequence[int],
        deadline: Deadline,
        plans: Plans | None = None,
    ) -> None:
        """Order `ranks` to form `names` ([]: all) again, in order with the calls; not those that die meanwhile.

        plans: all groups there are, where some of `ranks` may have missed orders. Raises as Dispatcher.submit, but for
        deaths.
        """
        with self._lock:  # a formation that was begun earlier is ordered earlier, or by who knows all its ranks
            while ranks := self._living(ranks):
                dead = {rank: f"pid {death.pid}, node {death.node}" for rank, death in self._dispatcher.dead.items()}
                order = Reform(list(names), epoch, self._store(), dead, plans)
                with contextlib.suppress(RpcError):  # one has just died
                    call = self._dispatcher.submit_order(wire.REFORM, "re-form groups", order, ranks, deadline)
                    call.callbacks.append(partial(log_failures, call, "form its groups again"))
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
        while self._asked:
            order = self._asked[0]
            with contextlib.suppress(RayShmError, TimeoutError):
                self._dispatcher.wait(order, deadline)
            for names in order.results.values():
                self._broken.update(names)
            if order.missing or order.failures:  # its answer may come late, or never: REFORM is queued behind it
                self._all_broken = True
            self._asked.popleft()

    def _compare_counts(self, deadline: Deadline) -> None:
        doubtful = {*self._doubtful}  # in one C call: the leader may be adding
        try:
            self._doubtful -= doubtful  # those that come from now on set `before_call` again
            if not self._are_in_step(doubtful, deadline):
                self._all_broken = True
        except BaseException:  # of a signal's handler
            self._doubtful |= doubtful
            raise

    def _are_in_step(self, doubtful: set[int], deadline: Deadline) -> bool:
        """Notes the groups that are to be formed again. False: all are, because some ranks stay busy or do not say."""
        dispatcher = self._dispatcher
        ranks = self._living(sorted(doubtful))
        free = Deadline.after(deadline.slice(_FREE_WAIT))
        while not dispatcher.busy().isdisjoint(ranks):  # who is in another call may rightly be ahead
            if len(ranks) == 1:
                return True  # of whom is not known
            if free.expired():
                return False
            dispatcher.drain_if_free()
            time.sleep(_LOOK)
        if not ranks:
            return True
        deadline = Deadline.after(deadline.slice(ANSWER_WAIT))
        try:
            call = self._counting = dispatcher.submit_order(wire.COUNTS, "count collectives", None, ranks, deadline)
        except (RayShmError, TimeoutError):
            return False
        try:
            with contextlib.suppress(RayShmError, TimeoutError):
                dispatcher.wait(call, deadline)
        finally:
            dispatcher.forget(call)  # else its ranks are busy
        counts: dict[tuple[str, tuple[int, ...]], set[tuple[int, int] | None]] = {}
        answers: dict[int, wire.Counts] = dict(call.results)
        for answer in answers.values():
            for group, count in answer.items():
                counts.setdefault(group, set()).add(count)
        whole = [group for group in counts if dispatcher.dead.keys().isdisjoint(group[1])]  # the others wait for heal()
        self._broken.update(group[0] for group in whole if len(counts[group]) > 1 or None in counts[group])
        return answers.keys() >= set(self._living(ranks))


def log_failures(order: Call, what: str) -> None:
    """As a callback of an order that nobody waits for."""
    for rank, error in order.failures.items():
        logger.warning("rank %d could not %s: %s", rank, what, error)
