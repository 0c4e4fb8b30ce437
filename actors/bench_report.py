"""What the reports of all benchmarks share: the machine, figures and sizes as text, JSON lines. Measures nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

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


def print_line(kind: str, values: dict[str, Any], out: TextIO | None = None) -> None:
    """One JSON line, at once. out: default is standard output."""
    print(json.dumps({"kind": kind, **values}), file=out, flush=True)


def table_console(out: TextIO | None = None) -> Console:
    """On `out`, by default standard output; a file or a pipe is as wide as the tables."""
    console = Console(file=out)
    return console if console.is_terminal else Console(file=out, width=WIDTH)
