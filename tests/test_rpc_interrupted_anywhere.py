"""Ctrl-C at each step of a call: the group answers the next one, and no worker is left waiting."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from injection import wait_for
from interrupts import Interrupted, interrupted

import ray_shm
from ray_shm import ActorGroup

HANG = 30.0  # seconds
STEPS = 20_000  # more than any of these calls has

pytestmark = pytest.mark.usefixtures("ray_local", "lost")


class Worker:
    def echo(self, value: Any) -> Any:
        return value

    def total(self, array: Any) -> int:
        return int(array.sum())

    def count(self, up_to: int) -> Iterator[int]:
        yield from range(up_to)


@pytest.fixture(scope="module")
def group() -> Iterator[ActorGroup]:
    with ray_shm.launch(Worker, num_workers=2) as group:
        yield group


def call(group: ActorGroup) -> Any:
    return group.collective_rpc("echo", HANG, (1,))


def call_without_waiting(group: ActorGroup) -> Any:
    return group.collective_rpc("echo", args=(1,), non_block=True).result(HANG)


def scatter(group: ActorGroup) -> Any:
    return group.collective_rpc("echo", HANG, (ray_shm.Scatter([1, 2]),))


def call_with_a_large_argument(group: ActorGroup) -> Any:
    return group.collective_rpc("total", HANG, (np.ones(300_000, np.uint8),))


def stream(group: ActorGroup) -> Any:
    return list(group.stream("count", HANG, (40,)))  # more than a worker sends unasked


def _where(broken: BaseException | None) -> str:
    if broken is None:
        return ""
    return " > ".join(f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(broken.__traceback__))


@pytest.mark.parametrize(
    ("work", "stride"),
    [
        (call, 1),
        (call_without_waiting, 1),
        (scatter, 1),
        (call_with_a_large_argument, 13),
        (stream, 31),
        pytest.param(call_with_a_large_argument, 1, marks=pytest.mark.slow),
        pytest.param(stream, 1, marks=pytest.mark.slow),
    ],
)
def test_a_group_answers_after_an_interrupt_anywhere(
    group: ActorGroup, work: Callable[[ActorGroup], Any], stride: int
) -> None:
    for at in range(0, STEPS, stride):
        where = _where(interrupted(at, lambda: work(group)))  # its traceback, which may hold a stream, is not kept
        try:
            assert group.collective_rpc("echo", HANG, (at,)) == [at, at]
        except BaseException as exc:
            exc.add_note(f"after an interrupt at step {at}, in {where}")
            raise
        if not where:
            break
    assert 50 < at < STEPS - stride


def test_a_close_that_is_interrupted_before_it_has_begun_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = ray_shm.launch(Worker, num_workers=1)
    [pid] = [worker.pid for worker in group.workers]

    def refuse() -> None:
        raise Interrupted

    monkeypatch.setattr(group._runtime.dispatcher, "refuse_calls", refuse)
    with pytest.raises(Interrupted):
        group.close()
    wait_for(lambda: not psutil.pid_exists(pid), "the worker has ended")
