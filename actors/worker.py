"""The Ray actor that a rank is: it starts the user's worker and then serves calls on its main thread.

Runs in the worker process. Life: `hello` (where am I, do I see the driver's memory), `start` (context, groups, the
user's constructor), `attach` (to the queues of requests), `run` (worker_loop.py, until a stop request), end. While
`run` blocks the main thread no other method of the actor runs. Two small threads stand beside it: one watches the
raylet and the driver, and ends the process when either is gone; the control thread (control.py) answers and cancels.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import Any

import ray.cloudpickle

from ray_shm import codec, death_word
from ray_shm.actors import status_board, wire
from ray_shm.actors.control import ControlThread, StackFile
from ray_shm.actors.orphan_watch import OrphanWatch
from ray_shm.actors.spec import WORLD, Hello, Reform, Started, StartSpec
from ray_shm.actors.status_board import SLOT, StatusBoard, StatusRow
from ray_shm.actors.worker_loop import WorkerLoop
from ray_shm.context import WorkerContext, set_context
from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import PeerLostError, QueueClosedError, StartError
from ray_shm.placement.devices import current_place
from ray_shm.placement.ports import HeldPort
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Buffer
from ray_shm.segment import AttachError, SegmentRef, pid_space
from ray_shm.store import GroupStore

_CHUNK_BYTES, _CHUNKS = 24 << 20, 10  # bound of unread replies, as MessageQueue's default
_MAIN_PARK, _CONTROL_PARK = 1.0, 5.0  # seconds between a sleeping thread's looks: in all, 1.2 wake-ups a second
_REPLY_RING = 256 << 10  # bytes; with a request ring of 1 MiB, a group of 8 holds 3 MiB of shared memory when idle


class WorkerActor:
    """Ray calls `hello`, `start`, `attach`, `run`, in this order, once each."""

    def __init__(self, bundle_index: int) -> None:
        codec.use_cloudpickle(ray.cloudpickle)
        self._bundle_index = bundle_index
        self._groups: dict[str, StatelessGroupCoordinator] = {}
        self._store: GroupStore | None = None
        self._board: StatusBoard | None = None

    def hello(self, board: SegmentRef | None) -> Hello:
        place = current_place(self._bundle_index)
        self._port = HeldPort.bind(place.node_ip)
        why_not = ""
        try:
            if board is None:
                raise AttachError("the driver has no shared memory, or was told not to use it")
            self._board = StatusBoard.attach(board)
        except StartError as exc:
            why_not = str(exc)
        return Hello(place, not why_not, why_not, (self._port.host, self._port.port), pid_space())

    def start(self, spec: StartSpec) -> Started:
        """Become a rank. What the user's constructor raises is returned, not raised: Ray would rewrap it."""
        begun = time.monotonic()
        self._stage = "making its reply queue"
        try:
            handle = self._start(spec)
        except BaseException as exc:
            error = wire.encode_failure(0, spec.epoch, spec.rank.rank, exc)
            return Started(None, error, self._stage, time.monotonic() - begun, -1)
        return Started(handle, [], self._stage, time.monotonic() - begun, self._stacks.fd)

    def attach(self) -> list[Buffer]:
        """Read what is sent from now on. Not before the constructor has ended, which may take minutes: whoever has
        attached is waited for once the ring is full. Returns the frames of the error that this raised, or none."""
        spec = self._spec
        rank = spec.rank.rank
        try:
            requests = QueueReader(spec.requests, rank, _MAIN_PARK)
            orders = QueueReader(spec.control, rank, _CONTROL_PARK)
            self._loop = WorkerLoop(self._worker, rank, requests, self._replies, self._row, self._reform)
            del self._worker
            self._control = ControlThread(orders, rank, self._loop, self._row, self._groups)
        except BaseException as exc:
            return wire.encode_failure(0, spec.epoch, rank, exc)
        return []

    def run(self) -> None:
        """Serve calls until the driver says stop, or is gone."""
        try:
            with contextlib.suppress(QueueClosedError, PeerLostError):
                self._loop.run()
        finally:
            self._tear_down()

    def _start(self, spec: StartSpec) -> Any:
        self._spec = spec
        self._watch = OrphanWatch(spec.driver_pid)
        if spec.driver_nice is not None:
            # Ray runs workers at nice 15; on a busy core the driver would always win over the ranks it waits for.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, spec.driver_nice)
        rank, ip = spec.rank.rank, spec.rank.place.node_ip
        self._row = self._status_row(rank)
        # The kernel tells the driver of this thread's end through it, before it tears down the process's memory.
        self._held = None if self._board is None else death_word.hold(self._board.memory, StatusBoard.slot(rank))
        self._stacks = StackFile()
        ends = ([0], []) if spec.replies_local else ([], [0])
        # It wakes nobody: the driver sleeps on the request queue's bell, which the loop rings after each request.
        self._replies = QueueWriter(*ends, _CHUNK_BYTES, _CHUNKS, ip, wakes=False, ring_bytes=_REPLY_RING)
        self._stage = "forming its coordinator groups"
        self._make_groups()
        set_context(self._context())
        self._stage = "its constructor"
        cls, args, kwargs = codec.decode([spec.worker])
        args, kwargs = wire.join_scatter(args, kwargs, kwargs.pop(wire.OWN_VALUES))
        self._worker = cls(*args, **kwargs)
        return self._replies.handle

    def _status_row(self, rank: int) -> StatusRow:
        """Its row of the driver's board, or one of its own where it cannot reach that."""
        memory = memoryview(bytearray(SLOT)) if self._board is None else self._board.memory
        row = StatusRow(memory, 0 if self._board is None else StatusBoard.slot(rank))
        row.rest(status_board.STARTING)
        return row

    def _reform(self, order: Reform) -> None:
        """Form coordinator groups again, under a new epoch, in the same objects; they connect when next used."""
        if order.store != self._spec.store:
            old, self._store = self._store, None
            self._spec = replace(self._spec, store=order.store)
            if old is not None:
                old.close()
        self._spec = replace(self._spec, epoch=order.epoch)
        for name in order.names or list(self._groups):
            if name in self._groups:
                group = self._groups[name]
                group.reform(order.epoch, self._open_store)
                if absent := sorted(set(group.ranks) & set(order.dead)):
                    group.release(f"ranks {absent} are gone")

    def _context(self) -> WorkerContext:
        place, spec = self._spec.rank.place, self._spec
        return WorkerContext(
            spec.rank.rank,
            spec.rank.local_rank,
            spec.world_size,
            spec.rank.node_rank,
            place.node_id,
            place.node_ip,
            place.gpu_ids,
            self._groups,
        )

    def _make_groups(self) -> None:
        spec = self._spec
        if spec.groups and spec.rank.rank == 0:
            self._open_store()  # also where rank 0 is in none of them
        for name, lists in spec.groups.items():
            if any(spec.rank.rank in ranks for ranks in lists):
                self._groups[name] = self._coordinator(name, lists, lazy=spec.lazy_groups)
        self._groups[WORLD] = self._coordinator(WORLD, [list(range(spec.world_size))], lazy=True)

    def _coordinator(self, name: str, lists: list[list[int]], lazy: bool) -> StatelessGroupCoordinator:
        spec = self._spec
        return StatelessGroupCoordinator(
            lists,
            spec.rank.local_rank,
            "gloo" if spec.backend == "auto" and not spec.rank.place.gpu_ids else spec.backend,
            False,
            use_message_queue_broadcaster=True,
            group_name=name,
            host=spec.store[0],
            global_rank=spec.rank.rank,
            global_world_size=spec.world_size,
            coord_store=self._open_store,
            bind_host=spec.rank.place.node_ip,
            epoch=spec.epoch,
            lazy=lazy,
            device_index=0 if spec.rank.place.gpu_ids else None,
        )

    def _open_store(self) -> GroupStore:
        """The group's store: served here on the held port by rank 0, reached from the other ranks. Made once."""
        if self._store is None:
            if self._spec.rank.rank == 0:
                self._store = GroupStore.serve(self._port.take())
            else:
                self._store = GroupStore.connect(*self._spec.store)
        return self._store

    def _tear_down(self) -> None:
        self._row.rest(status_board.ENDED)
        self._control.close()
        self._loop.close()
        del self._loop  # and the user's worker with it
        for group in self._groups.values():
            group.destroy()
        set_context(None)
        if self._store is not None:
            self._store.close()
        self._port.close()
        self._stacks.close()
        self._row.close()
        if self._held is not None:
            self._held.release()
        self._watch.close()


def ping(_worker: object) -> None:
    """What check_health calls."""
