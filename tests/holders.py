"""What receivers in other processes do with what they hold. No torch here, which takes a process seconds to import."""

from __future__ import annotations

from typing import Any

import numpy as np
from injection import HANG
from reader_pool import Me

from ray_shm import codec, lease, message_queue


def make(kind: str, size: int, value: int) -> Any:
    data = bytes([value]) * size
    if kind == "bytes":
        return data
    if kind == "bytearray":
        return bytearray(data)
    if kind == "memoryview":
        return memoryview(bytearray(data))
    if kind == "tensor":
        import torch

        return torch.full((size,), value, dtype=torch.uint8)
    return np.full(size, value, np.uint8)


def as_bytes(obj: Any) -> bytes:
    return bytes(obj.numpy() if hasattr(obj, "numpy") else obj)


def keep_and_go_on(me: Me, kept: int, more: int) -> list[str]:
    """Keep the first messages, take more, and say which of those kept have changed."""
    me.kept = [me.queue.dequeue(HANG) for _ in range(kept)]
    for k in range(more):
        got = me.queue.dequeue(HANG)
        assert as_bytes(got)[-1] == 100 + k % 100
        del got
    return [f"{kind} {size}" for kind, size, value, obj in me.kept if as_bytes(obj) != bytes([value]) * size]


def keep_uncopied(_me: Me) -> None:
    message_queue._decode = lambda frames, owned: codec.decode(frames, 0, True)  # type: ignore[assignment]


def return_at_once(_me: Me) -> None:
    take = lease.Leases.take

    def take_and_return(self: Any, key: Any, nbytes: int, index: int, generation: int) -> memoryview:
        view = take(self, key, nbytes, index, generation)
        self._give_back(index)
        return view

    lease.Leases.take = take_and_return  # type: ignore[method-assign]


def hold(me: Me, count: int) -> None:
    me.kept = [me.queue.dequeue(HANG) for _ in range(count)]


def hold_and_leave(me: Me, count: int) -> None:
    me.kept = [me.queue.dequeue(HANG) for _ in range(count)]
    me.queue.close()


def kept_values(me: Me) -> list[int]:
    return [int(np.unique(array)[0]) if len(np.unique(array)) == 1 else -1 for array in me.kept]


def write_all(me: Me, count: int) -> list[int]:
    seen = []
    for _ in range(count):
        got = me.queue.dequeue(HANG)
        seen.append(int(got[0]) if (got == got[0]).all() else -1)
        got[:] = 66
        del got
    return seen
