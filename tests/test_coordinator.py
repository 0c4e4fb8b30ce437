"""Coordinator groups over real processes and sockets: operations against NumPy, bad arguments, start and end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from rank_pool import LOOPBACK, WATCHDOG, WORLD, Pool, Rank, free_port, growth, open_handles

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError, RemoteError, StartError
from ray_shm.store import GroupStore


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    assert pool.close() == [0, 0, 0]


# Tensors


SHAPES = [(576,), (2, 3), (4, 1, 5), (), (0,), (3, 0)]
REDUCTIONS = {"sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum}


def values(rank: int, shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng([rank, *shape]).integers(1, 9, shape).astype(dtype)


def check_tensors(me: Rank, name: str, ranks: list[list[int]]) -> None:
    import torch

    with me.group(name, ranks) as group:
        everyone, own = group.ranks, group.rank_in_group
        for shape in SHAPES:
            tensor = torch.from_numpy(values(me.rank, shape))
            parts = [values(r, shape) for r in everyone]
            for op, reduction in REDUCTIONS.items():
                expected = reduction.reduce(parts)
                np.testing.assert_array_equal(group.all_reduce(tensor, op).numpy(), expected)
            np.testing.assert_array_equal(tensor.numpy(), values(me.rank, shape))  # out of place
            for dim in range(-max(1, len(shape)), max(1, len(shape))):
                expected = np.concatenate([np.atleast_1d(p) for p in parts], axis=dim)
                np.testing.assert_array_equal(group.all_gather(tensor, dim).numpy(), expected)
            for src in range(group.world_size):
                copy = tensor.clone()
                assert group.broadcast(copy, src) is copy
                np.testing.assert_array_equal(copy.numpy(), parts[src])
        transposed = torch.from_numpy(values(me.rank, (5, 4))).t()
        parts = [values(r, (5, 4)).T for r in everyone]
        np.testing.assert_array_equal(group.all_reduce(transposed).numpy(), np.add.reduce(parts))
        np.testing.assert_array_equal(group.all_gather(transposed, 0).numpy(), np.concatenate(parts, 0))
        np.testing.assert_array_equal(group.broadcast(transposed, 0).numpy(), parts[0])
        if group.world_size > 1:
            ring = torch.from_numpy(values(me.rank, (7, 2))).t()
            for sender in range(group.world_size):  # default neighbours, one sender after the other
                if own == sender:
                    group.send(ring)
                if own == (sender + 1) % group.world_size:
                    got = group.recv(torch.Size((2, 7)), torch.float64)
                    np.testing.assert_array_equal(got.numpy(), values(group.prev_rank, (7, 2)).T)
        group.barrier()


@pytest.mark.parametrize("ranks", [[[0, 1, 2]], [[2, 0], [1]], [[0], [1, 2]]], ids=str)
def test_tensors_equal_numpy(pool: Pool, ranks: list[list[int]]) -> None:
    pool.run(check_tensors, f"tensors {ranks}", ranks)


def check_dtypes(me: Rank) -> None:
    import torch

    moved = [torch.bool, torch.int16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.uint16]
    with me.group("dtypes") as group:
        for dtype in moved:
            parts = [torch.from_numpy(values(r, (6,))).to(dtype) for r in range(3)]
            assert torch.equal(group.all_gather(parts[me.rank]).float(), torch.cat(parts).float()), dtype
            assert torch.equal(group.broadcast(parts[me.rank].clone(), 1).float(), parts[1].float()), dtype
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64):
            parts = [torch.from_numpy(values(r, (6,))).to(dtype) for r in range(3)]
            assert torch.equal(group.all_reduce(parts[me.rank]), torch.stack(parts).sum(0, dtype=dtype)), dtype
        with pytest.raises(TypeError, match="int16"):
            group.all_reduce(torch.ones(3, dtype=torch.int16))
        weight = torch.nn.Parameter(torch.ones(3))
        assert group.all_reduce(weight).tolist() == [3.0, 3.0, 3.0]  # usable after the error
        assert not group.all_reduce(weight).requires_grad


def test_dtypes(pool: Pool) -> None:
    pool.run(check_dtypes)


def check_overlapping(me: Rank) -> None:
    import torch

    layouts = {"world": WORLD, "tp": [[0, 1], [2]], "pp": [[2, 0], [1]], "ep": [[0], [1, 2]]}
    groups = {name: me.group(f"overlap {name}", ranks) for name, ranks in layouts.items()}
    for turn in range(20):
        for group in groups.values():
            sent = torch.tensor([float(10**me.rank + turn)])
            assert group.all_reduce(sent).item() == sum(10**r + turn for r in group.ranks)
            assert group.broadcast_object((group.group_name, turn, me.rank), group.world_size - 1) == (
                group.group_name,
                turn,
                group.last_rank,
            )
    groups["tp"].destroy()
    assert groups["world"].all_reduce(torch.ones(1)).item() == 3.0  # the others live on
    for group in groups.values():
        group.destroy()


def test_overlapping_groups_share_one_store(pool: Pool) -> None:
    pool.run(check_overlapping)


def check_torch_takes_the_group(me: Rank) -> bool:
    import torch
    import torch.distributed as dist

    with me.group("torch") as group:
        for torch_group in (group.cpu_group, group.device_group):
            tensor = torch.ones(2)
            dist.all_reduce(tensor, group=torch_group)
            assert tensor.tolist() == [3.0, 3.0]
        assert (group.cpu_group.rank(), group.cpu_group.size()) == (me.rank, 3)
        assert group.device == torch.device("cpu")
        assert group.tcp_store_group is me.store
    return dist.is_initialized()


def test_torch_takes_the_group_and_has_no_world(pool: Pool) -> None:
    assert pool.run(check_torch_takes_the_group) == [False, False, False]


# Objects


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not today")


class Unloadable:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("cannot be loaded")


def check_objects(me: Rank) -> None:
    with me.group("objects") as group:
        for src in range(3):
            big = {"rank": src, "array": np.arange(100_000) + src}
            got = group.broadcast_object(big if me.rank == src else None, src)
            assert got["rank"] == src
            np.testing.assert_array_equal(got["array"], big["array"])
            assert group.broadcast_object_list([me.rank, None, "x" * me.rank], src) == [src, None, "x" * src]
        with pytest.raises(TypeError if me.rank == 1 else RemoteError, match="not today"):
            group.broadcast_object(Unpicklable(), 1)
        if me.rank == 0:
            group.broadcast_object(Unloadable())
        else:
            with pytest.raises(LookupError, match="cannot be loaded"):
                group.broadcast_object()
        places = [None] * (2 + me.rank)
        if me.rank == 0:
            group.broadcast_object_list(places)
        else:
            with pytest.raises(ValueError, match=f"2 objects, this list has {2 + me.rank} places"):
                group.broadcast_object_list(places)
        assert group.broadcast_object("still in step" if me.rank == 0 else None) == "still in step"


def test_objects(pool: Pool) -> None:
    pool.run(check_objects)


def check_senders(me: Rank) -> None:
    import torch

    with me.group("senders") as group:
        if me.rank == 0:
            group.barrier()
            for turn in range(5):  # the later sender first
                assert group.recv_object(2) == ("from", 2, turn)
                assert group.recv(torch.Size((3,)), torch.int64, src=2).tolist() == [2, turn, 0]
                assert group.recv_object(1) == ("from", 1, turn)
                assert group.recv(torch.Size((3,)), torch.int64, src=1).tolist() == [1, turn, 0]
            with pytest.raises(RemoteError, match=r"rank 1 could not pickle .*not today"):
                group.recv_object(1)
        else:
            group.barrier()
            for turn in range(5):
                group.send_object(("from", me.rank, turn), 0)
                group.send(torch.tensor([me.rank, turn, 0]), 0)
            if me.rank == 1:
                with pytest.raises(TypeError, match="not today"):
                    group.send_object(Unpicklable(), 0)
        group.barrier()


def test_two_senders_to_one_receiver_do_not_mix(pool: Pool) -> None:
    pool.run(check_senders)


# Arguments


def check_bad_arguments(me: Rank) -> None:
    import torch

    with me.group("arguments") as group:
        tensor = torch.ones(2, 3)
        outside: list[Callable[[int], Any]] = [
            lambda r: group.broadcast(tensor, r),
            lambda r: group.broadcast_object(1, r),
            lambda r: group.broadcast_object_list([1], r),
            lambda r: group.send(tensor, r),
            lambda r: group.recv(tensor.shape, tensor.dtype, r),
            lambda r: group.send_object(1, r),
            lambda r: group.recv_object(r),
        ]
        for operation in outside:
            for rank in (3, -1):
                with pytest.raises(ValueError, match="outside the group"):
                    operation(rank)
        for operation in outside[3:]:
            with pytest.raises(ValueError, match="this rank itself"):
                operation(me.rank)
        with pytest.raises(ValueError, match="op='mean' is none of sum, product, min, max"):
            group.all_reduce(tensor, "mean")
        with pytest.raises(ValueError, match="dim=2"):
            group.all_gather(tensor, 2)
        with pytest.raises(ValueError, match="CPU tensors; the tensor is on meta"):
            group.all_reduce(tensor.to("meta"))
        assert group.all_reduce(tensor).sum().item() == 18.0  # usable


def test_bad_arguments_leave_the_group_usable(pool: Pool) -> None:
    pool.run(check_bad_arguments)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"global_rank": 7}, "rank 7 is in none"),
        ({"group_ranks": [[0, 1], [1, 2]]}, r"ranks \[1\] are listed more than once"),
        ({"group_ranks": [[0, -1]]}, "start at 0"),
        ({}, "pass coord_store, or group_ports"),
        ({"group_ports": [[29500]], "coord_store": object()}, "alternatives"),
        ({"group_ports": []}, "has to end with the port"),
        ({"group_ports": [[0]]}, "1 to 65535"),
        ({"torch_distributed_backend": "mpi"}, "'mpi' is none of auto, gloo, nccl"),
        ({"timeout": 0}, "more than 0"),
    ],
)
def test_contradicting_arguments(kwargs: dict[str, Any], text: str) -> None:
    defaults = {
        "group_ranks": [[0, 1]],
        "local_rank": 0,
        "torch_distributed_backend": "gloo",
        "use_device_communicator": False,
    }
    with pytest.raises(ValueError, match=text):
        StatelessGroupCoordinator(**{**defaults, **kwargs})


def check_standing(me: Rank) -> list[Any]:
    group = me.group("standing", [[2, 0], [1]], epoch=3, lazy=True)
    return [
        [group.rank, group.rank_in_group, group.world_size, group.size(), group.ranks, group.local_rank],
        [group.first_rank, group.last_rank, group.next_rank, group.prev_rank],
        [group.is_first_rank, group.is_last_rank],
        repr(group),
    ]


def test_standing(pool: Pool) -> None:
    zero, one, two = pool.run(check_standing)
    text = "StatelessGroupCoordinator('standing', ranks=%s, rank=%d, backend='gloo', epoch=3)"
    assert zero == [[0, 1, 2, 2, [2, 0], 0], [2, 0, 2, 2], [False, True], text % ([2, 0], 0)]
    assert one == [[1, 0, 1, 1, [1], 1], [1, 1, 1, 1], [True, True], text % ([1], 1)]
    assert two == [[2, 0, 2, 2, [2, 0], 2], [2, 0, 0, 0], [True, False], text % ([2, 0], 2)]


# Start and end


UNUSED = """
import os, sys, threading
from ray_shm.coordinator import StatelessGroupCoordinator
def forbidden(): raise SystemExit("the store was asked for")
before = len(os.listdir("/proc/self/fd")), threading.active_count()
group = StatelessGroupCoordinator([[0, 1]], 0, "auto", False, group_name="world", coord_store=forbidden, lazy=True)
repr(group), group.ranks, group.next_rank, group.size()
group.destroy()
after = len(os.listdir("/proc/self/fd")), threading.active_count()
print("torch" in sys.modules, "ray" in sys.modules, before == after)
"""


def test_lazy_group_that_is_not_used_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", UNUSED], capture_output=True, text=True, timeout=WATCHDOG, check=False)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def check_lazy(me: Rank) -> None:
    import torch

    calls = []

    def store() -> GroupStore:
        calls.append(me.rank)
        return me.store

    group = me.group("lazy", coord_store=store, lazy=True)
    assert calls == []
    assert group.all_reduce(torch.ones(1)).item() == 3.0
    group.barrier()
    assert calls == [me.rank]
    group.destroy()


def test_lazy_group_connects_at_the_first_operation(pool: Pool) -> None:
    pool.run(check_lazy)


def check_cycles(me: Rank, ports: list[list[int]]) -> tuple[int, int]:
    import torch

    def cycle(epoch: int) -> None:
        with me.group("cycles", epoch=epoch) as group:
            assert group.all_reduce(torch.ones(1)).item() == 3.0
            group.barrier()
        own = {"coord_store": None, "group_ports": ports, "host": LOOPBACK, "epoch": epoch}
        with me.group("cycles of own store", **own) as group:
            assert group.all_reduce(torch.ones(1)).item() == 3.0
            group.barrier()

    cycle(0)
    before = open_handles()
    for epoch in range(1, 21):
        cycle(epoch)
    return growth(before)


def test_cycles_leave_descriptors_and_threads_flat(pool: Pool) -> None:
    assert pool.run(check_cycles, [[1, 2, free_port()]]) == [(0, 0)] * 3


def check_destroyed(me: Rank) -> None:
    import torch

    group = me.group("destroyed")
    group.barrier()
    group.destroy()
    group.destroy()
    for operation in (lambda: group.all_reduce(torch.ones(1)), group.barrier, lambda: group.cpu_group):
        with pytest.raises(GroupClosedError, match=r"'destroyed/0/0'.*next epoch"):
            operation()
    with pytest.raises(StartError, match=r"formed before.*next epoch"):
        me.group("destroyed")
    with me.group("destroyed", epoch=1) as again:
        assert again.all_reduce(torch.ones(1)).item() == 3.0


def test_destroyed_group_is_formed_again_under_the_next_epoch(pool: Pool) -> None:
    pool.run(check_destroyed)


def check_group_of_one(me: Rank) -> None:
    import torch
    import torch.distributed as dist

    with me.group("alone", [[0], [1], [2]], coord_store=None) as group:
        tensor = torch.ones(2)
        assert group.all_reduce(tensor) is tensor
        assert group.broadcast_object("x") == "x"
        group.barrier()
        dist.all_reduce(tensor, group=group.device_group)
        assert tensor.tolist() == [1.0, 1.0]
        with pytest.raises(ValueError, match="this rank itself"):
            group.send(tensor)


def test_group_of_one_needs_no_store(pool: Pool) -> None:
    pool.run(check_group_of_one)
