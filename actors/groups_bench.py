"""``ray-shm bench groups``: the operations of coordinator groups, beside plain torch.distributed and a TCPStore.

Runs in the driver, without Ray; the ranks are spawned processes (bench_workers.py). For each number of ranks all peers
(groups_peers.py) are connected at once in the same processes, and take turns in short rounds, so that what else the
machine does meets all of them alike. This file decides what is measured and how often; groups_report.py prints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_shm.actors.bench_workers import WorkerPool
from ray_shm.actors.groups_peers import BURST, BURST_BYTES, GLOO, NCCL, OURS, OURS_CUDA, STORE, GroupsEnd, Place, Turn
from ray_shm.actors.groups_report import TITLES, LeftOut, Report, make_rows
from ray_shm.size_text import size_text

OPERATIONS = tuple(TITLES)
RANKS = (2, 3, 4)
PAYLOADS = (2304, 64 << 10, 1 << 20, 16 << 20)  # bytes; the first is what a small language model sums
ROUNDS = 10
WARM_UP = 3  # samples
_OBJECTS = ("broadcast_object", "broadcast_objects")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        operations: of OPERATIONS. payloads: bytes of each rank. calls: samples at most, per peer and cell. seconds: per
        peer and cell, about. rounds: in which the peers take turns.
    """

    operations: Sequence[str] = OPERATIONS
    ranks: Sequence[int] = RANKS
    payloads: Sequence[int] = PAYLOADS
    calls: int = 500
    seconds: float = 1.0
    rounds: int = ROUNDS

    @property
    def notes(self) -> str:
        """How to read the figures, and what is left out of them."""
        return (
            "A sample is from when the last rank began until the last one was done; before each of them all ranks meet "
            "in gloo's barrier, which does not count. gloo, NCCL: torch.distributed on the same ranks; its all_reduce "
            "is in place, its broadcast_tensor_dict is as vLLM's: metadata as an object, then tensor after tensor. "
            "TCPStore: an object as vLLM's StatelessProcessGroup gives it to all, a pickle that the others get. A "
            f"sample of broadcast_objects is a burst of {BURST} (fewer large ones: {BURST_BYTES >> 20} MiB at most), "
            f"divided by their number. The last column compares medians. Left out are {WARM_UP} samples of each peer "
            "and cell. Torch runs one thread per rank."
        )


# Arguments of a Plan that shows whether all of it works.
QUICK: dict[str, Any] = {"ranks": (2,), "payloads": (2304,), "calls": 12, "seconds": 0.1, "rounds": 2}


def bench_groups(plan: Plan, report: Report) -> None:
    """Measure the plan. Call it from the main thread; the report gets rows as they are done.

    Raises:
        BenchError: a rank died, failed or hangs. In every case, Ctrl-C and SIGTERM among them, no process is left over.
    """
    report.progress(f"starting {max(plan.ranks)} processes")
    with WorkerPool(max(plan.ranks)) as pool:
        for number, ranks in enumerate(plan.ranks):
            run = _Run(plan, report, pool, ranks)
            report.progress(f"{ranks} ranks: connecting")
            with run.connected(number):
                for operation in plan.operations:
                    report.progress(f"{ranks} ranks: {operation}")
                    for size in plan.payloads if operation != "barrier" else [0]:
                        run.measure(operation, size)
    report.progress("done")


@dataclass
class _Run:
    """What is measured with one number of ranks."""

    plan: Plan
    report: Report
    pool: WorkerPool
    ranks: int
    gpus: bool = False

    @contextlib.contextmanager
    def connected(self, number: int) -> Iterator[None]:
        workers = self.pool.workers[: self.ranks]
        with self.pool.watched(f"connecting {self.ranks} ranks"):
            self.pool.order(workers[:1], "open", "groups", GroupsEnd, [Place(0, self.ranks, None, number)])
            port = workers[0].pipe.recv()
            places = [Place(rank, self.ranks, port, number) for rank in range(self.ranks)]
            self.pool.order(workers[1:], "open", "groups", GroupsEnd, places)
            gpus = self.pool.answers(workers)
            self.pool.answers(workers)
        self.gpus = min(gpus) >= self.ranks
        if not self.gpus:
            why = f"it needs a GPU for each rank, and this machine has {min(gpus)}"
            self.report.leave_out(LeftOut(NCCL, None, self.ranks, why))
        yield
        with self.pool.watched(f"disconnecting {self.ranks} ranks"):
            self.pool.order(workers, "close", "groups")
            self.pool.answers(workers)

    def measure(self, operation: str, size: int) -> None:
        """Let the peers take turns, then report their rows."""
        times: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for peer in self._peers(operation):
            warm = self._turn(peer, operation, size, WARM_UP)
            burst = Turn(peer, operation, size, 1).burst
            spent = max(1.0, burst * sorted(warm)[len(warm) // 2]) / 1e6
            rounds = self.plan.rounds
            counts[peer] = max(1, int(min(self.plan.calls, self.plan.seconds / spent) / rounds))
            times[peer] = []
        for number in range(self.plan.rounds):
            names = list(times)
            first = number % len(names)  # another one each time, so that nobody always follows the same
            for peer in names[first:] + names[:first]:
                times[peer] += self._turn(peer, operation, size, counts[peer])
        self.report.add(make_rows(operation, self.ranks, size or None, times))

    def _peers(self, operation: str) -> list[str]:
        peers = [OURS, GLOO, *([STORE] if operation in _OBJECTS else [])]
        on_gpu = self.gpus and operation not in ("barrier", *_OBJECTS)
        return [*peers, *([OURS_CUDA, NCCL] if on_gpu else [])]

    def _turn(self, peer: str, operation: str, size: int, count: int) -> list[float]:
        """µs of each sample."""
        workers = self.pool.workers[: self.ranks]
        where = f"{peer}'s {operation} of {size_text(size or 1)} over {self.ranks} ranks"
        with self.pool.watched(where):
            turn = Turn(peer, operation, size, count)
            self.pool.order(workers, "serve", "groups", turn)
            self.pool.answers(workers)
            of_ranks = [times for worker in workers if (times := worker.pipe.recv())]
            self.pool.answers(workers)
        samples = zip(*of_ranks, strict=True)
        return [(max(end for _, end in s) - max(begun for begun, _ in s)) / 1000 / turn.burst for s in samples]
