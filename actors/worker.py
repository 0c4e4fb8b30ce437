"""The Ray actor that a rank is: it starts the user's worker and then serves calls on its main thread.

Runs in the worker process. Life: `hello` (where am I, do I see the driver's memory), `start` (context, groups, the
user's constructor), `attach` (to the queues of requests), `run` (worker_loop.py, until a stop request), end. While
`run` blocks the main thread no other method of the actor runs. Two small threads stand beside it: one watches the
raylet and the driver, and ends the process when either is gone; the control thread (control.py) answers and cancels.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import replace
from typing import Any

import ray.cloudpickle

from ray_shm import codec, death_word
from ray_shm.actors import status_board, wire
from ray_shm.actors.control import ControlThread, StackFile
from ray_shm.actors.orphan_watch import OrphanWatch
from ray_shm.actors.spec import Dissolve, Form, GroupPlan, Hello, Reform, Started, StartSpec
from ray_shm.actors.status_board import SLOT, StatusBoard, StatusRow
from ray_shm.actors.worker_groups import WorkerGroups
from ray_shm.actors.worker_loop import Orders, WorkerLoop
from ray_shm.context import WorkerContext, set_context
from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import PeerLostError, QueueClosedError, StartError
from ray_shm.placement.devices import current_place
from ray_shm.placement.interfaces import name_nccl_interface
from ray_shm.placement.ports import HeldPort
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Buffer
from ray_shm.segment import AttachError, SegmentRef, pid_space
from ray_shm.store import GroupStore

_CHUNK_BYTES, _CHUNKS = 24 << 20, 10  # bound of unread replies, as MessageQueue's default
_MAIN_PARK, _CONTROL_PARK = 1.0, 5.0  # seconds between a sleeping thread's looks: in all, 1.2 wake-ups a second
_REASON_WAIT = 1.0  # seconds for the driver to say who died, once a collective has lost a connection
_REPLY_RING = 256 << 10  # bytes; with a request ring of 1 MiB, a group of 8 holds 3 MiB of shared memory when idle


class WorkerActor:
    """Ray calls `hello`, `hold_port` (rank 0's only), `start`, `attach`, `run`, in this order, once each."""

    def __init__(self, bundle_index: int) -> None:
        codec.use_cloudpickle(ray.cloudpickle)
        self._bundle_index = bundle_index
        self._port: HeldPort | None = None  # for the store: rank 0 has one
        self._serving = threading.Lock()
        self._store: GroupStore | None = None
        self._board: StatusBoard | None = None

    def hello(self, board: SegmentRef | None) -> Hello:
        self._place = place = current_place(self._bundle_index)
        why_not = ""
        try:
            if board is None:
                raise AttachError("the driver has no shared memory, or was told not to use it")
            self._board = StatusBoard.attach(board)
        except StartError as exc:
            why_not = str(exc)
        return Hello(place, not why_not, why_not, pid_space())

    def hold_port(self, port_range: tuple[int, int] | None) -> tuple[str, int] | list[Buffer]:
        """Bind the port of the groups' store, and keep it; the frames of the error where none can be had."""
        try:
            self._port = HeldPort.bind(self._place.node_ip, port_range)
        except BaseException as exc:
            return wire.encode_failure(0, 0, 0, exc)
        return self._port.host, self._port.port

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
            orders_in_line: Orders = {wire.FORM: self._form, wire.REFORM: self._reform, wire.DISSOLVE: self._dissolve}
            self._loop = WorkerLoop(self._worker, rank, requests, self._replies, self._row, orders_in_line)
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
        self._replies = QueueWriter(
            *ends, _CHUNK_BYTES, _CHUNKS, ip, wakes=False, ring_bytes=_REPLY_RING, port_range=spec.port_range
        )
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

    def _form(self, order: Form) -> None:
        self._move_to(order.store, order.epoch)
        if self._port is not None:
            self._open_store()  # also where rank 0 is in none of them
        self._groups.form(order.plans, order.epoch)

    def _reform(self, order: Reform) -> None:
        self._move_to(order.store, order.epoch)
        self._groups.reform(order, self._open_store)

    def _dissolve(self, order: Dissolve) -> None:
        self._groups.dissolve(order)

    def _move_to(self, store: tuple[str, int], epoch: int) -> None:
        """What is formed from now on is formed on this store."""
        if store != self._spec.store:
            old, self._store = self._store, None
            if old is not None:
                old.close()
        self._spec = replace(self._spec, store=store, epoch=epoch)

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
            self._groups.lists,
        )

    def _make_groups(self) -> None:
        spec = self._spec
        if spec.rank.place.gpu_ids:
            name_nccl_interface(spec.rank.place.node_ip)
        if spec.groups and self._port is not None:
            self._open_store()
        world = GroupPlan([list(range(spec.world_size))], spec.backend)
        self._groups = WorkerGroups(spec.rank.rank, self._coordinator, world)
        self._groups.declare(spec.groups, spec.epoch, spec.lazy_groups)

    def _coordinator(self, name: str, plan: GroupPlan, epoch: int, lazy: bool) -> StatelessGroupCoordinator:
        spec = self._spec
        return StatelessGroupCoordinator(
            plan.lists,
            spec.rank.local_rank,
            "gloo" if plan.backend == "auto" and not spec.rank.place.gpu_ids else plan.backend,
            False,
            use_message_queue_broadcaster=True,
            group_name=name,
            host=spec.store[0],
            global_rank=spec.rank.rank,
            global_world_size=spec.world_size,
            coord_store=self._open_store,
            bind_host=spec.rank.place.node_ip,
            epoch=epoch,
            lazy=lazy,
            device_index=0 if spec.rank.place.gpu_ids else None,
            reason_wait=_REASON_WAIT,
        )

    def _open_store(self) -> GroupStore:
        """The groups' store: served here on the held port by rank 0, reached from the other ranks. From any thread."""
        if self._port is not None:
            with self._serving:
                if self._store is None:
                    self._store = GroupStore.serve(self._port.take())
                return self._store
        store, address = self._store, self._spec.store
        if store is None:
            store = GroupStore.connect(*address)
            if address == self._spec.store:  # else a formation that was given up has at last reached the old one
                self._store = store
        return store

    def _tear_down(self) -> None:
        self._row.rest(status_board.ENDED)
        self._control.close()
        self._loop.close()
        del self._loop  # and the user's worker with it
        self._groups.close()
        set_context(None)
        if self._store is not None:
            self._store.close()
        if self._port is not None:
            self._port.close()
        self._stacks.close()
        self._row.close()
        if self._held is not None:
            self._held.release()
        self._watch.close()


def ping(_worker: object) -> None:
    """What check_health calls."""
