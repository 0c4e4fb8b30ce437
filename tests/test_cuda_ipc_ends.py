"""What becomes of GPU memory that a writer shares, however its readers and itself end. In files: fake_gpu.py."""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch
from fake_gpu import FakeMemory
from gpu_readers import BOUND, COUNT, become_writer, give, has_gpu, kind_of_error, put, queue_to, summary, take, tensor
from injection import wait_for
from reader_pool import Peer, attach_only, close, peers_for

from ray_shm import codec, cuda_ipc
from ray_shm.cuda_memory import SHARE_BYTES
from ray_shm.message_queue import MessageQueue

pytestmark = pytest.mark.usefixtures("what_stays")


def test_unread_gpu_memory_is_bounded(gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]) -> None:
    give(gpu_queue, spare, tensor())
    fit = BOUND // SHARE_BYTES
    for turn in range(fit + 3):
        gpu_queue.enqueue(tensor(turn))
    assert gpu_queue.stats().shared == fit
    assert len(gpu.kept) == fit
    for turn in range(fit + 3):
        assert [peer.run(summary) for peer in spare] == 2 * [[(turn, turn, COUNT)]]
    give(gpu_queue, spare, tensor())
    assert gpu_queue.stats().shared == fit + 1
    assert len(gpu.kept) == 1


def test_one_tensor_beyond_the_bound_goes_alone(gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]) -> None:
    give(gpu_queue, spare, tensor())
    beyond = torch.full((2 * BOUND // 4,), 3.0)
    assert give(gpu_queue, spare, beyond) == 2 * [[(3.0, 3.0, beyond.numel())]]
    assert gpu_queue.stats().shared == 1
    nearly = beyond[: BOUND // 4 - COUNT // 2]
    gpu_queue.enqueue([tensor(4.0), nearly])  # not alone in the message
    assert len(gpu.kept) == 1
    assert [peer.run(summary) for peer in spare] == 2 * [[(4.0, 4.0, COUNT), (3.0, 3.0, nearly.numel())]]
    gpu_queue.enqueue(tensor(5.0))
    gpu_queue.enqueue(nearly)  # not alone in the queue
    assert len(gpu.kept) == 1
    assert [peer.run(summary) for peer in spare] == 2 * [[(5.0, 5.0, COUNT)]]
    assert [peer.run(summary) for peer in spare] == 2 * [[(3.0, 3.0, nearly.numel())]]


def test_small_messages_have_read_memory_let_go(gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]) -> None:
    give(gpu_queue, spare, tensor())
    give(gpu_queue, spare, tensor())
    assert gpu.kept
    for turn in range(64):
        give(gpu_queue, spare, [torch.full((2,), float(turn))])
    assert not gpu.kept


def test_what_could_not_be_sent_is_let_go(gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]) -> None:
    give(gpu_queue, spare, tensor())
    gpu_queue.enqueue(bytes(BOUND))
    with pytest.raises(TimeoutError):
        gpu_queue.enqueue([tensor(), bytes(SHARE_BYTES)], timeout=0.05)
    gc.collect()
    assert not gpu.kept
    assert gpu_queue.stats().shared == 0
    for peer in spare:
        peer.run(take)
    assert give(gpu_queue, spare, tensor(2.0)) == 2 * [[(2.0, 2.0, COUNT)]]


@pytest.mark.parametrize("way", ["reads", "closes", "dies"])
def test_a_closed_writers_memory_is_there_for_readers_that_are_attached(
    gpu: FakeMemory, spare: list[Peer], way: str
) -> None:
    with peers_for(1) as [other]:
        queue = queue_to([spare[0], other])
        other.run(has_gpu)
        give(queue, [spare[0], other], tensor())
        queue.enqueue(tensor(2.0))
        spare[0].run(close)
        queue.close()
        cuda_ipc._trim_closed()
        assert len(gpu.kept) == 1
        if way == "reads":
            assert other.run(summary) == [(2.0, 2.0, COUNT)]
        other.kill() if way == "dies" else other.run(close)
        cuda_ipc._trim_closed()
        assert not gpu.kept


def test_a_reader_that_dies_keeps_nothing(gpu: FakeMemory, spare: list[Peer]) -> None:
    with peers_for(1) as [doomed], queue_to([spare[0], doomed], drop_dead_readers=True) as queue:
        doomed.run(has_gpu)
        give(queue, [spare[0], doomed], tensor())
        queue.enqueue(tensor(2.0))
        assert spare[0].run(summary) == [(2.0, 2.0, COUNT)]
        doomed.kill()
        writer = queue._require_writer()
        ring = writer._shm.ring  # type: ignore[union-attr]
        wait_for(lambda: writer.require_readers() or 1 in ring.dropped, "the reader's death")
        writer.sharer.trim()  # type: ignore[union-attr]
        assert not gpu.kept
        assert give(queue, [spare[0]], tensor(3.0)) == [[(3.0, 3.0, COUNT)]]
        assert queue.stats().shared == 2
        spare[0].run(close)


def test_a_forked_child_lets_go_of_nothing(gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]) -> None:
    give(gpu_queue, spare, tensor())
    frames = codec.encode(tensor(2.0), b"", gpu_queue._require_writer().sharer)
    gpu_queue.enqueue(tensor(3.0))
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            del frames
            gpu_queue.close()
            cuda_ipc._trim_closed()
            gc.collect()
            os._exit(len(gpu.kept))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert [peer.run(summary) for peer in spare] == 2 * [[(3.0, 3.0, COUNT)]]


def test_the_memory_of_a_writer_that_is_gone_is_an_error_that_says_so(spare: list[Peer]) -> None:
    with peers_for(1) as [writer]:
        handle = writer.run(become_writer)
        pid = writer.process.pid
        spare[0].run(attach_only, handle, 0)
        writer.run(put, 1.0)
        assert spare[0].run(summary) == [(1.0, 1.0, COUNT)]
        assert writer.run(put, 2.0) == 1
        writer.kill()
        kind, text = spare[0].run(kind_of_error)
        assert kind == "PeerLostError"
        assert f"its writer (pid {pid}) is gone, and its GPU memory with it" in text
        spare[0].run(close)
