"""What makes a queue's process fail on purpose: sleepers that never look up by themselves, and death at a chosen line.

Runs in the pytest process and in the processes under test. Children are forked from a spawned process that has nothing
open (`fork_child`): that costs a millisecond, a spawn a third of a second.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
from reader_pool import Me, Peer

from ray_shm import arena, queue_reader, queue_writer, waiting

HANG = 20.0  # seconds: whatever takes longer hangs
NEVER = 3600.0  # seconds: longer than any test
_PR_SET_PDEATHSIG = 1
_STILL = 0.02  # seconds


def start_what_stays() -> None:
    """What a process makes once and keeps: Python's resource tracker, and the threads that share large copies."""
    resource_tracker.ensure_running()
    if arena._COPY_THREADS > 1:
        arena._copy_with_threads(memoryview(bytearray(1 << 12)), bytes(1 << 12))
        threads = arena._COPY_THREADS - 1
        barrier = threading.Barrier(threads + 1)
        pool = arena._pool
        assert pool is not None
        for _ in range(threads):
            pool.submit(barrier.wait)
        barrier.wait(HANG)


def be_patient(_me: Me | None = None) -> None:
    """Without the safety timeout of sleepers, a lost wake-up is a hang."""
    for module in (waiting, queue_reader, queue_writer):
        module.IDLE_PARK = NEVER  # type: ignore[attr-defined]
    waiting.YIELDS = 2  # so that many waits end in a sleep


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`be_patient` for the pytest process."""
    for module in (waiting, queue_reader, queue_writer):
        monkeypatch.setattr(module, "IDLE_PARK", NEVER)


def result_within(peer: Peer, seconds: float) -> Any:
    if not peer.pipe.poll(seconds):
        pytest.fail(f"process {peer.process.pid} hangs")
    return peer.result()


def wait_for(condition: Callable[[], object], what: str, seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never came: {what}")
        time.sleep(0.001)


def wait_until_asleep(pid: int) -> None:
    """Until the main thread of `pid` sleeps in a futex, and has slept for a moment."""
    switches = -1

    def asleep() -> bool:
        nonlocal switches
        before, switches = switches, _switches(pid)
        where = Path(f"/proc/{pid}/task/{pid}/wchan").read_text()
        if ("futex" in where or where == "0") and switches == before and _state(pid) == "S":
            return True
        time.sleep(_STILL)
        return False

    wait_for(asleep, f"process {pid} falls asleep")


def is_hung(peers: list[Peer], seconds: float) -> bool:
    """Whether every one of these processes sleeps, and none of their main threads wakes for so long."""
    pids = [peer.process.pid for peer in peers]
    before = [_switches(pid) for pid in pids if pid is not None]
    time.sleep(seconds)
    after = [_switches(pid) for pid in pids if pid is not None]
    return before == after and all(_state(pid) == "S" for pid in pids if pid is not None)


def _switches(pid: int) -> int:
    """Times that the main thread of `pid` went to sleep."""
    rows = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("voluntary_ctxt_switches"))


def sleeps(pid: int) -> int:
    """Times that the threads of `pid` went to sleep, all together."""
    tasks = [(Path(f"/proc/{pid}/task") / tid / "status").read_text() for tid in os.listdir(f"/proc/{pid}/task")]
    return sum(int(task.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for task in tasks)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_alive(pid: int) -> bool:
    return _state(pid) not in "ZX"


# Forked children


class Forked:
    """A forked child of this process that waits for `go`, runs `check` and ends without cleaning up."""

    def __init__(self, check: Callable[[], Any]) -> None:
        self._there, here = os.pipe()
        wait, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._there)
            os.close(self._go)
            try:
                os.read(wait, 1)
                result = (True, check())
            except BaseException:
                result = (False, traceback.format_exc())
            os.write(here, pickle.dumps(result))
            os._exit(0)
        os.close(here)
        os.close(wait)

    def go(self) -> Any:
        """What the check returned."""
        os.close(self._go)
        with os.fdopen(self._there, "rb") as pipe:
            watchdog = threading.Timer(HANG, os.kill, (self.pid, signal.SIGKILL))
            watchdog.start()
            said = pipe.read()
            watchdog.cancel()
        os.waitpid(self.pid, 0)
        assert said, "the forked child hangs"
        passed, value = pickle.loads(said)
        assert passed, f"in the forked child:\n{value}"
        return value


def fork_child(_me: Me, life: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """Runs in a Peer: (pid, the first thing that `life` says) of a child that runs life(say, *args)."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for it
    there, here = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(there)
            life(lambda value: os.write(here, pickle.dumps(value)), *args)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(here)
    try:
        with os.fdopen(there, "rb") as pipe:
            return pid, pickle.load(pipe)
    except EOFError:
        return pid, None


# Death at a line


def codes(*functions: Any) -> set[CodeType]:
    """Code of these functions, of all methods of these classes, and of what is defined inside of them."""
    found: set[CodeType] = set()
    for function in functions:
        members = vars(function).values() if inspect.isclass(function) else [function]
        for member in members:
            member = member.fget if isinstance(member, property) else member
            member = inspect.unwrap(member) if callable(member) else member
            if inspect.isfunction(member):
                found.update(_nested(member.__code__))
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


class Fuse:
    """Calls `act` before line number `at` of the given code, counted as this thread runs it; `lines` are those seen."""

    def __init__(self, traced: set[CodeType], at: int, act: Callable[[], object]) -> None:
        self._traced = traced
        self._left = at
        self._act = act
        self.lines: set[tuple[str, int]] = set()

    def light(self) -> None:
        sys.settrace(self._on_call)

    def put_out(self) -> None:
        sys.settrace(None)

    def _on_call(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if frame.f_code not in self._traced:
            return None
        if "return" in event:
            return None
        return self._on_line

    def _on_line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            self.lines.add((os.path.basename(frame.f_code.co_filename), frame.f_lineno))
            self._left -= 1
            if self._left == 0:
                self._act()
        return self._on_line


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sync_points(module: ModuleType, traced: set[CodeType]) -> set[tuple[str, int]]:
    """(file, line) of the statements in `traced` that a SYNC POINT comment stands at, or in front of."""
    lines, _ = inspect.getsourcelines(module)
    path = inspect.getsourcefile(module)
    starts = {line for code in traced if code.co_filename == path for *_, line in code.co_lines() if line is not None}
    found = set()
    for number, text in enumerate(lines, 1):
        if "SYNC POINT" in text:
            following = [n for n in range(number, len(lines) + 1) if n in starts and n - number < 4]
            if following:
                found.add((os.path.basename(str(path)), following[0]))
    return found
