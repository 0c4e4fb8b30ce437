"""The processes that ``ray-shm bench queue`` calls: spawned once, they serve one peer after the other.

WorkerPool lives in the driver, in its main thread; `_run` is the life of a worker. Each worker has a control pipe
(what to open, serve, close), a pipe and two one-way pipes that only the peers use. The driver waits inside peers
without a time-out, so signals end its waits: SIGCHLD when a worker died, SIGTERM, Ctrl-C, and once a second SIGALRM:
to see whether a call takes too long, and because a signal that comes just before a wait begins does not break it.
However the driver ends, the workers end: killed by `close`, or by the kernel with the driver's main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from ray_shm.actors.queue_peers import ReaderEnd, Seat

WATCHDOG = 120  # seconds for one call, or one answer on a control pipe
_TICK = 1.0  # seconds between two looks at the workers and the clock
_DEATH = 1.0  # seconds between what a peer sees of a death and the worker's exit code being known
_ENDED = "All workers were ended; nothing is left running."
_PR_SET_PDEATHSIG = 1
_SWITCHES = "voluntary_ctxt_switches:"
_libc = ctypes.CDLL(None)

MakeReader = Callable[[Any, Seat], ReaderEnd]


class BenchError(RuntimeError):
    """A worker died, failed or hangs: the benchmark ends. Says which, and in what. Nothing is left running."""


@dataclass(frozen=True)
class Worker:
    """A worker as its driver sees it: rank, process, and the driver's ends of its pipes. ping: (write, read)."""

    rank: int
    process: BaseProcess
    control: Connection
    pipe: Connection
    ping: tuple[Connection, Connection]

    @property
    def pid(self) -> int:
        return self.process.pid or 0


class WorkerPool:
    """`count` workers and the signal handlers that watch them. A context manager; for the main thread only."""

    def __init__(self, count: int) -> None:
        self.doing = "starting"
        self._deadline = 0.0  # on the monotonic clock
        self._error: BaseException | None = None  # what a signal handler raised
        handlers = {
            signal.SIGALRM: self._on_tick,
            signal.SIGCHLD: self._on_death,
            signal.SIGINT: lambda *_: self._stop(KeyboardInterrupt()),
            signal.SIGTERM: lambda *_: self._stop(SystemExit(128 + signal.SIGTERM)),
        }
        self._replaced = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._report_unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        self.workers: list[Worker] = []
        try:
            for rank in range(count):
                self.workers.append(_start(rank))
            with self.watched("starting"):
                self.answers(self.workers)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def watched(self, doing: str) -> Iterator[None]:
        """What runs inside is `doing`, for messages; what fails inside because a worker is gone is a BenchError."""
        self.doing = doing
        self.rearm()
        try:
            yield
            self._stop_again()
        except BenchError:
            raise
        except Exception as exc:
            self._stop_if_one_died(exc)
            raise
        finally:
            self.disarm()

    def rearm(self) -> None:
        """The time for the current call begins now."""
        self._deadline = time.monotonic() + WATCHDOG
        signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)

    def disarm(self) -> None:
        """No clock and no ticks until the next `rearm`."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def order(self, workers: Sequence[Worker], verb: str, *args: Any) -> None:
        for worker in workers:
            worker.control.send((verb, args))

    def answers(self, workers: Sequence[Worker]) -> list[Any]:
        return [self._answer(worker) for worker in workers]

    def _answer(self, worker: Worker) -> Any:
        answer = worker.control.recv()
        if isinstance(answer, _Failed):
            who = f"the worker of rank {worker.rank} (pid {worker.pid})"
            self._stop(BenchError(f"{who} failed during: {self.doing}. It said:\n{answer.text}\n{_ENDED}"))
        return answer

    def close(self) -> None:
        """Kill every worker, wait for it, and restore the signal handlers. Idempotent."""
        self.disarm()
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        if self._replaced:
            sys.unraisablehook = self._report_unraisable
        self._replaced = {}
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.process.close()
            for end in (worker.control, worker.pipe, *worker.ping):
                end.close()
        self.workers = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_death(self, *_: object) -> None:
        if self._error is None:
            self._stop_if_one_died(None)

    def _on_tick(self, *_: object) -> None:
        self._stop_again()
        self._stop_if_one_died(None)
        if time.monotonic() > self._deadline:
            states = ", ".join(f"rank {worker.rank} pid {worker.pid} {_state(worker.pid)}" for worker in self.workers)
            self._stop(BenchError(f"no answer for {WATCHDOG} s during: {self.doing}. Workers: {states}. {_ENDED}"))

    def _stop_if_one_died(self, cause: Exception | None) -> None:
        if cause is not None:  # then one may be about to die, or be dead and not yet to be waited for
            multiprocessing.connection.wait([worker.process.sentinel for worker in self.workers], _DEATH)
        for worker in self.workers:
            if cause is not None and multiprocessing.connection.wait([worker.process.sentinel], 0):
                worker.process.join(_DEATH)
            code = worker.process.exitcode
            if code is not None:
                error = BenchError(
                    f"the worker of rank {worker.rank} (pid {worker.pid}) ended with exit code "
                    f"{code}{_signal_name(code)} during: {self.doing}. {_last_words(worker)}{_ENDED}"
                )
                error.__cause__ = cause
                self._stop(error)

    def _stop(self, error: BaseException) -> NoReturn:
        self._error = error
        raise error

    def _stop_again(self) -> None:
        """Python drops what a signal handler raises where a finalizer happens to run: then it is raised once more."""
        if self._error is not None:
            raise self._error

    def _on_unraisable(self, dropped: Any) -> None:
        if self._error is None or dropped.exc_value is not self._error:  # that one is not lost
            self._report_unraisable(dropped)


def _start(rank: int) -> Worker:
    spawn = multiprocessing.get_context("spawn")
    control, their_control = spawn.Pipe()
    pipe, their_pipe = spawn.Pipe()
    come, to = spawn.Pipe(duplex=False)
    back_read, back_write = spawn.Pipe(duplex=False)
    theirs = (their_control, their_pipe, come, back_write)
    process = spawn.Process(target=_run, args=(rank, os.getpid(), *theirs), name=f"ray-shm-bench-{rank}", daemon=True)
    try:
        process.start()
    finally:
        for end in theirs:  # or the death of a worker would not be seen as the end of its pipes
            end.close()
    return Worker(rank, process, control, pipe, (to, back_read))


def _signal_name(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(-code).name})"
    return ""


def _last_words(worker: Worker) -> str:
    """The traceback that a failed worker sent, if it is next in the control pipe."""
    with contextlib.suppress(OSError, EOFError):
        while worker.control.poll():
            answer = worker.control.recv()
            if isinstance(answer, _Failed):
                return f"It said:\n{answer.text}\n"
    return ""


def _state(pid: int) -> str:
    """As in /proc/<pid>/status: "S (sleeping)", "T (stopped)"; where it sleeps, if the kernel tells."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        state = next(line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:"))
        place = Path(f"/proc/{pid}/wchan").read_text()
    except (OSError, StopIteration):
        return "gone"
    return f"{state} in {place}" if place.strip("0") else state


# ---- a process, seen from outside --------------------------------------------------------------------------------


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time, user and system, of all threads that these processes ever had, together, in nanoseconds.

    Raises:
        OSError: one of them is gone.
    """
    return sum(_one_cpu_ns(pid) for pid in pids)


def _one_cpu_ns(pid: int) -> int:
    clock = ctypes.c_int()
    error = _libc.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, f"no CPU clock of pid {pid}: {os.strerror(error)}")
    return time.clock_gettime_ns(clock.value)


def wake_ups(pid: int) -> int:
    """How often the threads of `pid` that exist now gave up the CPU by themselves, and so were woken again."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += sum(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(_SWITCHES))
    return total


# ---- in the worker ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failed:
    text: str


def _run(
    rank: int, driver: int, control: Connection, pipe: Connection, ping_in: Connection, ping_out: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair, which ends the workers
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it died before that
        return
    seat = Seat(rank, pipe, (ping_in.fileno(), ping_out.fileno()))
    try:
        _obey(control, seat)
    except BaseException:
        with contextlib.suppress(OSError):  # the driver is gone, and its pipes went before it
            control.send(_Failed(traceback.format_exc()))
        os._exit(1)


def _obey(control: Connection, seat: Seat) -> None:
    """Orders: open (name, class, specs) → info, then "ready"; serve (name, touch) → "serving", then "served"; close."""
    ends: dict[str, ReaderEnd] = {}
    control.send("started")
    while True:
        verb, args = control.recv()
        if verb == "open":
            name, make, specs = args
            end = ends[name] = make(specs[seat.rank], seat)
            control.send(end.info)
            end.ready()
            control.send("ready")
        elif verb == "serve":
            name, touch = args
            control.send("serving")
            ends[name].serve(touch)
            control.send("served")
        else:
            ends.pop(args[0]).close()
            control.send("closed")
