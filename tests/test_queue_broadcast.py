"""Objects from one member of a coordinator group to all others through queues, over real processes and hosts."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import Host, lay_cable
from rank_pool import WATCHDOG, Pool, Rank, alongside, growth, open_handles, wait_until
from reader_pool import Me

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError, PeerLostError, RemoteError, StartError

REASON = "rank 2 raised ValueError('no such token')"
PORT = 29500  # on hosts where nobody else is


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    yield from lay_cable()


def queue_group(me: Rank, name: str, **kwargs: Any) -> StatelessGroupCoordinator:
    return me.group(name, use_message_queue_broadcaster=True, **kwargs)


def queue_maps() -> int:
    """Mappings of queues' memory in this process, but for what a traceback of an earlier test keeps."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:ray_shm:")


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
    from ray_shm.queue_broadcast import Tree

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
    with queue_group(me, "objects") as group:
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

    with queue_group(me, "privacy") as group:
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
    with queue_group(me, "cuda") as group:
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
    with queue_group(me, "failing") as group:
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
    with queue_group(me, "different") as group:
        with pytest.raises(StartError, match=r"different src.*\{0: 0, 1: 0, 2: 1\}"):
            group.broadcast_object("x", 1 if me.rank == 2 else 0)
        assert group.broadcast_object(me.rank, 1) == 1
        group.barrier()


def test_members_that_name_different_sources_are_told(pool: Pool) -> None:
    pool.run(check_different_src)


# Late


def fill(group: StatelessGroupCoordinator, kept: dict[str, Any], timeout: float | None = None) -> None:
    for kept["filled"] in range(1000):
        group.broadcast_object(bytes(50_000), group.rank, timeout=timeout)


def check_late_source(me: Rank) -> str:
    group = queue_group(me, "late source")
    assert group.broadcast_object(me.rank, 2) == 2
    if me.rank == 2:
        me.kept["group"] = group
        return ""
    with pytest.raises(PeerLostError) as caught:
        group.broadcast_object(None, 2, timeout=0.3 if me.rank == 0 else None)  # rank 1 hears of it from rank 2's end
    return str(caught.value)


def check_came_late(me: Rank) -> str:
    """The others are gone, and that is noticed although there would be room."""
    with pytest.raises(PeerLostError) as caught:
        me.kept["group"].broadcast_object(1, 2)
    return str(caught.value)


def test_late_source_is_named_and_learns_of_it(pool: Pool) -> None:
    pool.start(check_late_source)
    first, _ = pool.result(0), pool.result(2)
    assert "broadcast_object failed in coordinator group 'late source/0/0'" in first
    assert "nothing came from global rank 2 (pid" in first
    assert "within 0.3 s" in first
    late = pool.run(check_came_late, ranks=(2,))[0]
    assert "reader rank 0 (pid" in late
    assert "closed its end of the queue" in late
    assert "global rank 2 (pid" in pool.result(1)
    pool.run(check_destroyed, ranks=(2,))


def check_destroyed(me: Rank) -> None:
    me.kept.pop("group").destroy()


def check_late_readers(me: Rank) -> tuple[str, int]:
    """Rank 0 fills the queue, and counts what went in; the others do not read."""
    group = queue_group(me, "late readers")
    group.broadcast_object(None)
    if me.rank:
        me.kept["group"] = group
        return "", 0
    with pytest.raises(PeerLostError) as caught:
        fill(group, me.kept, timeout=0.3)
    return str(caught.value), me.kept.pop("filled")


def check_read_late(me: Rank, count: int) -> None:
    """What was sent before the end can still be read."""
    group = me.kept.pop("group")
    for _ in range(count):
        assert group.broadcast_object() == bytes(50_000)
    with pytest.raises(PeerLostError, match="global rank 0"):
        group.broadcast_object()


def test_a_source_whose_readers_do_not_read_waits_and_names_them(pool: Pool) -> None:
    text, count = pool.run(check_late_readers)[0]
    assert 10 < count < 1000
    assert "was full for 0.3 s: rank 1 (pid" in text
    assert "rank 2 (pid" in text
    pool.run(check_read_late, count, ranks=(1, 2))


# Released, interrupted, destroyed


def parks(group: StatelessGroupCoordinator, src: int) -> int:
    """How often this rank has slept in the queue of `src`."""
    groups = group._link.groups
    return sum(end.parks for end in groups.queues.stats().get(src, [])) if groups is not None else 0


def released_in(group: StatelessGroupCoordinator, src: int, operation: Callable[[], Any]) -> None:
    before = parks(group, src)

    def release() -> None:
        wait_until(lambda: group.operation == "broadcast_object" if before == 0 else parks(group, src) > before)
        assert group.release(REASON)

    thread = alongside(release)
    with pytest.raises(PeerLostError, match="was ended by this process: rank 2 raised"):
        operation()
    thread.join()


def use_once(me: Rank, name: str) -> None:
    """What a process keeps from its first queue on (the thread that watches for deaths) is no leak."""
    with queue_group(me, name) as group:
        group.broadcast_object(None)
        group.barrier()


def check_released(me: Rank) -> None:
    use_once(me, "before release")
    before = open_handles(), queue_maps()
    group, control = queue_group(me, "released", lazy=True), me.group("control")
    if me.rank == 0:  # while the queue is made
        released_in(group, 2, lambda: group.broadcast_object(None, 2))
    control.barrier()
    group.reform(1)
    for _ in range(2):
        assert group.broadcast_object(me.rank, 2) == 2
        control.barrier()
    if me.rank == 0:  # while a member waits for the source
        released_in(group, 2, lambda: group.broadcast_object(None, 2))
    control.barrier()
    group.reform(2)
    assert group.broadcast_object(me.rank) == 0
    if me.rank == 0:  # while the source waits for room
        released_in(group, 0, lambda: fill(group, me.kept))
    control.barrier()
    group.reform(3)
    assert group.broadcast_object(me.rank, 1) == 1
    control.barrier()
    if me.rank == 1:  # while the source is elsewhere; the others learn of it
        assert not group.release(REASON)
    else:
        with pytest.raises(PeerLostError, match=r"nothing came from global rank 1 .*: .* closed the queue"):
            group.broadcast_object(None, 1)
    group.reform(4)
    assert [group.broadcast_object(me.rank, src) for src in (2, 1, 0)] == [2, 1, 0]
    group.barrier()
    group.destroy()
    control.destroy()
    with pytest.raises(GroupClosedError):
        group.broadcast_object(1)
    assert [growth(before[0]), queue_maps() - before[1]] == [(0, 0), 0], os.listdir("/proc/self/fd")


def test_a_release_ends_every_wait_and_the_group_is_formed_again(pool: Pool) -> None:
    pool.run(check_released)


class InterruptError(Exception):
    pass


def check_interrupted(me: Rank) -> None:
    def interrupt(*_: Any) -> None:
        raise InterruptError

    group, control = queue_group(me, "interrupted"), me.group("control of interrupted")
    for _ in range(2):
        assert group.broadcast_object(me.rank, 2) == 2
        control.barrier()
    if me.rank == 0:
        previous = signal.signal(signal.SIGUSR1, interrupt)
        main = threading.main_thread().ident or 0

        before = parks(group, 2)

        def send() -> None:
            wait_until(lambda: parks(group, 2) > before)
            signal.pthread_kill(main, signal.SIGUSR1)

        thread = alongside(send)
        try:
            with pytest.raises(InterruptError):
                group.broadcast_object(None, 2)
        finally:
            signal.signal(signal.SIGUSR1, previous)
        thread.join()
        with pytest.raises(PeerLostError, match="an earlier broadcast was interrupted"):
            group.broadcast_object(None, 2)
    control.barrier()
    group.reform(1)
    assert group.broadcast_object(me.rank, 2) == 2
    control.barrier()
    for used in (group, control):
        used.destroy()


def test_an_interrupted_broadcast_ends_the_group_until_it_is_formed_again(pool: Pool) -> None:
    pool.run(check_interrupted)


_to_be_destroyed: list[StatelessGroupCoordinator] = []


class Destroyer:
    """Destroys the group that it comes through."""

    def __reduce__(self) -> Any:
        return _destroy, ()


def _destroy() -> str:
    _to_be_destroyed.pop().destroy()
    return "came all the same"


def check_destroyed_inside(me: Rank) -> None:
    with me.group("beside") as control:
        for name in ("first", "second"):  # the first one leaves what is made once in a process
            before = open_handles(), queue_maps()
            group = queue_group(me, f"destroyed inside, {name}")
            _to_be_destroyed[:] = [group]
            got = group.broadcast_object(Destroyer() if me.rank == 0 else None)
            control.barrier()
            if me.rank == 0:
                group.destroy()
            else:
                assert got == "came all the same"
            with pytest.raises(GroupClosedError):
                group.barrier()
        assert (growth(before[0]), queue_maps() - before[1]) == ((0, 0), 0)


def test_destroyed_in_an_operation_that_comes_through(pool: Pool) -> None:
    """Its thread frees what it used, since whoever destroys must not."""
    pool.run(check_destroyed_inside)


def check_cycles(me: Rank) -> None:
    import torch

    group = queue_group(me, "cycles")
    before = open_handles(), queue_maps()
    for epoch in range(1, 11):
        for src in (epoch % 3, 1):
            got = group.broadcast_object(torch.full((1 << 17,), float(src)) if me.rank == src else None, src)
            assert got[-1].item() == src
        if epoch % 2:
            group.barrier()
            if me.rank == epoch % 3:
                group.release(REASON)
        group.reform(epoch)
        del got
    assert (growth(before[0]), max(0, queue_maps() - before[1])) == ((0, 0), 0)
    kept = group.broadcast_object(torch.ones(1 << 17))
    group.barrier()
    group.destroy()
    assert kept.sum().item() == 1 << 17  # outlives the group


def test_cycles_leave_descriptors_threads_and_memory_flat(pool: Pool) -> None:
    pool.run(check_cycles)


# Users' own queues


def check_own_queues(me: Rank) -> None:
    with queue_group(me, "own") as group:
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
    me.kept[0].release(REASON)
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


# Deaths; the last tests of the module, whose pool is short of ranks afterwards


def for_ever(work: Callable[[], Any]) -> None:
    while True:
        work()


def check_dead_reader(me: Rank) -> str:
    """Rank 2 is killed while it waits for rank 0, which then broadcasts; rank 1 reads on until the end."""
    group = queue_group(me, "dead reader")
    group.broadcast_object(None)
    if me.rank == 2:
        alongside(lambda: (wait_until(lambda: group.operation is not None), os.kill(os.getpid(), signal.SIGKILL)))
    with pytest.raises(PeerLostError) as caught:
        for_ever(lambda: (group.broadcast_object(None), time.sleep(0.001)))
    return str(caught.value)


def test_a_killed_reader_is_named_by_the_source_and_ends_the_group(pool: Pool) -> None:
    pid = pool.processes[2].pid
    pool.start(check_dead_reader)
    assert f"reader rank 2 (pid {pid}) is gone" in pool.result(0)
    assert "from global rank 0" in pool.result(1) or "global rank 0 " in pool.result(1)


def check_dead_source(me: Rank) -> str:
    group = queue_group(me, "dead source", ranks=[[0, 1], [2]])
    group.broadcast_object(None, 1)
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        group.broadcast_object(None, 1)
    return str(caught.value)


def test_a_killed_source_is_named(pool: Pool) -> None:
    pid = pool.processes[1].pid
    pool.start(check_dead_source, ranks=(0, 1))
    text = pool.result(0)
    assert f"global rank 1 (pid {pid} on " in text
    assert "is gone" in text
