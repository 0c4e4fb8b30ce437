"""The steps from a checked request to a running group. Runs in the process that the queues are to live in.

    reserve bundles -> create actors -> hello (where, which GPUs, does it see our memory)
      -> ranks -> queues -> start (groups, constructor) -> attach to the queues -> run -> ready

That process is the one that called launch, or a driver actor. Whatever fails on the way, all that was made is taken
back before the error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from ray_shm import futex
from ray_shm.actors.call import CallOptions
from ray_shm.actors.rank import Rank
from ray_shm.actors.recruiting import Lines, Recruit, Recruiter, attach_replies
from ray_shm.actors.runtime import GroupRuntime
from ray_shm.actors.spec import Plans, Started
from ray_shm.actors.status_board import StatusBoard
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError, StartError
from ray_shm.placement import devices
from ray_shm.placement.bundles import Reservation, WorkerResources, reserve
from ray_shm.placement.topology import RankPlace, assign_ranks
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Bell
from ray_shm.segment import pid_space

CHUNK_BYTES, CHUNKS = 24 << 20, 10  # bound of unread requests, as MessageQueue's default
CONTROL_BYTES = 64 << 10  # of orders to control threads that have not taken them

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Bundles:
    """What to reserve, as `placement.bundles.reserve` takes it."""

    num_workers: int
    resources: WorkerResources
    placement_group: PlacementGroup | None
    strategy: str
    label_selector: Any
    name: str

    def reserve(self, deadline: Deadline, progress: Progress) -> Reservation:
        """Raises ValueError, PlacementError."""
        progress(f"placing {self.num_workers} workers, each with {self.resources.bundle()}")
        return reserve(
            self.num_workers,
            self.resources,
            placement_group=self.placement_group,
            strategy=self.strategy,
            bundle_label_selector=self.label_selector,
            deadline=deadline,
            name=self.name,
            progress=progress,
        )


@dataclass(frozen=True)
class GroupSpec:
    """A group to start, in bundles that are reserved; the names are those of `launch`.

    Attributes:
        payloads: for each rank the pickle of (class, args, kwargs, own values).
        backend: of the group "world". port_range: ports for what listens to other nodes, both ends included; None: any.
    """

    worker_name: str
    payloads: Sequence[bytes]
    resources: WorkerResources
    groups: Plans
    backend: str
    transport: str
    runtime_env: dict[str, Any] | None
    port_range: tuple[int, int] | None
    auto_heal: bool
    options: CallOptions


def start_group(
    spec: GroupSpec, reservation: Reservation, deadline: Deadline, progress: Progress, bell: Bell | None = None
) -> GroupRuntime:
    """Start the workers and connect them. `bell`: what the driver sleeps on where no worker is on its node.

    Raises:
        PlacementError, StartError: see `launch`; nothing is left, and the reservation is given back.
    """
    runtime = GroupRuntime(spec.worker_name, reservation, spec.options)
    runtime.bell = bell
    try:
        runtime.board = _board(len(spec.payloads))
        board = runtime.board.ref if runtime.board is not None else None
        recruiter = Recruiter(
            reservation,
            spec.resources,
            spec.payloads,
            spec.backend,
            spec.transport,
            spec.runtime_env,
            spec.port_range,
            board,
        )
        _Start(runtime, recruiter, spec, progress, deadline).run()
        runtime.enable_healing(recruiter, spec.auto_heal)
    except BaseException:
        runtime.abort()
        raise
    return runtime


class _Start:
    """The steps of one start, in order. What they make is registered with the runtime at once, which can abort."""

    def __init__(
        self, runtime: GroupRuntime, recruiter: Recruiter, spec: GroupSpec, progress: Progress, deadline: Deadline
    ) -> None:
        self._runtime = runtime
        self._recruiter = recruiter
        self._spec = spec
        self._progress = progress
        self._deadline = deadline

    def run(self) -> None:
        placed = self._place(self._meet())
        lines = self._lay_lines(placed)
        started = self._recruiter.start(placed, lines, self._deadline, self._progress)
        self._recruiter.attach(placed, self._deadline, self._progress)
        self._connect(started)

    def _meet(self) -> list[Recruit]:
        recruiter, runtime = self._recruiter, self._runtime
        self._progress(f"starting {recruiter.world_size} worker processes")
        for position in range(recruiter.world_size):
            runtime.actors.append(recruiter.create(position))
        labels = [f"bundle {i}" for i in runtime.reservation.bundle_indices]
        recruits = recruiter.meet(runtime.actors, labels, self._deadline, self._progress)
        devices.verify([r.hello.place for r in recruits], recruiter.resources.gpus)
        return recruits

    def _place(self, recruits: list[Recruit]) -> dict[int, tuple[RankPlace, Recruit]]:
        """Rank → its place and process."""
        by_bundle = {r.hello.place.bundle_index: (position, r) for position, r in enumerate(recruits)}
        placed = {}
        own_space = pid_space()
        for rank in assign_ranks([r.hello.place for r in recruits], ray.get_runtime_context().get_node_id()):
            position, recruit = by_bundle[rank.place.bundle_index]
            hello = recruit.hello
            transport = "shm" if hello.attached else "zmq"
            visible = hello.pid_space == own_space
            self._runtime.ranks[rank.rank] = Rank(rank, position, recruit.actor, transport, visible)
            placed[rank.rank] = (rank, recruit)
        return placed

    def _lay_lines(self, placed: Mapping[int, tuple[RankPlace, Recruit]]) -> Lines:
        local = [rank for rank, (_, recruit) in placed.items() if recruit.hello.attached]
        remote = [rank for rank in placed if rank not in local]
        ip = ray.util.get_node_ip_address()
        runtime, ports = self._runtime, self._spec.port_range
        runtime.requests = QueueWriter(local, remote, CHUNK_BYTES, CHUNKS, ip, watch_readers=False, port_range=ports)
        runtime.control = QueueWriter(
            local,
            remote,
            CONTROL_BYTES,
            1,
            ip,
            watch_readers=False,
            ring_bytes=CONTROL_BYTES,
            port_range=ports,
        )
        runtime.store = self._recruiter.hold_port(placed[0][1], self._deadline)
        queues = (runtime.requests.handle, runtime.control.handle)
        return Lines(*queues, runtime.store, 0, False, self._spec.groups)

    def _connect(self, started: Mapping[int, Started]) -> None:
        runtime = self._runtime
        for rank, answer in started.items():
            runtime.ranks[rank].stacks_fd = answer.stacks_fd
            runtime.replies[rank] = attach_replies(rank, answer)
        runtime.go(self._spec.groups)
        try:
            for queue in (runtime.requests, runtime.control):
                if queue is not None:
                    queue.wait_until_ready(self._deadline)
            for reader in runtime.replies.values():
                if reader.shm is not None:  # the others belong to the thread of RemoteReplies by now
                    reader.wait_until_ready(self._deadline)
            runtime.check_health(self._deadline.remaining())
        except (TimeoutError, RayShmError) as exc:
            raise StartError(f"the workers started, but the group does not answer: {exc}") from exc


def _board(world_size: int) -> StatusBoard | None:
    """Shared memory for the ranks' status, which also shows which workers can attach to ours; None: there is none."""
    try:
        futex.require_supported()
    except StartError:
        return None
    return StatusBoard.create(world_size)
