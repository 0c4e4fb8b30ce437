"""The coordinator groups that a rank is in, and how they come and go. Runs in the workers.

The main thread carries out orders in line with the calls: FORM, REFORM, DISSOLVE. The control thread releases groups,
also one that the main thread is just forming, or is yet to form.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from ray_shm.actors.spec import WORLD, Dissolve, GroupPlan, Plans, Reform
from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError

Make = Callable[[str, GroupPlan, int, bool], StatelessGroupCoordinator]


class WorkerGroups(Mapping[str, StatelessGroupCoordinator]):
    """The groups of this rank, by name.

    Args:
        make: a coordinator for (name, plan, epoch, whether it connects only when first used).
        world: the group that every rank is in.

    Attributes:
        plans: of all groups of the actor group, those without this rank, too.
    """

    def __init__(self, rank: int, make: Make, world: GroupPlan) -> None:
        self._rank = rank
        self._make = make
        self._world = world
        self._groups: dict[str, StatelessGroupCoordinator] = {}
        self.plans: dict[str, GroupPlan] = {}
        self._lock = threading.Lock()  # of what follows: the control thread writes it, the main thread reads it
        self._abandoned: dict[int, str] = {}  # epochs of formations that have failed elsewhere, and why

    def __getitem__(self, name: str) -> StatelessGroupCoordinator:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._groups))  # a copy: the other thread may be changing it

    def __len__(self) -> int:
        return len(self._groups)

    def lists(self) -> dict[str, list[list[int]]]:
        """The ranks of all groups of the actor group."""
        return {name: plan.lists for name, plan in list(self.plans.items())}

    def declare(self, plans: Plans, epoch: int, lazy: bool) -> None:
        """Before the constructor: these groups, and "world". Raises as StatelessGroupCoordinator."""
        self.plans = {**plans, WORLD: self._world}
        for name, plan in plans.items():
            if self._rank in plan.members:
                group = self._groups[name] = self._make(name, plan, epoch, True)
                if not lazy:
                    _ = group.cpu_group  # connects
        self._groups[WORLD] = self._make(WORLD, self._world, epoch, True)

    def form(self, plans: Plans, epoch: int) -> None:
        """Connect new groups. All of them or, where one fails, none.

        Raises:
            StartError: one could not be formed. PeerLostError: its formation failed elsewhere.
        """
        try:
            for name, plan in plans.items():
                self.plans[name] = plan
                self._drop(name)  # left over where an order to destroy it found no room
                if self._rank in plan.members:
                    self._form(name, plan, epoch)
        except BaseException:
            self._dissolve(plans)
            raise

    def _form(self, name: str, plan: GroupPlan, epoch: int) -> None:
        group = self._groups[name] = self._make(name, plan, epoch, True)
        with self._lock:
            reason = self._abandoned.get(epoch)
        if reason is not None:  # later ones find the group
            group.release(reason)
        _ = group.cpu_group  # connects

    def reform(self, order: Reform, open_store: Callable[[], object]) -> None:
        """Form groups again, in the same objects; they connect when next used. What user code destroyed stays so."""
        if order.plans is not None:
            self._catch_up(order.plans, order.epoch)
        for name in order.names or list(self._groups):
            if name in self._groups:
                group = self._groups[name]
                if group.epoch != order.epoch:
                    with contextlib.suppress(GroupClosedError):
                        group.reform(order.epoch, open_store)
                if absent := sorted(set(group.ranks) & set(order.dead)):
                    gone = ", ".join(f"rank {rank} ({order.dead[rank]})" for rank in absent)
                    group.release(f"{gone} is gone" if len(absent) == 1 else f"{gone} are gone")

    def _catch_up(self, plans: Plans, epoch: int) -> None:
        """With orders that came while this process was not yet, or no longer, a rank."""
        self._dissolve([name for name in self.plans if name != WORLD and name not in plans])
        for name, plan in plans.items():
            known, self.plans[name] = self.plans.get(name), plan
            if known != plan:
                self._drop(name)
                if self._rank in plan.members:
                    self._groups[name] = self._make(name, plan, epoch, True)

    def dissolve(self, order: Dissolve) -> None:
        """Destroy groups, and free their sockets and threads."""
        if order.epoch is not None:
            with self._lock:
                self._abandoned.pop(order.epoch, None)
        self._dissolve(order.names)

    def _dissolve(self, names: Iterable[str]) -> None:
        for name in names:
            self.plans.pop(name, None)
            self._drop(name)

    def _drop(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            group.destroy()

    def abandon(self, epoch: int, reason: str) -> None:
        """A formation has failed elsewhere: whoever forms it here raises, now or later. By the control thread."""
        with self._lock:
            self._abandoned[epoch] = reason
        for group in list(self._groups.values()):
            if group.epoch == epoch:
                group.release(reason)

    def close(self) -> None:
        for name in list(self._groups):
            self._drop(name)
