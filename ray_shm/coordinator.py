"""Collectives among a subset of ranks, independent of torch's WORLD; the surface of vLLM's coordinator.

    StatelessGroupCoordinator   constructor, torch's handles, release, reform, destroy
        ├── TensorCollectives     ┐
        ├── ObjectCollectives     ├ the operations: check the arguments, shape and pickle
        ├── PointToPoint          ┘
        └─► GroupConnection     connects at once or at the first operation, notices the end     (no torch till then)
              ├─► Membership      who is in it, where this rank stands
              ├─► GroupStore      where the members meet: the group's own, or one shared by an actor group
              └─► ProcessGroups   gloo, and nccl where there are GPUs

Runs in every worker. Importing this module imports no torch: a lazy coordinator that is never used costs nothing.
A coordinator is used by one thread at a time, as torch's process groups are; `operation`, `is_lost`, `release` and
`destroy` are for any thread. It does not notice a peer that dies while this rank is not exchanging data with it: the
collective runs into its timeout, unless another thread releases it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from ray_shm.connection import BACKENDS, GroupConnection, choose_device
from ray_shm.meeting_place import store_port
from ray_shm.membership import Membership
from ray_shm.object_collectives import ObjectCollectives
from ray_shm.point_to_point import PointToPoint
from ray_shm.store import GroupStore
from ray_shm.tensor_collectives import TensorCollectives

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store


_PATIENCE = 1.0  # seconds that a constructor waits for other members, if the timeout is longer than
_SHORT = 5.0


class StatelessGroupCoordinator(TensorCollectives, ObjectCollectives, PointToPoint):
    """One group of ranks that exchange tensors and objects. Every member constructs it, with the same arguments.

    After a PeerLostError the group is gone on this rank, and its sockets are closed, so that peers that wait for
    this rank raise too; `reform` makes it usable again. After `destroy()`, operations raise GroupClosedError.

    Args:
        group_ranks: disjoint lists of global ranks; this rank joins the list that contains `global_rank`.
        local_rank: rank on its node, 0-based.
        torch_distributed_backend: "gloo" (CPU), "nccl" (CUDA, and gloo for CPU tensors) or "auto": nccl where
            every member has a GPU to itself, else gloo.
        use_device_communicator: taken for compatibility; CUDA tensors always go through nccl.
        use_message_queue_broadcaster: objects that one member gives to all go through shared memory where members share
            it, and by ZeroMQ to one member on each other node, which passes them on. Else over the CPU group. The same
            on every member. `ctx.group(name)` in a worker has it.
        group_name: distinguishes groups that share a store.
        host: address of the group's first rank, which binds the port of `group_ports` there.
        group_ports: one list of ports per list of `group_ranks`; its last port serves the store. Outside of
            net.ipv4.ip_local_port_range nobody gets such a port by accident before the group is formed.
        global_rank: this rank.
        global_world_size: number of ranks over all groups, for information.
        coord_store: instead of `group_ports`: a store that several groups share, or a callable that returns it,
            called when the group connects. It stays the caller's to close.
        bind_host: this node's own address, on which gloo listens. Default: `host`.
        epoch: number of this formation of the group; a group formed again on the same store needs another.
        timeout: seconds, for the members to meet and for every operation that is given none of its own. An operation
            that takes longer raises PeerLostError, whose `ranks` are those that have not arrived. With nccl a late
            CUDA operation is ended by torch's own watchdog.
        lazy: connect at the first operation. All members have to come to one within `timeout` seconds.
        reason_wait: seconds that an operation whose connection broke waits for a `release`, whose reason names the dead
            peer, before it raises. For groups that somebody watches over.
        device_index: CUDA device of this rank as this process numbers them. Default: `local_rank` if so many
            are visible, else 0 (Ray shows each worker its own GPUs only).

    Attributes:
        rank: this rank, global. ranks: global ranks of the members. local_rank, global_world_size, epoch: as given.
        rank_in_group: position in `ranks`, which `src` and `dst` arguments count in. world_size: len(ranks).
        group_name, use_message_queue_broadcaster: as given. unique_name: `group_name` with the epoch and the index of
            this rank's list; keys start with it.
        backend: as asked; once connected, "gloo" or "nccl".

    Raises:
        ValueError: the arguments contradict each other, or this rank is in no list.
        StartError: the store or a member could not be reached in time, the port is taken, or this group and epoch
            were formed before on the store. Nothing remains. The constructor waits a second for the other members (to
            the end, if `timeout` is 5 s or less); then the group goes on forming, and its first operation waits for
            that and raises this error. So members may construct several groups in different orders, or from several
            threads. A lazy group raises it from its first operation, too.
    """

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str,
        use_device_communicator: bool,
        use_message_queue_broadcaster: bool = False,
        group_name: str | None = None,
        host: str = "127.0.0.1",
        group_ports: list[list[int]] | None = None,
        global_rank: int = 0,
        global_world_size: int = 1,
        coord_store: Store | GroupStore | Callable[[], GroupStore] | None = None,
        *,
        bind_host: str | None = None,
        epoch: int = 0,
        timeout: float = 300.0,
        lazy: bool = False,
        device_index: int | None = None,
        reason_wait: float = 0.0,
    ) -> None:
        if torch_distributed_backend not in BACKENDS:
            raise ValueError(f"backend {torch_distributed_backend!r} is none of {', '.join(BACKENDS)}")
        if timeout <= 0:
            raise ValueError(f"timeout={timeout}: give the seconds that an operation may take, more than 0")
        super().__init__(Membership.find(group_ranks, global_rank))
        self.local_rank, self.global_world_size = local_rank, global_world_size
        self.group_name = group_name or "anonymous"
        self.epoch = epoch
        self.use_device_communicator = use_device_communicator
        self.use_message_queue_broadcaster = use_message_queue_broadcaster
        self._device_index = device_index
        self._link = GroupConnection(
            self._members,
            self.unique_name,
            torch_distributed_backend,
            store=coord_store,
            store_address=(host, store_port(self._members, group_ports, coord_store)),
            bind_host=bind_host or host,
            timeout=timeout,
            device=partial(choose_device, torch_distributed_backend, local_rank, device_index),
            reason_wait=reason_wait,
        )
        if not lazy:
            self._link.begin(None if timeout <= _SHORT else _PATIENCE)

    @property
    def unique_name(self) -> str:
        return f"{self.group_name}/{self.epoch}/{self._members.index}"

    @property
    def operation(self) -> str | None:
        """What its thread is in at the moment, as "all_reduce" (forming the group for it included), or None."""
        return self._link.operation

    @property
    def operations(self) -> int:
        """How many collectives this rank has called in the present formation; without `send` and `recv`."""
        return self._link.operations

    @property
    def is_lost(self) -> bool:
        """Whether it needs `reform`: a peer is gone or late, it was released, interrupted, or could not be formed."""
        return self._link.is_lost

    # Torch's own handles; the first of these properties that is read connects a lazy group, but for `device`

    @property
    def backend(self) -> str:
        """As asked for; once connected, "gloo" or "nccl"."""
        return self._link.backend

    @property
    def device(self) -> torch.device:
        """This rank's GPU, unless the backend is "gloo" or none is visible; then the CPU."""
        return choose_device(self.backend, self.local_rank, self._device_index)

    @property
    def device_group(self) -> ProcessGroup:
        """For CUDA and CPU tensors with nccl, else `cpu_group`; `torch.distributed` takes it as ``group=``."""
        return self._link.connect().device_group

    @property
    def cpu_group(self) -> ProcessGroup:
        """Gloo."""
        return self._link.connect().cpu_group

    @property
    def tcp_store_group(self) -> GroupStore | Store:
        """The store on which the members met."""
        self._link.connect()
        return self._link.store

    # The end, and another beginning

    def release(self, reason: str) -> bool:
        """Ends the operation that this rank waits in, because a peer will not come. From any thread; waits for nothing.

        The operation, or the forming of the group if it got no further, raises PeerLostError, and so does every later
        one until `reform`; their text contains `reason`. Peers that wait for this rank raise as well. Only this
        group's own connections end. A group that was released, lost or destroyed before stays as it is. Whoever uses
        `cpu_group` or `device_group` by itself gets torch's own error, if any.

        Args:
            reason: for the error, as "rank 3 raised ValueError".

        Returns:
            Whether its thread was in an operation.
        """
        return self._link.release(reason)

    def reform(
        self, epoch: int, store: Store | GroupStore | Callable[[], GroupStore] | None = None, *, connect: bool = False
    ) -> None:
        """Starts the group afresh in this same object, whatever became of it. On the owner's thread, on every member.

        The old connection's sockets and threads are freed. The group connects at its next operation.

        Args:
            epoch: another than the group was ever formed under on its store, and the same on every member.
            store: replaces `coord_store` or `group_ports`, for good; needed once the process that served it is gone.
            connect: connect now.

        Raises:
            GroupClosedError: after `destroy()`.
            StartError: with `connect`, as the constructor.
        """
        name = f"{self.group_name}/{epoch}/{self._members.index}"
        self._link.reform(name, store)
        self.epoch = epoch
        if connect:
            self._link.connect("reform")

    def destroy(self) -> None:
        """Closes this rank's sockets and threads; peers that still use the group raise PeerLostError. Idempotent."""
        self._link.close()

    def __enter__(self) -> StatelessGroupCoordinator:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.destroy()

    def __repr__(self) -> str:
        return (
            f"StatelessGroupCoordinator({self.group_name!r}, ranks={self.ranks}, rank={self.rank}, "
            f"backend={self.backend!r}, epoch={self.epoch})"
        )
