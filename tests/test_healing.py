"""What else goes on while a rank is replaced: calls to the living, other heals, deaths, a close.

The replacement's constructor waits at a gate, or acts, so that the moment is always the same one.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_worker import HANG, VICTIM, Background, Faulty, kill, wait_for

import ray_shm
from ray_shm import ActorGroup, GroupClosedError, StartError

OTHERS = [0, 2]
RANKS = [0, 1, 2]
_PART_OF_RING = 100 << 10  # bytes of arguments that travel in the request ring, which has 1 MiB


class Gate:
    """Where the constructor of the victim's replacement waits."""

    def __init__(self, orders: Path) -> None:
        self.orders = orders
        self._gate = orders.with_name("gate")
        self._reached = orders.with_name("gate.reached")

    def shut(self) -> None:
        self.orders.write_text(f"await {self._gate}")

    def await_arrival(self) -> None:
        wait_for(self._reached.exists, "the replacement's constructor")

    def open(self) -> None:
        self._gate.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "orders")
    yield gate
    gate.open()


def launch(gate: Gate, auto_heal: bool = False) -> ActorGroup:
    return ray_shm.launch(Faulty, num_workers=3, args=(str(gate.orders),), auto_heal=auto_heal)


def test_calls_to_the_living_and_other_heals_do_not_wait_for_the_constructor(ray_local: None, gate: Gate) -> None:
    with launch(gate) as group:
        assert group.heal(-1) == []
        kill(group, VICTIM)
        for none in (0, -1, -math.inf):
            with pytest.raises(StartError, match="no time was left"):
                group.heal(none)
        gate.shut()
        healing = Background(lambda: group.heal(math.inf))
        gate.await_arrival()
        for none in (0, -1, -math.inf):
            with pytest.raises(StartError, match="another heal"):
                group.heal(none)
        for _ in range(30):  # three times what fits into the ring
            group.collective_rpc("keep", HANG, (bytes(_PART_OF_RING),), target_ranks=OTHERS)
        gate.open()
        assert healing.result() == [VICTIM]
        assert group.collective_rpc("rank", HANG) == RANKS


def test_all_heals_end_with_the_group(ray_local: None, gate: Gate) -> None:
    group = launch(gate)
    kill(group, VICTIM)
    gate.shut()
    heals = [Background(group.heal)]
    gate.await_arrival()
    heals.append(Background(group.heal))
    group.close(0.1)
    assert [type(heal.result()) for heal in heals] == [GroupClosedError] * 2


@pytest.mark.slow
def test_calls_end_with_the_group_though_another_rank_dies_while_it_waits_for_a_heal(
    ray_local: None, gate: Gate
) -> None:
    group = launch(gate, auto_heal=True)
    gate.shut()
    os.kill(group.workers[VICTIM].pid, signal.SIGKILL)
    gate.await_arrival()
    calling = Background(lambda: group.collective_rpc("rank"))
    closing = Background(lambda: group.close(HANG))
    assert type(calling.result()) is GroupClosedError
    kill(group, 2)
    with pytest.raises(GroupClosedError):
        group.collective_rpc("rank", HANG)
    gate.open()
    assert closing.result() is None


def test_calls_wait_for_all_ranks_where_another_one_dies_during_a_heal(
    ray_local: None, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with launch(gate, auto_heal=True) as group:
        gate.orders.write_text(f"kill {group.workers[2].pid}")
        kill(group, VICTIM)
        wait_for(lambda: group.stats().heals, "the first heal")
        wait_for(lambda: group.workers[2].state == "dead" or group.stats().heals == 2, "the death of rank 2")
        assert group.collective_rpc("rank", HANG) == RANKS
        assert group.stats().heals == 2
        kill(group, 0)
        group.heal()  # or the group has been faster
        assert group.collective_rpc("rank", HANG) == RANKS
    assert "ranks [2] had died" in caplog.text
    assert "ranks [] had died" not in caplog.text
