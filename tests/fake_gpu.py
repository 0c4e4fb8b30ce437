"""Files in place of GPU memory, so that the protocol of cuda_ipc.py can be tested where there is no GPU.

CPU tensors of SHARE_BYTES and more are then taken for CUDA tensors. What is shared can be opened by other processes
as it stands, until it is unshared, which must happen once, or until its process ends. Only copies can be shared.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch

from ray_shm import cuda_ipc, tensor_codec
from ray_shm.cuda_memory import SHARE_BYTES, CudaMemory, Shared, Token


class FakeMemory(CudaMemory):
    """Attributes: full: nothing can be copied. broken: nothing can be shared. opens: "right", "not" at all, or
    "wrong", which is to say other memory. kept: descriptors of what is shared."""

    def __init__(self) -> None:
        self.full = self.broken = False
        self.opens = "right"
        self.kept: set[int] = set()
        self._files: dict[int, int] = {}  # by address

    def suits(self, tensor: Any) -> bool:
        return bool(tensor.nbytes >= SHARE_BYTES)

    def copy(self, flat: Any, device: Any) -> Any:
        if self.full:
            raise torch.cuda.OutOfMemoryError("out of memory")
        fd = os.memfd_create("fake_gpu")
        os.truncate(fd, flat.nbytes)
        own = torch.frombuffer(mmap.mmap(fd, flat.nbytes), dtype=torch.uint8)
        own.copy_(flat)
        self._files[own.data_ptr()] = fd
        return own

    def share(self, own: Any) -> Shared:
        fd = self._files.pop(own.data_ptr())  # only what was copied lies in a file
        if self.broken:
            os.close(fd)
            raise RuntimeError("no such call")
        self.kept.add(fd)
        return Shared(own, (os.getpid(), fd, own.nbytes), (fd,))

    def unshare(self, shared: Shared) -> None:
        (fd,) = shared.counter
        self.kept.remove(fd)  # once
        shared.own.fill_(0xEE)  # the memory is somebody else's now
        os.close(fd)

    def open(self, token: Token) -> Any:
        if self.opens == "not":
            raise RuntimeError("no peer access")
        pid, fd, nbytes = token
        if self.opens == "wrong":
            return torch.zeros(nbytes, dtype=torch.uint8)
        with open(f"/proc/{pid}/fd/{fd}", "rb", buffering=0) as file:
            content = bytearray(nbytes)
            assert file.readinto(content) == nbytes
        return torch.frombuffer(content, dtype=torch.uint8)


def install() -> FakeMemory:
    """In this process, for good."""
    memory = cuda_ipc.memory = FakeMemory()
    return memory


def send_tensors_as_from_a_gpu(monkeypatch: Any) -> FakeMemory:
    """In this process, for one test."""
    exported = tensor_codec._exported

    def numbered(tensor: Any, sent: Any = None) -> Any:
        number = sent.beside(tensor) if sent is not None else None
        return exported(tensor) if number is None else number

    memory = FakeMemory()
    monkeypatch.setattr(cuda_ipc, "memory", memory)
    monkeypatch.setattr(tensor_codec, "_exported", numbered)
    return memory
