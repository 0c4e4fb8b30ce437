"""CUDA tensors that readers fetch from GPU memory, on a GPU; the protocol without one: test_cuda_ipc.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_readers import COUNT, checksum, queue_to
from reader_pool import WATCHDOG, Me, close, peers_for, take_bytes

pytestmark = pytest.mark.usefixtures("what_stays")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def take_cuda(me: Me) -> Any:
    """As `summary`, and where it is."""
    received = me.queue.dequeue(WATCHDOG)
    found = checksum(received.cpu()), str(received.device), torch.cuda.current_device()
    received.zero_()
    torch.cuda.synchronize()
    return found


def start_cuda(me: Me) -> None:
    torch.ones(1).cuda()


@needs_cuda
@pytest.mark.parametrize("count", [COUNT, 64 * COUNT], ids=["1MiB", "64MiB"])
def test_cuda_tensors_reach_two_processes_by_ipc(count: int) -> None:
    with peers_for(2) as peers, queue_to(peers) as queue:
        for peer in peers:
            peer.run(start_cuda)
        for turn in range(20):
            sent = torch.rand(count, device="cuda")
            want = checksum(sent.cpu())
            queue.enqueue(sent, WATCHDOG)
            sent.zero_()
            for peer in peers:
                found, device, current = peer.run(take_cuda)
                assert (found, device) == (want, f"cuda:{current}")
            assert queue.stats().shared == turn, "the readers could not open the probe; see their log"
        for peer in peers:
            peer.run(close)


@needs_cuda
def test_cuda_tensors_for_a_process_without_torch_go_through_host_memory_first() -> None:
    with peers_for(1) as [peer], queue_to([peer]) as queue:
        for shared in (0, 0, 1):
            sent = torch.rand(COUNT, device="cuda")
            queue.enqueue(sent, WATCHDOG)
            assert peer.run(take_bytes) == sent.cpu().numpy().tobytes()
            assert queue.stats().shared == shared
        peer.run(close)


@needs_cuda
def test_cuda_memory_stays_flat() -> None:
    with peers_for(1) as [peer], queue_to([peer]) as queue:
        peer.run(start_cuda)
        sent = torch.rand(16 * COUNT, device="cuda")
        levels = []
        for _ in range(50):
            queue.enqueue(sent, WATCHDOG)
            peer.run(take_cuda)
            levels.append(torch.cuda.memory_allocated())
        assert queue.stats().shared == 49
        assert max(levels) <= 2 * sent.nbytes + (1 << 20), levels
        peer.run(close)
