"""torch.profiler in every rank of a group, started and stopped by calls: one Chrome trace per rank.

`profile` runs in the driver's process, and is what ``ActorGroup.profile`` and ``Executor.profile`` do. `start_profile`
and `stop_profile` run in the workers, on the thread that runs the user's methods, which is the thread they record; the
profiler lives in this module in between. A trace opens in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray.util

from ray_shm.context import get_context

if TYPE_CHECKING:
    from ray_shm.actors.group import ActorGroup

_PREFIX = "ray_shm_profile-"


def profile(group: ActorGroup, is_start: bool, directory: str | os.PathLike[str] | None = None) -> list[str] | None:
    """Start torch.profiler in every rank, or stop it and write each rank's trace. Waits for all ranks.

    Records the CPU, and CUDA where a rank has a GPU, of all calls in between.

    Args:
        is_start: True starts, False stops.
        directory: folder for the traces, on each rank's node; made if missing. Default: a fresh folder
            ``ray_shm_profile-...`` below the workers' `tempfile.gettempdir()`. To be given at the start only.

    Returns:
        None at the start. At the stop, the path of each rank's trace ``rank{N}.json`` in rank order; for a rank on
        another node than this process ``node_ip:path``, as scp reads it.

    Raises:
        RuntimeError: it was started already, or was not. Ranks that differ (one was replaced in between) do what was
            asked of them where they can, so that all are in the same state afterwards.
        ValueError: `directory` without a start. RpcError: a rank failed, such as for a folder that it cannot write to;
            ranks that did start go on, until a stop.
    """
    if not is_start:
        if directory is not None:
            raise ValueError("directory belongs to profile(True); a stop writes where the start said")
        return _collect(group.collective_rpc(stop_profile))
    folder = None if directory is None else os.fspath(directory)
    # The name is chosen once, so that the ranks of a node share a folder; its place is up to each node.
    fresh = f"{_PREFIX}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    running = group.collective_rpc(start_profile, args=(folder, fresh))
    if any(running):
        ranks = [rank for rank, where in enumerate(running) if where]
        where = next(filter(None, running))
        others = "" if all(running) else "; the others have started now"
        raise RuntimeError(
            f"ranks {ranks} are being profiled already, into {where}{others}; end that with profile(False) first"
        )
    return None


def _collect(traces: Sequence[Trace | None]) -> list[str]:
    here = ray.util.get_node_ip_address()
    paths = [
        None if trace is None else trace.path if trace.node_ip == here else f"{trace.node_ip}:{trace.path}"
        for trace in traces
    ]
    idle = [rank for rank, path in enumerate(paths) if path is None]
    if len(idle) == len(paths):
        raise RuntimeError("no profile was started; call profile(True) first")
    if idle:
        raise RuntimeError(
            f"ranks {idle} were not being profiled (were they replaced since the start?); the others wrote "
            f"{[path for path in paths if path is not None]}"
        )
    return [path for path in paths if path is not None]


# ---- in the worker ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A trace that was written. path: absolute, on the node `node_ip`."""

    node_ip: str
    path: str


_running: tuple[Any, str] | None = None  # this rank's torch.profiler.profile, and where its trace will be


def start_profile(worker: object, directory: str | None, fresh: str = f"{_PREFIX}0") -> str | None:
    """Start this rank's profiler; None, or where the one that runs already will write.

    Args:
        directory: for the trace. None: `fresh`, a name, below `tempfile.gettempdir()`.

    Raises:
        OSError: the folder cannot be made or written to. RuntimeError: another profiler of torch runs. Nothing started.
    """
    global _running
    if _running is not None:
        return _running[1]
    import torch.profiler

    path = _prepared(os.path.abspath(directory or os.path.join(tempfile.gettempdir(), fresh)))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    _running = profiler, path
    return None


def stop_profile(worker: object) -> Trace | None:
    """Stop this rank's profiler and write its trace; None if none runs.

    Raises:
        OSError, RuntimeError: the trace cannot be written, and is lost. The profiler is stopped all the same.
    """
    global _running
    if _running is None:
        return None
    (profiler, path), _running = _running, None
    context = get_context()
    # The key by which tools that read the traces of many ranks together tell them apart. Dropped if given after `stop`.
    profiler.add_metadata_json("distributedInfo", json.dumps({"rank": context.rank, "world_size": context.world_size}))
    profiler.stop()
    profiler.export_chrome_trace(path)
    return Trace(context.node_ip, path)


def _prepared(directory: str) -> str:
    """The path of this rank's trace, which can be written: found out now, not after the work that was recorded."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = os.path.join(directory, f"rank{get_context().rank}.json")
    with open(path, "w"):
        return path
