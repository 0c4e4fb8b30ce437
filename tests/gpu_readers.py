"""A queue whose tensors are taken for CUDA tensors, its readers' processes, and what these do.

For the tests of cuda_ipc.py, on a GPU or with fake_gpu.py in its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_gpu import install, send_tensors_as_from_a_gpu
from reader_pool import WATCHDOG, Me, Peer, attach

from ray_shm.cuda_memory import SHARE_BYTES
from ray_shm.message_queue import MessageQueue

COUNT = SHARE_BYTES // 4  # of float32
BOUND = 8 * SHARE_BYTES


def queue_to(peers: list[Peer], **options: Any) -> MessageQueue:
    queue = MessageQueue(len(peers), len(peers), None, SHARE_BYTES, 8, **options)
    for rank, peer in enumerate(peers):
        peer.start(attach, queue.export_handle(), rank)
    queue.wait_until_ready(WATCHDOG)
    for peer in peers:
        peer.result()
    return queue


def words(queue: MessageQueue) -> list[int]:
    ring = queue._require_writer()._shm.ring  # type: ignore[union-attr]
    return [ring.device(i) for i in range(ring.shape.n_readers)]


def tensor(value: float = 1.0) -> Any:
    return torch.full((COUNT,), float(value))


def give(queue: MessageQueue, peers: list[Peer], obj: Any) -> list[Any]:
    """What each reader makes of it."""
    queue.enqueue(obj, WATCHDOG)
    return [peer.run(summary) for peer in peers]


# In a reader's process


def has_gpu(me: Me) -> None:
    install()


def opens(me: Me, how: str) -> None:
    install().opens = how


def summary(me: Me) -> Any:
    """(first, last, number of elements) of each tensor of the next message. Writes to them when that is known."""
    received = me.queue.dequeue(WATCHDOG)
    tensors = received if isinstance(received, list) else [received]
    found = [(float(t.flatten()[0]), float(t.flatten()[-1]), t.numel()) for t in tensors]
    for t in tensors:
        t.fill_(-1.0)
    return found


def kind_of_error(me: Me) -> tuple[str, str]:
    try:
        me.queue.dequeue(WATCHDOG)
    except Exception as exc:
        return type(exc).__name__, str(exc)
    return "", ""


def share_memory(me: Me) -> bool:
    whole, part = me.queue.dequeue(WATCHDOG)
    part[0] = 7.0
    return float(whole[COUNT]) == 7.0


def become_writer(me: Me) -> Any:
    send_tensors_as_from_a_gpu(pytest.MonkeyPatch())
    me.queue = MessageQueue(1, 1, None, SHARE_BYTES, 8)
    return me.queue.export_handle()


def put(me: Me, value: float) -> int:
    me.queue.enqueue(torch.full((COUNT,), value))
    shared: int = me.queue.stats().shared
    return shared


def take(me: Me) -> None:
    me.queue.dequeue(WATCHDOG)


def checksum(t: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    flat = t.contiguous().view(-1).view(torch.uint8)
    return str(t.dtype), tuple(t.shape), t.stride(), int((flat * torch.arange(len(flat), dtype=torch.int64)).sum())


def checksums(me: Me) -> list[Any]:
    return [checksum(t) for t in me.queue.dequeue(WATCHDOG)]
