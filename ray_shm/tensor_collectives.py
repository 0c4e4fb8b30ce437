"""Collectives on tensors: every member calls the same one, with the same shapes and dtypes. Runs in every worker.

Any strided tensor will do: contiguous or not, empty, 0-dim, on the CPU or a GPU. A GPU's tensor in a group that runs
on gloo goes through host memory. Results carry no gradient. With other shapes or dtypes than its peers', a member may
end its process or a peer's: torch's gloo does that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from ray_shm.connection import REDUCE_OPS
from ray_shm.membership import Member
from ray_shm.tensor_arguments import OF_BITS, as_bits, as_reals, dimension, is_bool, plain, require_reducible

if TYPE_CHECKING:
    import torch

F = TypeVar("F", bound=Callable[..., Any])


def also_tensor(method: F) -> F:
    """Takes `input_`, vLLM's name for it, as ``tensor=`` as well."""

    @functools.wraps(method)
    def with_either_name(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "tensor" in kwargs:
            args = (kwargs.pop("tensor"), *args)
        return method(self, *args, **kwargs)

    return cast(F, with_either_name)


class TensorCollectives(Member):
    """The part of StatelessGroupCoordinator that moves tensors between all members.

    Every method takes `timeout`: seconds that this operation may take, instead of the group's. All of them raise
    TypeError for what is no strided tensor, ValueError for arguments that cannot be right, both before anything is
    sent, and PeerLostError when a peer is gone or late: then the group is gone.
    """

    @also_tensor
    def all_reduce(self, input_: torch.Tensor, op: str = "sum", *, timeout: float | None = None) -> torch.Tensor:
        """Element-wise reduction over the members.

        Args:
            input_: any shape; on the CPU float16 to float64, bfloat16, int8, uint8, int32, int64, bool (a sum is "any",
                a product "all") or complex (sum only).
            op: "sum", "product", "min" or "max".

        Returns:
            A new contiguous tensor of the same shape, the same bits on every member; `input_` keeps its values. In a
            group of one, `input_` itself.

        Raises:
            TypeError: the backend does not reduce this dtype. Every member raises it, the group stays usable.
        """
        if op not in REDUCE_OPS:
            raise ValueError(f"all_reduce: op={op!r} is none of {', '.join(REDUCE_OPS)}")
        tensor = plain("all_reduce", input_)
        require_reducible("all_reduce", tensor, op)
        if self.world_size == 1:
            return input_
        if self._needs_host("all_reduce", tensor):
            return self.all_reduce(tensor.cpu(), op, timeout=timeout).to(tensor.device)
        result = tensor.clone() if tensor.is_contiguous() else tensor.contiguous()
        reduced, reduction = (as_bits(result), OF_BITS[op]) if is_bool(result) else (result, op)
        self._link.run("all_reduce", "all_reduce", reduced, reduction, timeout=timeout)
        return result

    @also_tensor
    def all_gather(self, input_: torch.Tensor, dim: int = -1, *, timeout: float | None = None) -> torch.Tensor:
        """The members' tensors, concatenated along `dim` in the order of `ranks`.

        Args:
            input_: the same shape and dtype on every member, any dtype. 0-dim tensors count as shape (1,).
            dim: dimension to concatenate along; negative counts from the end.

        Returns:
            A new tensor. In a group of one, `input_` itself.

        Raises:
            ValueError: `input_` has no dimension `dim`.
        """
        part, dim = self._part("all_gather", input_, dim)
        if self.world_size == 1:
            return part
        if self._needs_host("all_gather", part):
            return self.all_gather(part.cpu(), dim, timeout=timeout).to(part.device)
        part = part.contiguous()
        gathered = part.new_empty((self.world_size, *part.shape))
        if part.numel():
            self._link.run("all_gather", "all_gather", gathered.view(-1), part.view(-1), timeout=timeout)
        return joined(gathered, dim)

    def gather(
        self, input_: torch.Tensor, dst: int = 0, dim: int = -1, *, timeout: float | None = None
    ) -> torch.Tensor | None:
        """What `all_gather` returns, on the member `dst` (its rank in the group); None on the others.

        Args:
            input_, dim: as for `all_gather`.

        Raises:
            ValueError: `dst` is outside the group, or `input_` has no dimension `dim`.
        """
        self._members.member(dst, "dst")
        part, dim = self._part("gather", input_, dim)
        if self.world_size == 1:
            return part
        if self._needs_host("gather", part):
            gathered = self.gather(part.cpu(), dst, dim, timeout=timeout)
            return None if gathered is None else gathered.to(part.device)
        part, here = part.contiguous(), dst == self.rank_in_group
        parts = part.new_empty((self.world_size if here else 0, *part.shape))
        if part.numel():
            places = list(parts.view(len(parts), -1).unbind()) if here else []
            self._link.run("gather", "gather", places, part.view(-1), dst, timeout=timeout)
        return joined(parts, dim) if here else None

    @overload
    def all_gatherv(
        self,
        input_: list[torch.Tensor],
        dim: int = 0,
        sizes: Sequence[int] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[torch.Tensor]: ...

    @overload
    def all_gatherv(
        self, input_: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None, *, timeout: float | None = None
    ) -> torch.Tensor: ...

    def all_gatherv(
        self,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: Sequence[int] | None = None,
        *,
        timeout: float | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """As `all_gather`, of tensors that may differ in size along `dim`; or of several at once, as a list.

        Args:
            input_: a tensor, or a list of as many on every member.
            sizes: the members' sizes along `dim`, in the order of `ranks`; the same for all tensors of a list.
                Default: the members tell each other first, which is one more small exchange.

        Returns:
            A new tensor, or a list of them. In a group of one, `input_` itself.

        Raises:
            ValueError: an input has no dimension `dim`, or `sizes` contradicts its shape or the group's size.
        """
        inputs = input_ if isinstance(input_, list) else [input_]
        parts = [self._part("all_gatherv", tensor, dim)[0] for tensor in inputs]
        dims = [dim % part.dim() for part in parts]
        own = [part.shape[d] for part, d in zip(parts, dims, strict=True)]
        if sizes is not None:
            for length in own:
                self._require_sizes("all_gatherv", sizes, own=length)
        if self.world_size == 1 or not parts:
            return parts if isinstance(input_, list) else parts[0]
        lengths = self._lengths(own, timeout) if sizes is None else [list(sizes) for _ in parts]
        results = self._all_gatherv(parts, dims, lengths, timeout)
        return results if isinstance(input_, list) else results[0]

    def _all_gatherv(
        self, parts: list[torch.Tensor], dims: list[int], lengths: list[list[int]], timeout: float | None
    ) -> list[torch.Tensor]:
        hosted = [self._needs_host("all_gatherv", part) for part in parts]
        firsts = [  # the dimension to concatenate along comes first
            (part.cpu() if host else part).movedim(d, 0).contiguous()
            for part, d, host in zip(parts, dims, hosted, strict=True)
        ]
        wholes = [first.new_empty((sum(sizes), *first.shape[1:])) for first, sizes in zip(firsts, lengths, strict=True)]
        places = [[p.view(-1) for p in whole.split(sizes)] for whole, sizes in zip(wholes, lengths, strict=True)]
        if any(whole.numel() for whole in wholes):
            flats = [first.view(-1) for first in firsts]
            self._link.run("all_gatherv", "all_gatherv", places, flats, timeout=timeout)
        return [
            whole.movedim(0, d).contiguous().to(part.device) for whole, part, d in zip(wholes, parts, dims, strict=True)
        ]

    def _lengths(self, own: list[int], timeout: float | None) -> list[list[int]]:
        """For every tensor, its size on every member."""
        import torch

        told = torch.empty(self.world_size * len(own), dtype=torch.int64, device="cpu")
        self._link.run(
            "all_gatherv", "all_gather", told, torch.tensor(own, dtype=torch.int64, device="cpu"), timeout=timeout
        )
        by_tensor: list[list[int]] = told.view(self.world_size, len(own)).t().tolist()
        return by_tensor

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1, *, timeout: float | None = None) -> torch.Tensor:
        """This rank's share of the members' sum: the one at its place of `world_size` equal ones along `dim`.

        Args:
            input_: the same shape and dtype on every member; a dtype that `all_reduce` sums.

        Returns:
            A new contiguous tensor. On the CPU the terms are added in the order of ranks. In a group of one,
            `input_` itself.

        Raises:
            ValueError: `input_` has no dimension `dim`, or that cannot be divided by the group's size.
            TypeError: the backend does not reduce this dtype. Every member raises it, the group stays usable.
        """
        tensor, dim = self._whole("reduce_scatter", input_, dim)
        share, rest = divmod(tensor.shape[dim], self.world_size)
        if rest:
            raise ValueError(
                f"reduce_scatter: dimension {dim} of a tensor of shape {tuple(tensor.shape)} cannot be divided among "
                f"{self.world_size} members; reduce_scatterv takes a size for each"
            )
        return self._reduce_scatter("reduce_scatter", input_, tensor, dim, [share] * self.world_size, timeout)

    def reduce_scatterv(
        self,
        input_: torch.Tensor,
        dim: int = -1,
        sizes: Sequence[int] | None = None,
        *,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """As `reduce_scatter`, in shares of any size.

        Args:
            sizes: the members' shares of dimension `dim`, in the order of `ranks`. Default: equal ones.

        Raises:
            ValueError: also if `sizes` has not an entry for each member, or does not add up to dimension `dim`.
        """
        if sizes is None:
            return self.reduce_scatter(input_, dim, timeout=timeout)
        tensor, dim = self._whole("reduce_scatterv", input_, dim)
        self._require_sizes("reduce_scatterv", sizes, total=tensor.shape[dim])
        return self._reduce_scatter("reduce_scatterv", input_, tensor, dim, list(sizes), timeout)

    def _reduce_scatter(
        self,
        operation: str,
        input_: torch.Tensor,
        tensor: torch.Tensor,
        dim: int,
        sizes: list[int],
        timeout: float | None,
    ) -> torch.Tensor:
        if self.world_size == 1:
            return input_
        if self._needs_host(operation, tensor):
            host = tensor.cpu()
            return self._reduce_scatter(operation, host, host, dim, sizes, timeout).to(tensor.device)
        parts = tensor.movedim(dim, 0).contiguous().split(sizes)
        share = parts[self.rank_in_group].clone()
        if tensor.numel():
            flats = [as_reals(part).view(-1) for part in parts]
            self._link.run(operation, "reduce_scatter", as_reals(share).view(-1), flats, timeout=timeout)
        return share.movedim(0, dim).contiguous()

    @also_tensor
    def broadcast(self, input_: torch.Tensor, src: int = 0, *, timeout: float | None = None) -> torch.Tensor:
        """Overwrites `input_` with that of the member `src` (its rank in the group), in place, and returns it.

        Args:
            input_: the same shape and dtype on every member; any dtype, contiguous or not.

        Raises:
            ValueError: `src` is outside the group.
            PeerLostError: a peer is gone or late. The group is gone; the content of `input_` is undefined.
        """
        self._members.member(src, "src")
        tensor = plain("broadcast", input_)
        if self.world_size == 1 or tensor.numel() == 0:
            return input_
        content = tensor.cpu() if self._needs_host("broadcast", tensor) else tensor
        content = content.contiguous().view(-1)
        self._link.run("broadcast", "broadcast", content, src, timeout=timeout)
        if src != self.rank_in_group and content.data_ptr() != input_.data_ptr():
            input_.detach().copy_(content.view(input_.shape))
        return input_

    def barrier(self, *, timeout: float | None = None) -> None:
        """Returns when every member has called it. Waits on the CPU, not for work queued on a GPU.

        Raises:
            PeerLostError: a peer is gone or late. The group is gone.
        """
        if self.world_size == 1:
            return
        self._link.run("barrier", "barrier", timeout=timeout)

    # Checks, before anything is sent

    def _part(self, operation: str, input_: torch.Tensor, dim: int) -> tuple[torch.Tensor, int]:
        """What is concatenated, and along which dimension, 0-based."""
        tensor = plain(operation, input_)
        part = tensor if tensor.dim() else tensor.view(1)
        return part, dimension(operation, part, dim)

    def _whole(self, operation: str, input_: torch.Tensor, dim: int) -> tuple[torch.Tensor, int]:
        tensor = plain(operation, input_)
        dim = dimension(operation, tensor, dim)
        require_reducible(operation, tensor, "sum")
        return tensor, dim

    def _require_sizes(
        self, operation: str, sizes: Sequence[int], *, own: int | None = None, total: int | None = None
    ) -> None:
        if len(sizes) != self.world_size or any(size < 0 for size in sizes):
            raise ValueError(f"{operation}: sizes={list(sizes)}: give a size for each of {self.world_size} members")
        if own is not None and sizes[self.rank_in_group] != own:
            raise ValueError(
                f"{operation}: sizes={list(sizes)} says {sizes[self.rank_in_group]} for this rank, the group's "
                f"{self.rank_in_group}, whose tensor has size {own} along that dimension"
            )
        if total is not None and sum(sizes) != total:
            raise ValueError(f"{operation}: sizes={list(sizes)} add up to {sum(sizes)}, the dimension has {total}")

    def _needs_host(self, operation: str, tensor: torch.Tensor) -> bool:
        """Whether it has to go through host memory: a GPU's tensor in a group that runs on gloo."""
        if tensor.is_cpu:
            return False
        if tensor.is_meta:
            raise ValueError(f"{operation} moves CUDA and CPU tensors; the tensor is on meta and has no values")
        return self._link.connect(operation).nccl is None


def joined(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """(member, a, b, c) → (a, member, b, c) → (a, member · b, c) for dim 1"""
    return parts.movedim(0, dim).flatten(dim, dim + 1)
