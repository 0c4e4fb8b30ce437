"""What ``ray-shm bench rpc`` found, as tables or as JSON lines. Runs in the driver; measures nothing."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich import box
from rich.table import Table

from ray_shm.actors.bench_report import BenchReport, figure_text
from ray_shm.size_text import size_text

TITLES = {
    "noop": "no-op call with 100 B, back to back",
    "paced": "the same, one call per millisecond",
    "hog": "the same, back to back, with a busy process on every core",
    "pipelined": "no-op calls with 100 B, many in flight; time per call",
    "sizes": "no-op call with a NumPy array",
    "kill": "SIGKILL of a worker with torch imported, until the caller of its method has the exception",
    "launch": "from nothing to the first reply of all workers",
}
_IN_MS = ("kill", "launch")
_MS = 1000.0  # µs


@dataclass(frozen=True)
class Row:
    """What one peer took in one cell: times in µs over `samples` calls, bursts, kills or launches.

    payload_bytes: None in sections that send none. calls_per_s: of pipelined calls, at p50; else None.
    """

    section: str
    peer: str
    workers: int
    payload_bytes: int | None
    samples: int
    p50_us: float
    p90_us: float
    p99_us: float
    calls_per_s: float | None

    @property
    def cell(self) -> tuple[int, int]:
        return (self.payload_bytes or 0, self.workers)


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why. section, workers, payload_bytes: where; None stands for all."""

    peer: str
    section: str | None
    workers: int | None
    payload_bytes: int | None
    reason: str

    @property
    def place(self) -> str:
        size = f"{size_text(self.payload_bytes)}, " if self.payload_bytes else ""
        workers = f"{self.workers} workers" if self.workers else ""
        if self.section:
            return f" in {self.section} ({size}{workers})"
        return f" with {workers}" if workers else ""


def make_row(section: str, peer: str, workers: int, payload_bytes: int | None, times_us: Sequence[float]) -> Row:
    """p90 and p99 are samples, the next above: of fewer than 100 samples, p99 is the worst."""
    ordered = sorted(times_us)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 2)

    p50 = round(statistics.median(ordered), 2)
    rate = float(f"{1e6 / p50:.4g}") if section == "pipelined" else None
    return Row(section, peer, workers, payload_bytes, len(ordered), p50, at(0.9), at(0.99), rate)


class Report(BenchReport[Row, LeftOut]):
    bench = "rpc"
    packages = ("ray-shm", "ray", "torch", "torchmonarch", "numpy")

    def apart(self) -> AbstractContextManager[object]:
        """What others print inside goes to standard error: Ray prints a paragraph for every worker that is killed."""
        return contextlib.redirect_stdout(sys.stderr)

    def leave_out(self, left_out: LeftOut) -> None:
        """Once for each reason; the rest takes minutes, so it is said at once."""
        if not self.as_json and left_out not in self.left_out:
            self.progress(f"Left out: {left_out.peer}{left_out.place}: {left_out.reason}")
        super().leave_out(left_out)

    def tables(self) -> Iterator[Table]:
        for section in TITLES:
            rows = sorted((row for row in self.rows if row.section == section), key=lambda row: row.cell)
            if rows:
                yield _table(section, rows)


def _table(section: str, rows: Sequence[Row]) -> Table:
    unit = "ms" if section in _IN_MS else "µs"
    table = Table(title=f"{section}: {TITLES[section]}", title_justify="left", box=box.SIMPLE_HEAD)
    sized = any(row.payload_bytes is not None for row in rows)
    rated = any(row.calls_per_s is not None for row in rows)
    for name in (*(["payload"] if sized else []), "workers", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("samples", *(f"{p} {unit}" for p in ("p50", "p90", "p99")), *(["calls/s"] if rated else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ray-shm is", justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before not in (None, row.cell):
            table.add_section()
        first = before != row.cell
        before = row.cell
        place = [*([size_text(row.payload_bytes or 0)] if sized else []), str(row.workers)]
        scale = _MS if section in _IN_MS else 1
        figures = [figure_text(value / scale) for value in (row.p50_us, row.p90_us, row.p99_us)]
        rate = [f"{row.calls_per_s or 0:,.0f}"] if rated else []
        place = place if first else [""] * len(place)
        table.add_row(*place, row.peer, f"{row.samples:,}", *figures, *rate, _compared(row, rows))
    return table


def _compared(row: Row, rows: Sequence[Row]) -> str:
    """The cell's first row, which is ours, against this one, by the medians."""
    ours = next(other for other in rows if other.cell == row.cell)
    if row is ours or not ours.peer.startswith("ray-shm"):
        return ""
    ratio = row.p50_us / ours.p50_us
    return f"{ratio:.2f} × faster" if ratio >= 1 else f"{1 / ratio:.2f} × slower"
