"""Tensors taken out of a dictionary to travel by themselves, and put in again where it arrives. Runs in every worker.

Imports torch: only object_collectives.py imports this module, at the first dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Stands in the dictionary for the tensor number `index` of those that travel by themselves."""

    index: int
    shape: torch.Size
    dtype: torch.dtype
    on_gpu: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        """What to receive it in. device: where tensors from a GPU go."""
        return torch.empty(self.shape, dtype=self.dtype, device=device if self.on_gpu else "cpu")


def take_out(tensors: Any, over_nccl: bool, through_queue: bool) -> tuple[Any, list[TensorPlace], list[torch.Tensor]]:
    """The dictionary with a TensorPlace for every tensor that travels by itself, these places, and the tensors.

    Args:
        tensors: may hold dictionaries in turn. over_nccl: the group has nccl, for CUDA tensors. through_queue: the rest
            goes through a queue, which carries tensors on the CPU as they are.
    """
    places: list[TensorPlace] = []
    taken: list[torch.Tensor] = []

    def leave(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not _is_plain(value):
            return value
        if not (over_nccl if value.is_cuda else value.is_cpu and not through_queue):
            return value
        places.append(TensorPlace(len(taken), value.shape, value.dtype, value.is_cuda))
        taken.append(value)
        return places[-1]

    return _mapped(tensors, leave), places, taken


def _is_plain(tensor: torch.Tensor) -> bool:
    """Its elements and its shape are all there is to it, and there is something to send."""
    dressed = tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not dressed and tensor.numel() > 0


def put_in(tensors: Any, taken: Sequence[torch.Tensor]) -> Any:
    """The dictionary with the tensors in their places."""
    return _mapped(tensors, lambda value: taken[value.index] if isinstance(value, TensorPlace) else value)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return change(value)
