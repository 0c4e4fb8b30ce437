"""What the reports of all benchmarks share: rows and what was left out, as tables or JSON lines. Measures nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TextIO, TypeVar

from rich.console import Console
from rich.table import Table

WIDTH = 126  # columns, of what does not go to a terminal
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


def parse_size(text: str) -> int:
    """Bytes of "100B", "64KiB", "1 GiB" or "4096".

    Raises:
        ValueError: it is not such a text, or less than 1.
    """
    for unit, factor in _UNITS:
        if text.lower().endswith(unit.lower()):
            size = int(float(text[: -len(unit)]) * factor)
            break
    else:
        size = int(text)
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return size


def figure_text(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the figures depend on, with the versions of those of `packages` that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_text() -> str:
    facts = machine(())
    return f"{facts['cpus']} CPUs, {facts['cpu']}, Linux {facts['kernel']}, Python {facts['python']}"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


class _LeftOut(_Dataclass, Protocol):
    """What was not measured, and why; `place`: where, with the word that leads to it, as " in noop"."""

    @property
    def peer(self) -> str: ...

    @property
    def reason(self) -> str: ...

    @property
    def place(self) -> str: ...


RowT = TypeVar("RowT", bound=_Dataclass)
LeftOutT = TypeVar("LeftOutT", bound=_LeftOut)


class BenchReport(Generic[RowT, LeftOutT]):
    """Collects rows; prints JSON lines as they come, or the tables at the end; says on standard error what is done.

    What it prints goes to what is standard output when it is made.

    Attributes:
        bench: the benchmark's name on the command line. packages: whose versions its figures depend on.
    """

    bench: ClassVar[str]
    packages: ClassVar[Sequence[str]]

    def __init__(self, as_json: bool, notes: str) -> None:
        self.as_json = as_json
        self.rows: list[RowT] = []
        self.left_out: list[LeftOutT] = []
        self.notes = notes
        self._begun = time.monotonic()
        self._out = sys.stdout
        if as_json:
            self.print_line("machine", machine(self.packages) | {"notes": notes})

    def progress(self, text: str) -> None:
        seconds = time.monotonic() - self._begun
        print(f"ray-shm bench {self.bench} [{seconds:5.1f} s] {text}", file=sys.stderr, flush=True)

    def print_line(self, kind: str, values: dict[str, Any]) -> None:
        """One JSON line, at once."""
        print(json.dumps({"kind": kind, **values}), file=self._out, flush=True)

    def add(self, rows: Sequence[RowT]) -> None:
        self.rows += rows
        if self.as_json:
            for row in rows:
                self.print_line("row", asdict(row))

    def leave_out(self, left_out: LeftOutT) -> None:
        """Once for each reason."""
        if left_out in self.left_out:
            return
        self.left_out.append(left_out)
        if self.as_json:
            self.print_line("left out", asdict(left_out))

    def finish(self) -> None:
        """Print what is not printed yet; also after a failure, with the rows so far."""
        if not self.as_json and self.rows:
            left_out = (f"Left out: {item.peer}{item.place}: {item.reason}" for item in self.left_out)
            lines = [self.notes, *left_out, *self.closing()]
            _console(self._out).print(machine_text(), "", *self.tables(), *lines, sep="\n")

    def tables(self) -> Iterator[Table]:
        """Of the rows, in the order in which they are printed."""
        raise NotImplementedError

    def closing(self) -> Sequence[str]:
        """The lines below everything else."""
        return ()


def _console(out: TextIO) -> Console:
    """A file or a pipe is as wide as the tables."""
    console = Console(file=out)
    return console if console.is_terminal else Console(file=out, width=WIDTH)
