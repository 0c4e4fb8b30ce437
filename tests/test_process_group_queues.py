"""MessageQueue's constructors over torch process groups, on three spawned ranks with real gloo groups."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from rank_pool import WATCHDOG, Pool, Rank

from ray_shm.errors import StartError
from ray_shm.message_queue import MessageQueue
from ray_shm.process_group_queues import route_to

CHUNK, CHUNKS = 1 << 16, 4
_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = 0x4000 | 0x40000


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with contextlib.closing(Pool()) as made:
        made.run(open_groups)
        yield made
        made.run(close_groups)


# Checks: these run on every rank


def open_groups(me: Rank) -> None:
    """The same ranks three times: as a coordinator, as its ProcessGroup without WORLD, and as WORLD itself."""
    import torch.distributed as dist

    coordinator = me.group("queues")
    dist.init_process_group("gloo", store=me.store.prefix("world"), rank=me.rank, world_size=3)
    me.kept = {"coordinator": coordinator, "stateless": coordinator.cpu_group, "world": dist.group.WORLD}


def close_groups(me: Rank) -> None:
    import torch.distributed as dist

    coordinator = me.kept.pop("coordinator")
    me.kept.clear()
    dist.destroy_process_group()
    coordinator.destroy()


def one_writer(me: Rank, group: str, writer_rank: int, blocking: bool) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    with MessageQueue.create_from_process_group(
        me.kept[group], CHUNK, CHUNKS, writer_rank=writer_rank, blocking=blocking
    ) as queue:
        if not blocking:
            queue.wait_until_ready(WATCHDOG)
        got = queue.broadcast_object([writer_rank, bytes(300_000)] if me.rank == writer_rank else None)
        handle = queue.export_handle()
        return (got[0], len(got[1])), handle.local_reader_ranks, handle.remote_reader_ranks


def one_reader(me: Rank, group: str, reader_rank: int, blocking: bool) -> Any:
    with ThreadPoolExecutor(1) as pool:
        queue, handles = MessageQueue.create_from_process_group_single_reader(
            me.kept[group], CHUNK, CHUNKS, reader_rank=reader_rank, blocking=blocking
        )
        done = pool.submit(_greet, queue, me.rank)
        got = []
        for handle in handles:
            with MessageQueue.create_from_handle(handle, reader_rank) as reader:
                got.append(reader.dequeue(WATCHDOG))
        done.result(WATCHDOG)
        queue.close()
        return len(handles), got


def _greet(queue: MessageQueue, rank: int) -> None:
    queue.wait_until_ready(WATCHDOG)
    queue.enqueue(f"from rank {rank}", WATCHDOG)


def external(me: Rank, handle: Any) -> Any:
    with MessageQueue.create_from_process_group(
        me.kept["stateless"], CHUNK, CHUNKS, writer_rank=1, external_writer_handle=handle if me.rank == 1 else None
    ) as queue:
        return queue.dequeue(WATCHDOG)


def start_error(me: Rank, handle: Any) -> tuple[str, list[int]]:
    try:
        MessageQueue.create_from_process_group(
            me.kept["stateless"], CHUNK, CHUNKS, writer_rank=1, external_writer_handle=handle if me.rank == 1 else None
        )
    except StartError as exc:
        return str(exc), sorted(exc.failures)
    return "no error", []


def value_errors(me: Rank) -> int:
    wrong: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (MessageQueue.create_from_process_group, {"writer_rank": 3}),
        (MessageQueue.create_from_process_group, {"writer_rank": -1}),
        (MessageQueue.create_from_process_group_single_reader, {"reader_rank": 3}),
        (MessageQueue.create_from_process_group, {"max_chunks": 0}),
    ]
    count = 0
    for make, kwargs in wrong:
        arguments = {"max_chunk_bytes": CHUNK, "max_chunks": CHUNKS, **kwargs}
        try:
            make(me.kept["coordinator"], **arguments)
        except ValueError:
            count += 1
    return count


def in_another_mount_namespace(me: Rank, hidden: list[int], check: Callable[..., Any], *args: Any) -> Any:
    """Run the check in a thread that really cannot see the processes `hidden`, as if they were in other containers."""
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(_hide, hidden).result(WATCHDOG)
        except PermissionError:
            return "not permitted"
        return pool.submit(check, me, *args).result(WATCHDOG)


def _hide(pids: list[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def require(code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    require(libc.unshare(_CLONE_NEWNS))
    require(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None))
    for pid in pids:
        require(libc.mount(b"none", f"/proc/{pid}".encode(), b"tmpfs", ctypes.c_ulong(0), None))


def may_hide(me: Rank) -> bool:
    return in_another_mount_namespace(me, [], lambda _me: True) is True


def own_pid(_me: Rank) -> int:
    return os.getpid()


# One writer


@pytest.mark.parametrize("group", ["coordinator", "stateless", "world"])
@pytest.mark.parametrize("writer_rank", [0, 2])
def test_one_writer_reaches_all_others(pool: Pool, group: str, writer_rank: int) -> None:
    readers = tuple(rank for rank in range(3) if rank != writer_rank)
    results = pool.run(one_writer, group, writer_rank, group != "world")
    assert results == [((writer_rank, 300_000), readers, ())] * 3


def test_ranks_that_cannot_attach_read_through_zmq(pool: Pool) -> None:
    """Same addresses, same machine: only the outcome of attaching counts."""
    if not all(pool.run(may_hide)):
        pytest.skip("mount namespaces need privileges here")
    pids = pool.run(own_pid)
    pool.start(one_writer, "stateless", 0, True, ranks=(0, 2))
    pool.start(in_another_mount_namespace, [pids[0]], one_writer, "stateless", 0, True, ranks=(1,))
    assert [pool.result(rank) for rank in range(3)] == [((0, 300_000), (2,), (1,))] * 3


def test_an_external_queue_is_read_by_all(pool: Pool) -> None:
    with MessageQueue(3, 3) as queue:
        pool.start(external, queue.export_handle())
        queue.wait_until_ready(WATCHDOG)
        queue.enqueue("from outside")
        assert [pool.result(rank) for rank in range(3)] == ["from outside"] * 3


def test_a_rank_that_fails_is_named_on_all(pool: Pool) -> None:
    with MessageQueue(2, 2) as queue:
        for text, failed in pool.run(start_error, queue.export_handle()):
            assert failed == [2]
            assert "rank 2: the queue of pid" in text
    assert pool.run(one_writer, "stateless", 0, True) == [((0, 300_000), (1, 2), ())] * 3, "the group is usable"


def test_wrong_arguments_are_found_before_anything_is_sent(pool: Pool) -> None:
    assert pool.run(value_errors) == [4, 4, 4]


# One reader


@pytest.mark.parametrize("group", ["coordinator", "world"])
@pytest.mark.parametrize("reader_rank", [0, 1])
def test_one_reader_gets_a_handle_of_every_rank(pool: Pool, group: str, reader_rank: int) -> None:
    results = pool.run(one_reader, group, reader_rank, group == "world")
    everything = (3, ["from rank 0", "from rank 1", "from rank 2"])
    assert results == [everything if rank == reader_rank else (0, []) for rank in range(3)]


def test_a_reader_that_cannot_attach_reads_through_zmq(pool: Pool) -> None:
    if not all(pool.run(may_hide)):
        pytest.skip("mount namespaces need privileges here")
    pids = pool.run(own_pid)
    pool.start(one_reader, "stateless", 0, False, ranks=(1, 2))
    pool.start(in_another_mount_namespace, [pids[2]], one_reader, "stateless", 0, False, ranks=(0,))
    [at_reader, *_] = [pool.result(rank) for rank in range(3)]
    assert at_reader == (3, ["from rank 0", "from rank 1", "from rank 2"])


# Addresses


def test_the_address_on_the_way_to_a_host() -> None:
    assert route_to("127.0.0.1") == "127.0.0.1"
    assert route_to("no such host") == "127.0.0.1"
