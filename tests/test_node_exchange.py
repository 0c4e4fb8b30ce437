"""Small collectives through shared memory, over real processes: results against NumPy, stress, ends of every kind."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_pool import SETTLE, WATCHDOG, Pool, Rank, total
from test_process_group_queues import in_another_mount_namespace, may_hide, own_pid

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import PeerLostError, RpcCancelledError

REDUCTIONS = {"sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum}
LENGTHS = (1, 7, 576, 20_011, 65_536)  # the last two are reduced by slices; 20,011 is no multiple of a cache line


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """The last two tests kill ranks 2 and 1."""
    with contextlib.closing(Pool()) as pool:
        pool.run(one_thread)
        yield pool


def one_thread(_me: Rank) -> None:
    """As Ray has it: torch's threads would fight for the cores."""
    import torch

    torch.set_num_threads(1)


def node_of(group: StatelessGroupCoordinator) -> Any:
    node = group._link.connect().node
    assert node is not None
    return node


# Results


def check_reductions(me: Rank, ranks: list[list[int]]) -> str:
    """Digest of all results."""
    import torch

    digest = hashlib.sha256()
    with me.group(f"reductions {ranks}", ranks) as group:
        node = node_of(group)
        for dtype in ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64"):
            for length in LENGTHS:
                parts = [_values(rank, length, dtype) for rank in group.ranks]
                for op, reduction in REDUCTIONS.items():
                    assert node.takes("all_reduce", parts[0].nbytes, parts[0].dtype)
                    got = group.all_reduce(parts[group.rank_in_group], op)
                    expected = _reduced(parts, reduction)
                    assert torch.equal(got, expected), (dtype, length, op)
                    digest.update(bytes(got.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _values(rank: int, length: int, dtype: str) -> Any:
    """Values whose sums and products are not exact, but for integers, which wrap around."""
    import torch

    numbers = torch.from_numpy(np.random.default_rng([rank, length]).normal(0, 50, length))
    return numbers.to(getattr(torch, dtype)) if "float" in dtype else numbers.to(torch.int64).to(getattr(torch, dtype))


def _reduced(parts: list[Any], reduction: np.ufunc) -> Any:
    """In the order of ranks; halves in float32, which is exact for min and max as well."""
    import torch

    dtype = parts[0].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    arrays = [(part.float() if half else part).numpy() for part in parts]
    with np.errstate(over="ignore"):
        total = reduction(arrays[0], arrays[1])
        for array in arrays[2:]:
            total = reduction(total, array)
    return torch.from_numpy(total).to(dtype)


@pytest.mark.parametrize("ranks", [[[0, 1, 2]], [[2, 0], [1]]], ids=str)
def test_reductions_equal_numpy_and_each_other_bit_for_bit(pool: Pool, ranks: list[list[int]]) -> None:
    members = tuple(ranks[0])
    assert len(set(pool.run(check_reductions, ranks, ranks=members))) == 1


def check_moves(me: Rank) -> None:
    import torch

    moved = [torch.bool, torch.int16, torch.bfloat16, torch.complex128, torch.float8_e4m3fn, torch.uint16]
    with me.group("moves") as group:
        node = node_of(group)
        for dtype in moved:
            for length in (1, 5, 4096, 70_001):
                parts = [torch.from_numpy(np.arange(length) % 100 + r).to(dtype) for r in range(3)]
                own = parts[me.rank]
                assert node.takes("all_gather", own.nbytes, dtype) == node.takes("broadcast", own.nbytes, dtype)
                gathered = group.all_gather(own).view(torch.uint8)
                assert torch.equal(gathered, torch.cat([part.view(torch.uint8) for part in parts])), dtype
                for src in range(3):
                    got = group.broadcast(own.clone(), src)
                    assert torch.equal(got.view(torch.uint8), parts[src].view(torch.uint8)), dtype
        with torch.inference_mode():
            guarded = torch.full((4,), float(me.rank))
        assert group.broadcast(guarded, 1).tolist() == [1.0] * 4
        assert group.all_reduce(guarded).tolist() == [3.0] * 4
        for mode in (torch.inference_mode(), torch.no_grad()):  # by slices, through views that the first call leaves
            with mode:
                assert group.all_reduce(torch.ones(70_001)).unique().tolist() == [3.0]
        for dtype, total in ((torch.bool, True), (torch.complex64, 3.0 + 0j)):  # gloo's, on all members alike
            assert not node.takes("all_reduce", 4, dtype)
            assert group.all_reduce(torch.ones(2, dtype=dtype)).tolist() == [total] * 2


def test_every_dtype_moves(pool: Pool) -> None:
    pool.run(check_moves)


def check_nan(me: Rank) -> None:
    import torch

    with me.group("nan") as group:
        own = torch.tensor([float("nan") if me.rank == 1 else 1.0, float("inf"), -0.0])
        for op in ("sum", "min", "max", "product"):
            got = group.all_reduce(own, op)
            assert got[0].isnan()
            assert got[1] == float("inf")


def test_nan_wins(pool: Pool) -> None:
    pool.run(check_nan)


# Nobody overwrites what another has still to read


def check_stress(me: Rank, seed: int, rounds: int) -> None:
    import torch

    order, pause = random.Random(seed), random.Random(seed + 1 + me.rank)
    with me.group(f"stress {seed}") as group:
        _read_slowly(node_of(group), pause)
        for turn in range(rounds):
            operation = order.choice(["all_reduce", "all_gather", "broadcast", "broadcast", "broadcast", "barrier"])
            length, src = order.choice([1, 9, 576, 9_000, 30_000]), order.randrange(3)
            parts = [torch.arange(length) + 1_000_003 * turn + 7 * rank for rank in range(3)]
            if pause.random() < 0.02:
                time.sleep(pause.random() / 500)
            if operation == "all_reduce":
                assert torch.equal(group.all_reduce(parts[me.rank]), sum(parts)), turn
            elif operation == "all_gather":
                assert torch.equal(group.all_gather(parts[me.rank]), torch.cat(parts)), turn
            elif operation == "broadcast":
                assert torch.equal(group.broadcast(parts[me.rank], src), parts[src]), turn
            else:
                group.barrier()
        group.barrier()


def _read_slowly(node: Any, pause: random.Random) -> None:
    """Now and then this rank stops before it reads what the others wrote, for longer than they need for many steps."""
    memory = node._memory
    for name in ("take", "fold"):
        setattr(memory, name, _paused(getattr(memory, name), pause))


def _paused(read: Callable[..., None], pause: random.Random) -> Callable[..., None]:
    def read_late(*args: Any) -> None:
        if pause.random() < 0.02:
            time.sleep(pause.random() / 500)
        read(*args)

    return read_late


def test_a_slow_reader_is_never_overwritten(pool: Pool) -> None:
    pool.run(check_stress, 1, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
def test_a_slow_reader_is_never_overwritten_for_long(pool: Pool, seed: int) -> None:
    pool.run(check_stress, seed, 8000)


# Ends


def lost(operation: Callable[[], Any]) -> PeerLostError:
    with pytest.raises(PeerLostError) as caught:
        operation()
    return caught.value


def check_late(me: Rank, length: int) -> None:
    group, store = me.group(f"late {length}", timeout=0.3), me.store.prefix(f"late {length}")
    node = node_of(group)
    total(group, length)
    if me.rank == 2:
        store.wait(["0", "1"])
        lost(group.barrier)
        return
    error = lost(lambda: total(group, length))
    assert node.late() == [2]  # also afterwards
    if length == 3:  # else it is gloo that waits
        assert error.__cause__.late == [2]
        assert "global rank 2 (pid" in str(error)
        assert "had not arrived" in str(error)
    store.set(str(me.rank), "")


@pytest.mark.parametrize("length", [3, 1_000_000])
def test_the_late_rank_is_named(pool: Pool, length: int) -> None:
    pool.run(check_late, length)


def check_released(me: Rank) -> str:
    group = me.group("released")
    if me.rank == 2:
        return ""
    if me.rank == 1:
        return str(lost(lambda: total(group)))
    node = node_of(group)
    inside = threading.Event()
    sleep = node._board._sleep

    def tell(*args: Any) -> Any:
        inside.set()
        return sleep(*args)

    node._board._sleep = tell
    thread = threading.Thread(target=lambda: inside.wait(WATCHDOG) and group.release("rank 2 raised"))
    thread.start()
    text = str(lost(lambda: total(group)))
    thread.join()
    return text


def test_a_release_wakes_the_waiter_and_its_peers(pool: Pool) -> None:
    own, other, _ = pool.run(check_released)
    assert "rank 2 raised" in own
    assert "global rank 0 (pid" in other
    assert "was released" in other


def check_left(me: Rank) -> str:
    group = me.group("left")
    assert total(group) == 111.0
    if me.rank == 2:
        group.destroy()
        return ""
    return str(lost(group.barrier))


def test_a_rank_that_left_is_named(pool: Pool) -> None:
    pid = pool.run(own_pid)[2]
    for text in pool.run(check_left)[:2]:
        assert f"global rank 2 (pid {pid}) has left the group" in text


def check_first_to_finish(me: Rank) -> None:
    """A member that has got its result may leave before the others look at theirs."""
    for turn in range(10):
        group = me.group(f"finish {turn}")
        _read_slowly(node_of(group), random.Random(turn + me.rank))
        import torch

        assert total(group, 20_000) == 111.0
        assert group.broadcast(torch.full((5,), me.rank), turn % 3).tolist() == [turn % 3] * 5
        group.destroy()


def test_who_finished_first_may_leave_first(pool: Pool) -> None:
    pool.run(check_first_to_finish)


MISMATCHES: dict[str, Callable[[StatelessGroupCoordinator, Any], Any]] = {
    "all_reduce (sum) of 28 bytes of torch.float32": lambda group, torch: group.all_reduce(torch.ones(7)),
    "all_reduce (max) of 24 bytes of torch.float32": lambda group, torch: group.all_reduce(torch.ones(6), "max"),
    "all_reduce (sum) of 24 bytes of torch.int32": lambda group, torch: group.all_reduce(torch.ones(6).int()),
    "all_gather of 24 bytes of torch.float32": lambda group, torch: group.all_gather(torch.ones(6)),
    "broadcast of 24 bytes of torch.float32 from rank 1": lambda group, torch: group.broadcast(torch.ones(6), 1),
    "barrier": lambda group, torch: group.barrier(),
}


def check_mismatch(me: Rank, called: str) -> str:
    import torch

    group = me.group(f"mismatch {called}")

    def differ() -> None:
        for _ in range(2):  # a broadcast's source learns of it with its next operation
            MISMATCHES[called](group, torch)

    return str(lost(differ if me.rank == 1 else lambda: group.all_reduce(torch.ones(6))))


@pytest.mark.parametrize("called", MISMATCHES)
def test_members_that_call_something_else_are_named(pool: Pool, called: str) -> None:
    texts = pool.run(check_mismatch, called)
    assert any(f"called {called}" in text for text in texts), texts
    for text in texts:
        assert "called" in text or "different operations" in text, text


class Interruption:
    """Has a signal's handler raise `error` in the main thread, once that waits in the exchange."""

    def __init__(self, group: StatelessGroupCoordinator, error: BaseException, after: Callable[[], Any]) -> None:
        self._board, self._error, self._after = node_of(group)._board, error, after
        self._waits, self._handled = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self._sleep = self._board._sleep
        self._board._sleep = self._tell
        self._previous = signal.signal(signal.SIGURG, self._raise)
        self._thread = threading.Thread(target=self._signal, args=(threading.get_ident(),))
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(WATCHDOG)
        signal.signal(signal.SIGURG, self._previous)
        del self._board._sleep, self._sleep

    def _tell(self, *args: Any) -> Any:
        self._waits.set()
        return self._sleep(*args)

    def _signal(self, main: int) -> None:
        self._waits.wait(WATCHDOG)
        while not self._handled.is_set():
            signal.pthread_kill(main, signal.SIGURG)
            self._handled.wait(0.05)
        self._after()

    def _raise(self, *_: object) -> None:
        if not self._handled.is_set():
            self._handled.set()
            raise self._error


def check_cancelled(me: Rank) -> None:
    group, store = me.group("cancelled"), me.store.prefix("cancelled")
    if me.rank == 0:
        with pytest.raises(RpcCancelledError), Interruption(group, RpcCancelledError(), lambda: store.set("go", "")):
            total(group)
    else:
        store.get("go")
        assert total(group) == 111.0
    assert total(group) == 111.0
    group.destroy()


def test_a_cancelled_rank_finishes_its_operation_first(pool: Pool) -> None:
    """As in C code, so all members have made the same steps; if others do not come, the driver releases it."""
    pool.run(check_cancelled)


def check_interrupted(me: Rank) -> str:
    group = me.group("interrupted")
    if me.rank == 0:
        with pytest.raises(KeyboardInterrupt), Interruption(group, KeyboardInterrupt(), lambda: None):
            total(group)
        return str(lost(group.barrier))
    return "" if me.rank == 2 else str(lost(lambda: total(group)))


def test_an_interrupted_rank_ends_the_group(pool: Pool) -> None:
    for text in pool.run(check_interrupted)[:2]:
        assert "was interrupted in an operation" in text


# Who shares memory


def check_no_exchange(me: Rank, name: str) -> bool:
    import torch

    with me.group(name) as group:
        assert total(group) == 111.0
        assert group.all_gather(torch.tensor([me.rank])).tolist() == [0, 1, 2]
        assert group.broadcast(torch.tensor([me.rank]), 2).tolist() == [2]
        group.barrier()
        return group._link.connect().node is None


@pytest.mark.parametrize("blind", [1, 2])
def test_where_one_cannot_attach_all_use_gloo(pool: Pool, blind: int) -> None:
    if not all(pool.run(may_hide)):
        pytest.skip("mount namespaces need privileges here")
    hidden = [pool.run(own_pid)[0]]
    name = f"rank {blind} cannot attach"
    pool.start(check_no_exchange, name, ranks=tuple(rank for rank in range(3) if rank != blind))
    pool.start(in_another_mount_namespace, hidden, check_no_exchange, name, ranks=(blind,))
    assert [pool.result(rank) for rank in range(3)] == [True] * 3


# What it costs


def check_cycles(me: Rank) -> None:
    for turn in range(5):
        cycle(me, turn)
    before = held()
    for turn in range(5, 105):
        cycle(me, turn)
    deadline = time.monotonic() + SETTLE  # the thread that watched the processes ends by itself
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (held(), before)
        time.sleep(0.01)


def cycle(me: Rank, turn: int) -> None:
    import torch

    from ray_shm.deadline import Deadline
    from ray_shm.membership import Membership
    from ray_shm.node_exchange import NodeExchange
    from ray_shm.release import Release
    from ray_shm.rendezvous import MeetingStore, Rendezvous

    release = Release()
    store = MeetingStore(me.store.prefix(f"cycle {turn}"), release, WATCHDOG)
    members = Membership.find([[0, 1, 2]], me.rank)
    node = NodeExchange.form(Rendezvous(store, "cycles", members, "127.0.0.1", WATCHDOG, release))
    assert node is not None
    deadline = Deadline.after(WATCHDOG)
    for length in (3, 100_000):
        tensor = torch.full((length,), float(me.rank))
        node.all_reduce(tensor, "sum", deadline)
        assert tensor.sum() == 3 * length
    node.barrier(deadline)
    if turn % 2:
        node.close()
    node.close()  # idempotent
    with pytest.raises(RuntimeError, match="has left the group"):
        node.barrier(deadline)


def held() -> tuple[int, int, int]:
    """Descriptors, mappings of ours, bytes of shared memory resident."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("/memfd:ray_shm")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return len(os.listdir("/proc/self/fd")), maps, int(status["RssShmem"].split()[0])


def test_a_hundred_cycles_leave_nothing(pool: Pool) -> None:
    pool.run(check_cycles)


# Deaths. These come last: the pool loses two ranks.


def check_a_death_inside(me: Rank) -> str:
    group = me.kept["mortal"] = me.group("a death inside")
    if me.rank == 2:
        memory = node_of(group)._memory
        memory.fold = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # it has arrived, and dies before it leaves
        assert total(group) == 111.0
    assert total(group) == 111.0  # all had arrived
    return str(lost(lambda: total(group)))


def test_a_rank_that_dies_inside_is_named(pool: Pool) -> None:
    pid = pool.run(own_pid)[2]
    pool.start(check_a_death_inside)
    for rank in (0, 1):
        assert f"global rank 2 (pid {pid}) is gone" in pool.result(rank)
    pool.processes[2].join(WATCHDOG)


def check_a_death_between(me: Rank, victim: int) -> str:
    group = me.group("a death between", [[0, 1], [2]])
    assert total(group) == 11.0
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(_ended(victim))
    return str(lost(group.barrier))


def _ended(pid: int) -> int:
    """A pidfd of a process, once that has ended."""
    import select

    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(1000 * WATCHDOG)
    return pidfd


def test_a_rank_that_dies_between_operations_is_named(pool: Pool) -> None:
    pid = pool.run(own_pid, ranks=(0, 1))[1]
    pool.start(check_a_death_between, pid, ranks=(0, 1))
    assert f"global rank 1 (pid {pid}) is gone" in pool.result(0)
