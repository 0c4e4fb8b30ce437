"""What a coordinator's operations ask of the tensors they are given. Runs in every worker.

Imports no torch by itself: whoever passes a tensor has.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def plain(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or without what its memory does not show: gradient, lazy conjugation and negation.

    Raises:
        TypeError: it is no tensor, or its elements do not lie in memory one by one.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{operation} takes a torch.Tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(
            f"{operation} takes strided tensors, and this one is {kind}; convert it, or send it as an object"
        )
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def flat(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    """One-dimensional and contiguous: the same memory if `tensor` is contiguous, else a copy."""
    return plain(operation, tensor).contiguous().view(-1)


def dimension(operation: str, tensor: torch.Tensor, dim: int) -> int:
    """`dim`, counted from the front."""
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"{operation}: dim={dim}, but the tensor has shape {tuple(tensor.shape)}")
    return dim % int(tensor.dim())


OF_BITS = {"sum": "max", "product": "min", "min": "min", "max": "max"}  # on 0 and 1; gloo would add up to 2 and more


def is_bool(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.dtype is torch.bool


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(torch.uint8)


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: torch adds no complex numbers of 16-bit parts, and nccl none at all."""
    import torch

    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def require_reducible(operation: str, tensor: torch.Tensor, op: str) -> None:
    """By a table, so that members agree whatever the size and whichever way it would take.

    Raises:
        TypeError: gloo reduces no such dtype (on a GPU nccl sees to that), or it is complex and not to be added.
    """
    if tensor.is_complex() and op != "sum":
        raise TypeError(f"{operation}: complex numbers ({tensor.dtype}) can be summed, not reduced by {op!r}")
    if tensor.is_cpu and tensor.dtype not in _reduced_by_gloo():
        raise TypeError(f"{operation}: gloo does not reduce {tensor.dtype}; convert the tensor")


@functools.cache
def _reduced_by_gloo() -> frozenset[torch.dtype]:
    import torch

    floats = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    integers = {torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64}
    return frozenset(floats | integers | {torch.complex32, torch.complex64, torch.complex128})
