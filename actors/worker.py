"""The Ray actor that a rank is: it starts the user's worker and then serves calls on its main thread.

Runs in the worker process. Life: `hello` (where am I, do I see the driver's memory), `start` (context, groups, the
user's constructor), `run` (the loop, until a stop request), end. While `run` blocks the main thread no other method of
the actor runs; one small thread watches the raylet and the driver, and ends the process when either is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import ray.cloudpickle

from ray_shm import codec
from ray_shm.actors import wire
from ray_shm.actors.orphan_watch import OrphanWatch
from ray_shm.actors.spec import WORLD, Hello, Started, StartSpec
from ray_shm.context import WorkerContext, set_context
from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError, RemoteError, StartError
from ray_shm.placement.devices import current_place
from ray_shm.placement.ports import HeldPort
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Buffer
from ray_shm.segment import AttachError, Segment, SegmentRef, pid_space
from ray_shm.store import GroupStore

_NEVER = Deadline.after(None)
_CHUNK_BYTES, _CHUNKS = 24 << 20, 10  # bound of unread replies, as MessageQueue's default
_REPLY_RING = 256 << 10  # bytes; with a request ring of 1 MiB, a group of 8 holds 3 MiB of shared memory when idle


class WorkerActor:
    """Ray calls `hello`, `start`, `run`, in this order, once each."""

    def __init__(self, bundle_index: int) -> None:
        codec.use_cloudpickle(ray.cloudpickle)
        self._bundle_index = bundle_index
        self._groups: dict[str, StatelessGroupCoordinator] = {}
        self._store: GroupStore | None = None

    def hello(self, probe: SegmentRef | None) -> Hello:
        place = current_place(self._bundle_index)
        self._port = HeldPort.bind(place.node_ip)
        why_not = ""
        try:
            if probe is None:
                raise AttachError("the driver has no shared memory, or was told not to use it")
            Segment.attach(probe).close()
        except StartError as exc:
            why_not = str(exc)
        return Hello(place, not why_not, why_not, (self._port.host, self._port.port), pid_space())

    def start(self, spec: StartSpec) -> Started:
        """Become a rank. What the user's constructor raises is returned, not raised: Ray would rewrap it."""
        begun = time.monotonic()
        self._stage = "attaching to the queues"
        try:
            handle = self._start(spec)
        except BaseException as exc:
            error = wire.encode_failure(0, spec.epoch, spec.rank.rank, exc)
            return Started(None, error, self._stage, time.monotonic() - begun)
        return Started(handle, [], self._stage, time.monotonic() - begun)

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
        requests = QueueReader(spec.requests, rank)
        ends = ([0], []) if spec.replies_local else ([], [0])
        # It wakes nobody: the driver sleeps on the request queue's bell, which the loop rings after each request.
        replies = QueueWriter(*ends, _CHUNK_BYTES, _CHUNKS, ip, wakes=False, ring_bytes=_REPLY_RING)
        self._stage = "forming its coordinator groups"
        self._make_groups()
        set_context(self._context())
        self._stage = "its constructor"
        cls, args, kwargs = codec.decode([spec.worker])
        args, kwargs = wire.join_scatter(args, kwargs, kwargs.pop(wire.OWN_VALUES))
        self._loop = WorkerLoop(cls(*args, **kwargs), rank, spec.epoch, requests, replies)
        self._stage = "running"
        return replies.handle

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
                self._groups[name] = self._coordinator(name, lists, lazy=False)
        self._groups[WORLD] = self._coordinator(WORLD, [list(range(spec.world_size))], lazy=True)

    def _coordinator(self, name: str, lists: list[list[int]], lazy: bool) -> StatelessGroupCoordinator:
        spec = self._spec
        return StatelessGroupCoordinator(
            lists,
            spec.rank.local_rank,
            "gloo" if spec.backend == "auto" and not spec.rank.place.gpu_ids else spec.backend,
            False,
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
        self._loop.close()
        del self._loop  # and the user's worker with it
        for group in self._groups.values():
            group.destroy()
        set_context(None)
        if self._store is not None:
            self._store.close()
        self._port.close()
        self._watch.close()


class WorkerLoop:
    """Takes requests, calls the user's worker, sends replies; all on the calling thread."""

    def __init__(self, worker: Any, rank: int, epoch: int, requests: QueueReader, replies: QueueWriter) -> None:
        self._worker = worker
        self._rank = rank
        self._epoch = epoch
        self._requests = requests
        self._replies = replies
        shm = requests.shm
        self._ring_driver: Callable[[], None] = shm.ring.bell.ring if shm is not None else lambda: None

    def run(self) -> None:
        """Until a stop request.

        Raises:
            QueueClosedError, PeerLostError: the driver is gone.
        """
        self._replies.wait_until_ready(_NEVER)
        while self._serve_one():
            self._ring_driver()

    def close(self) -> None:
        self._requests.close()
        self._replies.close()

    def _serve_one(self) -> bool:
        self._requests.await_message(_NEVER)
        frames = self._requests.poll()
        if frames is None:
            return True
        request = wire.decode_request(frames, self._rank, self._requests.owned)
        if request.position is None or request.kind == wire.STOP:
            self._requests.release()
            return request.kind != wire.STOP
        try:
            call = request.decode()
        except BaseException as exc:  # whatever the user's class raises while unpickling: an error of this call
            self._requests.release()
            self._reply(wire.encode_failure(request.call_id, self._epoch, self._rank, exc))
            return True
        self._requests.release()
        del frames
        request.frames = ()  # the method alone keeps the memory of large arguments
        reply = self._execute(request, *call)
        if reply is not None:
            self._reply(reply)
        return True

    def _execute(
        self, request: wire.Request, method: wire.Method, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Buffer] | None:
        """The reply's frames, or None where no reply is wanted."""
        try:
            if isinstance(method, str):
                result = getattr(self._worker, method)(*args, **kwargs)
            else:
                result = method(self._worker, *args, **kwargs)
            if request.reply_rank not in (wire.EVERY_RANK, self._rank):
                return None
            return self._encode_result(request.call_id, method, result)
        except BaseException as exc:  # SystemExit and KeyboardInterrupt, too: the worker lives
            with contextlib.suppress(Exception):  # a frozen dataclass refuses even this
                exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next  # without this frame
            if isinstance(exc, AttributeError) and isinstance(method, str) and not hasattr(self._worker, method):
                exc = AttributeError(self._no_method(method))
            return wire.encode_failure(request.call_id, self._epoch, self._rank, exc)

    def _encode_result(self, call_id: int, method: wire.Method, result: Any) -> list[Buffer]:
        try:
            return wire.encode_result(call_id, self._epoch, self._rank, result)
        except Exception as exc:
            raise RemoteError(
                f"the result of {method!r} on rank {self._rank} ({type(result).__name__}) cannot be pickled: {exc}; "
                "return plain data, NumPy arrays or CPU tensors"
            ) from exc

    def _reply(self, frames: list[Buffer]) -> None:
        try:
            self._replies.send(frames)
        except StartError as exc:  # no memory for a large result
            call_id = wire.decode_reply(frames).call_id
            self._replies.send(wire.encode_failure(call_id, self._epoch, self._rank, exc))

    def _no_method(self, name: str) -> str:
        methods = [n for n in dir(self._worker) if not n.startswith("_") and callable(getattr(self._worker, n, None))]
        return (
            f"worker class {type(self._worker).__name__} has no method {name!r}; it has: {', '.join(methods) or 'none'}"
        )


def ping(_worker: object) -> None:
    """What check_health calls."""
