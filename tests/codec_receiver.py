"""Objects as a receiver gets them, and how tensors are compared. For the tests of the codec."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from ray_shm.codec import decode, encode


def copied(obj: Any) -> Any:
    """`obj` as a receiver gets it: from read-only copies of the frames, which are then overwritten."""
    frames = [bytearray(frame) for frame in encode(obj)]
    received = decode([memoryview(frame).toreadonly() for frame in frames])
    for frame in frames:
        frame[:] = b"\xff" * len(frame)
    return received


def sent_bytes(obj: Any) -> int:
    """Of all frames."""
    return sum(memoryview(frame).nbytes for frame in encode(obj))


class Leased:
    """Frames in memory that tells when nothing refers to it any more, as the arena's lease does."""

    def __init__(self, obj: Any) -> None:
        self.alive = 0
        self.addresses: list[range] = []  # of frames[1:]
        self._watches: list[Any] = []
        first, *others = encode(obj)
        self._frames: list[Any] = [bytes(first)]
        for frame in others:
            block = (ctypes.c_char * memoryview(frame).nbytes).from_buffer_copy(frame)
            self.alive += 1
            self._watches.append(weakref.ref(block, self._gone))
            start = ctypes.addressof(block)
            self.addresses.append(range(start, start + len(block)))
            self._frames.append(memoryview(block).cast("B"))

    def _gone(self, _: Any) -> None:
        self.alive -= 1

    def decode(self) -> Any:
        """Once: the object, in this memory."""
        frames, self._frames = self._frames, []
        return decode(frames, owned=True)


def bits(tensor: Any) -> bytes:
    """The elements of a tensor as they stand in memory, in C order."""
    import torch

    flat = tensor.detach().contiguous().resolve_conj().resolve_neg().cpu()
    flat = flat.as_strided((flat.numel(),), (1,))  # a single element may have any stride, which view() refuses
    data: bytes = flat.view(torch.uint8).numpy().tobytes()
    return data


def check_same(received: Any, sent: Any) -> None:
    """Of tensors."""
    assert type(received) is type(sent)
    assert (received.dtype, received.shape, received.device) == (sent.dtype, sent.shape, sent.device)
    assert received.requires_grad == sent.requires_grad
    assert bits(received) == bits(sent)


def random_bits(shape: tuple[int, ...], dtype: Any) -> Any:
    """A tensor of any bits, NaNs with payloads and the like included; booleans are 0 or 1."""
    import torch

    numbers = np.random.default_rng(7)
    count = int(np.prod(shape)) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    data = numbers.integers(0, 2 if dtype is torch.bool else 256, count, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def shares(a: Any, b: Any) -> bool:
    return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
