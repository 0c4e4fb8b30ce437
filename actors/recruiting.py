"""Makes workers: their actors, their first answers, their start. Used by a launch, and again for replacements.

Runs in the driver's process. What a recruiter makes is registered with whoever asked at once, who can take it back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ray_shm.actors import wire
from ray_shm.actors.spec import Hello, Plans, Started, StartSpec
from ray_shm.actors.starting import gather
from ray_shm.actors.worker import WorkerActor
from ray_shm.deadline import Deadline
from ray_shm.errors import StartError
from ray_shm.handle import Handle
from ray_shm.placement.bundles import Reservation, WorkerResources
from ray_shm.placement.topology import RankPlace
from ray_shm.queue_reader import QueueReader
from ray_shm.ring import Buffer
from ray_shm.segment import SegmentRef, pid_space

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recruit:
    """A fresh worker actor, before it has a rank."""

    actor: Any
    hello: Hello


@dataclass(frozen=True)
class Lines:
    """The queues that lead to the workers, and the coordinator groups with their store, at one formation."""

    requests: Handle
    control: Handle
    store: tuple[str, int]
    epoch: int
    lazy_groups: bool
    groups: Plans


class Recruiter:
    """What all workers of a group have in common.

    Args:
        payloads: for each rank the pickle of (class, args, kwargs, own values). backend: of the group "world".
        port_range: ports for what listens to other nodes, or None. board: of the ranks' status, or None.
    """

    def __init__(
        self,
        reservation: Reservation,
        resources: WorkerResources,
        payloads: Sequence[bytes],
        backend: str,
        transport: str,
        runtime_env: Mapping[str, Any] | None,
        port_range: tuple[int, int] | None,
        board: SegmentRef | None,
    ) -> None:
        self.reservation = reservation
        self.resources = resources
        self.world_size = len(payloads)
        self._payloads = payloads
        self._backend = backend
        self._transport = transport
        self._port_range = port_range
        self._runtime_env = dict(runtime_env or {})
        self._board = None if transport == "zmq" else board

    def create(self, position: int) -> Any:
        """An actor in the `position`-th bundle of the reservation."""
        options = {
            **self.resources.actor_options(),
            "scheduling_strategy": self.reservation.scheduling_strategy(position),
        }
        if self._runtime_env:
            options["runtime_env"] = self._runtime_env
        actor_class = ray.remote(WorkerActor)
        return actor_class.options(**options).remote(self.reservation.bundle_indices[position])

    def meet(
        self, actors: Sequence[Any], labels: Sequence[str], deadline: Deadline, progress: Progress
    ) -> list[Recruit]:
        """Their first answers, in order. Raises StartError."""
        refs = [actor.hello.remote(self._board) for actor in actors]
        hellos: list[Hello] = gather(refs, labels, "start its process", deadline, progress)
        far = [h for h in hellos if not h.attached]
        if self._transport == "shm" and far:
            raise StartError(
                f'transport="shm" but {len(far)} of {len(hellos)} workers cannot reach the driver\'s shared memory: '
                f'pid {far[0].place.pid} on {far[0].place.node_ip}: {far[0].why_not} Use transport="auto".'
            )
        return [Recruit(actor, hello) for actor, hello in zip(actors, hellos, strict=True)]

    def hold_port(self, first: Recruit, deadline: Deadline) -> tuple[str, int]:
        """Have rank 0's process bind the port of the groups' store; returns its address. Raises StartError."""
        label = f"rank 0 (pid {first.hello.place.pid}, node {first.hello.place.node_ip})"
        refs = [first.actor.hold_port.remote(self._port_range)]
        host, port = gather(refs, [label], "bind a port for its store", deadline, lambda text: None, _port_failure)[0]
        return str(host), int(port)

    def start(
        self, recruits: Mapping[int, tuple[RankPlace, Recruit]], lines: Lines, deadline: Deadline, progress: Progress
    ) -> dict[int, Started]:
        """Have them become ranks; rank → answer. Raises StartError, with what a constructor raised in `failures`."""
        own_space = pid_space()
        refs = []
        for rank, (place, recruit) in recruits.items():
            visible = recruit.hello.pid_space == own_space
            spec = StartSpec(
                rank=place,
                world_size=self.world_size,
                epoch=lines.epoch,
                worker=self._payloads[rank],
                requests=lines.requests,
                control=lines.control,
                replies_local=recruit.hello.attached,
                groups=lines.groups,
                lazy_groups=lines.lazy_groups,
                backend=self._backend,
                store=lines.store,
                port_range=self._port_range,
                driver_pid=os.getpid() if visible else None,
                driver_nice=os.getpriority(os.PRIO_PROCESS, 0) if visible else None,
            )
            refs.append(recruit.actor.start.remote(spec))
        answers = gather(refs, _labels(recruits), "start", deadline, progress, _failure)
        return dict(zip(recruits, answers, strict=True))

    def attach(self, recruits: Mapping[int, tuple[RankPlace, Recruit]], deadline: Deadline, progress: Progress) -> None:
        """Have those that started read their requests, which must have a place for each of them. Raises StartError."""
        refs = [recruit.actor.attach.remote() for _, recruit in recruits.values()]
        gather(refs, _labels(recruits), "attach to its queues", deadline, progress, _attach_failure)


def _labels(recruits: Mapping[int, tuple[RankPlace, Recruit]]) -> list[str]:
    return [f"rank {rank} (pid {p.place.pid}, node {p.place.node_ip})" for rank, (p, _) in recruits.items()]


def _failure(answer: Started, position: int) -> tuple[str, BaseException] | None:
    """(what failed, the exception) where a worker's start raised."""
    if not answer.error:
        return None
    return answer.stage, wire.decode_reply(answer.error).error()


def _attach_failure(answer: list[Buffer], position: int) -> tuple[str, BaseException] | None:
    return ("attaching to its queues", wire.decode_reply(answer).error()) if answer else None


def _port_failure(answer: Any, position: int) -> tuple[str, BaseException] | None:
    return (
        ("binding a port for the groups' store", wire.decode_reply(answer).error())
        if isinstance(answer, list)
        else None
    )


def attach_replies(rank: int, answer: Started) -> QueueReader:
    """The rank's reply queue. Raises StartError."""
    if answer.replies is None:
        raise StartError(f"rank {rank} gave no reply queue: a bug in ray-shm")
    return QueueReader(answer.replies, 0)
