"""Everything a running group owns in the driver's process, and how it is taken down.

The ActorGroup that users hold refers to this, never the other way round, so that a dropped handle can be noticed.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ray_shm.actors import termination
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.supervision import DeathWatch
from ray_shm.actors.worker import ping
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError, StartError
from ray_shm.placement.bundles import Reservation
from ray_shm.placement.topology import RankPlace
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter

CLOSE_TIMEOUT = 10.0  # seconds that calls in flight and exit handlers may take
_STOP_TICK = 0.1
_STOP_SEND = 2.0  # seconds for the stop request to find room behind stuck ranks


@dataclass
class Rank:
    """A rank as the driver knows it. transport: "shm" or "zmq". visible: its pid means something in this process."""

    place: RankPlace
    actor: Any
    transport: str
    visible: bool


class GroupRuntime:
    """Actors, queues, placement and watch of one group. Filled by launch, step by step; `abort` at any step."""

    def __init__(self, worker_name: str, reservation: Reservation) -> None:
        self.worker_name = worker_name
        self.reservation = reservation
        self.actors: list[Any] = []
        self.ranks: dict[int, Rank] = {}
        self.requests: QueueWriter | None = None
        self.replies: dict[int, QueueReader] = {}
        self._runs: dict[int, Any] = {}
        self._dispatcher: Dispatcher | None = None
        self._watch: DeathWatch | None = None
        self._close_lock = threading.RLock()  # a done-callback of a call may close, too
        self.closed = False

    @property
    def dispatcher(self) -> Dispatcher:
        if self._dispatcher is None:
            raise StartError("the group has not been started: a bug in ray-shm")
        return self._dispatcher

    def go(self) -> None:
        """Start the workers' loops and the watch over them; all queues are attached."""
        if self.requests is None:
            raise StartError("the group has no request queue: a bug in ray-shm")
        self._runs = {rank: entry.actor.run.remote() for rank, entry in self.ranks.items()}
        self._dispatcher = Dispatcher(self.requests, self.replies, self.where)
        local = {rank for rank, entry in self.ranks.items() if entry.visible}
        places = {rank: entry.place for rank, entry in self.ranks.items()}
        self._watch = DeathWatch(places, self._runs, local, self._dispatcher.report_death)
        atexit.register(self.close)  # before Ray's own hook, which was registered earlier

    def where(self, rank: int) -> str:
        place = self.ranks[rank].place.place
        gpus = f", GPU {','.join(place.gpu_ids)}" if place.gpu_ids else ""
        return f"node {place.node_ip}{gpus}, pid {place.pid}"

    def summary(self) -> str:
        nodes = len({entry.place.place.node_id for entry in self.ranks.values()})
        transports = "+".join(sorted({entry.transport for entry in self.ranks.values()}))
        return f"{len(self.ranks)} × {self.worker_name} on {nodes} node{'s' * (nodes > 1)} through {transports}"

    def call(
        self,
        method: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """A plain call of all ranks."""
        deadline = Deadline.after(timeout)
        call = self.dispatcher.submit(method, args, kwargs or {}, None, None, None, deadline)
        self.dispatcher.wait(call, deadline)
        return call.outcome()

    def check_health(self, timeout: float | None) -> None:
        """Raises RpcError or RpcTimeoutError."""
        self.call(ping, timeout=timeout)

    def abort(self) -> None:
        """Take down a start that failed, at whatever step it was. Raises nothing."""
        self.closed = True
        self._stop_watching()
        with contextlib.suppress(Exception):
            termination.kill(self.actors, self._local_pids())
        self._free()

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Let calls in flight finish, end the workers, and free everything. Idempotent; a second caller waits."""
        with self._close_lock:
            if self.closed:
                return
            self.closed = True
            deadline = Deadline.after(timeout)
            self.dispatcher.refuse_calls()
            self._stop_watching()  # from here on the workers' ends are expected
            ended = [False] * len(self.actors)
            try:
                ended = self._finish_calls(deadline)
            finally:  # also on Ctrl-C
                try:
                    termination.end(self.actors, self._local_pids(), ended, deadline)
                finally:
                    self._free()

    def _finish_calls(self, deadline: Deadline) -> list[bool]:
        """Ask the workers to stop after the calls already sent; for each actor, whether its loop has ended."""
        with contextlib.suppress(RayShmError, TimeoutError):
            self.dispatcher.send_stop(Deadline.after(deadline.slice(_STOP_SEND)))
        run_of = {entry.actor: self._runs[rank] for rank, entry in self.ranks.items()}
        waiting = list(run_of.values())
        while waiting and ray.is_initialized():
            # Short waits: a long one crashes when Ray is torn down under it, and replies have to be taken meanwhile.
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=deadline.slice(_STOP_TICK))
            self.dispatcher.drain_if_free()
            if deadline.expired():
                break
        return [run_of[actor] not in waiting for actor in self.actors]

    def _local_pids(self) -> list[int]:
        dead = self._dispatcher.dead if self._dispatcher is not None else {}  # their pids may be others' by now
        return [entry.place.place.pid for rank, entry in self.ranks.items() if entry.visible and rank not in dead]

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _free(self) -> None:
        atexit.unregister(self.close)
        if self._dispatcher is not None:
            self._dispatcher.close()
        for reader in self.replies.values():
            reader.close()
        if self.requests is not None:
            self.requests.close()
        self.reservation.remove()
