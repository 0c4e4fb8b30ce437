"""Coordinator groups of a running actor group: created, found, destroyed, refused, lost and healed; and their ports.

Most tests share three workers, each with torch imported.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty_worker import HANG, await_gate, check_for_leaks, kill, pids, wait_for
from netns import lay_cable
from reader_pool import Me

import ray_shm
from ray_shm import ActorGroup, GroupClosedError, PeerLostError, RpcError, RpcTimeoutError, StartError, WorkerDiedError
from ray_shm.placement.interfaces import NCCL_VARIABLE, interface_of

RANKS = [0, 1, 2]
VICTIM = 1
CYCLES = 100
START = 300.0  # seconds for 32 processes on a small machine


class Member:
    """Sums over groups: rank r gives 10 ** r, so a sum shows whose numbers are in it."""

    def __init__(self) -> None:
        self.context = ray_shm.get_context()
        self.lost = ""

    def rank(self):
        return self.context.rank

    def total(self, name="world"):
        import torch

        return int(self.context.group(name).all_reduce(torch.tensor([10**self.context.rank]))[0])

    def give(self, value, leaver=None):
        """Rank 0's value; the leaver raises before it comes to that."""
        if self.context.rank == leaver:
            raise ValueError("left")
        return self.context.group().broadcast_object(value)

    def destroy(self, name):
        self.context.group(name).destroy()

    def epoch_of(self, name):
        return self.context.group(name).epoch

    def why_not(self, name):
        try:
            self.context.group(name)
        except LookupError as exc:
            return str(exc)
        return ""

    def hold(self, gate):
        await_gate(gate)

    def hold_and_total(self, gate, name):
        await_gate(gate)
        return self.total(name)

    def reduce_for_ever(self, name):
        """Until a collective raises; its words are kept for `told`."""
        try:
            while True:
                self.total(name)
        except PeerLostError as exc:
            self.lost = str(exc)
            raise

    def told(self):
        return self.lost

    def handles(self):
        return handles(os.getpid())

    def variable(self, name):
        return os.environ.get(name)


def handles(pid: int) -> dict[str, int]:
    process = psutil.Process(pid)
    listening = [c for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    shared = [path for path in os.listdir("/dev/shm") if not path.startswith(("plasma", "sem."))]
    return {"fds": process.num_fds(), "threads": process.num_threads(), "ports": len(listening), "files": len(shared)}


class Background:
    """A function on a thread, and what became of it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run, args=(function,))
        self._thread.start()

    def _run(self, function: Callable[[], object]) -> None:
        try:
            self._outcome = function()
        except Exception as exc:
            self._outcome = exc

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout: float = HANG) -> object:
        self._thread.join(timeout)
        assert not self._thread.is_alive()
        return self._outcome


@pytest.fixture(scope="module")
def group(ray_local: None) -> Iterator[ActorGroup]:
    with ray_shm.launch(Member, num_workers=3) as group:
        group.collective_rpc("rank", non_block=True).add_done_callback(lambda future: None)  # its thread stays
        yield group


@pytest.fixture(autouse=True)
def no_leaks(group: ActorGroup) -> Iterator[None]:
    yield from check_for_leaks(group)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Opened at the end, whatever happens: nobody is left waiting."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def rpc(group: ActorGroup, method: str, *args: Any, **options: Any) -> Any:
    return group.collective_rpc(method, HANG, args, **options)


def totals(group: ActorGroup, name: str, ranks: list[int]) -> list[int]:
    return rpc(group, "total", name, target_ranks=ranks)


def at_work(group: ActorGroup, what: str, *ranks: int) -> bool:
    return all(group.status()[rank].method == what and group.status()[rank].state == "running" for rank in ranks)


# ---- in step ---------------------------------------------------------------------------------------------------------


def test_what_a_rank_left_out_is_not_taken_for_what_comes_next(group: ActorGroup) -> None:
    assert rpc(group, "give", "first") == ["first"] * 3
    with pytest.raises(RpcError) as info:
        rpc(group, "give", "second", VICTIM)  # the source is through with it, whether or not others read it
    assert list(info.value.failures) == [VICTIM]
    assert rpc(group, "give", "third") == ["third"] * 3
    epoch = rpc(group, "epoch_of", "world")
    with pytest.raises(RpcError):
        rpc(group, "why_not")  # an exception that leaves all in step
    assert rpc(group, "epoch_of", "world") == epoch


# ---- created and destroyed ------------------------------------------------------------------------------------------


def test_groups_overlap_repeat_and_are_found_by_their_members(group: ActorGroup) -> None:
    group.create_groups({"later": [[1, 2]]})  # rank 0, which serves the store, is in none
    group.create_groups({"pp": [[2, 0], [1]], "dp": [[0, 1]], "same": [[0, 1]]})
    assert totals(group, "later", [1, 2]) == [110, 110]
    assert totals(group, "pp", RANKS) == [101, 10, 101]
    for name in ("dp", "same"):
        assert totals(group, name, [0, 1]) == [11, 11]
    assert totals(group, "world", RANKS) == [111] * 3
    outside = rpc(group, "why_not", "dp", target_ranks=[2])[0]
    assert "rank 2 is outside of group 'dp', which is [[0, 1]]" in outside
    group.destroy_groups(["dp", "pp", "later"])
    for text in rpc(group, "why_not", "pp"):
        assert "there is no group 'pp'; there are ['same', 'world']" in text
        assert "create_groups" in text
    group.create_groups({"dp": [[1, 2]]}, backend="gloo")  # the name, with other ranks
    assert totals(group, "dp", [1, 2]) == [110, 110]
    assert totals(group, "same", [0, 1]) == [11, 11]  # whole all the time
    group.destroy_groups(["same", "dp"])


@pytest.mark.parametrize(
    ("groups", "backend", "words"),
    [
        ({"world": [[0, 1]]}, "auto", "reserved"),
        ({"tp": [[0, 1]]}, "auto", r"groups \['tp'\] already"),
        ({"x": [[0, 3]]}, "auto", r"no rank \[3\]"),
        ({"x": [[[0, 1]]]}, "auto", r"no rank \[\[0, 1\]\]"),
        ({"x": [[0, 1], [1, 2]]}, "auto", r"ranks \[1\] appear twice"),
        ({"x": [[]]}, "auto", "non-empty"),
        ({"": [[0]]}, "auto", "not empty"),
        ({"x": [[0, 1]]}, "mpi", "backend='mpi'"),
    ],
    ids=str,
)
def test_what_is_wrong_with_groups_is_said_before_anything_is_sent(
    tp: None, group: ActorGroup, groups: dict[str, list[list[int]]], backend: str, words: str
) -> None:
    sent = group.stats().calls
    with pytest.raises(ValueError, match=words):
        group.create_groups(groups, backend)
    assert group.stats().calls == sent


@pytest.fixture
def tp(group: ActorGroup) -> Iterator[None]:
    group.create_groups({"tp": [RANKS]})
    yield
    group.destroy_groups(["tp"])


def test_only_what_there_is_can_be_destroyed(tp: None, group: ActorGroup) -> None:
    for names, words in ((["tp", "pp"], r"no groups \['pp'\]; there are \['tp', 'world'\]"), (["world"], "not destr")):
        with pytest.raises(ValueError, match=words):
            group.destroy_groups(names)
    for call in (lambda: group.destroy_groups("tp"), lambda: group.create_groups({"x": [0, 1]})):  # type: ignore[dict-item]
        with pytest.raises(TypeError):
            call()
    assert totals(group, "tp", RANKS) == [111] * 3


def test_in_order_with_the_calls_in_flight(group: ActorGroup, gate: Path) -> None:
    group.create_groups({"old": [[0, 1]]})
    held = rpc(group, "hold_and_total", str(gate), "old", target_ranks=[0, 1], non_block=True)
    destroying = Background(lambda: group.destroy_groups(["old"]))
    wait_for(lambda: "old" not in group._runtime.directory.plans, "the order to destroy")
    creating = Background(lambda: group.create_groups({"old": [[1, 2]]}))
    wait_for(lambda: at_work(group, "create groups", 2), "rank 2 forms the group")
    after = rpc(group, "total", "old", target_ranks=[1, 2], non_block=True)
    assert destroying.running
    assert creating.running
    gate.touch()
    assert (held.result(HANG), after.result(HANG)) == ([11, 11], [110, 110])
    assert (destroying.result(), creating.result()) == (None, None)
    group.destroy_groups(["old"])


def test_threads_create_overlapping_groups_at_once(group: ActorGroup) -> None:
    names = [f"g{i}" for i in range(8)]
    sides = [[0, 1], [1, 2], [2, 0], [2, 1, 0]]
    creating = [Background(lambda i=i: group.create_groups({names[i]: [sides[i % 4]]})) for i in range(8)]
    again = [Background(lambda: group.create_groups({"one": [[0, 1]]})) for _ in range(3)]
    assert [thread.result() for thread in creating] == [None] * 8
    assert sorted(type(thread.result()).__name__ for thread in again) == ["NoneType", "ValueError", "ValueError"]
    for i, name in enumerate(names):
        assert totals(group, name, sides[i % 4]) == [sum(10**r for r in sides[i % 4])] * len(sides[i % 4])
    group.destroy_groups([*names, "one"])


def flat(group: ActorGroup, before: list[dict[str, int]]) -> bool:
    """A leak would be as many as the cycles, or a third of it; Ray's own threads open a descriptor now and then."""
    now = [*rpc(group, "handles"), handles(os.getpid())]
    return all(n[key] <= b[key] + 5 for n, b in zip(now, before, strict=True) for key in b)


def test_cycles_leave_nothing_in_workers_and_driver(group: ActorGroup) -> None:
    def cycle(i: int) -> None:
        group.create_groups({"a": [RANKS] if i % 10 == 0 else [[i % 3], [(i + 1) % 3, (i + 2) % 3]]})
        if i % 10 == 0:
            assert totals(group, "a", RANKS) == [111] * 3
        group.destroy_groups(["a"])

    cycle(0)  # torch and Ray keep something from the first time
    before = [*rpc(group, "handles"), handles(os.getpid())]
    for i in range(CYCLES):
        cycle(i)
    wait_for(lambda: flat(group, before), f"no more than before the cycles: {before}")


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_group_that_cannot_be_formed_leaves_nothing(tp: None, group: ActorGroup) -> None:
    before = rpc(group, "handles")
    with pytest.raises(RpcError, match=r"create groups \['fine', 'gpus'\]") as info:
        group.create_groups({"gpus": [[0, 1]], "fine": [[0, 1]]}, backend="nccl")
    assert sorted(info.value.failures) == [0, 1]
    assert all("nccl needs a GPU" in str(error) for error in info.value.failures.values())
    for name in ("gpus", "fine"):
        assert all("there is no group" in text for text in rpc(group, "why_not", name))
    assert all(now[key] <= was[key] for now, was in zip(rpc(group, "handles"), before, strict=True) for key in was)
    group.create_groups({"gpus": [[0, 1]]})
    group.destroy_groups(["gpus"])
    assert totals(group, "tp", RANKS) == [111] * 3


def limit_descriptors(member: Member) -> tuple[int, int]:
    """So that no group can be formed here."""
    import resource

    lowest = os.open(os.devnull, os.O_RDONLY)  # the limit is one of numbers, not of how many there are
    os.close(lowest)
    _, most = was = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, most))
    return was


def lift_limit(member: Member, was: tuple[int, int]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, was)


def test_the_rank_that_fails_is_named_and_the_others_are_freed(group: ActorGroup) -> None:
    was = group.collective_rpc(limit_descriptors, HANG, target_ranks=[2])[0]
    try:
        with pytest.raises(RpcError) as info:
            group.create_groups({"x": [RANKS]})
    finally:
        group.collective_rpc(lift_limit, HANG, (was,), target_ranks=[2])
    failures = info.value.failures
    assert failures[2] is info.value.root_cause
    assert "Too many open files" in str(failures[2])
    assert all(isinstance(error, PeerLostError) for rank, error in failures.items() if rank != 2)
    assert all("there is no group 'x'" in text for text in rpc(group, "why_not", "x"))
    group.create_groups({"x": [RANKS]})
    assert totals(group, "x", RANKS) == [111] * 3
    group.destroy_groups(["x"])


def test_a_late_rank_is_named_and_never_forms_the_group(group: ActorGroup, gate: Path) -> None:
    held = rpc(group, "hold", str(gate), target_ranks=[2], non_block=True)
    with pytest.raises(RpcTimeoutError, match=r"create groups \['x'\].*rank 2 \(.*running 'hold'"):
        group.create_groups({"x": [RANKS]}, timeout=0.5)
    freed = rpc(group, "why_not", "x", target_ranks=[0, 1])  # though rank 2 is not there yet
    gate.touch()
    held.result(HANG)
    for text in [*freed, *rpc(group, "why_not", "x")]:
        assert "there is no group 'x'" in text
    group.create_groups({"x": [RANKS]})
    assert totals(group, "x", RANKS) == [111] * 3
    group.destroy_groups(["x"])


def test_a_failed_creation_takes_back_only_its_own(group: ActorGroup, gate: Path) -> None:
    rpc(group, "hold", str(gate), non_block=True)
    plans = group._runtime.directory
    failing = Background(lambda: group.create_groups({"x": [RANKS]}, backend="nccl"))
    wait_for(lambda: "x" in plans.plans, "the order to form it")
    destroying = Background(lambda: group.destroy_groups(["x"]))
    wait_for(lambda: "x" not in plans.plans, "the order to destroy it")
    creating = Background(lambda: group.create_groups({"x": [[0, 1]]}))
    wait_for(lambda: "x" in plans.plans, "the order to form another one")
    gate.touch()
    assert isinstance(failing.result(), RpcError)
    assert (destroying.result(), creating.result()) == (None, None)
    assert totals(group, "x", [0, 1]) == [11, 11]
    group.destroy_groups(["x"])


def test_what_user_code_destroyed_keeps_no_other_group_from_being_formed_again(group: ActorGroup) -> None:
    group.create_groups({"a": [RANKS], "b": [RANKS]})
    rpc(group, "destroy", "a", target_ranks=[VICTIM])
    epoch = rpc(group, "epoch_of", "b")[0]
    group._runtime.releaser.peer_lost()  # all groups
    assert all(now > epoch for now in rpc(group, "epoch_of", "b"))
    assert totals(group, "b", RANKS) == [111] * 3
    group.destroy_groups(["a", "b"])


# ---- a rank dies ----------------------------------------------------------------------------------------------------


def test_deaths_are_told_in_the_collective_and_groups_are_healed(group: ActorGroup) -> None:
    group.create_groups({"tp": [RANKS], "pair": [[0, 2]], "gone": [RANKS]})
    place, first = group.workers[VICTIM], group.workers[0]
    reducing = rpc(group, "reduce_for_ever", "tp", non_block=True)
    wait_for(lambda: at_work(group, "reduce_for_ever", *RANKS), "all are in the collective")
    os.kill(place.pid, signal.SIGKILL)
    with pytest.raises(RpcError) as info:
        reducing.result(HANG)
    assert isinstance(info.value.root_cause, WorkerDiedError)
    for text in rpc(group, "told", target_ranks=[0, 2]):
        assert f"rank {VICTIM} is gone: pid {place.pid} on node {place.node_ip} died" in text
        assert text.startswith("all_reduce in coordinator group 'tp/")
    with pytest.raises(RpcError, match=r"groups \['x'\] was not begun") as refused:
        group.create_groups({"x": [RANKS]})
    assert list(refused.value.failures) == [VICTIM]
    assert totals(group, "pair", [0, 2]) == [101, 101]
    group.create_groups({"survivors": [[0, 2]]})
    group.destroy_groups(["gone"])
    # Rank 2 waits for one who has not come yet, so no connection of theirs carries anything.
    waiting = rpc(group, "reduce_for_ever", "survivors", target_ranks=[2], non_block=True)
    wait_for(lambda: "all_reduce" in group.status()[2].operation, "rank 2 in its collective")
    kill(group, 0)
    with pytest.raises(RpcError) as info:
        waiting.result(HANG)
    assert f"rank 0 is gone: pid {first.pid} on node {first.node_ip} died" in str(info.value.failures[2])
    with pytest.raises(RpcError, match="rank 0 serves their store"):
        group.create_groups({"x": [[2]]})
    assert group.heal() == [0, VICTIM]
    for name in ("tp", "world"):
        assert totals(group, name, RANKS) == [111] * 3
    for name in ("pair", "survivors"):
        assert totals(group, name, [0, 2]) == [101, 101]
    lost, outside = (rpc(group, "why_not", name)[VICTIM] for name in ("gone", "survivors"))
    assert "there is no group 'gone'" in lost
    assert "rank 1 is outside of group 'survivors', which is [[0, 2]]" in outside
    group.create_groups({"pp": [[1, 2]]})  # a change of membership
    assert totals(group, "pp", [1, 2]) == [110, 110]
    group.destroy_groups(["tp", "pair", "survivors", "pp"])


def test_a_rank_that_dies_while_a_group_is_formed(group: ActorGroup, gate: Path) -> None:
    rpc(group, "hold", str(gate), target_ranks=[VICTIM], non_block=True)
    creating = Background(lambda: group.create_groups({"x": [RANKS], "y": [[0, 2]]}))
    wait_for(lambda: at_work(group, "create groups", 0, 2), "the others form it")
    kill(group, VICTIM)
    error = creating.result()
    assert isinstance(error, RpcError)
    assert isinstance(error.failures[VICTIM], WorkerDiedError)
    assert group.heal() == [VICTIM]
    for name in ("x", "y"):
        assert all("there is no group" in text for text in rpc(group, "why_not", name))
    group.create_groups({"y": [[0, 2]]})
    assert totals(group, "y", [0, 2]) == [101, 101]
    group.destroy_groups(["y"])


# ---- a driver actor -------------------------------------------------------------------------------------------------


def test_clients_of_a_driver_actor_create_groups(group: ActorGroup, gate: Path) -> None:
    with ray_shm.launch(Member, num_workers=2, name="groups") as first, ray_shm.connect("groups") as second:
        second.create_groups({"tp": [[0, 1]]})
        with pytest.raises(ValueError, match="already"):
            first.create_groups({"tp": [[0]]})
        held = rpc(first, "hold_and_total", str(gate), "tp", non_block=True)
        destroying = Background(lambda: first.destroy_groups(["tp"]))
        wait_for(lambda: at_work(second, "hold_and_total", 0, 1), "the call")
        gate.touch()
        assert held.result(HANG) == [11, 11]  # it was sent before
        assert destroying.result() is None
        assert all("there is no group 'tp'" in text for text in rpc(second, "why_not", "tp"))
    with pytest.raises(GroupClosedError):
        first.create_groups({"x": [[0, 1]]})


@pytest.mark.slow
def test_a_clients_groups_come_after_its_calls_also_where_a_rank_is_dead(group: ActorGroup) -> None:
    with ray_shm.launch(Member, num_workers=3, driver="actor") as own:
        own.create_groups({"x": [[0]]})
        kill(own, 2)
        with pytest.raises(RpcError):
            rpc(own, "why_not", target_ranks=[0, 1])  # without its argument
        pid = own.workers[1].pid
        os.kill(pid, signal.SIGSTOP)  # so that the driver keeps the next call for a second
        try:
            before = rpc(own, "epoch_of", "x", target_ranks=[0], non_block=True)
            destroying = Background(lambda: own.destroy_groups(["x"]))
            assert before.exception(HANG) is None
        finally:
            os.kill(pid, signal.SIGCONT)
        assert destroying.result() is None


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["local", "actor"])
def test_created_groups_are_healed_by_themselves(group: ActorGroup, driver: str) -> None:
    with ray_shm.launch(Member, num_workers=2, driver=driver, auto_heal=True) as own:
        own.create_groups({"tp": [[0, 1]]})
        os.kill(own.workers[1].pid, signal.SIGKILL)
        wait_for(lambda: own.stats().heals == 1, "the group healed itself")
        assert totals(own, "tp", [0, 1]) == [11, 11]
        kill(own, 0)
        own.create_groups({"pp": [[1, 0]]})  # waits for the heal
        assert totals(own, "pp", [0, 1]) == [11, 11]


# ---- ports and interfaces -------------------------------------------------------------------------------------------


def free_range(count: int) -> tuple[int, int]:
    """That many ports in a row below the kernel's own, that nobody listens on."""
    taken = {c.laddr.port for c in psutil.net_connections(kind="tcp")}
    first = next(p for p in range(20_000, 30_000) if not taken & set(range(p, p + count)))
    return first, first + count - 1


def held_in(ports: tuple[int, int], pid: int) -> int:
    """How many of these ports this process listens on."""
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return sum(c.status == psutil.CONN_LISTEN and ports[0] <= c.laddr.port <= ports[1] for c in connections)


@pytest.mark.slow
def test_what_listens_to_other_nodes_keeps_to_the_range_of_ports(group: ActorGroup) -> None:
    ports = free_range(5)
    with ray_shm.launch(Member, num_workers=2, gpus_per_worker=1, transport="zmq", port_range=ports) as far:
        # Driver: requests and orders; rank 0: its replies and the store; rank 1: its replies.
        assert [held_in(ports, pid) for pid in (os.getpid(), *pids(far))] == [2, 2, 1]
        node_ip = far.workers[0].node_ip
        assert rpc(far, "variable", NCCL_VARIABLE) == [f"={interface_of(node_ip)}"] * 2
        taken = rf"rank 0 \(pid .*binding a port.*ports {ports[0]}\.\.{ports[1]} of {node_ip}: all are in use"
        with pytest.raises(StartError, match=taken):
            ray_shm.launch(Member, num_workers=1, port_range=ports)
    for wrong in ((5, 4), (0, 10), (1, 70_000), (1,), 20_000):
        with pytest.raises(ValueError, match="port_range"):
            ray_shm.launch(Member, num_workers=1, port_range=wrong)  # type: ignore[arg-type]


def test_interfaces_are_found_by_their_addresses() -> None:
    assert interface_of("127.0.0.1") == "lo"
    for none in ("127.0.0.2", "192.0.2.1", "2001:db8::1", "a-host", ""):
        assert interface_of(none) is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                found = interface_of(address.address)
                assert found == name or address.address in {a.address for a in psutil.net_if_addrs()[found or ""]}


def check_interface(me: Me, ip: str) -> str | None:
    return interface_of(ip)


@pytest.mark.slow
def test_the_interface_of_a_host_is_the_one_that_others_reach(group: ActorGroup) -> None:
    for one, other in lay_cable():
        for host in (one, other):
            assert [host.run(check_interface, ip) for ip in (host.ip, host.ip6, "127.0.0.1")] == [
                "cable",
                "cable",
                "lo",
            ]
        assert one.run(check_interface, other.ip) is None


# ---- many at once ---------------------------------------------------------------------------------------------------


def launch_at_once(groups: int, size: int, torch_in: int) -> None:
    """`groups` groups of `size` with declared groups and stores of their own, from as many threads.

    In `torch_in` of them the ranks meet; the others hold their ports, and import no torch.
    """
    every = list(range(size))

    def one(i: int) -> list[Any]:
        declared = {"tp": [every], "pp": [every[::-1]]} if i < torch_in else None
        with ray_shm.launch(
            Member, num_workers=size, gpus_per_worker=0.1, groups=declared, start_timeout=START
        ) as group:
            if i < torch_in:
                group.create_groups({"more": [every]}, timeout=HANG)
                assert totals(group, "more", every) == [int("1" * size)] * size
            store = group._runtime.store
            return [store, rpc(group, "rank")]

    threads = [Background(lambda i=i: one(i)) for i in range(groups)]
    outcomes = [thread.result(START) for thread in threads]
    assert [outcome[1] if isinstance(outcome, list) else outcome for outcome in outcomes] == [every] * groups


@pytest.mark.slow
def test_groups_are_launched_at_once(group: ActorGroup) -> None:
    launch_at_once(groups=4, size=2, torch_in=1)


@pytest.mark.slow
@pytest.mark.timeout(2 * START)
@pytest.mark.parametrize("turn", range(20))
def test_eight_groups_of_four_are_launched_at_once(group: ActorGroup, turn: int) -> None:
    launch_at_once(groups=8, size=4, torch_in=2)
