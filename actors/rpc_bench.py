"""``ray-shm bench rpc``: calls to a group of workers, beside the other ways to call Ray actors, in one run.

Runs in the driver. For each number of workers all peers (rpc_peers.py) are open at once and take turns in short rounds,
so that what else the machine does meets all of them alike. This file decides what is measured and how often;
rpc_events.py times deaths and starts, rpc_report.py prints.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from ray_shm.actors import rpc_events
from ray_shm.actors.rpc_peers import (
    GRAPH_IN_FLIGHT,
    OURS,
    OURS_ACTOR,
    PAYLOAD,
    PEERS,
    PUT_FROM,
    Caller,
    Peer,
    UnavailableError,
)
from ray_shm.actors.rpc_report import TITLES, LeftOut, Report, make_row
from ray_shm.size_text import size_text

SECTIONS = tuple(TITLES)
CALL_SECTIONS = ("noop", "paced", "hog", "pipelined", "sizes")  # in this order; the rest opens no peers
WORKERS = (1, 2, 4, 8)
FULL_WORKERS = (*WORKERS, 16, 32)
PAYLOADS = (100, 64 << 10, 1 << 20, 16 << 20, 256 << 20)  # bytes
LARGE = 1 << 20  # bytes; from here on two calls warm up, and none lead in
WARM_UP_LARGE, LEAD_IN = 2, 5  # calls
PACE = 1e-3  # seconds from one call to the next

Turn = Callable[[Caller], list[float]]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        sections: of SECTIONS. workers: of "noop". group: workers in the other sections; "pipelined" has 1, too.
        payloads: bytes, of "sizes". calls: at most, per peer and cell. seconds: per peer and cell, about.
        rounds: in which the peers take turns; each has at least one call, or burst, of every peer. burst: calls in
        flight at once. warm_up: calls left out. kills, launches: of each peer.
    """

    sections: Sequence[str] = SECTIONS
    workers: Sequence[int] = WORKERS
    group: int = 4
    payloads: Sequence[int] = PAYLOADS
    calls: int = 2000
    seconds: float = 4.0
    rounds: int = 10
    burst: int = 1000
    warm_up: int = 50
    kills: int = 20
    launches: int = 5

    def counts(self, section: str) -> set[int]:
        """The numbers of workers that a section is measured with."""
        if section == "noop":
            return set(self.workers)
        return {1, self.group} if section == "pipelined" and self.group > 2 else {self.group}

    @property
    def notes(self) -> str:
        """How to read the figures, and what is left out of them."""
        return (
            "All times end with the last worker's reply. A peer that takes longer than a millisecond is called back to "
            f"back in the paced section, too. A pipelined sample is a burst of {self.burst} calls, divided by their "
            f"number; a compiled graph has {GRAPH_IN_FLIGHT} of them in flight, its default, the others all. Arrays go "
            f"to Ray actor calls by ray.put from {size_text(PUT_FROM)} on. p99 of fewer than 100 samples is the worst. "
            f"Left out are, per peer and cell, {self.warm_up} calls for warming up (one burst where calls are "
            f"pipelined) and the first {LEAD_IN} of each turn; from {size_text(LARGE)} on, the first {WARM_UP_LARGE} "
            "calls only; nothing of kills and launches. The last column compares medians. Ray runs workers at nice 15, "
            "so other busy processes come first; ours run at the driver's niceness."
        )


# Arguments of a Plan that shows whether all of it works.
QUICK: dict[str, Any] = {
    "workers": (2,),
    "group": 2,
    "payloads": (100, 1 << 20),
    "calls": 60,
    "seconds": 0.3,
    "rounds": 3,
    "burst": 50,
    "warm_up": 10,
    "kills": 1,
    "launches": 1,
}


def bench_rpc(plan: Plan, report: Report) -> None:
    """Measure the plan; the report gets rows as they are done. Starts a local Ray if none runs, and then ends it.

    Raises:
        RayShmError, RayError: ours failed, or Ray did outside of a peer's cell. Nothing is left running.
    """
    with report.apart(), _ray(report):
        wanted = {section: plan.counts(section) for section in plan.sections if section in CALL_SECTIONS}
        for count in sorted(set().union(*wanted.values())):
            sections = [section for section in CALL_SECTIONS if count in wanted.get(section, ())]
            with _callers(count, report) as callers:
                for section in sections:
                    _CallBench(plan, report, count, callers).measure(section)
        if "kill" in plan.sections:
            report.add(rpc_events.measure_kills(plan.group, plan.kills, report.progress))
        if "launch" in plan.sections:
            report.add(rpc_events.measure_launches(plan.group, plan.launches, report.progress))
        report.progress("done")


@contextlib.contextmanager
def _ray(report: Report) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    report.progress("starting Ray")
    ray.init(address="local", logging_level="warning", include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _callers(count: int, report: Report) -> Iterator[dict[str, Caller]]:
    with contextlib.ExitStack() as stack:
        callers = {}
        for peer in PEERS:
            report.progress(f"{count} worker{'s' * (count > 1)}: starting {peer.name}")
            caller = _opened(peer, count, stack, report)
            if caller is not None:
                callers[peer.name] = caller
        yield callers


def _opened(peer: Peer, count: int, stack: contextlib.ExitStack, report: Report) -> Caller | None:
    try:
        return stack.enter_context(peer.open(count))
    except UnavailableError as exc:
        report.leave_out(LeftOut(peer.name, None, None, None, str(exc)))
    except Exception as exc:  # whatever a peer raises that cannot cope with so many workers
        if _is_ours(peer.name):
            raise
        report.leave_out(LeftOut(peer.name, None, count, None, _first_line(exc)))
    return None


def _is_ours(peer: str) -> bool:
    return peer in (OURS, OURS_ACTOR)


def _first_line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"


# ---- sections of calls --------------------------------------------------------------------------------------------


@dataclass
class _Cell:
    """What the peers of a cell have been measured to take so far, in µs."""

    section: str
    payload_bytes: int | None
    times: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _CallBench:
    """The sections of calls with one number of workers. callers: by peer, all open."""

    plan: Plan
    report: Report
    count: int
    callers: dict[str, Caller]

    def measure(self, section: str) -> None:
        self.report.progress(f"{self.count} worker{'s' * (self.count > 1)}: {section}")
        if section == "noop":
            self._calls(section, PAYLOAD)
        elif section == "paced":
            self._calls(section, PAYLOAD, PACE)
        elif section == "hog":
            with hogs():
                self._calls(section, PAYLOAD)
        elif section == "pipelined":
            self._measure(_Cell(section, len(PAYLOAD)), lambda caller: caller.burst(self.plan.burst), self._burst_turn)
        else:
            for size in self.plan.payloads:
                self.report.progress(f"{self.count} workers: {size_text(size)}")
                self._calls(section, np.ones(size, dtype=np.uint8))

    def _calls(self, section: str, payload: Any, pace: float = 0.0) -> None:
        size = len(payload)
        warm_up = WARM_UP_LARGE if size >= LARGE else self.plan.warm_up
        lead_in = 0 if size >= LARGE else LEAD_IN

        def turn(caller: Caller) -> list[float]:
            time_calls(caller.call, payload, lead_in, self.plan.seconds)
            calls = max(1, self.plan.calls // self.plan.rounds)
            return time_calls(caller.call, payload, calls, self._turn_seconds, pace)

        def warm(caller: Caller) -> object:
            return time_calls(caller.call, payload, warm_up, self.plan.seconds)

        self._measure(_Cell(section, size), warm, turn)

    @property
    def _turn_seconds(self) -> float:
        return self.plan.seconds / self.plan.rounds

    def _burst_turn(self, caller: Caller) -> list[float]:
        bursts = max(1, self.plan.calls // self.plan.rounds // 10)
        times = time_calls(caller.burst, self.plan.burst, bursts, self._turn_seconds)
        return [microseconds / self.plan.burst for microseconds in times]

    def _measure(self, cell: _Cell, warm_up: Callable[[Caller], object], turn: Turn) -> None:
        for name in self.callers:
            self._attempt(cell, name, lambda caller: (warm_up(caller), [])[1])
        for number in range(self.plan.rounds):
            names = list(cell.times)
            for name in (*names[number % len(names) :], *names[: number % len(names)]):  # not always after the same
                self._attempt(cell, name, turn)
        rows = [make_row(cell.section, name, self.count, cell.payload_bytes, t) for name, t in cell.times.items()]
        self.report.add(rows)

    def _attempt(self, cell: _Cell, name: str, turn: Turn) -> None:
        """A turn of one peer; where it fails, the peer is out of this cell, ours apart: that is an error."""
        try:
            cell.times.setdefault(name, []).extend(turn(self.callers[name]))
        except Exception as exc:  # whatever a peer raises, such as of a full object store
            if _is_ours(name):
                raise
            cell.times.pop(name, None)
            self.report.leave_out(LeftOut(name, cell.section, self.count, cell.payload_bytes, _first_line(exc)))


def time_calls(
    call: Callable[[Any], object], argument: Any, number: int, seconds: float, pace: float = 0.0
) -> list[float]:
    """µs of each call, of `number` at most, and until `seconds` have passed; at least one, unless `number` is 0.

    pace: seconds from the begin of one call to that of the next; a later one begins at once.
    """
    times: list[float] = []
    clock = time.perf_counter_ns
    begun = clock()
    end = begun + int(seconds * 1e9)
    step = int(pace * 1e9)
    due = begun
    for _ in range(number):
        if step:
            due = max(due + step, clock())
            time.sleep(max(0, due - clock()) / 1e9)
        begun = clock()
        call(argument)
        done = clock()
        times.append((done - begun) / 1000)
        if done > end:
            break
    return times


_HOG = """
import os, sys
parent = int(sys.argv[1])
os.sched_setaffinity(0, {int(sys.argv[2])})
print("hogging", flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def hogs() -> Iterator[list[int]]:
    """A process on every core of this process's, busy inside; their pids. They end with this one, however it does."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-c", _HOG, str(os.getpid()), str(core)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in processes:
            if process.stdout is not None:
                process.stdout.readline()
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
