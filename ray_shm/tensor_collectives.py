"""Collectives on tensors: every member calls the same one, with the same shapes and dtypes. Runs in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_shm.connection import REDUCE_OPS
from ray_shm.membership import Member

if TYPE_CHECKING:
    import torch


class TensorCollectives(Member):
    """The part of StatelessGroupCoordinator that moves tensors between all members.

    Every method takes `timeout`: seconds that this operation may take, instead of the group's.
    """

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, timeout: float | None = None) -> torch.Tensor:
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
        if op not in REDUCE_OPS:
            raise ValueError(f"all_reduce: op={op!r} is none of {', '.join(REDUCE_OPS)}")
        if self.world_size == 1:
            return tensor
        if tensor.requires_grad:
            tensor = tensor.detach()
        result = tensor.clone() if tensor.is_contiguous() else tensor.contiguous()
        self._link.run("all_reduce", "all_reduce", result, op, timeout=timeout)
        return result

    def all_gather(self, tensor: torch.Tensor, dim: int = -1, *, timeout: float | None = None) -> torch.Tensor:
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
            self._link.run("all_gather", "all_gather", gathered.view(-1), part.view(-1), timeout=timeout)
        # (member, a, b, c) → (a, member, b, c) → (a, member · b, c) for dim 1
        return gathered.movedim(0, dim % part.dim()).flatten(dim % part.dim(), dim % part.dim() + 1)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, *, timeout: float | None = None) -> torch.Tensor:
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
        content = flat(tensor)
        self._link.run("broadcast", "broadcast", content, src, timeout=timeout)
        if src != self.rank_in_group and not tensor.is_contiguous():
            tensor.detach().copy_(content.view(tensor.shape))
        return tensor

    def barrier(self, *, timeout: float | None = None) -> None:
        """Returns when every member has called it. Waits on the CPU, not for work queued on a GPU.

        Raises:
            PeerLostError: a peer is gone or late. The group is gone.
        """
        if self.world_size == 1:
            return
        self._link.run("barrier", "barrier", timeout=timeout)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """One-dimensional and contiguous: the same memory if `tensor` is contiguous, else a copy."""
    return tensor.detach().contiguous().view(-1)
