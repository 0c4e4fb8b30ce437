"""The ways to move data among ranks that ``ray-shm bench groups`` compares. Runs in every rank's process.

Imports torch. Each rank holds all peers at once, over the same members. An operation is a function of the peer and of
what it moves, made anew for each turn and called once for each sample. What a rank sends lies in memory before the
clock starts.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ray_shm.actors.queue_peers import Seat
from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.store import GroupStore

OURS, GLOO, STORE, OURS_CUDA, NCCL = "ray-shm", "gloo", "TCPStore", "ray-shm on CUDA", "NCCL"
TIMEOUT = 100.0  # seconds; only a hang comes near
BURST, BURST_BYTES = 50, 64 << 20  # of broadcast_objects: how many at most, and how many bytes

Call = Callable[[], object]


@dataclass(frozen=True)
class Turn:
    """What all ranks do next: `count` samples."""

    peer: str
    operation: str
    payload_bytes: int
    count: int

    @property
    def burst(self) -> int:
        """How many times a sample does it."""
        return max(1, min(BURST, BURST_BYTES // self.payload_bytes)) if self.operation == "broadcast_objects" else 1


@dataclass(frozen=True)
class Place:
    """Where a rank meets the others. port: of the store on 127.0.0.1; None: this rank, which is the first, serves it.

    number: of this formation; each has keys of its own.
    """

    rank: int
    size: int
    port: int | None
    number: int


class GroupsEnd:
    """All peers of one rank; a ReaderEnd for the workers of a WorkerPool. Results go through the seat's pipe."""

    def __init__(self, place: Place, seat: Seat) -> None:
        self.info: Any = torch.cuda.device_count()
        torch.set_num_threads(1)  # several ranks share the cores
        self._place, self._pipe = place, seat.pipe
        if place.port is None:
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            self._store = GroupStore.serve(listener, TIMEOUT)
            self._pipe.send(port)
        else:
            self._store = GroupStore.connect("127.0.0.1", place.port, TIMEOUT)
        self._broadcasts = _StoreBroadcasts(self._store.prefix(f"{place.number}/objects"), place.rank)

    def ready(self) -> None:
        """Connects; returns with all ranks."""
        place = self._place
        store = self._store.prefix(f"{place.number}/torch")
        dist.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=TIMEOUT)
        )
        self._nccl = None
        if torch.cuda.device_count() >= place.size:
            torch.cuda.set_device(place.rank)
            self._nccl = dist.new_group(backend="nccl")
        self._ours = {OURS: self._coordinator("gloo")}
        if self._nccl is not None:
            self._ours[OURS_CUDA] = self._coordinator("nccl")

    def _coordinator(self, backend: str) -> StatelessGroupCoordinator:
        place = self._place
        return StatelessGroupCoordinator(
            [list(range(place.size))],
            place.rank,
            backend,
            True,
            True,
            f"{backend} {place.number}",
            global_rank=place.rank,
            global_world_size=place.size,
            coord_store=self._store,
            timeout=TIMEOUT,
        )

    def serve(self, turn: Turn) -> None:
        """Sends when this rank's part in each sample began and ended, in ns of the clock that all processes share."""
        on_gpu = turn.peer in (OURS_CUDA, NCCL)
        call = self._call(turn, "cuda" if on_gpu else "cpu")
        times = []
        for _ in range(turn.count):
            dist.barrier()  # the same for all peers; every sample begins with nobody ahead
            begun = time.monotonic_ns()
            if call is not None:
                for _ in range(turn.burst):
                    call()
            if on_gpu:
                torch.cuda.synchronize()
            times.append((begun, time.monotonic_ns()))
        self._broadcasts.forget()
        self._pipe.send([] if call is None else times)

    def _call(self, turn: Turn, device: str) -> Call | None:
        """None: this rank has no part in it."""
        rank, size = self._place.rank, self._place.size
        if turn.operation == "send/recv" and 0 < rank < size - 1:
            return None
        load = _Load(rank, size, turn.payload_bytes, device)
        if turn.peer == STORE:
            return lambda: self._broadcasts.broadcast(load.obj)
        if turn.peer in self._ours:
            return _of_ours(turn.operation, self._ours[turn.peer], load)
        return _of_torch(turn.operation, self._nccl, load)

    def close(self) -> None:
        for group in self._ours.values():
            group.destroy()
        dist.destroy_process_group()
        self._store.close()


@dataclass
class _Load:
    """What a rank moves: `payload_bytes` of float32, zeros, so that sums stay what they are."""

    rank: int
    size: int
    payload_bytes: int
    device: str

    def __post_init__(self) -> None:
        elements = max(1, self.payload_bytes // 4)
        self.tensor = torch.zeros(elements, device=self.device)
        self.obj = {"token_ids": b"x" * self.payload_bytes, "step": 7}
        self.split = torch.zeros(-(-elements // self.size) * self.size, device=self.device)  # a part for each rank
        half = max(1, elements // 2)
        self.tensor_dict = {
            "hidden": torch.zeros(half, device=self.device),
            "residual": torch.zeros(half, device=self.device),
            "step": 7,
        }


def _of_ours(operation: str, group: StatelessGroupCoordinator, load: _Load) -> Call:
    first, last = load.rank == 0, load.rank == load.size - 1
    calls: dict[str, Call] = {
        "all_reduce": lambda: group.all_reduce(load.tensor),
        "all_gather": lambda: group.all_gather(load.tensor, 0),
        "reduce_scatter": lambda: group.reduce_scatter(load.split, 0),
        "broadcast": lambda: group.broadcast(load.tensor, 0),
        "gather": lambda: group.gather(load.tensor, 0, 0),
        "barrier": group.barrier,
        "broadcast_object": lambda: group.broadcast_object(load.obj if first else None, 0),
        "broadcast_objects": lambda: group.broadcast_object(load.obj if first else None, 0),
        "broadcast_tensor_dict": lambda: group.broadcast_tensor_dict(load.tensor_dict if first else None, 0),
    }
    if operation == "send/recv":
        if last:
            return lambda: group.recv(load.tensor.shape, load.tensor.dtype, 0)
        return lambda: group.send(load.tensor, load.size - 1)
    return calls[operation]


def _of_torch(operation: str, group: Any, load: _Load) -> Call:
    """group: None stands for gloo, torch's default group here."""
    gathered = torch.zeros(load.size * len(load.tensor), device=load.device)
    places = list(gathered.chunk(load.size)) if load.rank == 0 else None
    part = torch.zeros(len(load.split) // load.size, device=load.device)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer torch's names come first
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    calls: dict[str, Call] = {
        "all_reduce": lambda: dist.all_reduce(load.tensor, group=group),
        "all_gather": lambda: gather(gathered, load.tensor, group=group),
        "reduce_scatter": lambda: scatter(part, load.split, group=group),
        "broadcast": lambda: dist.broadcast(load.tensor, 0, group=group),
        "gather": lambda: dist.gather(load.tensor, places, 0, group=group),
        "barrier": lambda: dist.barrier(group=group),
        "broadcast_object": lambda: dist.broadcast_object_list([load.obj], 0, group=group),
        "broadcast_objects": lambda: dist.broadcast_object_list([load.obj], 0, group=group),
        "broadcast_tensor_dict": lambda: _broadcast_tensor_dict(load, group),
    }
    if operation == "send/recv":
        if load.rank == 0:
            return lambda: dist.send(load.tensor, load.size - 1, group=group)
        return lambda: dist.recv(load.tensor, 0, group=group)
    return calls[operation]


def _broadcast_tensor_dict(load: _Load, group: Any) -> dict[str, Any]:
    """As vLLM's GroupCoordinator does it: what is no tensor as an object, with the shapes, then tensor after tensor."""
    box: list[Any] = [None]
    if load.rank == 0:
        box[0] = {k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for k, v in load.tensor_dict.items()}
    dist.broadcast_object_list(box, 0, group=group)
    received: dict[str, Any] = {}
    for key, value in box[0].items():
        if isinstance(value, tuple):
            tensor = load.tensor_dict[key] if load.rank == 0 else torch.empty(value[0], dtype=value[1])
            value = tensor.to(load.device)
            dist.broadcast(value, 0, group=group)
        received[key] = value
    return received


class _StoreBroadcasts:
    """As vLLM's StatelessProcessGroup.broadcast_obj: a pickle under the next number, which the others wait for."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank
        self._count = self._forgotten = 0

    def broadcast(self, obj: Any) -> Any:
        key = f"broadcast_from/0/{self._count}"
        self._count += 1
        if self._rank == 0:
            self._store.set(key, pickle.dumps(obj))
            return obj
        return pickle.loads(self._store.get(key))

    def forget(self) -> None:
        """Frees the server's memory, once all have read."""
        dist.barrier()
        while self._forgotten < self._count:
            if self._rank == 0:
                self._store.delete_key(f"broadcast_from/0/{self._forgotten}")
            self._forgotten += 1
