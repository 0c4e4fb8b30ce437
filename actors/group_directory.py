"""Which coordinator groups an actor group has, and how they come and go while it runs. Runs in the driver's process.

    create    FORM, in line with the calls     -> members connect; the others note the names
       failed -> ABANDON to control threads    -> who waits for an absent member raises
              -> DISSOLVE, in line             -> nothing of the groups is left on any rank
    destroy   DISSOLVE, in line
    heal      REFORM with all plans, in line   -> a replacement, which missed orders, knows what there is

Orders go through the one request queue, so that all ranks see them in the same sequence: whoever calls from whichever
thread, no rank waits in one group for a rank that waits in another.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ray_shm.actors import wire
from ray_shm.actors.call import Call, closed_error
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.release import Releaser, log_failures
from ray_shm.actors.spec import WORLD, Dissolve, Form, GroupPlan, Groups, Plans, require_groups
from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, RayShmError, RpcError, RpcTimeoutError, WorkerDiedError
from ray_shm.locks import acquired

logger = logging.getLogger("ray_shm")

CREATE_TIMEOUT = 120.0  # seconds
_UNDO_SEND = 10.0  # seconds for room in the request queue, where a formation is taken back


class GroupDirectory:
    """The coordinator groups of one actor group, "world" aside.

    Args:
        plans: those that were declared at the launch. store: the address of the groups' store, as it is now.
    """

    def __init__(
        self, dispatcher: Dispatcher, releaser: Releaser, store: Callable[[], tuple[str, int]], plans: Plans
    ) -> None:
        self._dispatcher = dispatcher
        self._releaser = releaser
        self._store = store
        self._lock = threading.Lock()  # what `_plans` says, and the order of orders
        self._plans: dict[str, GroupPlan] = dict(plans)
        self._served = store() if plans else None  # the store that rank 0 is known to serve: it begins when needed

    @property
    def plans(self) -> Plans:
        """As they are now."""
        return dict(self._plans)

    def create(self, groups: Groups, backend: str, deadline: Deadline) -> None:
        """See ActorGroup.create_groups."""
        plans = require_groups(groups, self._dispatcher.world_size, backend)
        if self._dispatcher.refusing:
            raise closed_error()
        if not plans:
            return
        self._require_free(plans)
        self._await_whole(plans, deadline)
        epoch: int | None = None
        try:
            with self._ordering(deadline):
                self._require_free(plans)
                epoch = self._releaser.new_epoch()
                call = self._order_form(plans, epoch, deadline)
                self._plans.update(plans)
            self._dispatcher.wait(call, deadline)
            call.outcome()
            self._served = self._store() if 0 in call.results else self._served
        except BaseException as exc:  # Ctrl-C, too
            if epoch is not None:
                self._take_back(plans, epoch, f"creating groups {sorted(plans)} failed: {type(exc).__name__}")
            raise

    def destroy(self, names: Sequence[str], deadline: Deadline) -> None:
        """See ActorGroup.destroy_groups."""
        if isinstance(names, str):
            raise TypeError(f"destroy_groups takes a list of names: [{names!r}]")
        names = list(dict.fromkeys(names))
        with self._ordering(deadline):
            if WORLD in names:
                raise ValueError(f"the group {WORLD!r} is there as long as the actor group is, and is not destroyed")
            if unknown := [name for name in names if name not in self._plans]:
                raise ValueError(f"there are no groups {unknown}; there are {self._names()}")
            call = self._order(wire.DISSOLVE, f"destroy groups {names}", Dissolve(names), deadline)
            for name in names:
                del self._plans[name]
        if call is not None:
            self._dispatcher.wait(call, deadline)
            if call.over is not None or not all(isinstance(error, WorkerDiedError) for error in call.failures.values()):
                call.outcome()

    def order_reform(self, epoch: int, deadline: Deadline) -> None:
        """Have all living ranks form all groups again, after some were replaced. Raises as Dispatcher.submit."""
        with self._ordering(deadline):
            names = [WORLD, *self._plans]
            self._served = self._store() if self._plans else None
            self._releaser.order_reform(names, epoch, self._dispatcher.alive, deadline, self.plans)

    def _require_free(self, plans: Plans) -> None:
        if taken := sorted(plans.keys() & self._plans.keys()):
            raise ValueError(
                f"there are groups {taken} already; destroy_groups({taken}) first, or take other names than "
                f"{self._names()}"
            )

    def _names(self) -> list[str]:
        return sorted([WORLD, *self._plans])

    def _await_whole(self, plans: Plans, deadline: Deadline) -> None:
        """Where the group heals by itself, wait for that; then all members have to live, and who serves the store.

        Raises:
            RpcError: some are dead.
        """
        dispatcher = self._dispatcher
        needed = sorted({0, *(rank for plan in plans.values() for rank in plan.members)})
        if dispatcher.await_heal is not None and any(rank in dispatcher.dead for rank in needed):
            dispatcher.await_heal(deadline)
        dead: dict[int, Exception] = {rank: dispatcher.dead[rank] for rank in needed if rank in dispatcher.dead}
        if dead:
            raise RpcError(
                f"creating groups {sorted(plans)} was not begun (rank 0 serves their store, so it is needed, too); "
                "heal() first",
                dead,
            )

    @contextlib.contextmanager
    def _ordering(self, deadline: Deadline) -> Iterator[None]:
        """Raises RpcTimeoutError: another thread's order finds no room. GroupClosedError."""
        taken = False
        try:
            taken = acquired(self._lock, True, deadline.slice(threading.TIMEOUT_MAX))
            if not taken:
                raise RpcTimeoutError(f"no order was sent within {deadline.timeout} s: other orders are being sent")
            if self._dispatcher.refusing:
                raise closed_error()
            yield
        finally:
            if taken:
                self._lock.release()

    def _order_form(self, plans: Plans, epoch: int, deadline: Deadline) -> Call:
        """To the members, whose answers count, and to the others. Raises as Dispatcher.submit."""
        dispatcher, what, order = self._dispatcher, f"create groups {sorted(plans)}", Form(plans, epoch, self._store())
        members = {rank for plan in plans.values() for rank in plan.members}
        if self._served != order.store:
            members.add(0)
        call = dispatcher.submit_order(wire.FORM, what, order, sorted(members), deadline)
        with contextlib.suppress(RayShmError):  # they would know the name for an error's text, no more
            self._order(wire.FORM, what, order, Deadline.after(0), [r for r in dispatcher.alive if r not in members])
        return call

    def _order(
        self, kind: int, what: str, order: object, deadline: Deadline, ranks: Sequence[int] | None = None
    ) -> Call | None:
        """To those of `ranks` (None: all) that live; None: none does. Failures are logged."""
        dispatcher = self._dispatcher
        while living := [
            rank for rank in (dispatcher.alive if ranks is None else ranks) if rank not in dispatcher.dead
        ]:
            with contextlib.suppress(RpcError):  # one has just died
                call = dispatcher.submit_order(kind, what, order, living, deadline)
                call.callbacks.append(partial(log_failures, call, what))
                return call
        return None

    def _take_back(self, plans: Plans, epoch: int, reason: str) -> None:
        """The groups did not come about: ranks that still form them, or come to it later, must not."""
        dispatcher = self._dispatcher
        try:
            dispatcher.tell(wire.ABANDON, dispatcher.new_id(), None, (epoch, reason))
            with self._lock:
                own = [name for name, plan in plans.items() if self._plans.get(name, plan) is plan]
                for name in own:  # the others were destroyed, and created anew by another thread, meanwhile
                    self._plans.pop(name, None)
                what = f"take back groups {sorted(own)}"
                self._order(wire.DISSOLVE, what, Dissolve(own, epoch), Deadline.after(_UNDO_SEND))
        except GroupClosedError:
            pass
        except RayShmError as exc:  # they are released, though, and a group of the same name replaces them
            logger.warning("groups %s could not be taken back on all ranks: %s", sorted(plans), exc)
