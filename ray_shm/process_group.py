"""The torch process groups behind one coordinator group, made without torch's WORLD.

Runs in every worker. Members meet under one prefix of a store: each writes the backend it can use, waits until all
have (rendezvous.py), then connects gloo (CPU tensors and objects) and, where every member has a GPU, nccl (CUDA
tensors).

    device_group   nccl for CUDA + gloo for CPU      (without GPUs: the same object as cpu_group)
    cpu_group      gloo for CPU
    node           small CPU tensors and barriers, where all members share memory (node_exchange.py)

Imports torch: only `coordinator` imports this module, at the first use of a group.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed import (
    AllreduceOptions,
    BarrierOptions,
    BroadcastOptions,
    ProcessGroup,
    ProcessGroupGloo,
    ReduceOp,
)

from ray_shm import release
from ray_shm.deadline import Deadline
from ray_shm.direct_exchange import DirectExchange
from ray_shm.direct_exchange import as_bytes as _as_bytes
from ray_shm.errors import StartError
from ray_shm.node_exchange import NodeExchange
from ray_shm.queue_broadcast import QueueBroadcaster
from ray_shm.rendezvous import Rendezvous
from ray_shm.ring import Buffer
from ray_shm.store import first_line
from ray_shm.work_waits import timed, wait, wait_for_pairs

_REDUCE_OPS = {"sum": ReduceOp.SUM, "product": ReduceOp.PRODUCT, "min": ReduceOp.MIN, "max": ReduceOp.MAX}
SUM_TAG = 2  # of the messages of a direct sum; see connection.py for the other tags
DIRECT_BYTES, DIRECT_RANKS = 32 << 10, 4  # up to here a sum over CPU tensors goes directly between all members
DIRECT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)
_GLOO_THREADS = 2  # torch's own default; collectives of one group run one after the other
_LISTENER_TRIES = 100  # each fails only if another thread of this process begins to listen in the same 0.5 ms
_making_device = threading.Lock()


class ProcessGroups(DirectExchange):
    """The connected groups. `close` frees sockets and threads, unless the caller kept a reference to a group.

    Attributes:
        sockets: gloo's connections to the other members; a release shuts them down, and so ends every operation.
        queues: for objects, where the coordinator was told to use them; made at the first broadcast.
    """

    def __init__(self, meeting: Rendezvous, backend: str, device: torch.device) -> None:
        """Connects to every other member and returns when all have connected.

        Raises:
            StartError: a member could not be reached in time, or `bind_host` is no address of this node.
            ReleasedError: released.
        """
        super().__init__()
        self.backend = backend
        self.sockets: list[release.SocketRef] = []
        self._rank, self._size = meeting.members.rank_in_group, meeting.members.world_size
        self._reduce_options = {name: _reduce_options(op) for name, op in _REDUCE_OPS.items()}
        self.cpu_group: Any = None
        self.device_group: Any = None
        self.gloo: Any = None
        self.nccl: Any = None
        self.queues = QueueBroadcaster(meeting.members, meeting.bind_host)
        self.node: NodeExchange | None = None  # where all members share memory
        try:
            self._connect(meeting, device)
        except RuntimeError as exc:
            self.close()
            raise StartError(
                f"{meeting.label} could not connect its members within {meeting.meeting_timeout} s "
                f"({backend}, this rank on {meeting.bind_host}): {first_line(exc)}. "
                "Check that all members are alive, that bind_host is this node's address, reachable from theirs, and "
                "that firewalls let the ports of net.ipv4.ip_local_port_range through: gloo listens on one of them"
            ) from exc

    def _connect(self, meeting: Rendezvous, device: torch.device) -> None:
        self._connect_gloo(meeting)
        self.cpu_group = _wrap(meeting, ProcessGroup.BackendType.GLOO, [("cpu", self.gloo)])
        self.device_group = self.cpu_group
        if self.backend == "nccl":
            self.nccl = _nccl(meeting, device)
            meeting.release.on_request(self._abort_nccl)
            self.device_group = _wrap(meeting, ProcessGroup.BackendType.NCCL, [("cuda", self.nccl), ("cpu", self.gloo)])
        self.node = NodeExchange.form(meeting)
        within = Deadline.after(meeting.meeting_timeout)
        # The store may go away as soon as the first member returns, so none returns before all have connected.
        wait(self.gloo.barrier(timed(BarrierOptions(), within)), within)

    def _connect_gloo(self, meeting: Rendezvous) -> None:
        members = meeting.members
        own = members.rank_in_group
        before = release.open_sockets()
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=meeting.timeout)
        options._threads = _GLOO_THREADS
        device, address = _device(meeting)
        options._devices = [device]
        meeting.store.set(f"listener/{own}", f"{address[0]}|{address[1]}")
        meeting.release.on_request(partial(self._knock, address, members.world_size))
        self.gloo = ProcessGroupGloo(meeting.store, own, members.world_size, options)
        listeners = [_address(meeting.store.get(f"listener/{r}")) for r in range(members.world_size) if r != own]
        self.sockets = release.connections(release.open_sockets() - before, address, listeners)
        meeting.release.on_request(self._shut_down)
        meeting.release.on_request(self.queues.stop)

    def _knock(self, address: release.Address, size: int) -> None:
        if self.gloo is None:  # its constructor may wait for a member to connect
            release.knock(address, size)

    def _shut_down(self) -> None:
        for ref in self.sockets:
            ref.shut_down()

    def _abort_nccl(self) -> None:
        """On a thread: `abort` may wait for the GPU, and whoever releases must not."""
        nccl = self.nccl
        if nccl is not None and hasattr(nccl, "abort"):
            threading.Thread(target=nccl.abort, name="ray-shm-nccl-abort", daemon=True).start()

    # The operations on flat, contiguous tensors; a RuntimeError of theirs means that the groups are of no use any more.
    # No local variable keeps a backend: a traceback would keep its sockets open after `close`.

    def all_reduce(self, tensor: torch.Tensor, op: str, deadline: Deadline) -> None:
        """In place. `tensor` may have any shape; only this operation depends on its dtype.

        Raises:
            TypeError: gloo does not reduce this dtype. Found by every member alike, before anything is sent.
        """
        node = self._through_node("all_reduce", tensor)
        if node is not None:
            node.all_reduce(tensor.view(-1), op, deadline)
            return
        small = tensor.is_cpu and 0 < tensor.nbytes <= DIRECT_BYTES and self._size <= DIRECT_RANKS
        if small and op == "sum" and tensor.dtype in DIRECT_DTYPES:
            self._sum_directly(tensor, deadline)
            return
        try:
            wait(self._of(tensor).allreduce([tensor], timed(self._reduce_options[op], deadline)), deadline)
        except RuntimeError as exc:
            if "Invalid scalar type" in str(exc):
                raise TypeError(f"all_reduce: gloo does not reduce {tensor.dtype}; convert the tensor") from exc
            raise

    def _sum_directly(self, tensor: torch.Tensor, deadline: Deadline) -> None:
        """Everybody sends to everybody, and adds in the order of ranks, so that all get the same bits.

        One hop, where gloo's ring takes 2 (n - 1), each with a thread to wake. 576 floats over 3 processes on 2 cores,
        p50 in the same run: 0.57 ms against 4.1 ms (gloo's allreduce) and 3.8 ms (its allgather, then adding).
        """
        gloo, others = self.gloo, [r for r in range(self._size) if r != self._rank]
        parts = [tensor if r == self._rank else torch.empty_like(tensor) for r in range(self._size)]
        works = [gloo.recv([_as_bytes(parts[r].view(-1))], r, SUM_TAG) for r in others]
        works += [gloo.send([_as_bytes(tensor.view(-1))], r, SUM_TAG) for r in others]
        wait_for_pairs(works, [*others, *others], deadline)
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        tensor.copy_(total)

    def all_gather(self, gathered: torch.Tensor, part: torch.Tensor, deadline: Deadline) -> None:
        node = self._through_node("all_gather", part)
        if node is not None:
            node.all_gather(gathered, part, deadline)
            return
        options = timed(AllgatherOptions(), deadline)
        wait(self._of(part)._allgather_base(_as_bytes(gathered), _as_bytes(part), options), deadline)

    def broadcast(self, tensor: torch.Tensor, src: int, deadline: Deadline) -> None:
        node = self._through_node("broadcast", tensor)
        if node is not None:
            node.broadcast(tensor, src, deadline)
            return
        options = timed(BroadcastOptions(), deadline)
        options.rootRank = src
        wait(self._of(tensor).broadcast([_as_bytes(tensor)], options), deadline)

    def barrier(self, deadline: Deadline) -> None:
        if self.node is not None:
            self.node.enter()
            self.node.barrier(deadline)
        else:
            wait(self.gloo.barrier(timed(BarrierOptions(), deadline)), deadline)

    def publish(self, frames: Sequence[Buffer], deadline: Deadline) -> None:
        """An object's frames to all others, through queues."""
        self.queues.publish(frames, self.all_gather, deadline)

    def take(self, src: int, deadline: Deadline) -> Any:
        """The next object that the member `src` has published; see QueueBroadcaster.take."""
        return self.queues.take(src, self.all_gather, deadline)

    def is_in_step(self, primitive: str) -> bool:
        """After an exception of a signal's handler: whether the members' next operation is the same nevertheless."""
        if primitive in ("publish", "take"):
            return True  # or else the queues have closed, and tell
        return self.node is not None and self.node.came_through()

    def _through_node(self, operation: str, tensor: torch.Tensor) -> NodeExchange | None:
        if self.node is None:
            return None
        self.node.enter()
        return self.node if tensor.is_cpu and self.node.takes(operation, tensor.nbytes, tensor.dtype) else None

    def _of(self, tensor: torch.Tensor) -> Any:
        if tensor.is_cpu:
            return self.gloo
        if self.nccl is None:
            raise ValueError(f"this group runs on gloo, for CPU tensors; the tensor is on {tensor.device}")
        return self.nccl

    def close(self) -> None:
        """Drops the groups and closes the queues. Idempotent."""
        self.queues.close()
        self.forget_transfers()
        if self.node is not None:
            self.node.close()
        if self.nccl is not None:
            self.nccl.shutdown()
        self.cpu_group = self.device_group = self.gloo = self.nccl = None


def gpu_id(device: torch.device) -> str:
    """Tells the GPUs of all nodes apart; empty for the CPU."""
    return "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def _reduce_options(op: Any) -> Any:
    options = AllreduceOptions()
    options.reduceOp = op
    if hasattr(options, "asyncOp"):  # since torch 2.7: nccl then runs on the current stream
        options.asyncOp = False
    return options


def _device(meeting: Rendezvous) -> tuple[Any, release.Address]:
    """What gloo listens with, and where: the one socket of this process that began to listen while it was made."""
    for _ in range(_LISTENER_TRIES):
        with _making_device:
            before = release.open_sockets()
            device = _listening(meeting.bind_host)
            address = release.listening_address(release.open_sockets() - before)
        if address is not None:
            return device, address
    raise StartError(
        f"{meeting.label}: gloo's listening socket on {meeting.bind_host} could not be told from others, because other "
        "threads of this process open listening sockets all the time; form the group before they begin"
    )


def _listening(host: str) -> Any:
    with contextlib.suppress(TypeError):  # before torch 2.7 there is no such parameter, and nothing lazy
        return ProcessGroupGloo.create_device(hostname=host, lazy_init=False)
    return ProcessGroupGloo.create_device(hostname=host)


def _address(text: bytes) -> release.Address:
    host, _, port = text.decode().rpartition("|")
    return host, int(port)


def _nccl(meeting: Rendezvous, device: torch.device) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=meeting.timeout)
    members = meeting.members
    nccl = ProcessGroupNCCL(meeting.store.inner, members.rank_in_group, members.world_size, options)
    nccl._set_sequence_number_for_group()
    if members.world_size > 1:
        nccl.eager_connect_single_device(device)
    return nccl


def _wrap(meeting: Rendezvous, default: Any, backends: list[tuple[str, Any]]) -> Any:
    """A ProcessGroup that torch.distributed's functions accept as `group=`."""
    members = meeting.members
    group = ProcessGroup(meeting.store.inner, members.rank_in_group, members.world_size)
    group._set_default_backend(default)
    kinds = {"cpu": ProcessGroup.BackendType.GLOO, "cuda": ProcessGroup.BackendType.NCCL}
    for device_type, backend in backends:
        group._register_backend(torch.device(device_type), kinds[device_type], backend)
    return group
