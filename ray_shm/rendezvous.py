"""How the members of one coordinator group meet: under one prefix of a store, in waits that a release ends.

Runs in every worker. Imports torch: only `connection` imports this module, at the first use of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from ray_shm.deadline import Deadline
from ray_shm.errors import StartError
from ray_shm.member_process import MemberProcess
from ray_shm.membership import Membership
from ray_shm.release import Release
from ray_shm.store import first_line

_SHORTEST, _LONGEST = 0.0005, 0.01  # seconds between two looks at keys that are not there yet


class ReleasedError(Exception):
    """The wait was given up; whoever requested the release has told the user why."""


class MeetingStore(Store):  # type: ignore[misc]  # torch comes without types
    """A store's end as gloo and `Rendezvous` see it: waiting for a key ends with a release.

    It asks again and again: a wait inside torch's client would keep every other group off that client as well.
    """

    def __init__(self, inner: Any, release: Release, timeout: float) -> None:
        super().__init__()
        self.inner = inner
        self._release = release
        self._timeout = timedelta(seconds=timeout)

    def set(self, key: str, value: Any) -> None:
        self.inner.set(key, value)

    def add(self, key: str, amount: int) -> int:
        return int(self.inner.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self.inner.check(keys))

    def get(self, key: str) -> bytes:
        """Waits for the key, as torch's stores do."""
        self.wait([key])
        return bytes(self.inner.get(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Returns once all keys are there.

        Raises:
            RuntimeError: they were not in time, or the store is gone.
            ReleasedError: released.
        """
        keys, pause = list(keys), _SHORTEST
        deadline = Deadline.after((timeout or self._timeout).total_seconds())
        while not self.check(keys):
            if deadline.expired():
                raise RuntimeError(f"the store has no {keys} after {deadline.timeout} s")
            if self._release.requested.wait(deadline.slice(pause)):
                raise ReleasedError
            pause = min(2 * pause, _LONGEST)


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """What the members need to meet.

    Attributes:
        store: under a prefix that no other group and no earlier epoch used.
        label: the group in words, for errors.
        bind_host: this rank's own address, on which gloo listens; unset, gloo would resolve the host name.
        timeout: seconds, for every collective after the meeting that says nothing else.
        release: ends the meeting, and every collective after it.
        within: seconds for the meeting, where it has fewer than a collective.
        processes: those of the members, by rank in the group, once `agree` has returned.
    """

    store: MeetingStore
    label: str
    members: Membership
    bind_host: str
    timeout: float
    release: Release
    within: float | None = None
    processes: dict[int, MemberProcess] = field(default_factory=dict)

    @property
    def meeting_timeout(self) -> float:
        return self.timeout if self.within is None else self.within

    def agree(self, backend: str) -> str:
        """Waits for all members; returns the backend that all use.

        Args:
            backend: "gloo", "nccl", or "auto:" and the GPU of this rank as `gpu_id` has it: settles on nccl if every
                member has a GPU of its own (nccl refuses two ranks on one), else on gloo.

        Raises:
            StartError: members did not come, ask for different backends, or this rank was here before.
            ReleasedError: released.
        """
        keys = [f"rank/{i}" for i in range(self.members.world_size)]
        own = self.members.rank_in_group
        if self.store.add(f"arrivals/{own}", 1) > 1:
            raise StartError(f"{self.label} was formed before on this store; form it again under the next epoch")
        self.store.set(keys[own], f"{backend}\n{MemberProcess.own().text}")
        try:
            self.store.wait(keys, timedelta(seconds=self.meeting_timeout))
        except RuntimeError as exc:
            raise StartError(self._absent(keys, exc)) from exc
        told = [self.store.get(key).decode().partition("\n") for key in keys]
        self.processes.update({rank: MemberProcess.parse(process) for rank, (_, _, process) in enumerate(told)})
        return self._common([wanted for wanted, _, _ in told])

    def _absent(self, keys: list[str], exc: RuntimeError) -> str:
        try:
            absent = [r for r, key in zip(self.members.ranks, keys, strict=True) if not self.store.check([key])]
        except RuntimeError:
            return f"{self.label} could not be formed: its store is gone ({first_line(exc)}). Is its process alive?"
        return (
            f"{self.label} could not be formed: global ranks {absent} did not come within {self.meeting_timeout} s. "
            "Every member has to form the group (a lazy one: to use it), in the same order as its other groups"
        )

    def _common(self, backends: list[str]) -> str:
        wanted = dict(zip(self.members.ranks, backends, strict=True))
        fixed = {b for b in backends if not b.startswith("auto")}
        if not fixed:
            own_gpus = len(set(backends)) == len(backends) and "auto:" not in backends
            return "nccl" if own_gpus else "gloo"
        if len(fixed) > 1 or fixed != set(backends):
            raise StartError(f"{self.label}: members ask for different backends, by global rank: {wanted}")
        return fixed.pop()
