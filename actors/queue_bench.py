"""``ray-shm bench queue``: call and reply over queue pairs, beside other ways to reach processes on this machine.

Runs in the driver, without Ray. A ladder over payload sizes and numbers of readers; in each cell the peers
(queue_peers.py) take turns in short rounds over the same worker processes, so that what else the machine does meets all
of them alike. A round trip begins before the payload is pickled and ends with the last reader's reply. This file
decides what is measured and how often; bench_workers.py owns the processes, queue_report.py prints.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_shm.actors import iceoryx_peer, queue_peers
from ray_shm.actors.bench_workers import MakeReader, Worker, WorkerPool, cpu_ns, wake_ups
from ray_shm.actors.queue_peers import Cell, Desk, UnavailableError, WriterEnd
from ray_shm.actors.queue_report import Idle, LeftOut, Progress, Report, Row, cell_text
from ray_shm.errors import StartError
from ray_shm.segment import require_memory
from ray_shm.size_text import size_text

OURS = {"shm": "ray-shm shm", "zmq": "ray-shm zmq"}
READERS = (1, 2, 4, 8)
PAYLOADS = (100, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)  # bytes
CALLS = 2000
SECONDS = 6.0  # per cell; the fewest rounds may take longer
IDLE_SECONDS = 10.0
ROUNDS, FEWEST_ROUNDS, FEWEST_CALLS = 10, 5, 3
LARGE = 1 << 20  # bytes; from here on the first two calls of each peer are left out, and no others
WARM_UP, WARM_UP_LARGE, LEAD_IN = 50, 2, 5  # LEAD_IN: calls at the start of each turn, below LARGE
BYTES_PER_CELL = 8 << 30  # payload bytes that each peer sends at most, the fewest rounds apart
_SMALL = 64 << 20  # bytes for which memory is not looked at
_REARM_NS = 1_000_000_000
_LONGEST_BASE = 24  # characters; sockets are made below it, whose paths end at 107, and iceoryx2 adds up to 60
_SETTLE = 0.5  # seconds before the idle measurement


@dataclass(frozen=True)
class Ladder:
    """What to measure.

    Attributes:
        payloads: bytes. channels: of ours, "shm" and "zmq". calls: at most, per peer and cell. seconds: per cell,
        about. idle_seconds: how long the queues are watched while nothing is sent. touch: readers sum all of the
        payload. warm_up: calls of each peer and cell that are left out.
    """

    readers: Sequence[int] = READERS
    payloads: Sequence[int] = PAYLOADS
    channels: Sequence[str] = ("shm", "zmq")
    calls: int = CALLS
    seconds: float = SECONDS
    idle_seconds: float = IDLE_SECONDS
    touch: bool = False
    warm_up: int = WARM_UP

    @property
    def warm_up_text(self) -> str:
        """What is left out of the rows, in a sentence."""
        return (
            f"Left out are, per peer and cell, {self.warm_up} calls for warming up and the first {LEAD_IN} of each "
            f"turn; from {size_text(LARGE)} on, the first {WARM_UP_LARGE} calls only."
        )

    def cells(self) -> list[Cell]:
        return [Cell(readers, size, self.touch) for size in self.payloads for readers in self.readers]


# Arguments of a Ladder that shows whether all of it works.
QUICK: dict[str, Any] = {
    "readers": (1, 2),
    "payloads": (100, 1 << 20),
    "calls": 50,
    "seconds": 1.0,
    "idle_seconds": 1.0,
    "warm_up": 10,
}


@dataclass(frozen=True)
class Peer:
    """A way to call. kept, moved: memory it holds while open, and during a call, in payloads, all processes together.

    width: how many workers take part; None stands for all readers of the cell.
    """

    name: str
    writer: Callable[[Desk], WriterEnd]
    reader: MakeReader | None
    kept: int
    moved: int
    width: int | None = None


def peers_of(ladder: Ladder, readers: int) -> list[Peer]:
    """The peers of a cell, ours first."""
    n = readers
    shm = Peer(OURS["shm"], queue_peers.QueueWriter, queue_peers.QueueReader, 3, 0)
    zmq = Peer(OURS["zmq"], queue_peers.ZmqQueueWriter, queue_peers.QueueReader, 0, 2 * n + 2)
    peers = [{"shm": shm, "zmq": zmq}[channel] for channel in ladder.channels]
    if iceoryx_peer.is_installed():
        kept = iceoryx_peer.SAMPLES
        peers.append(Peer("iceoryx2", iceoryx_peer.IceoryxWriter, iceoryx_peer.IceoryxReader, kept, 0))
    peers.append(Peer("pyzmq", queue_peers.PyzmqWriter, queue_peers.PyzmqReader, 0, n + 1))
    peers.append(Peer("multiprocessing.Pipe", queue_peers.PipeWriter, queue_peers.PipeReader, 0, 3 * n + 1))
    if ladder.touch:
        peers.append(Peer("memcpy and sums", queue_peers.CopyAndSumsWriter, queue_peers.SumsReader, n + 1, 0))
    else:
        peers.append(Peer("memcpy", queue_peers.CopyWriter, None, 1, 0, width=0))
    peers.append(Peer("pipe ping-pong", queue_peers.PingWriter, queue_peers.PingReader, 0, 0, width=1))
    return peers


def bench_queue(ladder: Ladder, report: Report) -> None:
    """Measure the ladder. Call it from the main thread; the report gets rows as they are done.

    Raises:
        BenchError: a worker died or hangs. RayShmError: a queue of ours failed. In every case, Ctrl-C and SIGTERM among
        them, no process and no file is left over.
    """
    if not iceoryx_peer.is_installed():
        report.leave_out(LeftOut("iceoryx2", None, None, "the package iceoryx2 is not installed"))
    with _private_folder() as folder, report.bar(len(ladder.cells())) as progress:
        with WorkerPool(max(ladder.readers)) as pool:
            run = _Run(ladder, report, progress, pool, folder)
            for cell in ladder.cells():
                run.measure(cell)
            run.measure_idle()


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    base = tempfile.gettempdir()
    if len(base) > _LONGEST_BASE:
        base = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="ray-shm-bench-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        iceoryx_peer.remove_files(folder)


# ---- a cell -------------------------------------------------------------------------------------------------------


@dataclass
class _Turns:
    """What one peer has been measured to do in a cell so far."""

    peer: Peer
    writer: WriterEnd
    workers: Sequence[Worker]
    times_ns: list[int] = field(default_factory=list)
    cpu_ns: int = 0


@dataclass(frozen=True)
class _Run:
    """One run of a ladder, and what it works with. folder: private, for sockets."""

    ladder: Ladder
    report: Report
    progress: Progress
    pool: WorkerPool
    folder: Path

    def measure(self, cell: Cell) -> None:
        """Let the peers take turns, then report their rows."""
        self.progress.begin(cell)
        peers = self._fitting(cell)
        if not peers:
            return
        with contextlib.ExitStack() as stack:
            desk = self._desk(cell)
            all_turns = [turns for peer in peers if (turns := self._open(peer, desk, stack)) is not None]
            for turns in all_turns:
                self._take_turn(turns, cell, WARM_UP_LARGE if cell.payload_bytes >= LARGE else self.ladder.warm_up, 0)
            self._take_turns(all_turns, cell)
        self.report.add([_row(turns, cell) for turns in all_turns])

    def _open(self, peer: Peer, desk: Desk, stack: contextlib.ExitStack) -> _Turns | None:
        try:
            return stack.enter_context(_opened(peer, desk, self.pool))
        except UnavailableError as exc:
            self.report.leave_out(LeftOut(peer.name, desk.cell.readers, desk.cell.payload_bytes, str(exc)))
            return None

    def _take_turns(self, all_turns: list[_Turns], cell: Cell) -> None:
        calls = min(self.ladder.calls, max(FEWEST_ROUNDS, BYTES_PER_CELL // cell.payload_bytes))
        lead_in = 0 if cell.payload_bytes >= LARGE else LEAD_IN
        end = time.monotonic() + self.ladder.seconds
        for number in range(min(ROUNDS, calls)):
            if number >= FEWEST_ROUNDS and time.monotonic() > end:
                return
            first = number % len(all_turns)  # another one each time, so that nobody always follows the same
            for turns in all_turns[first:] + all_turns[:first]:
                if len(turns.times_ns) >= FEWEST_CALLS and sum(turns.times_ns) > self.ladder.seconds * 1e9:
                    continue  # so slow that it would take the time of all
                self._take_turn(
                    turns, cell, lead_in, -(-calls // ROUNDS), self.ladder.seconds / ROUNDS / len(all_turns)
                )

    def _take_turn(self, turns: _Turns, cell: Cell, lead_in: int, count: int, seconds: float = 0) -> None:
        """`lead_in` calls that do not count, then up to `count` that do, for about `seconds`, but at least one."""
        self.progress.peer(turns.peer.name)
        pids = [os.getpid(), *(worker.pid for worker in turns.workers)]
        with self.pool.watched(_name(turns.peer, cell)), _serving(turns, self.pool, cell):
            call = turns.writer.call
            for _ in range(lead_in):
                self.pool.rearm()
                call()
            cpu_begun = cpu_ns(pids)
            turns.times_ns += _time(call, self.pool.rearm, count, seconds)
            turns.cpu_ns += cpu_ns(pids) - cpu_begun if count else 0

    def measure_idle(self) -> None:
        """Our queues with most readers, all of them waiting, while nothing is sent."""
        self.progress.idle(self.ladder.idle_seconds)
        cell = Cell(max(self.ladder.readers), 100)
        peer = peers_of(self.ladder, cell.readers)[0]
        with _opened(peer, self._desk(cell), self.pool) as turns:
            with self.pool.watched(f"idle: {_name(peer, cell)}"), _serving(turns, self.pool, cell):
                turns.writer.call()
                self.pool.disarm()
                pids = [os.getpid(), *(worker.pid for worker in turns.workers)]
                self.report.idle = _watch_idle(pids, peer.name, cell.readers, self.ladder.idle_seconds)

    def _desk(self, cell: Cell) -> Desk:
        to, back = self.pool.workers[0].ping
        pipes = [worker.pipe for worker in self.pool.workers[: cell.readers]]
        return Desk(cell, cell.payload(), pipes, (to.fileno(), back.fileno()), self.folder)

    def _fitting(self, cell: Cell) -> list[Peer]:
        """The peers for which there is memory beside those before them; the others are reported as left out."""
        held = 1  # payloads: the driver's own
        fitting = []
        for peer in peers_of(self.ladder, cell.readers):
            reason = _lacks_memory((held + peer.kept + peer.moved) * cell.payload_bytes, peer)
            if reason is None:
                held += peer.kept
                fitting.append(peer)
            else:
                self.report.leave_out(LeftOut(peer.name, cell.readers, cell.payload_bytes, reason))
        return fitting


def _lacks_memory(need: int, peer: Peer) -> str | None:
    if need <= _SMALL:
        return None
    try:
        require_memory(need, f"the benchmark of {peer.name}")
    except StartError as exc:
        return str(exc)
    if peer.name == "iceoryx2":
        room = os.statvfs(iceoryx_peer.SHARED_MEMORY)
        if need > room.f_bavail * room.f_frsize:
            return f"/dev/shm has {size_text(room.f_bavail * room.f_frsize)} left, {size_text(need)} are needed"
    return None


@contextlib.contextmanager
def _opened(peer: Peer, desk: Desk, pool: WorkerPool) -> Iterator[_Turns]:
    workers = pool.workers[: desk.cell.readers if peer.width is None else peer.width]
    with pool.watched(f"opening {_name(peer, desk.cell)}"):
        writer = peer.writer(desk)
    try:
        with pool.watched(f"opening {_name(peer, desk.cell)}"):
            pool.order(workers, "open", peer.name, peer.reader, writer.specs())
            writer.connect(pool.answers(workers))
            pool.answers(workers)
        yield _Turns(peer, writer, workers)
        with pool.watched(f"closing {_name(peer, desk.cell)}"):
            pool.order(workers, "close", peer.name)
            pool.answers(workers)
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong first is what to tell; the workers will be killed
            writer.close()
        raise
    writer.close()


def _name(peer: Peer, cell: Cell) -> str:
    return f"{peer.name}, {cell_text(cell.payload_bytes, cell.readers)}"


def _time(call: Callable[[], None], rearm: Callable[[], None], count: int, seconds: float) -> list[int]:
    times: list[int] = []
    clock = time.perf_counter_ns
    rearmed = clock()
    end = rearmed + int(seconds * 1e9)
    for _ in range(count):
        begun = clock()
        call()
        done = clock()
        times.append(done - begun)
        if done > end:
            break
        if done > rearmed + _REARM_NS:  # not every time: it costs as much as a small copy
            rearm()
            rearmed = done
    return times


@contextlib.contextmanager
def _serving(turns: _Turns, pool: WorkerPool, cell: Cell) -> Iterator[None]:
    """The workers answer this peer's calls inside."""
    pool.order(turns.workers, "serve", turns.peer.name, cell.touch)
    pool.answers(turns.workers)
    yield
    pool.rearm()
    turns.writer.stop()
    pool.answers(turns.workers)


def _row(turns: _Turns, cell: Cell) -> Row:
    micros = sorted(t / 1000 for t in turns.times_ns)

    def at(share: float) -> float:
        return round(micros[min(len(micros) - 1, int(len(micros) * share))], 2)

    p50 = round(statistics.median(micros), 2)
    moves_payload = turns.peer.reader is not queue_peers.PingReader
    return Row(
        peer=turns.peer.name,
        readers=cell.readers,
        payload_bytes=cell.payload_bytes,
        touch=cell.touch,
        calls=len(micros),
        p50_us=p50,
        p90_us=at(0.9),
        p99_us=at(0.99),
        gb_per_s=float(f"{cell.payload_bytes / p50 / 1000:.3g}") if moves_payload else None,
        cpu_us=round(turns.cpu_ns / 1000 / len(micros), 2),
    )


def _watch_idle(pids: Sequence[int], peer: str, readers: int, seconds: float) -> Idle:
    time.sleep(_SETTLE)
    begun = time.monotonic()
    woken_begun = [wake_ups(pid) for pid in pids]
    cpu_begun = cpu_ns(pids)
    time.sleep(seconds)
    cpu = cpu_ns(pids) - cpu_begun
    woken = [wake_ups(pid) for pid in pids]
    lasted = time.monotonic() - begun
    rates = [(after - before) / lasted for before, after in zip(woken_begun, woken, strict=True)]
    return Idle(
        peer=peer,
        readers=readers,
        seconds=round(lasted, 2),
        cpu_percent=round(cpu / 1e9 / lasted * 100, 4),
        wake_ups_per_s_driver=round(rates[0], 2),
        wake_ups_per_s_mean=round(statistics.mean(rates[1:]), 2),
        wake_ups_per_s_worst=round(max(rates[1:]), 2),
    )
