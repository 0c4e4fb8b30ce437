"""ray-shm: call a group of Ray actors collectively, through shared memory on a node and ZeroMQ across nodes.

This file is the table of contents. Every name is imported on first use (PEP 562), so that ``import ray_shm`` stays
under 30 ms and imports neither torch nor ray nor zmq.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ray_shm import serve
    from ray_shm.actors.connect import connect
    from ray_shm.actors.executor import Executor
    from ray_shm.actors.future import RpcFuture
    from ray_shm.actors.group import ActorGroup
    from ray_shm.actors.launch import launch
    from ray_shm.actors.wire import Scatter
    from ray_shm.context import WorkerContext, get_context
    from ray_shm.coordinator import StatelessGroupCoordinator
    from ray_shm.errors import (
        GroupClosedError,
        MismatchError,
        PeerLostError,
        PlacementError,
        QueueCancelledError,
        QueueClosedError,
        RayShmError,
        RemoteError,
        RemoteExitError,
        RpcCancelledError,
        RpcError,
        RpcTimeoutError,
        StartError,
        WorkerDiedError,
    )
    from ray_shm.handle import Handle
    from ray_shm.message_queue import MessageQueue

_HOME = {
    "ActorGroup": "ray_shm.actors.group",
    "Executor": "ray_shm.actors.executor",
    "GroupClosedError": "ray_shm.errors",
    "Handle": "ray_shm.handle",
    "MessageQueue": "ray_shm.message_queue",
    "MismatchError": "ray_shm.errors",
    "PeerLostError": "ray_shm.errors",
    "PlacementError": "ray_shm.errors",
    "QueueCancelledError": "ray_shm.errors",
    "QueueClosedError": "ray_shm.errors",
    "RayShmError": "ray_shm.errors",
    "RemoteError": "ray_shm.errors",
    "RemoteExitError": "ray_shm.errors",
    "RpcCancelledError": "ray_shm.errors",
    "RpcError": "ray_shm.errors",
    "RpcFuture": "ray_shm.actors.future",
    "RpcTimeoutError": "ray_shm.errors",
    "Scatter": "ray_shm.actors.wire",
    "StartError": "ray_shm.errors",
    "StatelessGroupCoordinator": "ray_shm.coordinator",
    "WorkerContext": "ray_shm.context",
    "WorkerDiedError": "ray_shm.errors",
    "connect": "ray_shm.actors.connect",
    "get_context": "ray_shm.context",
    "launch": "ray_shm.actors.launch",
    "serve": "ray_shm.serve",
}

__all__ = [
    "ActorGroup",
    "Executor",
    "GroupClosedError",
    "Handle",
    "MessageQueue",
    "MismatchError",
    "PeerLostError",
    "PlacementError",
    "QueueCancelledError",
    "QueueClosedError",
    "RayShmError",
    "RemoteError",
    "RemoteExitError",
    "RpcCancelledError",
    "RpcError",
    "RpcFuture",
    "RpcTimeoutError",
    "Scatter",
    "StartError",
    "StatelessGroupCoordinator",
    "WorkerContext",
    "WorkerDiedError",
    "connect",
    "get_context",
    "launch",
    "serve",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ray_shm' has no attribute {name!r}; it has: {', '.join(__all__)}")
    module = importlib.import_module(home)
    value = module if home == f"ray_shm.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
