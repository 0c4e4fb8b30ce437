"""What is free inside the bundles of an existing placement group. Runs in the process that reserves.

Ray shows a bundle as resources of its node, ``CPU_group_<index>_<group>`` for what it holds and
``bundle_group_<index>_<group>`` for whether it is occupied (1000, less 0.001 for every task or actor in it). That view
lags by about 0.1 s, so what the reservations of this process have claimed is counted, too. Creates and removes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group_table

from ray_shm.placement.capacity import free_by_node

_GRAIN = 1e-4  # Ray counts resources in ten-thousandths

_lock = threading.Lock()
# (group id, bundle index) → what live reservations of this process claimed of it; guarded by _lock.
_claims: dict[tuple[str, int], list[Mapping[str, float]]] = {}


@dataclass(frozen=True)
class Bundle:
    """One bundle of a placement group."""

    index: int
    total: Mapping[str, float]
    unclaimed: Mapping[str, float]  # total, less what reservations of this process claimed; exact
    free: Mapping[str, float]  # unclaimed, or less where Ray shows less; may be ~0.1 s old
    occupied: bool  # anything claimed or, as Ray shows it, running in it


def fits(resources: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= need - _GRAIN / 2 for name, need in needs.items())


def read_bundles(group: PlacementGroup) -> list[Bundle]:
    """The bundles of a created placement group, by index; all free where Ray does not tell (Ray Client)."""
    group_id = group.id.hex()
    specs: Mapping[int, Mapping[str, float]] = placement_group_table(group)["bundles"]
    by_node = free_by_node()
    if by_node is None:
        return [Bundle(index, specs[index], specs[index], specs[index], False) for index in sorted(specs)]
    free: dict[str, float] = {}
    for node in by_node.values():
        free.update({name: amount for name, amount in node.items() if name.endswith(group_id)})
    return [_bundle(group_id, index, specs[index], free) for index in sorted(specs)]


class Claim:
    """`needs`, counted as taken from each of these bundles until released (once)."""

    def __init__(self, group: PlacementGroup, indices: Iterable[int], needs: Mapping[str, float]) -> None:
        self._keys = [(group.id.hex(), index) for index in indices]
        self._needs = needs
        with _lock:
            for key in self._keys:
                _claims.setdefault(key, []).append(needs)

    def release(self) -> None:
        with _lock:
            for key in self._keys:
                _claims[key].remove(self._needs)
                if not _claims[key]:
                    del _claims[key]


def _bundle(group_id: str, index: int, total: Mapping[str, float], seen: Mapping[str, float]) -> Bundle:
    with _lock:
        claims = list(_claims.get((group_id, index), ()))
    unclaimed = {name: amount - sum(c.get(name, 0.0) for c in claims) for name, amount in total.items()}
    free = {name: min(amount, seen.get(f"{name}_group_{index}_{group_id}", 0.0)) for name, amount in unclaimed.items()}
    untouched = seen.get(f"bundle_group_{index}_{group_id}", 0.0) >= 1000 - _GRAIN
    return Bundle(index, total, unclaimed, free, occupied=bool(claims) or not untouched)
