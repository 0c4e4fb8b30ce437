"""From the places Ray chose to ranks: pure functions, run by the driver.

Ray's bundle order says nothing about nodes or GPUs (bundle 0 is often on the other node), so ranks are sorted here.
Does not talk to Ray.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

_Natural: TypeAlias = tuple[int, int, str]  # numbers in numeric order, before text in text order


@dataclass(frozen=True)
class WorkerPlace:
    """Where one worker runs, as the worker itself reported it once.

    Attributes:
        bundle_index: its bundle in the placement group.
        node_id: Ray's hex id of its node. node_ip: the address Ray knows that node by.
        pid: process id on that node.
        gpu_ids: the GPUs Ray assigned, as ``CUDA_VISIBLE_DEVICES`` would name them; empty where none were asked for.
        cuda_visible_devices: that variable in the worker's environment; None when unset.
    """

    bundle_index: int
    node_id: str
    node_ip: str
    pid: int
    gpu_ids: tuple[str, ...]
    cuda_visible_devices: str | None


@dataclass(frozen=True)
class RankPlace:
    """A worker's numbers in its group. All start at 0 and have no gaps.

    Attributes:
        rank: in the group. local_rank: among the ranks of its node. node_rank: its node among the group's nodes.
        place: where it runs.
    """

    rank: int
    local_rank: int
    node_rank: int
    place: WorkerPlace


def assign_ranks(places: Sequence[WorkerPlace], driver_node_id: str) -> list[RankPlace]:
    """Number the workers, in an order that depends on the places only, not on the order they are given in.

    Nodes: the driver's node first, if it has workers (they are reached through shared memory); then the node with
    more workers first; equal ones by IP address (numerically), then by node id. Within a node: by GPU id, numeric
    ids as numbers and before others; then by bundle index. Ranks of a node are consecutive.

    Returns:
        One entry per place, in rank order.
    """
    by_node: dict[str, list[WorkerPlace]] = {}
    for place in places:
        by_node.setdefault(place.node_id, []).append(place)

    def node_order(workers: list[WorkerPlace]) -> tuple[bool, int, _Natural, str]:
        first = min(workers, key=_worker_order)
        return first.node_id != driver_node_id, -len(workers), _address_order(first.node_ip), first.node_id

    ranks: list[RankPlace] = []
    for node_rank, workers in enumerate(sorted(by_node.values(), key=node_order)):
        for local_rank, place in enumerate(sorted(workers, key=_worker_order)):
            ranks.append(RankPlace(len(ranks), local_rank, node_rank, place))
    return ranks


def sort_gpu_ids(ids: Iterable[str]) -> tuple[str, ...]:
    """GPU ids in numeric order; UUIDs and MIG names behind the numbers, in text order."""
    return tuple(sorted(ids, key=_natural))


def _worker_order(place: WorkerPlace) -> tuple[list[_Natural], int]:
    return [_natural(gpu_id) for gpu_id in place.gpu_ids], place.bundle_index


def _natural(text: str) -> _Natural:
    return (0, int(text), text) if text.isdecimal() else (1, 0, text)


def _address_order(address: str) -> _Natural:
    try:
        return 0, int(ipaddress.ip_address(address)), address
    except ValueError:  # a host name, or an address with a zone
        return 1, 0, address
