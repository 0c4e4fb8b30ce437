"""A reader that is gone is replaced by a new process, in the same queue and with the same handle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hazard_checks import content, is_content
from injection import HANG, fork_child, is_alive, result_within, wait_for, wait_until_asleep
from queue_ends import blocked
from reader_pool import Peer, peers_for
from readmit_lives import (
    KINDS,
    amid_a_message,
    behind,
    collect,
    dies_attaching,
    holding,
    kill,
    parked,
    queue_of_two,
    receive,
    send,
)

from ray_shm import reader_watch
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError, StartError
from ray_shm.message_queue import MessageQueue
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import LEASES

pytestmark = pytest.mark.usefixtures("what_stays")

SOON = 0.1  # seconds: a timeout that is meant to run out
SMALL: dict[str, Any] = {"max_chunk_bytes": 1000, "max_chunks": 4}
every_kind = pytest.mark.parametrize("kind", KINDS)
shm_and_zmq = pytest.mark.parametrize("kind", ["shm", "zmq"])


@pytest.fixture(scope="module")
def zygotes() -> Iterator[list[Peer]]:
    """Two processes that fork those which read, so that these are there in no time."""
    with peers_for(2) as made:
        yield made


@pytest.fixture
def zygote(zygotes: list[Peer]) -> Peer:
    return zygotes[0]


# What the new reader gets, and the others


@every_kind
@pytest.mark.parametrize("life", [parked, amid_a_message, holding, behind], ids=lambda life: life.__name__)
def test_a_new_process_takes_the_place(zygote: Peer, kind: str, life: Any) -> None:
    with queue_of_two(kind) as (queue, writer, other, rank):
        zygote.start(fork_child, life, queue.export_handle(), rank)
        queue.wait_until_ready(HANG)
        sent = send(queue, range(4))
        pid, _ = result_within(zygote, HANG)
        if life is parked and writer._shm is not None and rank in writer._local_ranks:
            wait_until_asleep(pid)
        kill(pid)
        writer.drop(rank)
        sent += send(queue, range(4, 7))
        writer.readmit(rank)
        zygote.start(fork_child, collect, queue.export_handle(), rank)
        news = send(queue, range(7, 15))
        queue.enqueue(None, HANG)
        assert result_within(zygote, HANG)[1] == news
        assert receive(other) == sent + news


@every_kind
def test_a_process_that_never_attached_is_replaced(zygote: Peer, kind: str) -> None:
    with queue_of_two(kind) as (queue, writer, other, rank):
        with pytest.raises(TimeoutError, match=rf"readers \[{rank}\]"):
            queue.wait_until_ready(SOON)
        writer.drop(rank)
        queue.wait_until_ready(HANG)
        other.wait_until_ready(HANG)
        sent = send(queue, range(3))
        writer.readmit(rank)
        zygote.start(fork_child, collect, queue.export_handle(), rank)
        queue.wait_until_ready(HANG)
        news = send(queue, range(3, 7))
        queue.enqueue(None, HANG)
        assert result_within(zygote, HANG)[1] == news
        assert receive(other) == sent + news


def test_what_is_sent_before_the_new_process_attaches_is_kept_for_it(zygote: Peer) -> None:
    with queue_of_two("shm") as (queue, writer, other, rank):
        writer.drop(rank)
        sent = send(queue, range(5))
        writer.readmit(rank)
        assert writer.behind() == {0: writer.behind()[0]}
        news = send(queue, range(5, 12))
        queue.enqueue(None, HANG)
        assert set(writer.behind()) == {0, 1}
        assert zygote.run(fork_child, collect, queue.export_handle(), rank)[1] == news
        assert receive(other) == sent + news


@every_kind
def test_a_queue_that_was_closed_meanwhile_says_so_to_the_new_process(kind: str) -> None:
    """And is in good order, though it never got a message."""
    with queue_of_two(kind) as (queue, writer, other, rank):
        writer.drop(rank)
        send(queue, range(3))
        writer.readmit(rank)
        with MessageQueue.create_from_handle(queue.export_handle(), rank) as late:
            queue.wait_until_ready(HANG)
            late.wait_until_ready(HANG)
            thread = threading.Thread(target=queue.close)
            thread.start()
            with pytest.raises(QueueClosedError):
                late.dequeue(HANG)
            assert [other.dequeue(HANG)[0] for _ in range(3)] == [0, 1, 2]
            thread.join(HANG)


def test_a_process_is_killed_at_every_line_of_attaching(zygote: Peer) -> None:
    at, there = 0, None
    with queue_of_two("shm") as (queue, writer, other, rank):
        while there is None:
            at += 1
            pid, there = zygote.run(fork_child, dies_attaching, at, queue.export_handle(), rank)
            wait_for(lambda pid=pid: not is_alive(pid), "its end")
            writer.drop(rank)
            writer.readmit(rank)
            zygote.start(fork_child, collect, queue.export_handle(), rank)
            news = send(queue, range(at, at + 2))
            queue.enqueue(None, HANG)
            assert result_within(zygote, HANG)[1] == receive(other) == news
            writer.drop(rank)
            writer.readmit(rank)
        assert at > 12


# The writer


@shm_and_zmq
def test_a_sender_goes_on_after_the_drop_and_waits_for_the_new_process(zygote: Peer, kind: str) -> None:
    with queue_of_two(kind, **SMALL) as (queue, writer, other, rank):
        zygote.start(fork_child, behind, queue.export_handle(), rank)
        queue.wait_until_ready(HANG)
        pid, _ = result_within(zygote, HANG)
        os.kill(pid, signal.SIGSTOP)  # so that nobody but `drop` says that it is gone
        for k in range(4):
            queue.enqueue(bytes([k]) * 900, HANG)
            assert other.dequeue(HANG)[0] == k
        outcomes: list[str] = []
        thread = blocked_in(queue, outcomes, kind)
        writer.drop(rank)
        thread.join(HANG)
        assert outcomes == ["returned None"]
        assert other.dequeue(HANG)[0] == 4
        kill(pid)
        writer.readmit(rank)
        if kind == "shm":  # over ZeroMQ nothing is sent before it attaches
            for k in range(5, 9):
                queue.enqueue(bytes([k]) * 900, HANG)
                assert other.dequeue(HANG)[0] == k
        with pytest.raises(TimeoutError, match=rf"rank {rank} never attached"):
            queue.enqueue(bytes(900), SOON)
        with MessageQueue.create_from_handle(queue.export_handle(), rank) as late:
            first = 5 if kind == "shm" else 9
            assert [late.dequeue(HANG)[0] for _ in range(first, 9)] == list(range(first, 9))
            queue.enqueue(b"\x09" * 900, HANG)
            assert late.dequeue(HANG) == other.dequeue(HANG) == b"\x09" * 900


def blocked_in(queue: MessageQueue, outcomes: list[str], kind: str) -> threading.Thread:
    """A thread that waits in enqueue for a stopped reader."""
    if kind == "shm":
        return blocked(queue, b"\x04" * 900, outcomes)
    waits = threading.Event()

    def look() -> None:
        waits.set()

    def enqueue() -> None:
        assert queue._writer is not None
        from ray_shm import codec

        queue._writer.send(codec.encode(b"\x04" * 900), Deadline.after(HANG), look)
        outcomes.append("returned None")

    thread = threading.Thread(target=enqueue)
    thread.start()
    assert waits.wait(HANG)
    return thread


@shm_and_zmq
def test_readmit_waits_behind_a_sender(zygote: Peer, kind: str) -> None:
    """That waits for a reader which stays: no deadlock, and nothing in between is lost."""
    with queue_of_two(kind, **SMALL) as (queue, writer, other, rank):
        writer.drop(rank)
        for k in range(4):
            queue.enqueue(bytes([k]) * 900, HANG)
        outcomes: list[str] = []
        sender = blocked_in(queue, outcomes, kind)
        returned = threading.Event()

        def readmit() -> None:
            writer.readmit(rank)
            returned.set()

        readmitter = threading.Thread(target=readmit)
        readmitter.start()
        assert not returned.wait(SOON)
        assert [other.dequeue(HANG)[0] for _ in range(5)] == list(range(5))
        assert returned.wait(HANG)
        sender.join(HANG)
        readmitter.join(HANG)
        with MessageQueue.create_from_handle(queue.export_handle(), rank) as late:
            queue.enqueue("for both", HANG)
            assert late.dequeue(HANG) == other.dequeue(HANG) == "for both"


@every_kind
def test_the_new_process_is_awaited_and_watched(zygote: Peer, kind: str) -> None:
    with queue_of_two(kind) as (queue, writer, other, rank):
        pid, _ = start(zygote, behind, queue, rank)
        kill(pid)
        writer.drop(rank)
        writer.readmit(rank)
        with pytest.raises(TimeoutError, match=rf"readers \[{rank}\]"):
            queue.wait_until_ready(SOON)
        pid, said = start(zygote, behind, queue, rank)
        assert said == "ready"
        queue.enqueue("for both", HANG)
        kill(pid)
        with pytest.raises(PeerLostError, match=rf"rank {rank} \(pid {pid}\)") as lost:
            send_until_lost(queue, other)
        assert lost.value.ranks == [rank]


def send_until_lost(queue: MessageQueue, other: MessageQueue) -> None:
    while True:
        queue.enqueue("for none", HANG)
        other.dequeue(HANG)


def start(zygote: Peer, life: Any, queue: MessageQueue, rank: int) -> Any:
    zygote.start(fork_child, life, queue.export_handle(), rank)
    queue.wait_until_ready(HANG)
    return result_within(zygote, HANG)


def test_a_late_word_of_the_old_process_s_end_does_not_meet_the_new_one(zygote: Peer) -> None:
    with queue_of_two("shm") as (queue, writer, other, rank):
        pid, _ = start(zygote, behind, queue, rank)
        watch = writer._watch
        assert watch is not None
        told = watch._on_death(rank, watch._replaced[rank])
        kill(pid)
        writer.drop(rank)
        writer.readmit(rank)
        told()
        assert not watch.dead
        with MessageQueue.create_from_handle(queue.export_handle(), rank) as late:
            queue.enqueue(content(1, 400_000), HANG)
            held = late.dequeue(HANG)
            other.dequeue(HANG)
            told()
            assert writer._shm is not None
            assert set(writer._shm.holders()) == {rank}
            assert is_content(held, 1, 400_000)
            del held


# What is refused


@every_kind
def test_only_a_rank_that_was_dropped_is_readmitted(zygote: Peer, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with queue_of_two(kind) as (queue, writer, other, rank):
        pid, _ = start(zygote, behind, queue, rank)
        with pytest.raises(ValueError, match=rf"rank {rank} \(pid {pid}\) .*call drop\({rank}\)"):
            writer.readmit(rank)
        with pytest.raises(ValueError, match="no reader 7"):
            writer.readmit(7)
        if rank in writer._local_ranks:
            os.kill(pid, signal.SIGSTOP)
            writer.drop(rank)
            with monkeypatch.context() as patched:
                patched.setattr(reader_watch, "_ENDING", 0.0)
                with pytest.raises(ValueError, match=rf"\(pid {pid}\) .*its process lives"):
                    writer.readmit(rank)
        kill(pid)
        writer.drop(rank)
        writer.readmit(rank)
        with pytest.raises(ValueError, match=rf"call drop\({rank}\)"):
            writer.readmit(rank)
        with MessageQueue.create_from_handle(queue.export_handle(), rank) as late:
            queue.wait_until_ready(HANG)
            with pytest.raises(StartError, match=rf"\(pid {os.getpid()}\)|process {os.getpid()} reads"):
                attach_twice(queue, rank)
            queue.enqueue("for both", HANG)
            assert late.dequeue(HANG) == other.dequeue(HANG) == "for both"
        queue.close()
        with pytest.raises(QueueClosedError):
            writer.readmit(rank)


def attach_twice(queue: MessageQueue, rank: int) -> None:
    assert queue._writer is not None
    before = queue._writer.refused
    with MessageQueue.create_from_handle(queue.export_handle(), rank) as second:
        wait_for(lambda: queue._writer.refused == before + 2, "refused on both connections")  # type: ignore[union-attr]
        second.dequeue(HANG)


def test_not_inside_of_a_send() -> None:
    with queue_of_two("shm", **SMALL) as (queue, writer, _other, rank):
        writer.drop(rank)
        for _ in range(4):
            queue.enqueue(bytes(900), HANG)
        with pytest.raises(RuntimeError, match="nothing was readmitted"):
            writer.send([bytes(900)], Deadline.after(HANG), lambda: writer.readmit(rank))
        writer.readmit(rank)
        assert not writer.behind().get(rank)


# Many times


def test_twenty_rounds_leave_nothing_behind(zygotes: list[Peer]) -> None:
    """A local and a remote reader are killed with large messages in their hands, while a third one goes on."""
    with MessageQueue(3, 2) as queue:
        writer = queue._writer
        assert writer is not None
        handle = queue.export_handle()
        with MessageQueue.create_from_handle(handle, 0) as other:
            steady: dict[str, int] = {}
            for number in range(20):
                for rank in (1, 2):
                    zygotes[rank - 1].start(fork_child, holding, handle, rank)
                queue.wait_until_ready(HANG)
                send(queue, range(4))
                held = [result_within(one, HANG) for one in zygotes]
                assert [said for _, said in held] == [4, 4]
                for rank, (pid, _) in zip((1, 2), held, strict=True):
                    kill(pid)
                    writer.drop(rank)
                    writer.readmit(rank)
                assert [other.dequeue(HANG)[0] for _ in range(4)] == list(range(4))
                if number < 3:
                    steady = footprint(writer)
                wait_for(partial(is_within, steady, writer), "no more than after three rounds")
            assert set(writer._shm.holders()) <= {0}  # type: ignore[union-attr]


def is_within(steady: dict[str, int], writer: QueueWriter) -> bool:
    return all(count <= steady[what] for what, count in footprint(writer).items())


def footprint(writer: QueueWriter) -> dict[str, int]:
    shm, remote, watch = writer._shm, writer._zmq, writer._watch
    assert shm is not None
    assert remote is not None
    assert watch is not None
    remote.probe()
    shm.holders()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "arena": shm.arena_bytes,
        "leases": LEASES - len(shm._free_leases),
        "connections": len(remote._connections),
        "tables": len(remote._peers) + len(remote._claims) + len(remote._replaced) + len(watch._watched),
        "in flight": len(shm._counted) + len(shm._leased),
    }
