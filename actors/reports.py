"""What a group shows of itself: tables that print in a terminal and in a notebook, counters, stacks.

Values without a tie to the group. Runs in the driver's process.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ray_shm.actors.status_board import Standing
from ray_shm.queue_end import QueueStats

_WIDTH = 120


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker of a group. transport: "shm" or "zmq". state: "alive" or "dead", as known when asked."""

    rank: int
    local_rank: int
    node_id: str
    node_ip: str
    pid: int
    gpu_ids: tuple[str, ...]
    transport: str
    state: str


@dataclass(frozen=True)
class Sheet:
    """A table: plain text with ``print``, rich in a terminal, HTML in a notebook."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        console = Console(width=_WIDTH, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(*self.head, title=self.title, title_justify="left")
        for line in self.lines:
            table.add_row(*line)
        yield table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(h)}</th>" for h in self.head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in self.lines)
        return f"<b>{html.escape(self.title)}</b><table><tr>{head}</tr>{body}</table>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def sheet_of(title: str, workers: Sequence[WorkerInfo]) -> Sheet:
    """The table of a group's workers."""
    head = ("rank", "local rank", "node", "pid", "GPU", "transport", "state")
    lines = tuple(
        (str(w.rank), str(w.local_rank), w.node_ip, str(w.pid), ",".join(w.gpu_ids) or "-", w.transport, w.state)
        for w in workers
    )
    return Sheet(title, head, lines)


@dataclass(frozen=True, slots=True)
class RankStatus:
    """Where one rank stands.

    Attributes:
        state: "idle", "running", "replying", "starting", "ended", "dead", or "silent": nothing is known of it now.
        call_id, method: of its present call, or its last; method is "" while a call is unpickled.
        seconds: in this state. calls: how many it has ended.
        operation: the collective that it is in, as "all_reduce of group 'tp'", if its control thread could say so.
    """

    rank: int
    node_ip: str
    pid: int
    state: str
    call_id: int = 0
    method: str = ""
    seconds: float = 0.0
    calls: int = 0
    operation: str = ""


class GroupStatus(tuple[RankStatus, ...]):
    """One row per rank, in rank order; prints as a table."""

    def _sheet(self) -> Sheet:
        head = ("rank", "node", "pid", "state", "call", "method", "seconds", "in", "calls ended")
        lines = tuple(
            (
                str(row.rank),
                row.node_ip,
                str(row.pid),
                row.state,
                str(row.call_id or "-"),
                row.method or "-",
                f"{row.seconds:.1f}" if row.state not in ("dead", "silent") else "-",
                row.operation or "-",
                str(row.calls),
            )
            for row in self
        )
        busy = sum(row.state == "running" for row in self)
        return Sheet(f"{len(self)} ranks, {busy} running", head, lines)

    def __str__(self) -> str:
        return str(self._sheet())

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._sheet().__rich_console__(console, options)

    def _repr_html_(self) -> str:
        return self._sheet()._repr_html_()


def status_of(workers: Sequence[WorkerInfo], standings: Mapping[int, Standing]) -> GroupStatus:
    """The rows of a group's status."""

    def row(worker: WorkerInfo) -> RankStatus:
        who = (worker.rank, worker.node_ip, worker.pid)
        standing = standings.get(worker.rank)
        if standing is None or worker.state == "dead":
            return RankStatus(*who, "dead" if worker.state == "dead" else "silent")
        return RankStatus(
            *who,
            standing.state,
            standing.call_id,
            standing.method,
            standing.seconds,
            standing.calls,
            standing.operation,
        )

    return GroupStatus(row(worker) for worker in workers)


class Stacks(dict[int, str]):
    """Rank -> the stacks of its threads; prints as text with a heading per rank."""

    def __str__(self) -> str:
        return "\n".join(f"=== rank {rank} ===\n{text.rstrip()}\n" for rank, text in self.items())

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Counters of one handle's process.

    Attributes:
        calls: sent so far, those of the library itself included. in_flight: not ended. dropped_replies: that came when
            nobody waited any more. dead: ranks that are. heals: ranks replaced. epoch: of the group's formation.
        requests: of the queue that leads to the workers; None where a driver actor has it.
    """

    calls: int
    in_flight: int
    dropped_replies: int
    dead: tuple[int, ...]
    heals: int
    epoch: int
    requests: QueueStats | None = field(default=None, repr=False)
