"""What the cluster has, what of it is free, and whether a request can ever fit. Runs in the driver.

`read_nodes` and `may_grow` ask Ray; the rest are pure functions. Does not look inside existing placement groups (see
occupancy) and creates nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private import state
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.client import ray as ray_client

_GRAIN = 1e-4  # Ray counts resources in ten-thousandths
_NODES_SHOWN = 8


@dataclass(frozen=True)
class Node:
    """A live node. `free` may be ~0.1 s old, and is None where Ray does not tell it per node (Ray Client)."""

    node_id: str
    node_ip: str
    total: Mapping[str, float]
    free: Mapping[str, float] | None


@dataclass(frozen=True)
class Request:
    """`count` equal bundles, placed by one of Ray's strategies."""

    count: int
    bundle: Mapping[str, float]
    strategy: str

    def __str__(self) -> str:
        return f"{self.count} × {show(self.bundle)} ({self.strategy})"


def show(resources: Mapping[str, float]) -> str:
    """``{CPU: 1, GPU: 0.5}``"""
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in resources.items()) + "}"


def free_by_node() -> dict[str, dict[str, float]] | None:
    """Node id → what is free there now, about 0.1 s old; None through Ray Client, which cannot ask by node."""
    if ray_client.is_connected():
        return None
    free: dict[str, dict[str, float]] = state.available_resources_per_node()
    return free


def read_nodes() -> list[Node]:
    """The live nodes, by IP address."""
    free = free_by_node()
    nodes = [
        Node(
            node_id=row["NodeID"],
            node_ip=row["NodeManagerAddress"],
            total=row["Resources"],
            free=None if free is None else free.get(row["NodeID"], {}),
        )
        for row in ray.nodes()
        if row["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.node_ip, node.node_id))


def may_grow() -> bool:
    """Whether nodes may join later. False only for a Ray that ``ray.init()`` started: it has no autoscaler.

    A cluster from ``ray start`` cannot be told: an autoscaler may run beside it, and anyone may add a node by hand.
    """
    try:
        metadata = json.loads(_internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster"))
        return not metadata.get("ray_init_cluster", False)
    except Exception:  # a Ray that keeps this record elsewhere: then it is not known
        return True


def holds(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many of `bundle` fit into `resources` at once."""
    return min(_times(resources.get(name, 0.0), need, name) for name, need in bundle.items())


def can_ever_fit(nodes: Sequence[Node], request: Request) -> bool:
    """Whether the request would fit if all else on these nodes ended. Labels are left out: they only restrict more."""
    room = [holds(node.total, request.bundle) for node in nodes]
    if request.strategy == "STRICT_PACK":
        return max(room, default=0) >= request.count
    if request.strategy == "STRICT_SPREAD":
        return sum(1 for r in room if r) >= request.count
    return sum(room) >= request.count


def describe(nodes: Sequence[Node], request: Request) -> str:
    """What the cluster has and what is free, by node where it has several, and what the strategy makes of it."""
    names = sorted({"CPU", "GPU", *request.bundle})
    total = _sum([node.total for node in nodes], names)
    lines = [
        f"the cluster has {_amounts(total)} on {len(nodes)} node{'s' * (len(nodes) != 1)}, free: {_free(nodes, names)}"
    ]
    if len(nodes) > 1:
        lines += [_node_line(node, names, request.bundle) for node in nodes[:_NODES_SHOWN]]
        if len(nodes) > _NODES_SHOWN:
            lines.append(f"  and {len(nodes) - _NODES_SHOWN} more nodes")
    shape = _explain_shape(nodes, request)
    return "\n".join([*lines, shape] if shape else lines)


def _explain_shape(nodes: Sequence[Node], request: Request) -> str:
    """Why the sum over the cluster is not the whole story; empty where it is."""
    room = [holds(node.total, request.bundle) for node in nodes]
    bundle = show(request.bundle)
    if request.strategy == "STRICT_PACK":
        most = max(room, default=0)
        return f"STRICT_PACK needs one node that holds all {request.count} × {bundle}; the largest holds {most}"
    if request.strategy == "STRICT_SPREAD":
        able = sum(1 for r in room if r)
        return (
            f"STRICT_SPREAD needs {request.count} different nodes that hold {bundle} each; {able} of {len(nodes)} can"
        )
    if not any(room):
        return f"a bundle never spans nodes, and no node holds {bundle}"
    return ""


def _node_line(node: Node, names: Sequence[str], bundle: Mapping[str, float]) -> str:
    return (
        f"  node {node.node_ip}: has {_amounts(_sum([node.total], names))}, free: {_free([node], names)}; "
        f"holds {holds(node.total, bundle)} × {show(bundle)} when empty"
    )


def _free(nodes: Sequence[Node], names: Sequence[str]) -> str:
    known = [node.free for node in nodes if node.free is not None]
    if len(known) == len(nodes):
        return _amounts(_sum(known, names))
    return _amounts(_sum([ray.available_resources()], names)) if len(nodes) > 1 else "unknown"


def _sum(resources: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: sum(r.get(name, 0.0) for r in resources) for name in names}


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{round(amount, 4):g} {name}" for name, amount in resources.items())


def _times(amount: float, need: float, name: str) -> int:
    if name == "GPU" and need < 1:  # a share lies within one GPU: three of 0.6 need three GPUs
        return math.floor(amount + _GRAIN) * math.floor(1 / need + _GRAIN)
    return math.floor(amount / need + _GRAIN)
