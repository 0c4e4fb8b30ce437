"""Objects from one member of a coordinator group to all others through queues, over real processes and hosts."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from netns import Host, lay_cable
from rank_pool import WATCHDOG, Pool, Rank
from reader_pool import Me

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import PeerLostError, RemoteError, StartError

PORT = 29500  # on hosts where nobody else is


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    yield from lay_cable()


# Who gets what from whom


@pytest.mark.parametrize(
    ("src", "nodes", "local", "branches"),
    [
        (0, [[0, 1, 2]], [1, 2], {}),
        (1, [[0, 1, 2]], [0, 2], {}),
        (3, [[0, 1], [2, 3]], [2], {0: [1]}),
        (0, [[0, 3], [1, 4], [2, 5]], [3], {1: [4], 2: [5]}),
        (0, [[0], [1], [2]], [], {1: [], 2: []}),
    ],
)
def test_tree(pool: Pool, src: int, nodes: list[list[int]], local: list[int], branches: dict[int, list[int]]) -> None:
    pool.run(check_tree, src, nodes, local, branches, ranks=(0,))


def check_tree(me: Rank, src: int, nodes: list[list[int]], local: list[int], branches: dict[int, list[int]]) -> None:
    from ray_shm.broadcast_tree import Tree

    ranks = range(sum(map(len, nodes)))
    tree = Tree.of(src, [[any(r in node and w in node for node in nodes) for w in ranks] for r in ranks])
    assert (tree.local, tree.branches) == (local, branches)
    sources = {r: tree.source(src, r) for r in ranks if r != src}
    followers = {r: leader for leader, readers in branches.items() for r in readers}
    assert sources == {r: followers.get(r, src) for r in ranks if r != src}


# Objects


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x


def samples() -> list[Any]:
    import numpy as np
    import torch

    return [
        None,
        {"step": 3, "tokens": list(range(50)), "name": "é"},
        Point(7),
        bytes(range(256)) * 4096,
        np.arange(200_000).reshape(400, 500),
        torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4).transpose(0, 2),
        torch.arange(1 << 20, dtype=torch.float32),
        [torch.empty(0), torch.tensor(2.5)],
        ("a", (1, {2: {3.5}})),
    ]


def same(got: Any, sent: Any) -> bool:
    import numpy as np
    import torch

    if isinstance(sent, torch.Tensor):
        return got.dtype == sent.dtype and torch.equal(got, sent)
    if isinstance(sent, np.ndarray):
        return bool(np.array_equal(got, sent))
    if isinstance(sent, list | tuple):
        return type(got) is type(sent) and all(map(same, got, sent))
    return type(got) is type(sent) and bool(got == sent)


def check_objects(me: Rank) -> None:
    with me.queue_group("objects") as group:
        for src in (0, 1, 2, 1):
            for sent in samples():
                assert same(group.broadcast_object(sent if me.rank == src else None, src), sent)
        for turn in range(30):  # interleaved, without a wait in between
            got = [group.broadcast_object((turn, me.rank), src) for src in (2, 0, 1)]
            assert got == [(turn, 2), (turn, 0), (turn, 1)]
        double = group.broadcast_object((lambda x: 2 * x) if me.rank == 0 else None)  # goes by value
        assert double(4) == 8
        places = [me.rank, None, "x" * me.rank]
        assert group.broadcast_object_list(places, 2, group=group.cpu_group) is places
        assert places == [2, None, "xx"]
        [ends] = [stats for src, stats in group._link.groups.queues.stats().items() if src == 0]
        assert [end.messages for end in ends] == [len(samples()) + 31]
        group.barrier()


def test_every_member_broadcasts_objects_of_every_sort(pool: Pool) -> None:
    pool.run(check_objects)


def check_privacy(me: Rank) -> None:
    import torch

    with me.queue_group("privacy") as group:
        mine = {"large": torch.ones(1 << 19), "small": torch.ones(5), "nested": {"list": [1, torch.ones(3)]}}
        group.broadcast_tensor_dict(dict(mine), 1)  # makes the queue
        group.barrier()
        got = group.broadcast_tensor_dict(mine if me.rank == 1 else None, 1)
        if me.rank == 1:
            assert got is mine
            for tensor in (mine["large"], mine["small"], mine["nested"]["list"][1]):
                tensor.fill_(7.0)
        group.barrier()
        if me.rank == 0:
            got["large"][:] = got["small"][:] = 5.0
        group.barrier()
        expected = [5.0, 7.0, 1.0][me.rank]
        assert got["large"].unique().tolist() == got["small"].unique().tolist() == [expected]
        assert got["nested"]["list"][1].tolist() == [7.0 if me.rank == 1 else 1.0] * 3
        group.barrier()


def test_what_one_writes_nobody_else_sees(pool: Pool) -> None:
    pool.run(check_privacy)


def check_tensor_dicts(me: Rank, through_queue: bool) -> None:
    import torch

    with me.group(f"dicts {through_queue}", use_message_queue_broadcaster=through_queue) as group:
        for src in (2, 0):
            sent = {
                "plain": torch.arange(12).view(3, 4) + src,
                "turned": torch.arange(6.0).view(2, 3).t(),
                "inner": {"half": torch.ones(3, dtype=torch.float16), "deeper": {"flag": torch.tensor(True), "n": src}},
                "empty": torch.empty(0, 4),
                "graded": torch.ones(2, requires_grad=True),
                "sparse": torch.eye(3).to_sparse(),
                "list": [torch.zeros(2), "text"],
                "none": None,
            }
            got = group.broadcast_tensor_dict(sent if me.rank == src else None, src, metadata_group=group.cpu_group)
            assert list(got) == list(sent)
            for key in ("plain", "turned", "empty", "list", "none"):
                assert same(got[key], sent[key])
            assert got["empty"].shape == (0, 4)
            assert got["graded"].requires_grad
            assert got["sparse"].is_sparse
            assert torch.equal(got["inner"]["half"], sent["inner"]["half"])
            assert (got["inner"]["deeper"]["flag"].item(), got["inner"]["deeper"]["n"]) == (True, src)
        assert group.broadcast_tensor_dict({} if me.rank == 1 else None, 1) == {}
        if me.rank == 0:
            with pytest.raises(TypeError, match="NoneType is no dictionary"):
                group.broadcast_tensor_dict(None)
        with pytest.raises(RemoteError) if me.rank else pytest.raises(pickle.PicklingError):
            group.broadcast_tensor_dict({"t": torch.ones(3), "bad": Unpicklable()})
        with pytest.raises(UnloadableError) if me.rank else nothing():
            group.broadcast_tensor_dict({"bad": Unloadable(), "t": torch.ones(3)})
        assert group.broadcast_tensor_dict({"n": me.rank}, 1) == {"n": 1}
        group.barrier()


@pytest.mark.parametrize("through_queue", [True, False], ids=["queue", "gloo"])
def test_dictionaries_of_tensors(pool: Pool, through_queue: bool) -> None:
    pool.run(check_tensor_dicts, through_queue)


def check_cuda(me: Rank) -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    with me.queue_group("cuda") as group:
        sent = {"gpu": torch.arange(5000, device="cuda"), "cpu": torch.ones(3)}
        got = group.broadcast_tensor_dict(sent if me.rank == 1 else None, 1)
        assert got["gpu"].is_cuda
        assert torch.equal(got["gpu"], sent["gpu"])
        assert got["cpu"].is_cpu
        group.barrier()
    return True


def test_cuda_tensors_of_a_group_without_nccl_go_through_host_memory(pool: Pool) -> None:
    if not all(pool.run(check_cuda)):
        pytest.skip("needs a CUDA device")


# Objects that fail


class UnloadableError(Exception):
    pass


def nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("not this one")


class Unloadable:
    """Cannot be unpickled, or on one rank only, whose process id is given."""

    def __init__(self, pid: int = 0) -> None:
        self.pid = pid

    def __reduce__(self) -> Any:
        return _load, (self.pid,)


def _load(pid: int) -> str:
    if pid in (0, os.getpid()):
        raise UnloadableError("not here")
    return "loaded"


def check_failing_objects(me: Rank) -> None:
    with me.queue_group("failing") as group:
        pids = [group.broadcast_object(os.getpid(), src) for src in range(3)]
        for src in (0, 2):
            with pytest.raises(pickle.PicklingError) if me.rank == src else pytest.raises(RemoteError) as caught:
                group.broadcast_object(Unpicklable(), src)
            if me.rank != src:
                assert f"rank {src} could not pickle the object to send" in str(caught.value)
                assert "not this one" in str(caught.value)
        if me.rank == 1:
            with pytest.raises(UnloadableError):
                group.broadcast_object()
        else:
            got = group.broadcast_object(Unloadable(pids[1]))
            assert got == "loaded" or me.rank == 0
        for error in (RuntimeError, TimeoutError, PeerLostError):  # are the user's here, and not the group's end
            with pytest.raises(error) if me.rank else nothing():
                group.broadcast_object(Raising(error))
        with pytest.raises(ValueError, match="outside the group"):
            group.broadcast_object(1, 3)
        assert group.broadcast_object("in step" if me.rank == 0 else None) == "in step"
        assert group.broadcast_object("in step" if me.rank == 2 else None, 2) == "in step"
        group.barrier()


class Raising:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _raise, (self.error,)


def _raise(error: type[Exception]) -> None:
    raise error("a user's own")


def test_objects_that_fail_leave_the_group_in_step(pool: Pool) -> None:
    pool.run(check_failing_objects)


def check_different_src(me: Rank) -> None:
    with me.queue_group("different") as group:
        with pytest.raises(StartError, match=r"different src.*\{0: 0, 1: 0, 2: 1\}"):
            group.broadcast_object("x", 1 if me.rank == 2 else 0)
        assert group.broadcast_object(me.rank, 1) == 1
        group.barrier()


def test_members_that_name_different_sources_are_told(pool: Pool) -> None:
    pool.run(check_different_src)


# Users' own queues


def check_own_queues(me: Rank) -> None:
    with me.queue_group("own") as group:
        with group.create_mq_broadcaster(writer_rank=1) as queue:
            assert queue.broadcast_object("x" if me.rank == 1 else None) == "x"
        queue, handles = group.create_single_reader_mq_broadcasters(2)
        assert len(handles) == (3 if me.rank == 2 else 0)
        group.barrier()
        queue.close()


def test_queues_of_the_users_own(pool: Pool) -> None:
    pool.run(check_own_queues)


# Across hosts


def form(me: Me, rank: int, host: str, bind_host: str) -> None:
    group = StatelessGroupCoordinator(
        [[0, 1, 2, 3]],
        rank % 2,
        "gloo",
        False,
        use_message_queue_broadcaster=True,
        group_name="hosts",
        host=host,
        group_ports=[[PORT]],
        global_rank=rank,
        bind_host=bind_host,
        timeout=WATCHDOG,
    )
    me.kept = [group]


def broadcast_across(me: Me) -> list[list[tuple[int, bool]]]:
    """For each source, of each end that this rank has: messages, and whether other hosts are concerned."""
    import torch

    [group] = me.kept
    for src in (0, 3):
        for turn in range(20):
            sent = {"turn": turn, "t": torch.full((100_000,), float(turn))}
            got = group.broadcast_object(sent if group.rank == src else None, src)
            assert (got["turn"], got["t"].sum().item()) == (turn, 100_000.0 * turn)
        with pytest.raises(pickle.PicklingError) if group.rank == src else pytest.raises(RemoteError):
            group.broadcast_object(Unpicklable(), src)
    group.barrier()
    queues = group._link.groups.queues
    return [[(end.messages, _is_remote(end)) for end in queues._routes[src].ends] for src in (0, 3)]


def _is_remote(end: Any) -> bool:
    return bool(end.handle.remote_reader_ranks) if hasattr(end, "handle") else end.zmq is not None


def wait_for_the_other_host(me: Me) -> str:
    [group] = me.kept
    with pytest.raises(PeerLostError) as caught:
        group.broadcast_object(None, 0)
    group.destroy()
    return str(caught.value)


def release_and_destroy(me: Me) -> None:
    me.kept[0].release("over")
    me.kept.pop().destroy()


def test_one_hop_per_host(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    ranks = [here, here.spawn(), there, there.spawn()]
    for rank, process in enumerate(ranks):
        process.start(form, rank, here.ip, here.ip if rank < 2 else there.ip)
    for process in ranks:
        process.result()
    for process in ranks:
        process.start(broadcast_across)
    passed = [process.result() for process in ranks]
    assert passed[0] == [[(21, True)], [(21, True), (21, False)]]  # writes to 1 and 2; leads here for 3
    assert passed[1] == [[(21, False)], [(21, False)]]
    assert passed[2] == [[(21, True), (21, False)], [(21, False)]]  # leads there for 0
    assert passed[3] == [[(21, False)], [(21, True)]]
    for process in ranks[1:]:
        process.start(wait_for_the_other_host)
    ranks[0].run(release_and_destroy)
    for process in ranks[1:]:
        assert "global rank 0" in process.result()
