"""What ``ray-shm bench queue`` found, as a table, as JSON lines, or as a plot. Runs in the driver; measures nothing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

from ray_shm.actors.bench_report import BenchReport, figure_text, machine_text
from ray_shm.actors.queue_peers import Cell
from ray_shm.size_text import size_text

_LOOKS = {  # of each peer's line: color-blind safe colors (Okabe and Ito), floors in grey
    "ray-shm shm": ("#d55e00", "o", "-"),
    "ray-shm zmq": ("#0072b2", "o", "-"),
    "iceoryx2": ("#009e73", "s", "-"),
    "pyzmq": ("#56b4e9", "^", "-"),
    "multiprocessing.Pipe": ("#cc79a7", "v", "-"),
    "memcpy": ("#555555", "x", "--"),
    "memcpy and sums": ("#555555", "x", "--"),
    "pipe ping-pong": ("#999999", None, ":"),
}
NOTES = (
    "A call ends with the last reader's reply; GB/s is the payload, counted once per call, by the p50; CPU is user and "
    "system time per call, of the driver and all readers together. Floors: memcpy is one thread's copy of the payload "
    "into warm shared memory and calls nobody, pipe ping-pong is one byte to one process and back. "
    "÷ ours: p50 divided by that of the cell's first row."
)


@dataclass(frozen=True)
class Row:
    """Round trips of one peer in one cell. Times in microseconds; cpu_us: of all processes together, per call.

    gb_per_s: 10⁹ payload bytes per second at p50, counted once per call; None where no payload moves.
    """

    peer: str
    readers: int
    payload_bytes: int
    touch: bool
    calls: int
    p50_us: float
    p90_us: float
    p99_us: float
    gb_per_s: float | None
    cpu_us: float


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why. None: in no cell."""

    peer: str
    readers: int | None
    payload_bytes: int | None
    reason: str

    @property
    def place(self) -> str:
        return f", {cell_text(self.payload_bytes, self.readers)}" if self.payload_bytes and self.readers else ""


@dataclass(frozen=True)
class Idle:
    """Queues that wait while the driver sleeps. cpu_percent: of one core, all processes together. worst: a reader's."""

    peer: str
    readers: int
    seconds: float
    cpu_percent: float
    wake_ups_per_s_driver: float
    wake_ups_per_s_mean: float
    wake_ups_per_s_worst: float


def cell_text(payload_bytes: int, readers: int) -> str:
    """Such as "1 MiB to 8 readers"."""
    return f"{size_text(payload_bytes)} to {readers} reader{'s' * (readers > 1)}"


class Report(BenchReport[Row, LeftOut]):
    """idle: what waiting costs, once that is measured."""

    bench = "queue"
    packages = ("ray-shm", "numpy", "pyzmq", "iceoryx2")

    def __init__(self, as_json: bool, warm_up: str, touch: bool) -> None:
        """warm_up: the sentence on such calls."""
        super().__init__(as_json, f"{NOTES} {'Readers sum the payload. ' if touch else ''}{warm_up}")
        self.idle: Idle | None = None

    def finish(self) -> None:
        super().finish()
        if self.as_json and self.idle is not None:
            self.print_line("idle", asdict(self.idle))

    @contextlib.contextmanager
    def bar(self, cells: int) -> Iterator[Progress]:
        """A line on standard error, if that is a terminal."""
        columns = (rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(30))
        console = Console(stderr=True)
        # Drawn by hand: a thread that draws ten times a second would be measured, too.
        with rich_progress.Progress(
            *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
        ) as bar:
            yield Progress(bar, cells)

    def tables(self) -> Iterator[Table]:
        table = Table(title="Call and reply over queue pairs", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("payload", "readers", "peer"):
            table.add_column(name, no_wrap=True)
        for name in ("calls", "p50 µs", "p90 µs", "p99 µs", "GB/s", "CPU µs", "÷ ours"):
            table.add_column(name, justify="right", no_wrap=True)
        before = None
        for row in self.rows:
            cell = (row.payload_bytes, row.readers)
            if before not in (None, cell):
                table.add_section()
            first = ("", "") if before == cell else (size_text(row.payload_bytes), str(row.readers))
            table.add_row(*first, *self._cells(row))
            before = cell
        yield table

    def _cells(self, row: Row) -> list[str]:
        ours = next(r for r in self.rows if (r.payload_bytes, r.readers) == (row.payload_bytes, row.readers))
        ratio = f"{row.p50_us / ours.p50_us:.2f}" if ours.peer.startswith("ray-shm") and row is not ours else ""
        speed = "" if row.gb_per_s is None else f"{row.gb_per_s:.2f}" if row.gb_per_s >= 0.01 else "<0.01"
        p50, p90, p99, cpu = (figure_text(value) for value in (row.p50_us, row.p90_us, row.p99_us, row.cpu_us))
        return [row.peer, f"{row.calls:,}", p50, p90, p99, speed, cpu, ratio]

    def closing(self) -> Sequence[str]:
        idle = self.idle
        if idle is None:
            return ()
        return [
            f"Idle: {idle.peer}, {idle.readers} readers, {idle.seconds:g} s: {idle.cpu_percent:g} % of one core in all "
            f"processes together; wake-ups per second: {idle.wake_ups_per_s_mean:g} in a reader on average, "
            f"{idle.wake_ups_per_s_worst:g} at most, {idle.wake_ups_per_s_driver:g} in the driver."
        ]


class Progress:
    """The line on standard error."""

    def __init__(self, bar: rich_progress.Progress, cells: int) -> None:
        self._bar = bar
        self._cells = cells
        self._done = -1
        self._cell = ""
        self._task = bar.add_task("starting workers", total=cells)

    def begin(self, cell: Cell) -> None:
        self._done += 1
        self._cell = f"{cell_text(cell.payload_bytes, cell.readers)} ({self._done + 1} of {self._cells})"
        self._show(self._cell)

    def peer(self, name: str) -> None:
        self._show(f"{self._cell}: {name}")

    def idle(self, seconds: float) -> None:
        self._done = self._cells
        self._show(f"idle for {seconds:g} s")

    def _show(self, text: str) -> None:
        self._bar.update(self._task, description=text, completed=self._done, refresh=True)


def require_plot() -> None:
    """Raises ModuleNotFoundError, which says what to install, where matplotlib is missing: asked before measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'ray-shm[bench]'", name="matplotlib")


def plot(rows: Sequence[Row], path: str) -> None:
    """p50 over payload of every peer, both axes logarithmic, one panel per number of readers; written to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    readers = sorted({row.readers for row in rows})
    columns = min(2, len(readers))
    lines = -(-len(readers) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(1 + 5.5 * columns, 1.2 + 3.9 * lines), sharex=True, sharey=True, squeeze=False
    )
    panels = [panel for line in grid for panel in line]
    for panel, count in zip(panels, readers, strict=False):
        _draw(panel, [row for row in rows if row.readers == count])
        panel.set_title(f"{count} reader{'s' * (count > 1)}", fontsize=11)
    for panel in panels[len(readers) :]:
        panel.set_visible(False)
    for panel in grid[-1]:
        panel.set_xlabel("payload")
    for line in grid:
        line[0].set_ylabel("p50 of a call")
    figure.suptitle(f"Call, and replies of all readers\n{machine_text()}", fontsize=10)
    drawn = [panel.get_legend_handles_labels() for panel in panels]
    keys = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    names = [name for name in _LOOKS if name in keys]
    figure.legend([keys[name] for name in names], names, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06 if lines > 1 else 0.11, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(panel: Any, rows: Sequence[Row]) -> None:
    sizes = sorted({row.payload_bytes for row in rows})
    for peer, (color, marker, dashes) in _LOOKS.items():
        points = sorted((row.payload_bytes, row.p50_us) for row in rows if row.peer == peer)
        if points:
            ours = peer.startswith("ray-shm")
            panel.plot(
                *zip(*points, strict=True), color=color, marker=marker, linestyle=dashes, label=peer,
                linewidth=2.4 if ours else 1.4, markersize=6 if ours else 4, zorder=3 if ours else 2,
            )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    slanted = {"rotation": 35, "ha": "right"} if len(sizes) > 7 else {}
    panel.set_xticks(sizes, [size_text(size) for size in sizes], fontsize=9, **slanted)
    panel.spines[["top", "right"]].set_visible(False)
    panel.yaxis.set_major_formatter(lambda value, _: _time_text(value))
    panel.set_xticks([], minor=True)
    panel.grid(True, which="major", alpha=0.3)


def _time_text(micros: float) -> str:
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if micros >= factor:
            return f"{micros / factor:g} {unit}"
    return f"{micros:g} µs"
