"""CUDA tensors that readers fetch from the writer's GPU memory: who may, when, and what becomes of the memory.

With files in place of GPU memory (fake_gpu.py); with a GPU: test_cuda_memory.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_gpu import FakeMemory, install, send_tensors_as_from_a_gpu
from reader_pool import WATCHDOG, Me, Peer, attach, attach_only, close, peers_for, take_bytes

from ray_shm import codec, cuda_ipc
from ray_shm.cuda_memory import SHARE_BYTES
from ray_shm.message_queue import MessageQueue
from ray_shm.ring import CAN, CANNOT, UNKNOWN

COUNT = SHARE_BYTES // 4  # of float32
BOUND = 8 * SHARE_BYTES
pytestmark = pytest.mark.usefixtures("what_stays")


@pytest.fixture
def gpu(monkeypatch: Any) -> Iterator[FakeMemory]:
    """This process's; what it shares must have been let go of in the end."""
    memory = send_tensors_as_from_a_gpu(monkeypatch)
    yield memory
    gc.collect()
    assert memory.kept == set()


@pytest.fixture(scope="module")
def spare() -> Iterator[list[Peer]]:
    """Two readers' processes that have imported torch, which takes seconds."""
    with peers_for(2) as made:
        for peer in made:
            peer.run(has_gpu)
        yield made


@pytest.fixture
def queue(spare: list[Peer]) -> Iterator[MessageQueue]:
    with queue_to(spare) as made:
        yield made
        for peer in spare:
            peer.run(close)


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


# Who may


def test_tensors_are_shared_once_every_reader_has_opened_a_probe(
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]
) -> None:
    assert words(queue) == [UNKNOWN, UNKNOWN]
    assert give(queue, spare, tensor(1.0)) == 2 * [[(1.0, 1.0, COUNT)]]
    assert (words(queue), queue.stats().shared) == ([CAN, CAN], 0)
    for turn in range(1, 4):
        assert give(queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
        assert queue.stats().shared == turn


def test_the_writer_may_change_its_tensor_as_soon_as_it_is_sent(
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]
) -> None:
    give(queue, spare, tensor())
    sent = tensor(5.0)
    queue.enqueue(sent)
    sent.fill_(6.0)
    assert queue.stats().shared == 1
    # One reader writes to what it got before the other looks.
    assert [peer.run(summary) for peer in spare] == 2 * [[(5.0, 5.0, COUNT)]]
    assert sent[0] == 6.0


def test_small_tensors_and_everything_else_travel_with_the_message(
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]
) -> None:
    give(queue, spare, tensor())
    small = torch.ones(100)
    assert give(queue, spare, [small, tensor(2.0), small]) == 2 * [[(1, 1, 100), (2, 2, COUNT), (1, 1, 100)]]
    assert queue.stats().shared == 1
    assert give(queue, spare, [small]) == 2 * [[(1, 1, 100)]]
    assert queue.stats().shared == 1


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
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]
) -> None:
    give(queue, spare, tensor())
    for turn, full in enumerate([True, False], 2):
        gpu.full = full
        assert give(queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
        assert queue.stats().shared == (not full)


def test_where_nothing_can_be_shared_all_goes_through_host_memory(
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer], caplog: Any
) -> None:
    give(queue, spare, tensor())
    for turn, broken in enumerate([True, False], 2):
        gpu.broken = broken
        assert give(queue, spare, tensor(turn)) == 2 * [[(turn, turn, COUNT)]]
        assert queue.stats().shared == 0
    assert "sharing GPU memory failed: no such call" in caplog.text


def test_a_reader_that_can_open_nothing_any_more_says_so(
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]
) -> None:
    give(queue, spare, tensor())
    spare[0].run(opens, "not")
    try:
        queue.enqueue(tensor(2.0))
        kind, text = spare[0].run(kind_of_error)
        assert (kind, spare[1].run(summary)) == ("RuntimeError", [(2.0, 2.0, COUNT)])
        assert re.search(
            r"GPU memory of pid \d+ cannot be opened in pid \d+ any more: RuntimeError: no peer access", text
        )
        assert give(queue, spare, tensor(3.0)) == 2 * [[(3.0, 3.0, COUNT)]]
        assert (words(queue), queue.stats().shared) == ([CANNOT, CAN], 1)
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
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]
) -> None:
    give(queue, spare, tensor())
    whole = torch.zeros(2 * COUNT)
    for pair in ([whole, whole[COUNT:]], [whole[: COUNT + 10], whole[COUNT:]]):  # inside, and across the end
        shared = queue.stats().shared
        queue.enqueue(pair)
        assert [peer.run(share_memory) for peer in spare] == [True, True]
        assert queue.stats().shared == shared + 1


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64], ids=str
)
def test_tensors_of_any_dtype_and_order(
    gpu: FakeMemory, queue: MessageQueue, spare: list[Peer], dtype: torch.dtype
) -> None:
    give(queue, spare, tensor())
    bits = torch.randint(0, 2, (1024, SHARE_BYTES // 1024), dtype=torch.uint8)
    sent = bits.view(dtype) if dtype is not torch.bool else bits.bool()
    queue.enqueue([sent, sent.t(), sent[::1, : sent.shape[1] - 1].repeat(2, 1)])
    want = [checksum(t) for t in (sent, sent.t(), sent[:, :-1].repeat(2, 1))]
    assert [peer.run(checksums) for peer in spare] == [want, want]
    assert queue.stats().shared == 1


def checksum(t: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    flat = t.contiguous().view(-1).view(torch.uint8)
    return str(t.dtype), tuple(t.shape), t.stride(), int((flat * torch.arange(len(flat), dtype=torch.int64)).sum())


def checksums(me: Me) -> list[Any]:
    return [checksum(t) for t in me.queue.dequeue(WATCHDOG)]


# What becomes of the memory


def test_unread_gpu_memory_is_bounded(gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]) -> None:
    give(queue, spare, tensor())
    fit = BOUND // SHARE_BYTES
    for turn in range(fit + 3):
        queue.enqueue(tensor(turn))
    assert queue.stats().shared == fit
    assert len(gpu.kept) == fit
    for turn in range(fit + 3):
        assert [peer.run(summary) for peer in spare] == 2 * [[(turn, turn, COUNT)]]
    give(queue, spare, tensor())
    assert queue.stats().shared == fit + 1
    assert len(gpu.kept) == 1


def test_one_tensor_beyond_the_bound_goes_alone(gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]) -> None:
    give(queue, spare, tensor())
    beyond = torch.full((2 * BOUND // 4,), 3.0)
    assert give(queue, spare, beyond) == 2 * [[(3.0, 3.0, beyond.numel())]]
    assert queue.stats().shared == 1
    nearly = beyond[: BOUND // 4 - COUNT // 2]
    queue.enqueue([tensor(4.0), nearly])  # not alone in the message
    assert len(gpu.kept) == 1
    assert [peer.run(summary) for peer in spare] == 2 * [[(4.0, 4.0, COUNT), (3.0, 3.0, nearly.numel())]]
    queue.enqueue(tensor(5.0))
    queue.enqueue(nearly)  # not alone in the queue
    assert len(gpu.kept) == 1
    assert [peer.run(summary) for peer in spare] == 2 * [[(5.0, 5.0, COUNT)]]
    assert [peer.run(summary) for peer in spare] == 2 * [[(3.0, 3.0, nearly.numel())]]


def test_small_messages_have_read_memory_let_go(gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]) -> None:
    give(queue, spare, tensor())
    give(queue, spare, tensor())
    assert gpu.kept
    for turn in range(64):
        give(queue, spare, [torch.full((2,), float(turn))])
    assert not gpu.kept


def test_what_could_not_be_sent_is_let_go(gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]) -> None:
    give(queue, spare, tensor())
    queue.enqueue(bytes(BOUND))
    with pytest.raises(TimeoutError):
        queue.enqueue([tensor(), bytes(SHARE_BYTES)], timeout=0.05)
    gc.collect()
    assert not gpu.kept
    assert queue.stats().shared == 0
    for peer in spare:
        peer.run(take)
    assert give(queue, spare, tensor(2.0)) == 2 * [[(2.0, 2.0, COUNT)]]


def take(me: Me) -> None:
    me.queue.dequeue(WATCHDOG)


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
        until = time.monotonic() + WATCHDOG
        while 1 not in writer._shm.ring.dropped and time.monotonic() < until:  # type: ignore[union-attr]
            writer.require_readers()
        writer.sharer.trim()  # type: ignore[union-attr]
        assert not gpu.kept
        assert give(queue, [spare[0]], tensor(3.0)) == [[(3.0, 3.0, COUNT)]]
        assert queue.stats().shared == 2
        spare[0].run(close)


def test_a_forked_child_lets_go_of_nothing(gpu: FakeMemory, queue: MessageQueue, spare: list[Peer]) -> None:
    give(queue, spare, tensor())
    frames = codec.encode(tensor(2.0), b"", queue._require_writer().sharer)
    queue.enqueue(tensor(3.0))
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            del frames
            queue.close()
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
