"""What ``ray-shm bench groups`` found, as tables or as JSON lines. Runs in the driver; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from ray_shm.actors.bench_report import BenchReport, figure_text
from ray_shm.size_text import size_text

OURS = "ray-shm"
TITLES = {
    "all_reduce": "sum of float32",
    "all_gather": "float32, of each rank",
    "reduce_scatter": "sum of float32, a part to each rank",
    "broadcast": "float32, in place",
    "gather": "float32, of each rank, to the first",
    "barrier": "",
    "send/recv": "float32, from the first rank to the last",
    "broadcast_object": "a dictionary with so many bytes",
    "broadcast_objects": "such dictionaries, one after the other in bursts; time of each",
    "broadcast_tensor_dict": "two float32 tensors, so many bytes together, and an integer",
}


@dataclass(frozen=True)
class Row:
    """What one peer took in one cell: µs over `samples`, from when the last rank began until the last was done.

    payload_bytes: None for barrier. compared_with: the row of ours in the same cell, whose p50 is `ratio` times shorter
    than this one's; None for ours.
    """

    operation: str
    peer: str
    ranks: int
    payload_bytes: int | None
    samples: int
    p50_us: float
    p90_us: float
    p99_us: float
    compared_with: str | None
    ratio: float | None


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why. operation, ranks: where; None stands for all."""

    peer: str
    operation: str | None
    ranks: int | None
    reason: str

    @property
    def place(self) -> str:
        ranks = f" with {self.ranks} ranks" if self.ranks else ""
        return f" in {self.operation}{ranks}" if self.operation else ranks


def make_rows(operation: str, ranks: int, payload_bytes: int | None, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row for each peer. Args: times: µs of each sample, by peer; on CUDA, ours there is what is compared with."""
    medians = {peer: statistics.median(of_peer) for peer, of_peer in times.items()}
    rows = []
    for peer, of_peer in times.items():
        ours = next((name for name in (f"{OURS} on CUDA", OURS) if name in times and _fits(name, peer)), None)
        ratio = None if ours in (None, peer) else round(medians[peer] / medians[str(ours)], 3)
        p90, p99 = _at(of_peer, 0.9), _at(of_peer, 0.99)
        compared = None if ours == peer else ours
        p50 = round(medians[peer], 2)
        rows.append(Row(operation, peer, ranks, payload_bytes, len(of_peer), p50, p90, p99, compared, ratio))
    return rows


def _fits(ours: str, peer: str) -> bool:
    return ours.endswith("on CUDA") == (peer == "NCCL" or peer.endswith("on CUDA"))


def _at(times: Sequence[float], share: float) -> float:
    """A sample, the next above: p99 of fewer than 100 is the worst."""
    ordered = sorted(times)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 2)


class Report(BenchReport[Row, LeftOut]):
    bench = "groups"
    packages = ("ray-shm", "torch")

    def tables(self) -> Iterator[Table]:
        for operation in TITLES:
            rows = [row for row in self.rows if row.operation == operation]
            if rows:
                yield _table(operation, sorted(rows, key=lambda row: (row.ranks, row.payload_bytes or 0)))


def _table(operation: str, rows: Sequence[Row]) -> Table:
    title = f"{operation}: {TITLES[operation]}" if TITLES[operation] else operation
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("ranks", "payload", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("samples", "p50 µs", "p90 µs", "p99 µs", "ray-shm is"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        cell = (row.ranks, row.payload_bytes)
        if before not in (None, cell):
            table.add_section()
        place = [str(row.ranks), size_text(row.payload_bytes) if row.payload_bytes else "–"]
        place = ["", ""] if cell == before else place
        before = cell
        figures = [figure_text(value) for value in (row.p50_us, row.p90_us, row.p99_us)]
        table.add_row(*place, row.peer, f"{row.samples:,}", *figures, _compared(row))
    return table


def _compared(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2f} × faster" if row.ratio >= 1 else f"{1 / row.ratio:.2f} × slower"
