"""CUDA tensors that readers fetch from the writer's GPU memory: who may, and what arrives. In files: fake_gpu.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fake_gpu import FakeMemory
from gpu_readers import (
    COUNT,
    checksum,
    checksums,
    give,
    has_gpu,
    kind_of_error,
    opens,
    queue_to,
    share_memory,
    summary,
    tensor,
    words,
)
from reader_pool import WATCHDOG, Peer, attach, attach_only, close, peers_for, take_bytes

from ray_shm.cuda_memory import SHARE_BYTES
from ray_shm.message_queue import MessageQueue
from ray_shm.ring import CAN, CANNOT, UNKNOWN

pytestmark = pytest.mark.usefixtures("what_stays")


# Who may


def test_tensors_are_shared_once_every_reader_has_opened_a_probe(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]
) -> None:
    assert words(gpu_queue) == [UNKNOWN, UNKNOWN]
    assert give(gpu_queue, spare, tensor(1.0)) == 2 * [[(1.0, 1.0, COUNT)]]
    assert (words(gpu_queue), gpu_queue.stats().shared) == ([CAN, CAN], 0)
    for turn in range(1, 4):
        assert give(gpu_queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
        assert gpu_queue.stats().shared == turn


def test_the_writer_may_change_its_tensor_as_soon_as_it_is_sent(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]
) -> None:
    give(gpu_queue, spare, tensor())
    sent = tensor(5.0)
    gpu_queue.enqueue(sent)
    sent.fill_(6.0)
    assert gpu_queue.stats().shared == 1
    # One reader writes to what it got before the other looks.
    assert [peer.run(summary) for peer in spare] == 2 * [[(5.0, 5.0, COUNT)]]
    assert sent[0] == 6.0


def test_small_tensors_and_everything_else_travel_with_the_message(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]
) -> None:
    give(gpu_queue, spare, tensor())
    small = torch.ones(100)
    assert give(gpu_queue, spare, [small, tensor(2.0), small]) == 2 * [[(1, 1, 100), (2, 2, COUNT), (1, 1, 100)]]
    assert gpu_queue.stats().shared == 1
    assert give(gpu_queue, spare, [small]) == 2 * [[(1, 1, 100)]]
    assert gpu_queue.stats().shared == 1


@pytest.mark.parametrize("how", ["not", "wrong"])
def test_one_reader_that_cannot_open_it_and_all_goes_through_host_memory(
    gpu: FakeMemory, spare: list[Peer], how: str
) -> None:
    spare[1].run(opens, how)
    try:
        with queue_to(spare) as queue:
            for turn in range(3):
                assert give(queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
            assert (words(queue), queue.stats().shared) == ([CAN, CANNOT], 0)
            for peer in spare:
                peer.run(close)
    finally:
        spare[1].run(opens, "right")


def test_a_reader_in_the_writers_process_gets_it_through_host_memory(gpu: FakeMemory) -> None:
    with MessageQueue(1, 1) as queue, MessageQueue.create_from_handle(queue.export_handle(), 0) as reader:
        for turn in range(2):
            queue.enqueue(tensor(turn))
            assert torch.equal(reader.dequeue(WATCHDOG), tensor(turn))
        assert (words(queue), queue.stats().shared) == ([CANNOT], 0)


def test_a_queue_with_a_reader_on_another_node_shares_nothing(gpu: FakeMemory, peer: Peer) -> None:
    with MessageQueue(1, 0) as queue:
        peer.run(has_gpu)
        peer.start(attach, queue.export_handle(), 0)
        queue.wait_until_ready(WATCHDOG)
        peer.result()
        for turn in range(2):
            assert give(queue, [peer], tensor(turn)) == [[(turn, turn, COUNT)]]
        assert queue.stats().shared == 0
        peer.run(close)


def test_where_gpu_memory_is_short_one_message_goes_through_host_memory(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]
) -> None:
    give(gpu_queue, spare, tensor())
    for turn, full in enumerate([True, False], 2):
        gpu.full = full
        assert give(gpu_queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
        assert gpu_queue.stats().shared == (not full)


def test_where_nothing_can_be_shared_all_goes_through_host_memory(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer], caplog: Any
) -> None:
    give(gpu_queue, spare, tensor())
    for turn, broken in enumerate([True, False], 2):
        gpu.broken = broken
        assert give(gpu_queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
        assert gpu_queue.stats().shared == 0
    assert "sharing GPU memory failed: no such call" in caplog.text


def test_a_reader_that_can_open_nothing_any_more_says_so(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]
) -> None:
    give(gpu_queue, spare, tensor())
    spare[0].run(opens, "not")
    try:
        gpu_queue.enqueue(tensor(2.0))
        kind, text = spare[0].run(kind_of_error)
        assert (kind, spare[1].run(summary)) == ("RuntimeError", [(2.0, 2.0, COUNT)])
        assert re.search(
            r"GPU memory of pid \d+ cannot be opened in pid \d+ any more: RuntimeError: no peer access", text
        )
        assert give(gpu_queue, spare, tensor(3.0)) == 2 * [[(3.0, 3.0, COUNT)]]
        assert (words(gpu_queue), gpu_queue.stats().shared) == ([CANNOT, CAN], 1)
    finally:
        spare[0].run(opens, "right")


def test_a_reader_that_has_not_imported_torch_is_asked_once_it_has(gpu: FakeMemory) -> None:
    with peers_for(1) as [peer], queue_to([peer]) as queue:
        queue.enqueue(tensor(1.0))
        assert peer.run(take_bytes) == tensor(1.0).numpy().tobytes()
        assert words(queue) == [UNKNOWN]
        peer.run(has_gpu)
        for turn in range(2):
            assert give(queue, [peer], tensor(turn)) == [[(turn, turn, COUNT)]]
            assert (words(queue), queue.stats().shared) == ([CAN], turn)
        peer.run(close)


def readmitted(queue: MessageQueue, rank: int, old: Peer) -> None:
    old.kill()
    writer = queue._require_writer()
    writer.drop(rank)
    writer.readmit(rank)


def test_a_new_process_in_a_readers_place_is_asked_again(gpu: FakeMemory, spare: list[Peer]) -> None:
    with peers_for(2) as [first, second], queue_to([spare[0], first]) as queue:
        first.run(has_gpu)
        give(queue, [spare[0], first], tensor())
        readmitted(queue, 1, first)
        assert words(queue) == [CAN, UNKNOWN]
        second.run(has_gpu)
        second.run(attach_only, queue.export_handle(), 1)
        both = [spare[0], second]
        for turn in range(2):
            assert give(queue, both, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
            assert queue.stats().shared == turn
        for peer in both:
            peer.run(close)


@pytest.mark.slow
def test_a_new_process_gets_through_host_memory_what_was_pickled_for_the_old_one(
    gpu: FakeMemory, spare: list[Peer], monkeypatch: Any
) -> None:
    with peers_for(2) as [first, second], queue_to([spare[0], first]) as queue:
        first.run(has_gpu)
        second.run(opens, "not")
        give(queue, [spare[0], first], tensor())
        writer = queue._require_writer()
        send = writer.send

        def replace_and_send(frames: Any, deadline: Any) -> None:
            monkeypatch.setattr(writer, "send", send)
            readmitted(queue, 1, first)
            second.run(attach_only, queue.export_handle(), 1)
            send(frames, deadline)

        monkeypatch.setattr(writer, "send", replace_and_send)
        both = [spare[0], second]
        assert give(queue, both, tensor(2.0)) == 2 * [[(2.0, 2.0, COUNT)]]
        assert queue.stats().shared == 0
        for peer in both:
            peer.run(close)


# What is shared


def test_tensors_that_overlap_share_memory_after_arrival(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer]
) -> None:
    give(gpu_queue, spare, tensor())
    whole = torch.zeros(2 * COUNT)
    for pair in ([whole, whole[COUNT:]], [whole[: COUNT + 10], whole[COUNT:]]):  # inside, and across the end
        shared = gpu_queue.stats().shared
        gpu_queue.enqueue(pair)
        assert [peer.run(share_memory) for peer in spare] == [True, True]
        assert gpu_queue.stats().shared == shared + 1


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64], ids=str
)
def test_tensors_of_any_dtype_and_order(
    gpu: FakeMemory, gpu_queue: MessageQueue, spare: list[Peer], dtype: torch.dtype
) -> None:
    give(gpu_queue, spare, tensor())
    bits = torch.randint(0, 2, (1024, SHARE_BYTES // 1024), dtype=torch.uint8)
    sent = bits.view(dtype) if dtype is not torch.bool else bits.bool()
    gpu_queue.enqueue([sent, sent.t(), sent[::1, : sent.shape[1] - 1].repeat(2, 1)])
    want = [checksum(t) for t in (sent, sent.t(), sent[:, :-1].repeat(2, 1))]
    assert [peer.run(checksums) for peer in spare] == [want, want]
    assert gpu_queue.stats().shared == 1
