"""The Ray actor that holds a group's queues, so that several processes can call it and it may outlive its creator.

Runs in the driver actor's process: a GroupRuntime as in a local driver, and a Relay for its clients. Ray runs the
methods on threads of a pool, none of them on the way of a call from the same node: there, one thread of the
dispatcher's leads, and polls the clients' queues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.cloudpickle
from ray.util.placement_group import placement_group_table

from ray_shm import codec
from ray_shm.actors.admission import Application, Welcome, answering
from ray_shm.actors.call import Reduce, closed_error
from ray_shm.actors.client_line import RayLine
from ray_shm.actors.group import ActorGroup
from ray_shm.actors.group_start import Bundles, GroupSpec, start_group
from ray_shm.actors.lifeline import Address, Lifelines
from ray_shm.actors.progress import Progress
from ray_shm.actors.relay import Relay, own_ip
from ray_shm.actors.runtime import GroupRuntime
from ray_shm.actors.spec import Groups
from ray_shm.actors.wire import Method
from ray_shm.deadline import Deadline
from ray_shm.errors import PlacementError, StartError
from ray_shm.placement.bundles import Reservation
from ray_shm.placement.ports import HeldPort
from ray_shm.ring import bell_in
from ray_shm.segment import Segment, pid_space

logger = logging.getLogger("ray_shm")

MAX_CONCURRENCY = 64  # threads; each client that is reached through Ray keeps one waiting
START_WAIT = 60.0  # seconds that those who join wait for a group that is being started
_BELL_BYTES = 4096
_LINGER = 10.0  # seconds after the end until this process leaves by itself, if nobody ends it


@dataclass(frozen=True)
class Seat:
    """Where a driver actor sits, and where most of its workers will: Ray's node ids. pid: its process."""

    node_id: str
    best_node_id: str
    pid: int
    pid_space: str


class DriverActor:
    """Made by connect.py. `collective_rpc` is for everybody who has the actor's handle; the rest is for our clients."""

    def __init__(self) -> None:
        codec.use_cloudpickle(ray.cloudpickle)
        self._reservation: Reservation | None = None
        self._bell: Segment | None = None
        self._runtime: GroupRuntime | None = None
        self._group: ActorGroup | None = None
        self._relay: Relay | None = None
        self._started = threading.Event()
        self._lifelines: Lifelines | None = None  # once a client without shared memory has asked
        self._port_range: tuple[int, int] | None = None
        self._end = threading.Lock()

    @answering
    def reserve(self, bundles: Bundles, timeout: float) -> Seat:
        """Raises ValueError, PlacementError."""
        self._reservation = bundles.reserve(Deadline.after(timeout), Progress("driver actor"))
        table = placement_group_table(self._reservation.placement_group)["bundles_to_node_id"]
        nodes = Counter(table[index] for index in self._reservation.bundle_indices)
        own = ray.get_runtime_context().get_node_id()
        best = own if nodes[own] == max(nodes.values()) else nodes.most_common(1)[0][0]
        return Seat(own, best, os.getpid(), pid_space())

    @answering
    def give_back(self) -> None:
        """What was reserved; another driver actor sits better."""
        if self._reservation is not None:
            self._reservation.remove()

    @answering
    def launch(self, spec: GroupSpec, timeout: float, niceness: int) -> None:
        """Raises as `ray_shm.launch`."""
        if self._reservation is None:
            raise StartError("launch before reserve: a bug in ray-shm")
        with contextlib.suppress(OSError):  # Ray starts actors at nice 15
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
        self._port_range = spec.port_range
        self._bell = Segment.create(_BELL_BYTES, "bell")
        progress = Progress(spec.worker_name)
        runtime = start_group(spec, self._reservation, Deadline.after(timeout), progress, bell_in(self._bell, 0))
        handle = runtime.requests.handle if runtime.requests is not None else None
        if handle is not None and handle.shm is not None:
            self._relay = Relay(runtime, handle.shm.ref, handle.shm.shape.n_readers)
        else:
            self._relay = Relay(runtime, self._bell.ref, 0)
        self._runtime, self._group = runtime, ActorGroup(runtime)
        self._started.set()

    @answering
    def join(self, application: Application) -> Welcome:
        """A process wants to call the group. Raises StartError, GroupClosedError."""
        if not self._started.wait(START_WAIT):
            raise StartError(f"the group was not ready within {START_WAIT} s; it may still be starting: try again")
        return self._require_relay().admit(application)

    def forward(self, number: int, sequence: int, to_control: bool, frames: list[bytes]) -> None:
        """Frames of a client that is reached through Ray."""
        line = self._require_relay().line(number)
        if line is not None:
            line.receive(sequence, to_control, frames)

    def take(self, number: int) -> tuple[list[list[bytes]], int] | None:
        """What there is for such a client, after some seconds at most; None: it does not belong to the group."""
        line = self._require_relay().line(number)
        return line.take() if line is not None else None

    def leave(self, number: int) -> None:
        """Such a client detaches."""
        line = self._require_relay().line(number)
        if line is not None:
            line.leave()

    @answering
    def lifeline(self, number: int, owns: bool) -> tuple[Address, bytes] | None:
        """Where such a client is to connect, so that its death is noticed at once, and what to say there; None: no port
        is free.

        owns: it launched the group, which ends with it. Raises GroupClosedError.
        """
        line = self._require_relay().line(number)
        if line is None:
            raise closed_error()
        with self._end:
            if self._lifelines is None:
                try:
                    self._lifelines = Lifelines(HeldPort.bind(own_ip(), self._port_range).take())
                except PlacementError as exc:
                    logger.warning("a client that is killed will be noticed late: %s", exc)
                    return None
            lifelines = self._lifelines
        return lifelines.address, lifelines.expect(lambda: self._on_client_death(line, owns))

    def _on_client_death(self, line: RayLine, owns: bool) -> None:
        if line.gone:
            return
        line.leave("its process has ended")
        if owns:
            logger.warning("client %s, which launched the group, has ended: so does the group", line.name)
            why = f"{line.name}, which launched it, has ended"
            threading.Thread(
                target=self._leave_with_owner, args=(why,), name="ray_shm-owner-ended", daemon=True
            ).start()

    def _leave_with_owner(self, why: str) -> None:
        try:
            self.shutdown(0.0, why)
        finally:
            os._exit(0)  # Ray would wait for the owner to come back

    @answering
    def heal(self, timeout: float | None) -> tuple[list[int], int]:
        """(ranks replaced, epoch since). The clients have been told. Raises as ActorGroup.heal."""
        runtime, relay = self._require_runtime(), self._require_relay()
        healed = runtime.heal(timeout)
        with runtime.dispatcher.lead.held():
            relay.poll()
        return healed, runtime.dispatcher.epoch

    @answering
    def create_groups(self, groups: Groups, backend: str, timeout: float | None) -> None:
        """Raises as ActorGroup.create_groups."""
        self._require_runtime().create_groups(groups, backend, timeout)

    @answering
    def destroy_groups(self, names: Sequence[str], timeout: float | None) -> None:
        """Raises as ActorGroup.destroy_groups."""
        self._require_runtime().destroy_groups(names, timeout)

    def collective_rpc(
        self,
        method: Method,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        target_ranks: Sequence[int] | None = None,
        unique_reply_rank: int | None = None,
        reduce: Reduce | None = None,
    ) -> Any:
        """ActorGroup.collective_rpc by a Ray call: ``ray.get_actor(name, namespace).collective_rpc.remote(...)``."""
        if self._group is None:
            raise closed_error()
        return self._group.collective_rpc(
            method,
            timeout,
            args,
            kwargs,
            target_ranks=target_ranks,
            unique_reply_rank=unique_reply_rank,
            reduce=reduce,
        )

    @answering
    def shutdown(self, timeout: float | None, why: str) -> None:
        """End the group for all clients. Whoever asked ends this process then."""
        with self._end:
            if self._relay is not None and self._runtime is not None and not self._runtime.closed:
                self._relay.refuse()
                self._runtime.close(timeout)
                self._relay.close(why)
                if self._lifelines is not None:
                    self._lifelines.close()
                leave = threading.Timer(_LINGER, os._exit, (0,))
                leave.daemon = True
                leave.start()

    def _require_runtime(self) -> GroupRuntime:
        if self._runtime is None:
            raise closed_error()
        return self._runtime

    def _require_relay(self) -> Relay:
        if self._relay is None:
            raise closed_error()
        return self._relay
