"""Everything a running group owns in the driver's process, and how it is taken down.

The ActorGroup that users hold refers to this, never the other way round, so that a dropped handle can be noticed.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray

from ray_shm.actors import standing, termination
from ray_shm.actors.call import CallOptions, closed_error
from ray_shm.actors.callback_server import CALLBACK_THREAD
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.group_directory import GroupDirectory
from ray_shm.actors.healing import Healer
from ray_shm.actors.rank import Rank, summary
from ray_shm.actors.recruiting import Recruiter
from ray_shm.actors.release import Releaser
from ray_shm.actors.remote_replies import RemoteReplies
from ray_shm.actors.reports import GroupStats
from ray_shm.actors.spec import Groups, Plans
from ray_shm.actors.status_board import Standing, StatusBoard
from ray_shm.actors.supervision import DeathWatch
from ray_shm.actors.worker import ping
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError, StartError, WorkerDiedError
from ray_shm.locks import acquired
from ray_shm.placement.bundles import Reservation
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Bell

CLOSE_TIMEOUT = 10.0  # seconds that calls in flight and exit handlers may take
_STOP_TICK = 0.1
_STOP_SEND = 2.0  # seconds for the stop request to find room behind stuck ranks

T = TypeVar("T")


class GroupRuntime:
    """Actors, queues, placement and watch of one group. Filled by launch, step by step; `abort` at any step."""

    def __init__(self, worker_name: str, reservation: Reservation, options: CallOptions) -> None:
        self.worker_name = worker_name
        self.reservation = reservation
        self.options = replace(options, where=self.where)
        self.board: StatusBoard | None = None
        self.bell: Bell | None = None  # what to sleep on where no worker is on this node
        self.actors: list[Any] = []
        self.ranks: dict[int, Rank] = {}
        self.requests: QueueWriter | None = None
        self.control: QueueWriter | None = None
        self.replies: dict[int, QueueReader] = {}
        self._runs: dict[int, Any] = {}
        self._dispatcher: Dispatcher | None = None
        self._releaser: Releaser | None = None
        self._directory: GroupDirectory | None = None
        self.store = ("", 0)  # where rank 0 serves the coordinator groups' store
        self._remote: RemoteReplies | None = None
        self._watch: DeathWatch | None = None
        self._close_lock = threading.RLock()  # a done-callback of a call may close, too
        self.healer: Healer | None = None
        self.closed = False

    @property
    def dispatcher(self) -> Dispatcher:
        return _started(self._dispatcher)

    @property
    def releaser(self) -> Releaser:
        return _started(self._releaser)

    @property
    def directory(self) -> GroupDirectory:
        return _started(self._directory)

    @property
    def watch(self) -> DeathWatch:
        return _started(self._watch)

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def dead(self) -> Mapping[int, WorkerDiedError]:
        return self._dispatcher.dead if self._dispatcher is not None else {}

    def go(self, groups: Plans) -> None:
        """Start the workers' loops and the watch over them; all queues are attached. groups: those formed."""
        requests, control = _started(self.requests), _started(self.control)
        local = {rank: reader for rank, reader in self.replies.items() if reader.zmq is None}
        self._dispatcher = Dispatcher(requests, control, local, self.world_size, self.options, bell=self.bell)
        self._releaser = Releaser(self._dispatcher, lambda: self.store)
        self._directory = GroupDirectory(self._dispatcher, self._releaser, lambda: self.store, groups)
        self._watch = DeathWatch(self._on_death, self.board.memory if self.board is not None else None)
        for rank, reader in self.replies.items():
            self.run(rank, reader)
        atexit.register(self.close)  # before Ray's own hook, which was registered earlier

    def run(self, rank: int, reader: QueueReader) -> None:
        """Start one rank's loop and the watch over it, and read its replies."""
        entry = self.ranks[rank]
        self.replies[rank] = reader
        self._runs[rank] = entry.actor.run.remote()
        if reader.zmq is not None:
            if self._remote is None:
                self._remote = RemoteReplies({}, self.dispatcher.lead.bell.ring, self._on_lost)
                self.dispatcher.add_source(self._remote)
            self._remote.add(rank, reader)
        slot = StatusBoard.slot(rank) if self.board is not None and entry.transport == "shm" else None
        self.watch.replace(rank, entry.place, self._runs[rank], visible=entry.visible, slot=slot)

    def enable_healing(self, recruiter: Recruiter, auto: bool) -> None:
        """From now on dead ranks can be replaced; `auto`: they are."""
        self.healer = Healer(self, recruiter)
        if auto:
            self.healer.heal_by_itself()

    def where(self, rank: int) -> str:
        """Where a rank is and what it does, in words."""
        return self.ranks[rank].where(self.board)

    def row(self, rank: int) -> Standing | None:
        """What the rank wrote into shared memory, None where this process cannot reach that, or it is freed."""
        return self.ranks[rank].row(self.board)

    def standings(self, timeout: float) -> dict[int, Standing]:
        """Where each living rank stands; those that do not answer in time are left out."""
        return standing.standings(self.dispatcher, self.row, timeout)

    def stacks(self, ranks: Sequence[int], timeout: float) -> dict[int, str]:
        """The stacks of these ranks' threads, in words."""
        return standing.stacks(self.dispatcher, self.ranks, ranks, timeout)

    def heal(self, timeout: float | None) -> list[int]:
        """See ActorGroup.heal."""
        return _started(self.healer).heal(timeout)

    def create_groups(self, groups: Groups, backend: str, timeout: float | None) -> None:
        """See ActorGroup.create_groups."""
        self.directory.create(groups, backend, Deadline.after(timeout))

    def destroy_groups(self, names: Sequence[str], timeout: float | None) -> None:
        """See ActorGroup.destroy_groups."""
        self.directory.destroy(names, Deadline.after(timeout))

    def subscribe(self, callback: Callable[[WorkerDiedError], object]) -> Callable[[], None]:
        """See ActorGroup.on_worker_death."""
        if self.closed:
            raise closed_error()
        return self.watch.subscribe(callback)

    def stats(self) -> GroupStats:
        """See ActorGroup.stats."""
        dispatcher = self.dispatcher
        return GroupStats(
            dispatcher.calls,
            dispatcher.in_flight,
            dispatcher.dropped,
            tuple(sorted(dispatcher.dead)),
            self.healer.heals if self.healer is not None else 0,
            dispatcher.epoch,
            _started(self.requests).stats(),
        )

    def summary(self) -> str:
        return summary(self.worker_name, self.ranks)

    def check_health(self, timeout: float | None) -> None:
        """Raises RpcError or RpcTimeoutError."""
        self.dispatcher.call(ping, timeout)

    def _on_death(self, death: WorkerDiedError) -> None:
        if self.healer is not None:
            self.healer.on_death()
        self.dispatcher.report_death(death)
        self.releaser.release_dead(death.rank, f"pid {death.pid} on node {death.node} died")

    def _on_lost(self, rank: int, why: str) -> None:
        self.watch.lost(rank, f"the connection to it broke: {why}")

    def abort(self) -> None:
        """Take down a start that failed, at whatever step it was. Raises nothing."""
        self.closed = True
        self._stop_watching()
        with contextlib.suppress(Exception):
            termination.kill(self.actors, self._local_pids(self.actors))
        self._free()

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Let calls in flight finish, end the workers, and free everything. Idempotent; a second caller waits.

        In a done-callback a second caller does not: the first may be waiting for that callback to end.
        """
        taken = False
        try:
            taken = acquired(self._close_lock, not _on_callback_thread())
            if not taken or self.closed:
                return
            self.closed = True
            deadline = Deadline.after(timeout)
            actors, ended = list(self.actors), [False] * len(self.actors)
            try:
                self.dispatcher.refuse_calls()
                if self.healer is not None:
                    self.healer.stop(deadline)
                self._stop_watching()  # from here on the workers' ends are expected
                actors = list(self.actors)  # a heal that has not ended in time takes back what it adds to them
                ended = [False] * len(actors)
                ended = self._finish_calls(actors, deadline)
            finally:  # also on Ctrl-C
                try:
                    self._stop_watching()
                    termination.end(actors, self._local_pids(actors), ended, deadline)
                finally:
                    self._free()
        finally:
            if taken:
                self._close_lock.release()

    def _finish_calls(self, actors: Sequence[Any], deadline: Deadline) -> list[bool]:
        """Ask the workers to stop after the calls already sent; for each of `actors`, whether its loop has ended."""
        with contextlib.suppress(RayShmError, TimeoutError):
            self.dispatcher.send_stop(Deadline.after(deadline.slice(_STOP_SEND)))
        dead = self.dispatcher.dead  # where a raylet was killed, Ray takes seconds to say so
        run_of = {entry.actor: self._runs[rank] for rank, entry in self.ranks.items() if rank not in dead}
        waiting = list(run_of.values())
        while waiting and ray.is_initialized():
            # Short waits: a long one crashes when Ray is torn down under it, and replies have to be taken meanwhile.
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=deadline.slice(_STOP_TICK))
            self.dispatcher.drain_if_free()
            if deadline.expired():
                break
        return [actor in run_of and run_of[actor] not in waiting for actor in actors]

    def _local_pids(self, actors: Sequence[Any]) -> list[int | None]:
        """Of each of `actors`, where its pid means something here."""
        dead = self.dead  # their pids may be others' by now
        pids = {e.actor: e.place.place.pid for rank, e in self.ranks.items() if e.visible and rank not in dead}
        return [pids.get(actor) for actor in actors]

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _free(self) -> None:
        atexit.unregister(self.close)
        if self._dispatcher is not None:
            self._dispatcher.close()
        for reader in self.replies.values():
            reader.close()
        for queue in (self.requests, self.control):
            if queue is not None:
                queue.close()
        if self.board is not None:
            self.board.close()
        self._watch = None  # with the board, what would keep the memory mapped
        self.reservation.remove()


def _started(part: T | None) -> T:
    if part is None:
        raise StartError("the group has not been started: a bug in ray-shm")
    return part


def _on_callback_thread() -> bool:
    return threading.current_thread().name == CALLBACK_THREAD
