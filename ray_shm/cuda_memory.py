"""GPU memory of this process that others on the node open, and theirs. What cuda_ipc.py needs torch for.

Runs in the ends of a queue; imports torch only when it is called. Handles and mappings are torch's, as
torch.multiprocessing uses them (torch/csrc/StorageSharing.cpp, torch/csrc/CudaIPCTypes.cpp). Its counters are not: they
are for one consumer each, are not atomic, and go wrong below zero. A queue knows who has read what, so its writer takes
the one count back itself, and readers are given the name of a counter that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHARE_BYTES = 1 << 20  # below, two copies between host and GPU cost less than opening memory (not measured: no GPU)
_NO_COUNTER = b"/ray_shm_none"  # torch looks for it, and takes it that the other process has ended

Token = tuple[Any, ...]  # says a reader where memory is


@dataclass(slots=True)
class Shared:
    """GPU memory that others may open, for as long as this is kept and `CudaMemory.unshare` was not called."""

    own: Any
    token: Token
    counter: tuple[Any, ...]


class CudaMemory:
    """What torch is needed for. Tensors here are flat ones of uint8."""

    def suits(self, tensor: Any) -> bool:
        """Whether a tensor is worth sharing."""
        return bool(tensor.is_cuda) and tensor.nbytes >= SHARE_BYTES

    def copy(self, flat: Any, device: Any) -> Any:
        """A copy on `device`, complete."""
        import torch

        own = flat.to(device, copy=True)
        for used in {flat.device, own.device}:
            if used.type != "cpu":
                torch.cuda.current_stream(used).synchronize()
        return own

    def share(self, own: Any) -> Shared:
        _, handle, size, start, counters, counter, event, _ = own.untyped_storage()._share_cuda_()
        return Shared(own, (handle, size, start, event, own.storage_offset(), own.numel()), (counters, counter))

    def unshare(self, shared: Shared) -> None:
        """Once: nobody opens it any more, and the memory is torch's again when the tensor goes."""
        import torch

        torch.UntypedStorage._release_ipc_counter_cuda(*shared.counter)

    def open(self, token: Token) -> Any:
        """What was shared, in memory of this process's current device; the writer's is let go of."""
        import torch

        handle, size, start, event, offset, count = token
        # Through the current device also where the writer's is visible: a context there would cost its memory.
        current = torch.cuda.current_device()
        # The writer has waited for its copy, so there is nothing to wait for (the last argument).
        where = (current, handle, size, start, _NO_COUNTER, 0, event, False)
        storage = torch.UntypedStorage._new_shared_cuda(*where)
        device = torch.device("cuda", current)
        there = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, offset, (count,), (1,))
        own = torch.empty(count, dtype=torch.uint8, device=device)
        own.copy_(there)
        torch.cuda.current_stream(device).synchronize()
        return own

    def content(self, flat: Any) -> bytes:
        data: bytes = flat.cpu().numpy().tobytes()
        return data

    def is_full(self, exc: Exception) -> bool:
        """Whether GPU memory was short, which passes."""
        import torch

        return isinstance(exc, torch.cuda.OutOfMemoryError)
