"""What each fault does to callers and to the group, row by row, with real signals on real Ray actors.

| fault                                                    | shown in                                                |
|----------------------------------------------------------|---------------------------------------------------------|
| worker raises; SystemExit, KeyboardInterrupt; `except*`  | test_rpc.py; here: alike failures, deep recursion       |
| unpicklable argument, result, exception                  | test_rpc.py                                             |
| any step of a call × exception, SIGKILL, SIGSTOP, exit   | test_crash_table.py                                     |
| worker killed: segfault, stack overflow, out of memory   | here                                                    |
| several deaths, rank 0, deaths during heal, auto_heal    | here                                                    |
| calls, other heals, a close while a rank is replaced     | test_healing.py                                         |
| rank raises while others sit in a coordinator collective | test_crash_table.py, test_coordinator_release.py; here: |
|                                                          | with nobody looking, after timeouts and cancels         |
| worker stuck                                             | test_crash_table.py (stopped); here: at work            |
| driver or raylet killed                                  | test_lifecycle.py, test_launch.py                       |
| node lost, network cut                                   | test_two_ray_hosts.py (slow); queues: test_two_hosts.py |
| memory too small                                         | test_queue_memory.py                                    |
| stranger on a TCP port                                   | test_zmq_strangers.py                                   |

Interleavings of all this: test_call_property.py.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_worker import (
    HANG,
    OTHERS,
    RANKS,
    SIZE,
    SUM,
    VICTIM,
    Faulty,
    await_gate,
    check_for_leaks,
    kill,
    pids,
    tells_exit_status,
    wait_for,
    wait_until_in_collective,
)

import ray_shm
from ray_shm import (
    ActorGroup,
    PeerLostError,
    RpcCancelledError,
    RpcError,
    RpcTimeoutError,
    Scatter,
    StartError,
    WorkerDiedError,
)


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the constructor of the victim's replacement does, if this file exists."""
    return tmp_path_factory.mktemp("orders") / "constructor"


@pytest.fixture(scope="module")
def group(ray_local: None, orders: Path) -> Iterator[ActorGroup]:
    with ray_shm.launch(Faulty, num_workers=SIZE, args=(str(orders),), groups={"tp": [RANKS]}) as group:
        group.collective_rpc("rank", non_block=True).add_done_callback(lambda future: None)  # its thread stays
        yield group


@pytest.fixture(autouse=True)
def no_leaks(group: ActorGroup) -> Iterator[None]:
    yield from check_for_leaks(group)


@pytest.fixture(autouse=True)
def whole(no_leaks: None, group: ActorGroup) -> Iterator[None]:
    """Every test gets a whole group, and leaves one that answers, once healed."""
    assert group.collective_rpc("rank", HANG) == RANKS
    yield
    group.heal()
    assert group.collective_rpc("rank", HANG) == RANKS


def on_victim(value: Any) -> Scatter:
    return Scatter([value if rank == VICTIM else None for rank in RANKS])


# ---- a worker raises ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_handler_that_raises_between_two_calls_is_logged(group: ActorGroup, tmp_path: Path) -> None:
    def install(worker: Faulty, path: str) -> None:
        import logging

        class Log(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                worker.kept = (record.getMessage(), str(record.exc_info and record.exc_info[1]))
                Path(path).touch()

        def raise_error(number: int, frame: Any) -> None:
            raise ValueError("in a signal handler")

        worker.log = Log()  # type: ignore[attr-defined]
        logging.getLogger("ray_shm").addHandler(worker.log)  # type: ignore[attr-defined]
        signal.signal(signal.SIGUSR1, raise_error)

    def remove(worker: Faulty) -> Any:
        import logging

        logging.getLogger("ray_shm").removeHandler(worker.log)  # type: ignore[attr-defined]
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        return worker.kept

    logged = tmp_path / "logged"
    before = pids(group)
    group.collective_rpc(install, HANG, (str(logged),), target_ranks=[VICTIM])
    wait_for(lambda: "in await_message" in group.stacks([VICTIM])[VICTIM], "it waits for the next call")
    os.kill(before[VICTIM], signal.SIGUSR1)
    wait_for(logged.exists, "it is logged")
    text = f"rank {VICTIM}: a signal handler raised while no call ran; the worker goes on"
    assert group.collective_rpc(remove, HANG, target_ranks=[VICTIM]) == [(text, "in a signal handler")]
    assert pids(group) == before


def test_a_call_that_is_being_unpickled_has_no_name_yet(group: ActorGroup, gate: Path) -> None:
    class AtGate:
        def __reduce__(self) -> Any:
            return await_gate, (str(gate),)

    future = group.collective_rpc("echo", HANG, (on_victim(AtGate()),), non_block=True)
    wait_for(lambda: group.status()[VICTIM].state == "running", "it unpickles")
    assert group.status()[VICTIM].method == ""
    with pytest.raises(RpcTimeoutError, match=r"running call \d+ \(being unpickled\) for"):
        group.collective_rpc("rank", 0.01, target_ranks=[VICTIM])
    gate.touch()
    assert future.result() == RANKS


def test_alike_failures_are_told_once(group: ActorGroup) -> None:
    def fail(worker: Faulty) -> None:
        raise KeyError("lost") if worker.rank() == VICTIM else ValueError("spoilt")

    with pytest.raises(RpcError) as info:
        group.collective_rpc(fail, HANG)
    text = str(info.value)
    assert "failed on 3 of 3 ranks: " in text
    assert "ranks 0,2: ValueError: spoilt (test_failure_model.py:" in text
    assert "rank 1: KeyError: 'lost'" in text
    assert text.count("spoilt") == 1


def test_endless_recursion(group: ActorGroup) -> None:
    def dive(worker: Faulty) -> Any:
        return dive(worker)

    with pytest.raises(RpcError) as info:
        group.collective_rpc(dive, HANG)
    assert {rank: type(failure) for rank, failure in info.value.failures.items()} == dict.fromkeys(
        RANKS, RecursionError
    )


def test_no_memory_for_what_a_method_wants(group: ActorGroup) -> None:
    def want_more_than_there_is(worker: Faulty) -> None:
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
        try:
            bytearray(1 << 30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    before = pids(group)
    with pytest.raises(RpcError) as info:
        group.collective_rpc(want_more_than_there_is, HANG, target_ranks=[VICTIM])
    assert isinstance(info.value.failures[VICTIM], MemoryError)
    assert pids(group) == before


def test_a_property_that_raises_does_not_end_the_worker(group: ActorGroup) -> None:
    group.collective_rpc("arm", HANG, ("exception",))
    with pytest.raises(RpcError) as info:
        group.collective_rpc("tarp", HANG)
    assert "has no method 'tarp'; it has: arm, echo, " in str(info.value)
    assert {type(failure) for failure in info.value.failures.values()} == {AttributeError}
    group.collective_rpc("arm", HANG, (None,))


# ---- a worker dies --------------------------------------------------------------------------------------------------


def segfault(worker: Faulty) -> None:
    ctypes.string_at(0)


def overflow_the_stack(worker: Faulty) -> None:
    """glibc parses nested parentheses recursively, as deep as they are."""
    ctypes.CDLL(None).regcomp(ctypes.create_string_buffer(4096), b"(" * 10**7, 1)


def abort(worker: Faulty) -> None:
    os.abort()


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (segfault, "killed by signal 11 (SIGSEGV)"),
        (overflow_the_stack, "killed by signal 11 (SIGSEGV)"),
        (abort, "killed by signal 6 (SIGABRT)"),
    ],
    ids=["segfault", "stack-overflow", "abort"],
)
def test_a_method_that_crashes_the_process(group: ActorGroup, end: Any, words: str) -> None:
    before = pids(group)
    with pytest.raises(RpcError) as info:
        group.collective_rpc(end, HANG, target_ranks=[VICTIM])
    death = info.value.failures[VICTIM]
    assert isinstance(death, WorkerDiedError)
    assert (death.rank, death.pid) == (VICTIM, before[VICTIM])
    assert words in str(death) or not tells_exit_status()
    assert group.collective_rpc("rank", HANG, target_ranks=OTHERS) == OTHERS


def test_killed_from_outside_as_the_kernel_does_when_memory_is_short(group: ActorGroup, gate: Path) -> None:
    future = group.collective_rpc("hold", args=(str(gate),), non_block=True)
    wait_for(lambda: {row.state for row in group.status()} == {"running"}, "all ranks at work")
    os.kill(group.workers[VICTIM].pid, signal.SIGKILL)
    with pytest.raises(RpcError) as info:
        future.result(HANG)
    death = info.value.root_cause
    assert isinstance(death, WorkerDiedError)
    assert death.signal == signal.SIGKILL or not tells_exit_status()
    assert info.value.late_ranks == OTHERS  # no grace after a death
    assert "running 'hold'" in str(info.value)  # where they stand
    gate.touch()


def test_two_ranks_die_at_once_and_the_survivor_keeps_what_it_has(group: ActorGroup) -> None:
    group.collective_rpc("keep", HANG, ("a loaded model",))
    before = pids(group)
    kill(group, 0, 1)
    with pytest.raises(RpcError) as info:
        group.collective_rpc("rank", HANG)
    assert sorted(info.value.failures) == [0, 1]
    assert group.heal() == [0, 1]
    assert group.collective_rpc("kept_value", HANG) == [None, None, "a loaded model"]
    assert [pid in before for pid in pids(group)] == [False, False, True]
    assert group.heal() == []


def test_rank_0_dies_which_serves_the_store(group: ActorGroup) -> None:
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE
    kill(group, 0)
    assert group.heal() == [0]
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


def check_that_collectives_fail_at_once(group: ActorGroup, ranks: list[int]) -> str:
    with pytest.raises(RpcError) as info:
        group.collective_rpc("total", HANG, target_ranks=ranks)
    assert {type(failure) for failure in info.value.failures.values()} == {PeerLostError}
    # A replacement may still import torch when its time is up; it does not get stuck either.
    assert sorted([*info.value.failures, *info.value.late_ranks]) == ranks
    assert group.collective_rpc("rank", HANG, target_ranks=ranks) == ranks
    return str(info.value)


def test_a_collective_with_a_dead_rank_fails_at_once_until_it_is_healed(group: ActorGroup) -> None:
    kill(group, VICTIM)
    assert f"rank {VICTIM} is gone" in check_that_collectives_fail_at_once(group, OTHERS)
    # Another failure, after which groups are formed again, does not make it one to wait for.
    with pytest.raises(RpcError):
        group.collective_rpc("perform", HANG, (Scatter(["exception", None]),), target_ranks=OTHERS)
    check_that_collectives_fail_at_once(group, OTHERS)
    assert group.heal() == [VICTIM]
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


def test_a_rank_dies_inside_a_collective_that_waits_for_another(group: ActorGroup, gate: Path) -> None:
    what = Scatter([None, None, "SIGSTOP"])  # not done: the gate stays shut
    future = group.collective_rpc("total", args=(what, str(gate)), non_block=True)
    wait_until_in_collective(group, 0, VICTIM)
    os.kill(group.workers[VICTIM].pid, signal.SIGKILL)
    with pytest.raises(RpcError) as info:
        future.result(HANG)
    assert list(info.value.failures) == [VICTIM]
    assert group.collective_rpc("rank", HANG, target_ranks=[0]) == [0]  # released
    os.kill(group.workers[2].pid, signal.SIGKILL)
    wait_for(lambda: group.workers[2].state == "dead", "the death of rank 2")
    assert group.heal() == [VICTIM, 2]
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


def test_heal_while_the_others_are_busy(group: ActorGroup, gate: Path) -> None:
    busy = group.collective_rpc("hold", args=(str(gate),), target_ranks=OTHERS, non_block=True)
    kill(group, VICTIM)
    assert group.heal() == [VICTIM]
    assert group.collective_rpc("rank", HANG, target_ranks=[VICTIM]) == [VICTIM]
    assert not busy.done()
    gate.touch()
    assert busy.result(HANG) == OTHERS
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


@pytest.mark.parametrize("order", ["exception", "SIGKILL"])
def test_a_replacement_whose_constructor_fails(group: ActorGroup, orders: Path, order: str) -> None:
    before = pids(group)
    kill(group, VICTIM)
    orders.write_text(order)
    try:
        with pytest.raises(StartError) as info:
            group.heal()
        assert f"rank {VICTIM} (pid " in str(info.value)
        assert ("told to fail" if order == "exception" else "its process died") in str(info.value)
        with pytest.raises(RpcError, match="was not sent"):
            group.collective_rpc("rank", HANG)
        assert group.collective_rpc("rank", HANG, target_ranks=OTHERS) == OTHERS
    finally:
        orders.unlink()
    assert group.heal() == [VICTIM]
    assert group.collective_rpc("rank", HANG) == RANKS
    assert [pids(group)[rank] for rank in OTHERS] == [before[rank] for rank in OTHERS]


@pytest.mark.slow
def test_a_rank_dies_while_another_one_is_replaced(group: ActorGroup, orders: Path) -> None:
    kill(group, VICTIM)
    orders.write_text(f"kill {group.workers[2].pid}")
    try:
        assert group.heal() == [VICTIM]
    finally:
        orders.unlink()
    wait_for(lambda: group.workers[2].state == "dead", "the death of rank 2")
    assert group.collective_rpc("rank", HANG, target_ranks=[0, 1]) == [0, 1]
    check_that_collectives_fail_at_once(group, [0, 1])
    assert group.heal() == [2]
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


def test_two_threads_heal_at_once(group: ActorGroup) -> None:
    kill(group, VICTIM)
    healed: list[list[int]] = []
    threads = [threading.Thread(target=lambda: healed.append(group.heal())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert sorted(healed) == [[], [VICTIM]]


def test_auto_heal_and_callbacks(group: ActorGroup) -> None:
    """Calls to a dead rank wait for its replacement; every death is told once, with its cause."""
    told: list[WorkerDiedError] = []
    with ray_shm.launch(Faulty, num_workers=2, auto_heal=True) as own:
        end = own.on_worker_death(told.append)
        for rank in (1, 0):
            victim = own.workers[rank].pid
            kill(own, rank)
            assert own.collective_rpc("rank", HANG) == [0, 1]
            wait_for(lambda: told, "the callback")
            death = told.pop()
            assert (death.rank, death.pid) == (rank, victim)
            assert death.signal == signal.SIGKILL or not tells_exit_status()
            assert victim not in pids(own)
        end()
        kill(own, 1)
        assert own.collective_rpc("rank", HANG) == [0, 1]
        assert own.stats().heals == 3
    assert told == []


@pytest.mark.slow
def test_twenty_successive_kills_heal_twenty_times(group: ActorGroup) -> None:
    heals = group.stats().heals
    for number in range(20):
        rank = number % SIZE
        others = [pid for r, pid in enumerate(pids(group)) if r != rank]
        kill(group, rank)
        assert group.heal() == [rank]
        assert [pid for r, pid in enumerate(pids(group)) if r != rank] == others
        assert group.collective_rpc("total", HANG) == [SUM] * SIZE
    assert group.stats().heals == heals + 20


# ---- a rank fails while others sit in a collective ------------------------------------------------------------------


def start_total(group: ActorGroup, gate: Path, **options: Any) -> Any:
    """A collective that the victim fails to join; it raises once the gate opens."""
    future = group.collective_rpc("total", args=(on_victim("exception"), str(gate)), non_block=True, **options)
    wait_until_in_collective(group, *OTHERS)
    return future


def test_released_behind_a_call_that_somebody_else_waits_for(group: ActorGroup, gate: Path) -> None:
    future = start_total(group, gate)
    gate.touch()
    assert group.collective_rpc("rank", HANG) == RANKS
    error = future.exception(HANG)
    assert isinstance(error, RpcError)
    assert isinstance(error.root_cause, ValueError)
    assert sorted(error.failures) == RANKS
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


@pytest.mark.slow
def test_released_though_nobody_looked_for_longer_than_the_grace(ray_local: None, gate: Path) -> None:
    with ray_shm.launch(Faulty, num_workers=SIZE, groups={"tp": [RANKS]}, failure_grace=0) as own:
        future = start_total(own, gate)
        gate.touch()
        error = future.exception(HANG)
        assert isinstance(error, RpcError)
        assert list(error.failures) == [VICTIM]
        assert own.collective_rpc("rank", HANG) == RANKS
        assert own.collective_rpc("total", HANG) == [SUM] * SIZE


def test_released_after_the_callers_timeout(group: ActorGroup, gate: Path) -> None:
    future = start_total(group, gate)
    assert isinstance(future.exception(0.05), RpcTimeoutError)
    gate.touch()
    wait_for(lambda: group.status()[VICTIM].state == "idle", "the victim has failed")
    # The caller is gone and its error with it; the next one finds the ranks, and a timeout of its own frees them not.
    assert group.collective_rpc("rank", HANG) == RANKS
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE


def test_a_cancelled_collective(group: ActorGroup, gate: Path) -> None:
    """A rank that waits for others is not interrupted: it is released with them."""
    before = pids(group)
    future = start_total(group, gate)
    assert future.cancel()
    assert isinstance(future.exception(), RpcCancelledError)
    assert group.collective_rpc("rank", HANG) == RANKS
    assert group.collective_rpc("total", HANG) == [SUM] * SIZE
    assert pids(group) == before


# ---- a worker is stuck ----------------------------------------------------------------------------------------------


def test_a_rank_that_is_stuck_is_named_and_its_late_reply_dropped(group: ActorGroup, gate: Path) -> None:
    holding = group.collective_rpc("hold", args=(str(gate),), target_ranks=[VICTIM], non_block=True)
    future = group.collective_rpc("rank", non_block=True)
    assert group.collective_rpc("rank", HANG, target_ranks=OTHERS) == OTHERS
    with pytest.raises(RpcTimeoutError) as info:
        future.result(0.05)
    assert info.value.late_ranks == [VICTIM]
    assert info.value.results == {0: 0, 2: 2}
    assert f"pid {group.workers[VICTIM].pid}" in str(info.value)
    assert "running 'hold' (call " in str(info.value)
    dropped = group.stats().dropped_replies
    gate.touch()
    assert holding.result(HANG) == [VICTIM]
    assert group.collective_rpc("rank", HANG) == RANKS
    assert group.stats().dropped_replies == dropped + 1
