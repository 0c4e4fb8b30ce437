"""Coordinator groups of a running actor group: created, found, destroyed and refused, in line with its calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_worker import HANG, RANKS, VICTIM, Background, check_for_leaks, wait_for, wait_until_stopped
from group_members import Member, at_work, handles, rpc, three_members, totals
from interrupts import interrupted

from ray_shm import ActorGroup, PeerLostError, RpcError, RpcTimeoutError

CYCLES = 100
STEPS = 20_000  # more than a call has


@pytest.fixture(scope="module")
def group(ray_local: None) -> Iterator[ActorGroup]:
    with three_members() as group:
        yield group


@pytest.fixture(autouse=True)
def no_leaks(group: ActorGroup) -> Iterator[None]:
    yield from check_for_leaks(group)


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


def test_what_was_left_out_is_found_though_a_rank_does_not_say_so_in_time(group: ActorGroup) -> None:
    assert rpc(group, "give", "first") == ["first"] * 3
    with pytest.raises(RpcError):
        rpc(group, "give", "old", VICTIM)
    pid = group.workers[VICTIM].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until_stopped(pid)
        with pytest.raises(RpcTimeoutError):
            group.collective_rpc("rank", 3.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert rpc(group, "give", "new") == ["new"] * 3


def test_what_was_left_out_is_found_though_another_call_has_been_sent(group: ActorGroup, gate: Path) -> None:
    assert rpc(group, "give", "first") == ["first"] * 3
    leaving_out = rpc(group, "give", "old", VICTIM, non_block=True)
    holding = rpc(group, "hold", str(gate), non_block=True)
    with pytest.raises(RpcError):
        leaving_out.result(HANG)
    giving = rpc(group, "give", "new", non_block=True)
    gate.touch()
    holding.result(HANG)
    assert giving.result(HANG) == ["new"] * 3


def test_groups_that_are_in_step_stay_although_ranks_are_in_other_calls(
    group: ActorGroup, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_shm.actors.release._FREE_WAIT", HANG)  # however slow the machine is
    assert rpc(group, "give", "first") == ["first"] * 3
    epoch = rpc(group, "epoch_of", "world")
    failing = rpc(group, "why_not", non_block=True)  # without its argument
    brief = rpc(group, "nap", 0.03, non_block=True)
    with pytest.raises(RpcError):
        failing.result(HANG)
    assert rpc(group, "epoch_of", "world") == epoch
    brief.result(HANG)
    failing = rpc(group, "why_not", target_ranks=[0], non_block=True)
    held = rpc(group, "hold", str(gate), target_ranks=[0], non_block=True)
    with pytest.raises(RpcError):
        failing.result(HANG)
    assert rpc(group, "epoch_of", "world", target_ranks=[1, 2]) == epoch[1:]
    gate.touch()
    held.result(HANG)
    with pytest.raises(RpcError):
        rpc(group, "why_not", unique_reply_rank=0)
    assert rpc(group, "epoch_of", "world") == epoch


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_what_was_left_out_is_found_also_after_a_call_that_is_interrupted_anywhere(
    group: ActorGroup, stride: int
) -> None:
    for at in range(0, STEPS, stride):
        with pytest.raises(RpcError):
            rpc(group, "give", "old", VICTIM)
        broken = interrupted(at, lambda: rpc(group, "give", "broken off"))  # it forms the group again, too
        assert rpc(group, "give", at) == [at] * 3
        if broken is None:
            break
    assert 300 < at < STEPS - stride


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
