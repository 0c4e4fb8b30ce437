"""Created coordinator groups whose ranks die, or whose driver is an actor: lost, told, healed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_worker import HANG, RANKS, VICTIM, Background, check_for_leaks, kill, wait_for
from group_members import Member, at_work, rpc, three_members, totals

import ray_shm
from ray_shm import ActorGroup, GroupClosedError, RpcError, WorkerDiedError


@pytest.fixture(scope="module")
def group(ray_local: None) -> Iterator[ActorGroup]:
    with three_members() as group:
        yield group


@pytest.fixture(autouse=True)
def no_leaks(group: ActorGroup) -> Iterator[None]:
    yield from check_for_leaks(group)


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
    epochs = [rpc(group, "epoch_of", name, target_ranks=[0, 2]) for name in ("pair", "world")]
    with pytest.raises(RpcError, match="why_not"):
        rpc(group, "why_not", target_ranks=[0, 2])  # without its argument; no reason to form a group again
    assert [rpc(group, "epoch_of", name, target_ranks=[0, 2]) for name in ("pair", "world")] == epochs
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
        epoch = rpc(first, "epoch_of", "world")
        gates = ray_shm.Scatter([str(gate.with_name("closed")), str(gate)])
        waiting = rpc(first, "hold", gates, unique_reply_rank=0, non_block=True)
        wait_for(lambda: at_work(second, "hold", 0) and second.status()[1].state == "idle", "rank 1 is through")
        assert waiting.cancel()
        wait_for(lambda: second.status()[0].state == "idle", "rank 0 is interrupted")
        assert rpc(first, "epoch_of", "world") == epoch  # rank 1 says nothing, but is not busy
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
    for groups in ({}, {"x": [[0]]}):
        with pytest.raises(GroupClosedError):
            own.create_groups(groups)
