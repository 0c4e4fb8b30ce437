"""What several ranks' failures say in one line: identical ones together, root cause first. Runs in every process.

    ranks 0-2,4-7: OutOfMemoryError: CUDA out of memory (model.py:80)

Two failures are identical when their type, the first line of their text and the innermost frame of their remote
traceback are. Root cause first means: deaths, then exceptions, then victims, each in the order of arrival. A victim
failed only because another rank did: its class or itself has ``ray_shm_victim = True``, as PeerLostError has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from ray_shm.errors import RemoteTraceback, WorkerDiedError

LINE_LENGTH = 300  # characters of an exception's text
_FRAME = re.compile(r'^[ |+-]*File "(.+)", line (\d+), in ', re.MULTILINE)
_DEATH, _EXCEPTION, _VICTIM = range(3)


def root_first(failures: Mapping[int, Exception]) -> list[tuple[int, Exception]]:
    """(rank, failure), the one to look at first in front."""
    return sorted(failures.items(), key=lambda item: _severity(item[1]))  # stable: else in the order of arrival


def describe(failures: Mapping[int, Exception]) -> str:
    """All failures in one line."""
    clusters: dict[tuple[str, ...], list[tuple[int, Exception]]] = {}
    for rank, error in root_first(failures):
        clusters.setdefault(_likeness(error), []).append((rank, error))
    return "; ".join(f"{name_ranks(rank for rank, _ in members)}: {_words(members)}" for members in clusters.values())


def describe_late(late_ranks: Sequence[int], where: Mapping[int, str]) -> str:
    """As in ``rank 5 (running 'train' for 41 s), ranks 6-7``; `where` may know each rank or not."""
    clusters: dict[str, list[int]] = {}
    for rank in late_ranks:
        clusters.setdefault(where.get(rank, ""), []).append(rank)
    return ", ".join(name_ranks(ranks) + (f" ({words})" if words else "") for words, ranks in clusters.items())


def name_ranks(ranks: Iterable[int]) -> str:
    """As in ``rank 3`` or ``ranks 0-2,4-7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    single = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"rank{'' if single else 's'} {','.join(names)}"


def _severity(error: Exception) -> int:
    if isinstance(error, WorkerDiedError):
        return _DEATH
    return _VICTIM if getattr(error, "ray_shm_victim", False) is True else _EXCEPTION


def _likeness(error: Exception) -> tuple[str, ...]:
    if isinstance(error, WorkerDiedError):
        return "", error.cause
    kind = type(error)
    return f"{kind.__module__}.{kind.__qualname__}", _first_line(error), *_innermost_frame(error)


def _words(members: Sequence[tuple[int, Exception]]) -> str:
    error = members[0][1]
    if isinstance(error, WorkerDiedError):
        died = "died, cause " if error.cause.startswith("unknown") else ""
        return f"{died}{error.cause} ({_processes([e for _, e in members if isinstance(e, WorkerDiedError)])})"
    line, frame = _first_line(error), _innermost_frame(error)
    where = f" ({os.path.basename(frame[0])}:{frame[1]})" if frame else ""
    return f"{type(error).__name__}{': ' * bool(line)}{line}{where}"


def _processes(deaths: Sequence[WorkerDiedError]) -> str:
    """As in ``pids 81,82, node 10.0.0.2; pid 90, node 10.0.0.3``."""
    by_node: dict[str, list[int]] = {}
    for death in deaths:
        by_node.setdefault(death.node, []).append(death.pid)
    return "; ".join(
        f"pid{'s' * (len(pids) > 1)} {','.join(map(str, pids))}, node {node}" for node, pids in by_node.items()
    )


def _first_line(error: Exception) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a user's __str__
        return "(its text cannot be shown)"
    line = lines[0] if lines else ""
    return line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 1] + "…"


def _innermost_frame(error: Exception) -> tuple[str, ...]:
    """(file, line) that raised it on the worker; () where that is not known."""
    cause = error.__cause__
    frames = _FRAME.findall(cause.text) if isinstance(cause, RemoteTraceback) else []
    return tuple(frames[-1]) if frames else ()
