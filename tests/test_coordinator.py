"""Coordinator groups over real processes and sockets: operations against NumPy, bad arguments, start and end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from free_ports import free_port
from rank_pool import LOOPBACK, WATCHDOG, WORLD, Pool, Rank, growth, open_handles

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError, PeerLostError, RemoteError, StartError
from ray_shm.store import GroupStore


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    assert pool.close() == [0, 0, 0]


# Several groups


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


def check_repeated_ranks(me: Rank) -> None:
    """The same ranks twice, in another order, beside groups that contain them."""
    import torch

    layouts = {"a": WORLD, "b": WORLD, "turned": [[2, 1, 0]], "pair": [[0, 1], [2]], "pair again": [[1, 0], [2]]}
    with contextlib.ExitStack() as stack:
        groups = {name: stack.enter_context(me.group(f"repeated {name}", ranks)) for name, ranks in layouts.items()}
        handles = []
        for group in groups.values():  # all under way at the same time
            sent = {"name": group.group_name, "rank": torch.tensor(me.rank)}
            handles += group.isend_tensor_dict(sent, None) if group.world_size > 1 else []
        for group in reversed(groups.values()):
            got = group.recv_tensor_dict()
            if group.world_size > 1:
                assert got is not None
                assert (got["name"], got["rank"].item()) == (group.group_name, group.prev_rank)
        for handle in handles:
            handle.wait()
        for group in groups.values():
            assert group.all_gather(torch.tensor(me.rank)).tolist() == group.ranks


def test_groups_may_have_the_same_ranks(pool: Pool) -> None:
    pool.run(check_repeated_ranks)


LAYOUTS = [WORLD, [[1, 2], [0]], [[0, 2], [1]], [[2, 1, 0]], [[0, 1], [2]], WORLD]


def check_orders(me: Rank) -> None:
    """Each rank begins with another group; with plain blocking, all would wait for each other until the timeout."""
    import torch

    turned = [(turn + 2 * me.rank) % len(LAYOUTS) for turn in range(len(LAYOUTS))]
    groups = {number: me.group(f"order {number}", LAYOUTS[number]) for number in turned}
    for number in range(len(LAYOUTS)):
        group = groups[number]
        assert group.all_reduce(torch.full((1,), 10.0**me.rank)).item() == sum(10.0**r for r in group.ranks)
        group.destroy()


def test_members_may_construct_groups_in_different_orders(pool: Pool) -> None:
    pool.run(check_orders)


def check_still_forming(me: Rank) -> tuple[int, int]:
    """Rank 2 never comes: the constructors return, and what they left behind ends with the group."""
    before = open_handles()
    ended, abandoned = me.group("still forming"), me.group("abandoned while forming")
    assert ended.operation is None
    assert not ended.release("rank 2 is away")
    with pytest.raises(PeerLostError, match="rank 2 is away"):
        ended.barrier()
    ended.reform(1)
    for group in (ended, abandoned):
        group.destroy()
        with pytest.raises(GroupClosedError):
            group.barrier()
    return growth(before)


def test_a_group_that_is_still_forming_is_ended(pool: Pool) -> None:
    assert pool.run(check_still_forming, ranks=(0, 1)) == [(0, 0)] * 2


def check_threads(me: Rank) -> tuple[int, int]:
    import torch

    before = open_handles()
    with ThreadPoolExecutor(len(LAYOUTS)) as threads:

        def use(number: int) -> float:
            with me.group(f"thread {number}", LAYOUTS[number]) as group:
                return float(group.all_reduce(torch.full((1,), 10.0**me.rank)))

        totals = list(threads.map(use, range(len(LAYOUTS))))
    for total, layout in zip(totals, LAYOUTS, strict=True):
        [ranks] = [ranks for ranks in layout if me.rank in ranks]
        assert total == sum(10.0**r for r in ranks)
    return growth(before)


def test_groups_are_constructed_and_used_in_several_threads_at_once(pool: Pool) -> None:
    assert pool.run(check_threads) == [(0, 0)] * 3


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


def check_default_device(me: Rank, queues: bool) -> None:
    """As while a model is made, under ``with torch.device("cuda")``."""
    import torch

    own = torch.full((2,), float(me.rank))
    with me.group(f"default device {queues}", use_message_queue_broadcaster=queues) as group, torch.device("meta"):
        assert group.broadcast_object(me.rank, 1) == 1
        assert group.broadcast_tensor_dict({"own": own}, 2)["own"].tolist() == [2.0, 2.0]
        assert group.all_gatherv(own).tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
        if me.rank == 0:
            group.send_object("object", 1)
            group.send(own, 1)
            group.send_tensor_dict({"own": own}, 1)
        elif me.rank == 1:
            assert group.recv_object(0) == "object"
            assert group.recv(own.shape, own.dtype, 0).tolist() == [0.0, 0.0]
            assert group.recv_tensor_dict(0)["own"].tolist() == [0.0, 0.0]
        group.barrier()


@pytest.mark.parametrize("queues", [False, True])
def test_torchs_default_device_does_not_count(pool: Pool, queues: bool) -> None:
    pool.run(check_default_device, queues)


def check_unpicklable_sent(me: Rank) -> None:
    """To one member: it raises, too, and what is sent next arrives."""
    import torch

    tensor = torch.ones(2, 3)
    with me.group("unpicklable", [[0, 1], [2]]) as group:
        if me.rank == 0:
            with pytest.raises(TypeError, match="not today"):
                group.send_object(Unpicklable(), 1)
            for send in (group.send_tensor_dict, group.isend_tensor_dict):
                with pytest.raises(TypeError, match="not today"):
                    send({"tensor": tensor, "bad": Unpicklable()})
            group.send_tensor_dict({"tensor": tensor, "bad": Unloadable(), "more": tensor.t()})
            group.send_tensor_dict({"tensor": tensor})
        elif me.rank == 1:
            with pytest.raises(RemoteError, match=r"rank 0 could not pickle .*not today"):
                group.recv_object(0)
            for _ in range(2):
                with pytest.raises(RemoteError, match=r"rank 0 could not send .*not today"):
                    group.recv_tensor_dict()
            with pytest.raises(LookupError, match="cannot be loaded"):
                group.recv_tensor_dict()
            assert torch.equal(group.recv_tensor_dict()["tensor"], tensor)


def test_what_cannot_be_pickled_raises_at_both_ends(pool: Pool) -> None:
    pool.run(check_unpicklable_sent)


# Handles


def check_handles_of_an_ended_group(me: Rank) -> tuple[int, int]:
    import torch

    much, other = {"tensor": torch.ones(1 << 20)}, 1 - me.rank  # starts torch's own threads, which stay
    with me.group("before handles", [[0, 1]]) as first:  # what a process starts once and keeps
        first.barrier()
    before = open_handles()
    group, control = me.group("handles", [[0, 1]]), me.group("control of handles", [[0, 1]])
    [handle] = group.isend_tensor_dict(much, other)  # nobody takes it
    control.barrier()
    group.release("rank 7 is away")
    for _ in range(2):
        with pytest.raises(PeerLostError, match=r"isend_tensor_dict in .* rank 7 is away"):
            handle.wait()
    control.barrier()
    group.reform(1)
    with pytest.raises(PeerLostError, match=r"'handles/0/0'.* was not waited for before .*'handles/1/0'"):
        handle.wait()
    handles = [handle for turn in range(2) for handle in group.isend_tensor_dict({"turn": turn}, other)]
    if me.rank == 0:
        assert group.recv_tensor_dict() == {"turn": 0}
        with pytest.raises(PeerLostError, match="recv_object failed in "):
            group.recv_object(other, timeout=0.2)
    with pytest.raises(PeerLostError, match="handles/1/0"):
        handles[1].wait()  # rank 0 gave up, so the group has ended on both
    with pytest.raises(PeerLostError):
        group.barrier()
    group.destroy()
    with pytest.raises(GroupClosedError):
        handles[1].wait()
    control.barrier()
    control.destroy()
    return growth(before)


def test_handles_of_a_group_that_has_ended_raise_and_hold_up_nothing(pool: Pool) -> None:
    assert pool.run(check_handles_of_an_ended_group, ranks=(0, 1)) == [(0, 0)] * 2


# Arguments


def check_bad_arguments(me: Rank) -> None:
    import torch

    with me.group("arguments") as group:
        tensor = torch.ones(2, 3)
        outside: list[Callable[[int], Any]] = [
            lambda r: group.broadcast(tensor, r),
            lambda r: group.broadcast_object(1, r),
            lambda r: group.broadcast_object_list([1], r),
            lambda r: group.gather(tensor, r),
            lambda r: group.send(tensor, r),
            lambda r: group.send_tensor_dict({}, r),
            lambda r: group.isend_tensor_dict({}, r),
            lambda r: group.recv_tensor_dict(r),
            lambda r: group.irecv_tensor_dict(r),
            lambda r: group.recv(tensor.shape, tensor.dtype, r),
            lambda r: group.send_object(1, r),
            lambda r: group.recv_object(r),
        ]
        for operation in outside:
            for rank in (3, -1):
                with pytest.raises(ValueError, match="outside the group"):
                    operation(rank)
        for operation in outside[4:]:
            with pytest.raises(ValueError, match="this rank itself"):
                operation(me.rank)
        with pytest.raises(ValueError, match="op='mean' is none of sum, product, min, max"):
            group.all_reduce(tensor, "mean")
        for operation in (
            lambda: group.all_gather(tensor, 2),
            lambda: group.gather(tensor, 0, 2),
            lambda: group.all_gatherv(tensor, 2),
            lambda: group.reduce_scatter(tensor, 2),
            lambda: group.reduce_scatterv(tensor, 2, [1, 1, 1]),
        ):
            with pytest.raises(ValueError, match="dim=2"):
                operation()
        with pytest.raises(ValueError, match="dim=0, but the tensor has shape"):
            group.reduce_scatter(torch.tensor(1.0), 0)
        with pytest.raises(ValueError, match=r"dimension 0 of .* cannot be divided among 3 members"):
            group.reduce_scatter(tensor, 0)
        for sizes, text in [([1, 2], "a size for each of 3"), ([3, 1, -1], "a size for each"), ([1, 1, 2], "up to 4")]:
            with pytest.raises(ValueError, match=text):
                group.reduce_scatterv(tensor, 1, sizes)
        with pytest.raises(ValueError, match=r"says 4 for this rank, .* has size 3"):
            group.all_gatherv(tensor, 1, [4, 4, 4])
        for operation in (group.all_reduce, group.all_gather, group.gather, group.all_gatherv, group.broadcast):
            for wrong, text in [(np.ones(3), "not ndarray"), (tensor.to_sparse(), "sparse")]:
                with pytest.raises(TypeError, match=text):
                    operation(wrong)
        with pytest.raises(TypeError, match="is a list, not a dict"):
            group.send_tensor_dict([tensor], (me.rank + 1) % 3)
        with pytest.raises(ValueError, match="more than 0"):
            group.barrier(timeout=0)
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
    assert pool.run(check_cycles, [[1, 2, free_port(LOOPBACK)]]) == [(0, 0)] * 3


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
