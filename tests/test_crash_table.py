"""Where a worker fails, and how: every cell with the error that the caller gets, and what the group is good for then.

The group has three ranks, of which rank 1 fails. What a cell leaves: USABLE (at once, all ranks, the same processes),
HEALABLE (the other ranks at once; heal() replaces the one, and nothing of the others), or nothing at all.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from faulty_worker import (
    HANG,
    OTHERS,
    RANKS,
    SIZE,
    SUM,
    VICTIM,
    Faulty,
    OnArrival,
    check_for_leaks,
    pids,
    tells_exit_status,
    wait_for,
    wait_until_in_collective,
    wait_until_stopped,
)

import ray_shm
from ray_shm import (
    ActorGroup,
    GroupClosedError,
    PeerLostError,
    RemoteError,
    RpcError,
    RpcTimeoutError,
    Scatter,
    StartError,
    WorkerDiedError,
)

USABLE, HEALABLE, CLOSED = "usable", "healable", "closed"
START_TIMEOUT = 10.0  # seconds, of a start that a stopped worker holds up


@dataclass(frozen=True)
class Expected:
    """error: what the call raises. failed: rank → type and words of its failure. late: ranks, None: any of the others.

    after: what remains. first: whether the call itself returns, and the next one meets this.
    """

    error: type[Exception] | tuple[type[Exception], ...] | None
    failed: dict[int, tuple[type[Exception], str]]
    late: list[int] | None
    after: str
    first: bool = False


def raised(error: type[Exception], words: str = "told to fail") -> Expected:
    return Expected(RpcError, {VICTIM: (error, words)}, [], USABLE)


def died(words: str, late: list[int] | None = None, first: bool = False) -> Expected:
    return Expected(RpcError, {VICTIM: (WorkerDiedError, words)}, late, HEALABLE, first)


def stopped(late: list[int], first: bool = False) -> Expected:
    return Expected(RpcTimeoutError, {}, late, USABLE, first)


KILLED, EXITED = "killed by signal 9 (SIGKILL)", "exited with code 3"
FINE = Expected(None, {}, [], USABLE)
VICTIMS = dict.fromkeys(OTHERS, (PeerLostError, f"rank {VICTIM} raised ValueError"))
# Whether the death or the close is first noticed is open; either ends the call.
CLOSED_ON = Expected((RpcError, GroupClosedError), {}, None, CLOSED)

TABLE: dict[tuple[str, str], Expected] = {
    ("unpickling the call", "exception"): raised(ValueError),
    ("unpickling the call", "SIGKILL"): died(KILLED),
    ("unpickling the call", "SIGSTOP"): stopped([VICTIM]),
    ("unpickling the call", "os._exit"): died(EXITED),
    ("before the method", "exception"): raised(ValueError),
    ("before the method", "SIGKILL"): died(KILLED),
    ("before the method", "SIGSTOP"): stopped([VICTIM]),
    ("before the method", "os._exit"): died(EXITED),
    ("inside the method", "exception"): raised(ValueError),
    ("inside the method", "SIGKILL"): died(KILLED),
    ("inside the method", "SIGSTOP"): stopped([VICTIM]),
    ("inside the method", "os._exit"): died(EXITED),
    ("pickling the result", "exception"): raised(RemoteError, "cannot be pickled: told to fail"),
    ("pickling the result", "SIGKILL"): died(KILLED),
    ("pickling the result", "SIGSTOP"): stopped([VICTIM]),
    ("pickling the result", "os._exit"): died(EXITED),
    ("after the reply", "exception"): FINE,
    ("after the reply", "SIGKILL"): died(KILLED, first=True),
    ("after the reply", "SIGSTOP"): stopped([VICTIM], first=True),
    ("after the reply", "os._exit"): died(EXITED, first=True),
    ("inside a collective", "exception"): Expected(
        RpcError, {VICTIM: (ValueError, "told to fail"), **VICTIMS}, [], USABLE
    ),
    ("inside a collective", "SIGKILL"): died(KILLED, OTHERS),
    ("inside a collective", "SIGSTOP"): stopped(RANKS),
    ("inside a collective", "os._exit"): died(EXITED, OTHERS),
    ("in the constructor", "exception"): Expected(
        StartError, {VICTIM: (ValueError, "failed in its constructor: ValueError: told to fail")}, None, CLOSED
    ),
    ("in the constructor", "SIGKILL"): Expected(
        StartError, {VICTIM: (StartError, "failed in start: StartError: its process died")}, None, CLOSED
    ),
    ("in the constructor", "SIGSTOP"): Expected(StartError, {}, None, CLOSED),
    ("in the constructor", "os._exit"): Expected(
        StartError, {VICTIM: (StartError, "failed in start: StartError: its process died")}, None, CLOSED
    ),
    ("during close", "exception"): Expected(RpcError, {VICTIM: (ValueError, "told to fail")}, [], CLOSED),
    ("during close", "SIGKILL"): CLOSED_ON,
    ("during close", "SIGSTOP"): Expected(GroupClosedError, {}, None, CLOSED),
    ("during close", "os._exit"): CLOSED_ON,
}


@pytest.fixture(scope="module")
def group(ray_local: None) -> Iterator[ActorGroup]:
    with ray_shm.launch(Faulty, num_workers=SIZE, groups={"tp": [RANKS]}) as group:
        group.collective_rpc("rank", non_block=True).add_done_callback(lambda future: None)  # its thread stays
        yield group


@pytest.fixture(autouse=True)
def no_leaks(group: ActorGroup) -> Iterator[None]:
    yield from check_for_leaks(group)


@pytest.fixture(autouse=True)
def whole(group: ActorGroup) -> Iterator[None]:
    """Whatever a test left: the next one gets a whole group."""
    yield
    group.heal()


# os._exit goes the way of SIGKILL but for the words that explain it.
SLOW = [key for key in TABLE if key[1] == "os._exit" and key[0] != "inside the method"]
SLOW += [("in the constructor", "SIGSTOP")]
CASES = [pytest.param(*key, marks=[pytest.mark.slow] if key in SLOW else []) for key in TABLE]


@pytest.mark.parametrize(("where", "what"), CASES, ids=lambda word: word.replace(" ", "-"))
def test_a_worker_that_fails(group: ActorGroup, tmp_path: Path, where: str, what: str) -> None:
    expected = TABLE[where, what]
    gate = tmp_path / "gate"
    if where == "in the constructor":
        fail_in_the_constructor(what, tmp_path / "orders", expected)
    elif where == "during close":
        fail_during_close(what, gate, expected)
    else:
        fail_in_a_call(group, where, what, gate, expected)


# ---- a group that goes on -------------------------------------------------------------------------------------------


def fail_in_a_call(group: ActorGroup, where: str, what: str, gate: Path, expected: Expected) -> None:
    before = pids(group)
    future = CALLS[where](group, what, gate)
    if where == "inside a collective":
        wait_until_in_collective(group, *OTHERS)
        gate.touch()
    if where == "after the reply":
        assert future.result(HANG) == RANKS
        gate.touch()
        await_the_act(what, group, before[VICTIM])
    if what == "SIGSTOP":
        future = group.collective_rpc("rank", non_block=True) if expected.first else future
        meet_a_stopped_rank(group, future, before[VICTIM], expected)
    elif expected.error is not None:
        with pytest.raises(RpcError) as info:
            group.collective_rpc("rank", HANG) if expected.first else future.result(HANG)
        check_failures(info.value, expected, before)
    if expected.after == HEALABLE:
        check_healing(group, before)
    assert group.collective_rpc("rank", HANG) == RANKS
    if where == "inside a collective":
        assert group.collective_rpc("total", HANG) == [SUM] * SIZE
    assert [pid for rank, pid in enumerate(pids(group)) if rank in OTHERS] == [before[rank] for rank in OTHERS]
    assert (pids(group)[VICTIM] == before[VICTIM]) == (expected.after == USABLE)


def on_victim(value: Any) -> Scatter:
    return Scatter([value if rank == VICTIM else None for rank in RANKS])


def look_up_the_method(group: ActorGroup, what: str, gate: Path) -> Future[Any]:
    group.collective_rpc("arm", HANG, (what,), target_ranks=[VICTIM])
    return group.collective_rpc("trap", non_block=True)


CALLS: dict[str, Callable[[ActorGroup, str, Path], Future[Any]]] = {
    "unpickling the call": lambda group, what, gate: group.collective_rpc(
        "echo", args=(on_victim(OnArrival(what)),), non_block=True
    ),
    "before the method": look_up_the_method,
    "inside the method": lambda group, what, gate: group.collective_rpc(
        "perform", args=(on_victim(what),), non_block=True
    ),
    "pickling the result": lambda group, what, gate: group.collective_rpc(
        "give", args=(on_victim(what),), non_block=True
    ),
    "after the reply": lambda group, what, gate: group.collective_rpc(
        "later", args=(on_victim(what), str(gate)), non_block=True
    ),
    "inside a collective": lambda group, what, gate: group.collective_rpc(
        "total", args=(on_victim(what), str(gate)), non_block=True
    ),
}


def await_the_act(what: str, group: ActorGroup, pid: int) -> None:
    if what == "SIGSTOP":
        wait_until_stopped(pid)
    elif what != "exception":
        wait_for(lambda: group.workers[VICTIM].state == "dead", f"the death of process {pid}")


def meet_a_stopped_rank(group: ActorGroup, future: Future[Any], pid: int, expected: Expected) -> None:
    wait_until_stopped(pid)
    try:
        if expected.late == [VICTIM]:  # the others' replies came before the ones to this
            assert group.collective_rpc("rank", HANG, target_ranks=OTHERS) == OTHERS
        dropped = group.stats().dropped_replies
        with pytest.raises(RpcTimeoutError) as info:
            future.result(0.2)
        assert info.value.late_ranks == expected.late
        assert sorted(info.value.results) == [rank for rank in RANKS if rank not in expected.late]
        assert f"pid {pid}" in str(info.value)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert group.collective_rpc("rank", HANG) == RANKS
    assert group.stats().dropped_replies == dropped + len(expected.late)


def check_failures(error: RpcError, expected: Expected, before: list[int]) -> None:
    assert sorted(error.failures) == sorted(expected.failed)
    for rank, (kind, words) in expected.failed.items():
        failure = error.failures[rank]
        assert type(failure) is kind
        if isinstance(failure, WorkerDiedError):
            assert (failure.rank, failure.pid) == (rank, before[rank])
            words = words if tells_exit_status() else ""
        assert words in str(failure)
    assert error.root_cause is error.failures[VICTIM]
    if expected.late is None:
        assert set(error.late_ranks) <= set(OTHERS)
    else:
        assert error.late_ranks == expected.late


def check_healing(group: ActorGroup, before: list[int]) -> None:
    with pytest.raises(RpcError, match="was not sent") as info:
        group.collective_rpc("rank", HANG)
    assert list(info.value.failures) == [VICTIM]
    assert group.collective_rpc("rank", HANG, target_ranks=OTHERS) == OTHERS
    group.collective_rpc("keep", HANG, (before,), target_ranks=OTHERS)
    assert group.heal() == [VICTIM]
    assert group.collective_rpc("kept_value", HANG) == [before, None, before]


# ---- a group of its own, that ends ----------------------------------------------------------------------------------


def fail_in_the_constructor(what: str, orders: Path, expected: Expected) -> None:
    orders.write_text(what)
    free = ray.available_resources()
    with pytest.raises(StartError) as info:
        ray_shm.launch(
            Faulty,
            num_workers=2,
            args=(str(orders),),
            cpus_per_worker=1,
            start_timeout=START_TIMEOUT if what == "SIGSTOP" else HANG,
        )
    error = info.value
    assert f"rank {VICTIM} (pid " in str(error)
    assert sorted(error.failures) == sorted(expected.failed)
    for rank, (kind, words) in expected.failed.items():
        assert type(error.failures[rank]) is kind
        assert words in str(error)
    if not expected.failed:
        assert f"did not start within {START_TIMEOUT} s" in str(error)
    wait_for(lambda: ray.available_resources().get("CPU") == free.get("CPU"), "the CPUs are free again")


def fail_during_close(what: str, gate: Path, expected: Expected) -> None:
    group = ray_shm.launch(Faulty, num_workers=2)
    args = (Scatter([None, what]), str(gate))
    future = group.collective_rpc("perform_at_gate", args=args, non_block=True)
    victim = group.workers[VICTIM].pid
    closer = threading.Thread(target=group.close, args=(1.0 if what == "SIGSTOP" else HANG,))
    closer.start()
    try:
        wait_for(lambda: "closed" in repr(group), "close has begun")
    finally:
        gate.touch()
        closer.join(HANG)
    assert not closer.is_alive()
    assert expected.error is not None
    with pytest.raises(expected.error) as info:
        future.result(HANG)
    if expected.failed:
        assert sorted(info.value.failures) == [VICTIM]
        assert isinstance(info.value.failures[VICTIM], ValueError)
    with pytest.raises(GroupClosedError):
        group.collective_rpc("rank")
    assert not Path(f"/proc/{victim}").exists()
