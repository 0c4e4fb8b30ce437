"""Collectives among a subset of ranks, independent of torch's WORLD; the surface of vLLM's coordinator.

    StatelessGroupCoordinator   the operations: checks the arguments, shapes and pickles
        └─► GroupConnection     connects at once or at the first operation, notices the end     (no torch till then)
              ├─► Membership      who is in it, where this rank stands
              ├─► GroupStore      where the members meet: the group's own, or one shared by an actor group
              └─► ProcessGroups   gloo, and nccl where there are GPUs

Runs in every worker. Importing this module imports no torch: a lazy coordinator that is never used costs nothing.
A coordinator is used by one thread at a time, as torch's process groups are; `operation`, `release` and `destroy` are
for any thread. It does not notice a peer that dies while this rank is not exchanging data with it: the collective runs
into its timeout, unless another thread releases it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray_shm.connection import BACKENDS, TENSOR_TAG, GroupConnection, choose_device, store_port
from ray_shm.membership import Membership, Standing
from ray_shm.store import GroupStore

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store


class StatelessGroupCoordinator(Standing):
    """One group of ranks that exchange tensors and objects. Every member constructs it, with the same arguments.

    After a PeerLostError the group is gone on this rank, and its sockets are closed, so that peers that wait for
    this rank raise too; `reform` makes it usable again. After `destroy()`, operations raise GroupClosedError.

    Args:
        group_ranks: disjoint lists of global ranks; this rank joins the list that contains `global_rank`.
        local_rank: rank on its node, 0-based.
        torch_distributed_backend: "gloo" (CPU), "nccl" (CUDA, and gloo for CPU tensors) or "auto": nccl where
            every member has a GPU to itself, else gloo.
        use_device_communicator: taken for compatibility; CUDA tensors always go through nccl.
        use_message_queue_broadcaster: False. Object broadcasts go over the CPU group.
        group_name: distinguishes groups that share a store.
        host: address of the group's first rank, which binds the port of `group_ports` there.
        group_ports: one list of ports per list of `group_ranks`; its last port serves the store.
        global_rank: this rank.
        global_world_size: number of ranks over all groups, for information.
        coord_store: instead of `group_ports`: a store that several groups share, or a callable that returns it,
            called when the group connects. It stays the caller's to close.
        bind_host: this node's own address, on which gloo listens. Default: `host`.
        epoch: number of this formation of the group; a group formed again on the same store needs another.
        timeout: seconds, for the members to meet and for every operation. With nccl a late CUDA operation
            is ended by torch's own watchdog.
        lazy: connect at the first operation. All members have to come to one within `timeout` seconds.
        device_index: CUDA device of this rank as this process numbers them. Default: `local_rank` if so many
            are visible, else 0 (Ray shows each worker its own GPUs only).

    Attributes:
        rank: this rank, global. ranks: global ranks of the members. local_rank, global_world_size, epoch: as given.
        rank_in_group: position in `ranks`, which `src` and `dst` arguments count in. world_size: len(ranks).
        group_name: as given. unique_name: with the epoch and the index of this rank's list; keys start with it.
        backend: as asked; once connected, "gloo" or "nccl".

    Raises:
        ValueError: the arguments contradict each other, or this rank is in no list.
        StartError: the store or a member could not be reached in time, the port is taken, or this group and epoch
            were formed before on the store. Nothing remains. A lazy group raises it from its first operation.
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
    ) -> None:
        if torch_distributed_backend not in BACKENDS:
            raise ValueError(f"backend {torch_distributed_backend!r} is none of {', '.join(BACKENDS)}")
        if use_message_queue_broadcaster:
            raise ValueError(
                "use_message_queue_broadcaster=True is not supported: object broadcasts go over the CPU group; "
                "pass False"
            )
        if timeout <= 0:
            raise ValueError(f"timeout={timeout}: give the seconds that an operation may take, more than 0")
        self._members = Membership.find(group_ranks, global_rank)
        super().__init__(self._members)
        self.local_rank, self.global_world_size = local_rank, global_world_size
        self.group_name = group_name or "anonymous"
        self.epoch = epoch
        self.use_device_communicator = use_device_communicator
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
        )
        if not lazy:
            self._link.connect()

    @property
    def unique_name(self) -> str:
        return f"{self.group_name}/{self.epoch}/{self._members.index}"

    @property
    def operation(self) -> str | None:
        """What its thread is in at the moment, as "all_reduce" (forming the group for it included), or None."""
        return self._link.operation

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

    # Collectives: every member calls the same one with the same shapes and dtypes

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Element-wise reduction over the members.

        Args:
            tensor: any shape; on the CPU of any floating type, int8, uint8, int32, int64, bool or complex.
            op: "sum", "product", "min" or "max".

        Returns:
            A new contiguous tensor of the same shape, the same on every member; `tensor` keeps its values. In a
            group of one, `tensor` itself.

        Raises:
            TypeError: gloo does not reduce this dtype. The group stays usable.
            PeerLostError: a peer is gone or late. The group is gone.
        """
        if self.world_size == 1:
            return tensor
        link = self._link
        link.operation = "all_reduce"
        try:
            groups = link.groups or link.connect("all_reduce")
            if op not in groups.reduce_options:
                raise ValueError(f"all_reduce: op={op!r} is none of {', '.join(groups.reduce_options)}")
            if tensor.requires_grad:
                tensor = tensor.detach()
            result = tensor.clone() if tensor.is_contiguous() else tensor.contiguous()
            try:
                groups.all_reduce(result, op)
            except RuntimeError as exc:
                if "Invalid scalar type" in str(exc):  # found by every member alike, before anything is sent
                    raise TypeError(f"all_reduce: gloo does not reduce {tensor.dtype}; convert the tensor") from exc
                raise link.lost("all_reduce", exc) from exc
            return result
        finally:
            link.operation = None

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The members' tensors, concatenated along `dim` in the order of `ranks`.

        Args:
            tensor: the same shape and dtype on every member, any dtype. 0-dim tensors count as shape (1,).
            dim: dimension to concatenate along; negative counts from the end.

        Raises:
            ValueError: `tensor` has no dimension `dim`.
            PeerLostError: a peer is gone or late. The group is gone.
        """
        part = tensor.detach().contiguous().view(tensor.shape or (1,))
        if not -part.dim() <= dim < part.dim():
            raise ValueError(f"all_gather: dim={dim}, but the tensor has shape {tuple(tensor.shape)}")
        if self.world_size == 1:
            return part
        gathered = part.new_empty((self.world_size, *part.shape))
        if part.numel():
            self._link.run("all_gather", "all_gather", gathered.view(-1), part.view(-1))
        # (member, a, b, c) → (a, member, b, c) → (a, member · b, c) for dim 1
        return gathered.movedim(0, dim % part.dim()).flatten(dim % part.dim(), dim % part.dim() + 1)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with that of the member `src` (its rank in the group), in place, and returns it.

        Args:
            tensor: the same shape and dtype on every member; any dtype, contiguous or not.

        Raises:
            ValueError: `src` is outside the group.
            PeerLostError: a peer is gone or late. The group is gone; the content of `tensor` is undefined.
        """
        self._members.member(src, "src")
        if self.world_size == 1 or tensor.numel() == 0:
            return tensor
        flat = _flat(tensor)
        self._link.run("broadcast", "broadcast", flat, src)
        if src != self.rank_in_group and not tensor.is_contiguous():
            tensor.detach().copy_(flat.view(tensor.shape))
        return tensor

    def barrier(self) -> None:
        """Returns when every member has called it. Waits on the CPU, not for work queued on a GPU.

        Raises:
            PeerLostError: a peer is gone or late. The group is gone.
        """
        if self.world_size == 1:
            return
        self._link.run("barrier", "barrier")

    # Objects: pickled, over the CPU group, never through the store

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """The object of the member `src`; there, `obj` itself.

        Raises:
            ValueError: `src` is outside the group.
            RemoteError: `src` could not pickle its object; there the original error is raised. The group stays
                usable, as it does when unpickling raises.
            PeerLostError: a peer is gone or late. The group is gone.
        """
        self._members.member(src, "src")
        if self.world_size == 1:
            return obj
        from ray_shm import object_exchange

        return object_exchange.broadcast(self._link, obj, src)

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0) -> list[Any]:
        """Overwrites the elements of `obj_list` with those of the member `src`, and returns it.

        Raises:
            ValueError: `src` is outside the group, or its list has another length; `obj_list` is as before.
            RemoteError, PeerLostError: as `broadcast_object`.
        """
        received = self.broadcast_object(obj_list, src)
        if len(received) != len(obj_list):
            raise ValueError(
                f"broadcast_object_list: rank {self.ranks[src]} sent {len(received)} objects, "
                f"this list has {len(obj_list)} places"
            )
        obj_list[:] = received
        return obj_list

    def send_object(self, obj: Any, dst: int) -> None:
        """Sends to the member `dst` and returns when it has received; two members must not both send first.

        Raises:
            ValueError: `dst` is outside the group or this rank itself.
            PeerLostError: `dst` is gone or late. The group is gone.
        """
        self._members.peer(dst, "dst")
        from ray_shm import object_exchange

        object_exchange.send(self._link, obj, dst)

    def recv_object(self, src: int) -> Any:
        """The next object that the member `src` sends to this rank.

        Raises:
            ValueError: `src` is outside the group or this rank itself.
            RemoteError: `src` could not pickle its object. The group stays usable.
            PeerLostError: `src` is gone or late. The group is gone.
        """
        self._members.peer(src, "src")
        from ray_shm import object_exchange

        return object_exchange.recv(self._link, src)

    # Tensors from one member to another

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Sends to the member `dst`, by default the next, and returns when it has received (nccl: when enqueued).

        Raises:
            ValueError: `dst` is outside the group or this rank itself.
            PeerLostError: `dst` is gone or late. The group is gone.
        """
        peer = self._members.peer((self.rank_in_group + 1) % self.world_size if dst is None else dst, "dst")
        if tensor.numel():
            self._link.run("send", "send", _flat(tensor), peer, TENSOR_TAG)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """The next tensor that the member `src`, by default the previous one, sends to this rank.

        Args:
            size: shape, and dtype: as sent. The result is on `device` with nccl, else on the CPU.

        Raises:
            ValueError: `src` is outside the group or this rank itself.
            PeerLostError: `src` is gone or late. The group is gone.
        """
        peer = self._members.peer((self.rank_in_group - 1) % self.world_size if src is None else src, "src")
        import torch

        on_gpu = self._link.connect("recv").nccl is not None
        tensor = torch.empty(size, dtype=dtype, device=self.device if on_gpu else "cpu")
        if tensor.numel():
            self._link.run("recv", "recv", tensor.view(-1), peer, TENSOR_TAG)
        return tensor

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


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """One-dimensional and contiguous: the same memory if `tensor` is contiguous, else a copy."""
    return tensor.detach().contiguous().view(-1)
