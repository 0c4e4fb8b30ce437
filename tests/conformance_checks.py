"""What every coordinator group has to do, against NumPy: checks that all members of a group run at the same time.

`ALL` holds the checks of one group, by name. They know the group only, whatever constructed it and wherever its members
are: each works out from the ranks what the others pass in, and so what it has to get.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ray_shm.coordinator import StatelessGroupCoordinator

Group = StatelessGroupCoordinator
SHAPES = [(6,), (2, 3), (4, 1, 5), (), (0,), (3, 0)]
REDUCTIONS: dict[str, Any] = {"sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum}
REDUCED = {  # by gloo, and what NumPy has for it; the values are small whole numbers
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
NOT_REDUCED = [torch.int16, torch.uint16, torch.float8_e4m3fn]
MOVED = [*REDUCED, *NOT_REDUCED, torch.complex64, torch.float8_e5m2, torch.uint64]
ALL: dict[str, Callable[[Group], None]] = {}


def check(function: Callable[[Group], None]) -> Callable[[Group], None]:
    ALL[function.__name__] = function
    return function


# What ranks pass in, and in which memory


def values(rank: int, shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng([rank, *shape]).integers(0, 5, shape).astype(dtype)


def layouts(array: np.ndarray) -> Iterator[torch.Tensor]:
    """Tensors of these values: contiguous, with gaps, transposed, and with a gradient."""
    plain = torch.from_numpy(array.copy())
    yield plain
    gaps = torch.zeros((*array.shape, 2), dtype=plain.dtype)
    gaps[..., 0] = plain
    yield gaps[..., 0]
    if array.ndim > 1:
        yield plain.transpose(0, -1).contiguous().transpose(0, -1)
    yield plain.clone().requires_grad_()


def same(got: torch.Tensor | None, expected: np.ndarray, dtype: torch.dtype | None = None) -> None:
    assert got is not None
    assert not got.requires_grad
    assert got.dtype == (dtype or torch.from_numpy(np.empty(0, expected.dtype)).dtype)
    shown = got.float() if dtype is not None and got.dtype not in (torch.bool, torch.complex64) else got
    np.testing.assert_array_equal(shown.resolve_conj().numpy(), expected)
    assert got.shape == expected.shape


def dims(shape: tuple[int, ...]) -> range:
    return range(-max(1, len(shape)), max(1, len(shape)))


# Tensors, all members


@check
def all_reduce(group: Group) -> None:
    for shape in SHAPES:
        parts = [values(r, shape) for r in group.ranks]
        for op, reduction in REDUCTIONS.items():
            for tensor in layouts(values(group.rank, shape)):
                same(group.all_reduce(tensor, op).detach(), reduction.reduce(parts))
                np.testing.assert_array_equal(tensor.detach().numpy(), values(group.rank, shape))  # out of place
    same(group.all_reduce(tensor=torch.ones(2)), np.full(2, group.world_size, "float32"))  # its other name


@check
def all_reduce_of_every_dtype(group: Group) -> None:
    for dtype, name in REDUCED.items():
        parts = [values(r, (7,), name) for r in group.ranks]
        own = torch.from_numpy(values(group.rank, (7,), name)).to(dtype)
        for op, reduction in REDUCTIONS.items():
            expected = reduction.reduce(parts)
            same(group.all_reduce(own, op), expected.astype(name), dtype)
    complexes = [values(r, (7,)) * (1 + 2j) for r in group.ranks]
    same(group.all_reduce(torch.from_numpy(complexes[group.rank_in_group]).conj()), np.add.reduce(complexes).conj())
    for dtype in NOT_REDUCED:
        for refused in (group.all_reduce, group.reduce_scatter):
            with pytest.raises(TypeError, match=str(dtype)):
                refused(torch.zeros(group.world_size).to(dtype))
    with pytest.raises(TypeError, match=r"complex128.*'max'"):
        group.all_reduce(torch.zeros(3, dtype=torch.complex128), "max")


@check
def all_reduce_gives_all_the_same_bits(group: Group) -> None:
    """Of any size: small and large ones take different ways."""
    for size in (1, 1000, 9000, 300_000):
        noise = [np.random.default_rng([r, size]).standard_normal(size).astype("float32") for r in group.ranks]
        got = group.all_reduce(torch.from_numpy(noise[group.rank_in_group]))
        np.testing.assert_allclose(got.numpy(), np.add.reduce(noise), rtol=1e-4, atol=1e-5)
        everyones = group.all_gather(got.view(1, -1), 0).view(torch.int32)
        assert torch.equal(everyones, everyones[:1].expand_as(everyones))


@check
def all_gather(group: Group) -> None:
    for shape in SHAPES:
        parts = [np.atleast_1d(values(r, shape)) for r in group.ranks]
        for dim in dims(shape):
            for tensor in layouts(values(group.rank, shape)):
                same(group.all_gather(tensor, dim).detach(), np.concatenate(parts, dim))
    same(group.all_gather(torch.full((2, 1), group.rank)), np.array([group.ranks] * 2))  # the last dimension


@check
def every_dtype_is_moved(group: Group) -> None:
    for dtype in MOVED:
        name = "complex64" if dtype is torch.complex64 else REDUCED.get(dtype, "float32")
        parts = [values(r, (3, 2), name) for r in group.ranks]
        own = torch.from_numpy(parts[group.rank_in_group]).to(dtype)
        same(group.all_gather(own, 0), np.concatenate(parts, 0), dtype)
        same(group.all_gatherv(own, 1), np.concatenate(parts, 1), dtype)
        same(group.broadcast(own.clone(), group.world_size - 1), parts[-1], dtype)
        gathered = group.gather(own, 0, 0)
        if group.is_first_rank:
            same(gathered, np.concatenate(parts, 0), dtype)


@check
def gather(group: Group) -> None:
    for shape in SHAPES:
        parts = [np.atleast_1d(values(r, shape)) for r in group.ranks]
        for dst in range(group.world_size):
            for dim in dims(shape):
                for tensor in layouts(values(group.rank, shape)):
                    got = group.gather(tensor, dst, dim)
                    assert (got is not None) == (dst == group.rank_in_group)
                    if got is not None:
                        same(got.detach(), np.concatenate(parts, dim))
    to_first = group.gather(torch.full((2, 1), group.rank))
    if group.is_first_rank:
        same(to_first, np.array([group.ranks] * 2))


@check
def all_gatherv(group: Group) -> None:
    for sizes in ([r + 1 for r in range(group.world_size)], [3 * (r % 2) for r in range(group.world_size)]):
        for dim in (0, 1, -1):
            shapes = [(2, 4, size) if dim == -1 else (size, 4) if dim == 0 else (2, size) for size in sizes]
            parts = [values(r, shape) for r, shape in zip(group.ranks, shapes, strict=True)]
            expected = np.concatenate(parts, dim)
            for tensor in layouts(parts[group.rank_in_group]):
                same(group.all_gatherv(tensor, dim, sizes).detach(), expected)
                same(group.all_gatherv(tensor, dim).detach(), expected)
    own = sizes[group.rank_in_group]
    first, second = group.all_gatherv([torch.full((own,), float(group.rank)), torch.full((own, 2), group.rank)])
    same(first, np.repeat(np.array(group.ranks, "float32"), sizes))
    same(second, np.repeat(np.array([[r, r] for r in group.ranks]), sizes, 0))
    different = [torch.zeros(group.rank_in_group), torch.full((2,), group.rank)]  # sizes of their own
    assert [len(part) for part in group.all_gatherv(different)] == [sum(range(group.world_size)), 2 * group.world_size]
    same(group.all_gatherv(torch.tensor(group.rank)), np.array(group.ranks))
    assert group.all_gatherv([]) == []


@check
def reduce_scatter(group: Group) -> None:
    size, own = group.world_size, group.rank_in_group
    for shape in [(size * 2,), (size, 3), (2 * size, size, size), (0,), (size, 0)]:
        total = np.add.reduce([values(r, shape) for r in group.ranks])
        for dim in dims(shape):
            if shape[dim] % size:
                continue
            for tensor in layouts(values(group.rank, shape)):
                same(group.reduce_scatter(tensor, dim).detach(), np.split(total, size, dim)[own])
                same(group.reduce_scatterv(tensor, dim).detach(), np.split(total, size, dim)[own])
    for dtype, name in REDUCED.items():
        total = np.add.reduce([values(r, (3 * size,), name) for r in group.ranks]).astype(name)
        mine = torch.from_numpy(values(group.rank, (3 * size,), name)).to(dtype)
        same(group.reduce_scatter(mine), np.split(total, size)[own], dtype)


@check
def reduce_scatterv(group: Group) -> None:
    for sizes in ([r + 1 for r in range(group.world_size)], [3 * (r % 2) for r in range(group.world_size)]):
        cuts = np.cumsum(sizes)[:-1]
        for shape, dim in [((sum(sizes),), -1), ((sum(sizes), 2), 0), ((2, sum(sizes), 3), 1)]:
            total = np.add.reduce([values(r, shape) for r in group.ranks])
            for tensor in layouts(values(group.rank, shape)):
                got = group.reduce_scatterv(tensor, dim, sizes).detach()
                same(got, np.split(total, cuts, dim)[group.rank_in_group])


@check
def reduce_scatter_adds_in_the_order_of_ranks(group: Group) -> None:
    shape = (group.world_size * 5000,)
    noise = [np.random.default_rng(r).standard_normal(shape).astype("float32") for r in group.ranks]
    total = noise[0].copy()
    for part in noise[1:]:
        total += part
    got = group.reduce_scatter(torch.from_numpy(noise[group.rank_in_group]))
    same(got, np.split(total, group.world_size)[group.rank_in_group])


@check
def broadcast(group: Group) -> None:
    for shape in SHAPES:
        for src in range(group.world_size):
            for tensor in layouts(values(group.rank, shape)):
                assert group.broadcast(tensor, src) is tensor
                np.testing.assert_array_equal(tensor.detach().numpy(), values(group.ranks[src], shape))
    same(group.broadcast(torch.full((2,), group.rank)), np.full(2, group.first_rank))
    same(group.broadcast(tensor=torch.full((2,), group.rank), src=0), np.full(2, group.first_rank))


@check
def barrier(group: Group) -> None:
    if group.world_size == 1:
        group.barrier()
        return
    arrived = group.tcp_store_group.prefix(f"arrived/{group.unique_name}")
    for turn in range(1, 6):
        arrived.add(str(turn), 1)
        group.barrier()
        assert int(arrived.add(str(turn), 0)) == group.world_size


# Objects, all members


@check
def objects(group: Group) -> None:
    for src in range(group.world_size):
        own = {"rank": group.rank, "array": values(group.rank, (50, 1000))}
        got = group.broadcast_object(own, src)
        assert got["rank"] == group.ranks[src]
        np.testing.assert_array_equal(got["array"], values(group.ranks[src], (50, 1000)))
        sent = [group.ranks[src], None, "x" * src]
        assert group.broadcast_object_list([group.rank, None, "x" * group.rank_in_group], src) == sent


# From one member to another


def pairs(group: Group) -> Iterator[tuple[int, int]]:
    """All of sender and receiver, in the same order on every member."""
    for src in range(group.world_size):
        for dst in range(group.world_size):
            if src != dst:
                yield src, dst


@check
def send_and_recv(group: Group) -> None:
    for src, dst in pairs(group):
        for shape in SHAPES:
            expected = values(group.ranks[src], shape)
            for tensor in layouts(expected):
                if group.rank_in_group == src:
                    group.send(tensor, dst)
                if group.rank_in_group == dst:
                    same(group.recv(torch.Size(shape), torch.float64, src), expected)
    for dtype in MOVED:
        name = "complex64" if dtype is torch.complex64 else REDUCED.get(dtype, "float32")
        for src, dst in list(pairs(group))[:1]:
            if group.rank_in_group == src:
                group.send(torch.from_numpy(values(1, (5,), name)).to(dtype), dst)
            if group.rank_in_group == dst:
                same(group.recv(torch.Size((5,)), dtype, src), values(1, (5,), name), dtype)
    for sender in range(group.world_size if group.world_size > 1 else 0):  # neighbours, in turn
        if group.rank_in_group == sender:
            group.send(torch.full((2,), group.rank))
        if group.rank_in_group == (sender + 1) % group.world_size:
            same(group.recv(torch.Size((2,)), torch.int64), np.full(2, group.prev_rank))


@check
def a_tensor_of_another_size_is_refused_by_its_receiver(group: Group) -> None:
    for wanted, dtype in [(3, torch.float32), (5, torch.float32), (0, torch.float32), (4, torch.int32)]:
        if group.world_size > 1 and group.is_first_rank:
            group.send(torch.ones(4), 1)
        elif group.rank_in_group == 1:
            with pytest.raises(ValueError, match=rf"rank {group.first_rank} sent 16 bytes.*size=\({wanted},\)"):
                group.recv(torch.Size((wanted,)), dtype, 0)
    group.barrier()  # usable


@check
def send_object_and_recv_object(group: Group) -> None:
    for src, dst in pairs(group):
        if group.rank_in_group == src:
            group.send_object({"from": src, "array": values(src, (100, 100))}, dst)
        if group.rank_in_group == dst:
            got = group.recv_object(src)
            assert got["from"] == src
            np.testing.assert_array_equal(got["array"], values(src, (100, 100)))


def dictionary(rank: int) -> dict[str, Any]:
    array = values(rank, (4, 6), "float32")
    return {
        "last key first": torch.tensor(float(rank)),
        "hidden.states%": torch.from_numpy(array),
        "nested": {
            "a": {"b%c": torch.from_numpy(array).t(), "none": {}, 7: torch.arange(rank + 1)},
            "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        },
        "numbers": [1, 2.5, rank],
        "text": "x" * 300,
        "array": array,
        "in a list": [torch.from_numpy(array)],
        "sparse": torch.from_numpy(array).to_sparse(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "weight": torch.nn.Parameter(torch.full((3,), float(rank))),
    }


def same_dictionary(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            same_dictionary(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same_dictionary(one, other)
    elif isinstance(expected, torch.Tensor):
        assert (got.dtype, got.shape, got.layout) == (expected.dtype, expected.shape, expected.layout)
        assert torch.equal(got.to_dense().detach().float(), expected.to_dense().detach().float())
    else:
        np.testing.assert_array_equal(got, expected)


@check
def tensor_dict(group: Group) -> None:
    for src, dst in pairs(group):
        if group.rank_in_group == src:
            assert group.send_tensor_dict(dictionary(src), dst) is None
        if group.rank_in_group == dst:
            same_dictionary(group.recv_tensor_dict(src), dictionary(src))


@check
def tensor_dict_without_waiting(group: Group) -> None:
    """Everybody sends to everybody first; the handles are waited for last."""
    others = [r for r in range(group.world_size) if r != group.rank_in_group]
    own = dictionary(group.rank_in_group)
    handles = [handle for dst in others for handle in group.isend_tensor_dict(own, dst)]
    for src in reversed(others):
        received, arriving, postprocess = group.irecv_tensor_dict(src)
        for handle in arriving:
            handle.wait()
            assert handle.is_completed()
        assert postprocess == []
        same_dictionary(received, dictionary(src))
    for handle in handles:
        handle.wait()
        handle.wait()  # idempotent


@check
def two_senders_never_mix_and_each_keeps_its_order(group: Group) -> None:
    """The first member receives, from all others, in an order of its own."""
    kinds = random.Random(5).choices(["tensor", "object", "dict"], k=20)
    if group.is_first_rank:
        turns = [src for src in range(1, group.world_size) for _ in kinds]
        random.Random(6).shuffle(turns)
        left = {src: iter(enumerate(kinds)) for src in range(1, group.world_size)}
        for src in turns:
            turn, kind = next(left[src])
            if kind == "tensor":
                assert group.recv(torch.Size((2,)), torch.int64, src).tolist() == [src, turn]
            elif kind == "object":
                assert group.recv_object(src) == (src, turn)
            else:
                received = group.recv_tensor_dict(src)
                assert (received["turn"], received["both"].tolist()) == (turn, [src, turn])
        return
    for turn, kind in enumerate(kinds):
        if kind == "tensor":
            group.send(torch.tensor([group.rank_in_group, turn]), 0)
        elif kind == "object":
            group.send_object((group.rank_in_group, turn), 0)
        else:
            group.send_tensor_dict({"turn": turn, "both": torch.tensor([group.rank_in_group, turn])}, 0)


# The group


@check
def standing(group: Group) -> None:
    ranks, size = group.ranks, len(group.ranks)
    own = ranks.index(group.rank)
    assert (group.rank_in_group, group.world_size, group.size()) == (own, size, size)
    assert (group.first_rank, group.last_rank) == (ranks[0], ranks[-1])
    assert (group.next_rank, group.prev_rank) == (ranks[(own + 1) % size], ranks[own - 1])
    assert (group.is_first_rank, group.is_last_rank) == (own == 0, own == size - 1)
    assert (group.cpu_group.rank(), group.cpu_group.size()) == (own, size)


@check
def a_group_of_one_sends_nothing(group: Group) -> None:
    if group.world_size > 1:
        return
    tensor = torch.ones(2, 3)
    for operation in (group.all_reduce, group.all_gather, group.gather, group.all_gatherv, group.broadcast):
        assert operation(tensor) is tensor
    assert group.reduce_scatter(tensor) is tensor
    assert group.reduce_scatterv(tensor, 0, [2]) is tensor
    assert group.all_gather(torch.tensor(1)).shape == (1,)
    [same_one] = group.all_gatherv([tensor])
    assert same_one is tensor
    held = {"tensor": tensor}
    assert group.send_tensor_dict(held) is held
    assert group.recv_tensor_dict() is None
    assert group.isend_tensor_dict(held) == []
    assert group.irecv_tensor_dict() == (None, [], [])
    assert group.broadcast_object(held) is held
    for refused in (group.send, lambda t: group.recv(t.shape, t.dtype), lambda t: group.send_object(t, 0)):
        with pytest.raises(ValueError, match="this rank itself"):
            refused(tensor)


# Two groups


def parts_are_gathered(stages: Group, tensors: Group) -> None:
    """A pipeline's stages, each a tensor-parallel group: every sender sends its part to its like, who gather.

    Args:
        stages: this rank and its like in the other stage. tensors: the stage of this rank.
    """
    common = torch.arange(24.0).view(4, 6)
    own = torch.full((4,), float(tensors.rank_in_group))
    sent = {
        "common": common,
        "own": own,
        "odd": torch.arange(7),
        "deep": {"own": own, "common": common.t(), "n": 5},
        "all own": {"x": own},
        "empty": torch.zeros(0),
    }
    overrides = {"own": False, "deep": {"own": False}, "all own": False, "common": True}
    if stages.is_first_rank:
        with pytest.raises(ValueError, match=r"'deep' → 'odd' has 7 elements, which 2 members"):
            stages.send_tensor_dict({"deep": {"odd": torch.arange(7)}}, 1, tensors, {"deep": True})
        stages.send_tensor_dict(sent, 1, tensors, overrides)
        for handle in stages.isend_tensor_dict({"common": common}, None, tensors):
            handle.wait()
        stages.send_tensor_dict({"common": common}, None, tensors)
        stages.send_tensor_dict({"still": "in step"})
        return
    with pytest.raises(Exception, match=r"ValueError: .*'odd' has 7 elements"):
        stages.recv_tensor_dict(0, tensors)
    same_dictionary(stages.recv_tensor_dict(0, tensors, overrides), sent)
    received, handles, postprocess = stages.irecv_tensor_dict(None, tensors)
    for handle in handles:
        handle.wait()
    half = common.view(2, 12)[tensors.rank_in_group]
    assert received is not None
    assert torch.equal(received["common"], half)  # so far
    for complete in postprocess:
        complete()
    assert torch.equal(received["common"], common)
    with pytest.raises(ValueError, match="comes in 2 parts: pass an all_gather_group of as many, not None"):
        stages.recv_tensor_dict()
    assert stages.recv_tensor_dict() == {"still": "in step"}
