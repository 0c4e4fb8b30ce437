"""Files in place of GPU memory, so that the protocol of cuda_ipc.py can be tested where there is no GPU.

CPU tensors of SHARE_BYTES and more are then taken for CUDA tensors. What torch's sharing promises is kept: a share is
for one reader, in another process, and its memory is there until it is released, or the process ends.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ray_shm import cuda_ipc, tensor_codec
from ray_shm.cuda_ipc import SHARE_BYTES, CudaMemory, Token


class FakeMemory(CudaMemory):
    """Attributes: full: nothing can be copied. kept: descriptors of what is shared. opens: "right", "not" at all, or
    "wrong", which is to say other memory."""

    def __init__(self) -> None:
        self.full = False
        self.opens = "right"
        self.kept: set[int] = set()

    def suits(self, tensor: Any) -> bool:
        return bool(tensor.nbytes >= SHARE_BYTES)

    def copy(self, flat: Any) -> Any:
        if self.full:
            raise torch.OutOfMemoryError("out of memory")
        return flat.clone()

    def probe(self, content: bytes, near: Any) -> Any:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def share(self, own: Any) -> Token:
        fd = os.memfd_create("fake_gpu")
        os.write(fd, own.numpy().data)
        self.kept.add(fd)
        return os.getpid(), fd, own.nbytes

    def release(self, token: Token) -> None:
        fd = token[1]
        if fd in self.kept:
            self.kept.discard(fd)
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

    def usable(self) -> str:
        return ""


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
