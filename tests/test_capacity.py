"""Whether a cluster can ever hold a group, from its nodes' totals alone: no Ray here."""

from __future__ import annotations

import pytest

from ray_shm.placement import capacity
from ray_shm.placement.bundles import WorkerResources
from ray_shm.placement.capacity import Node, Request

GPU = WorkerResources(gpus=1)


class TestCapacity:
    nodes = [Node("a", "10.0.0.1", {"GPU": 2, "CPU": 8}, {"CPU": 8}), Node("b", "10.0.0.2", {"GPU": 3.0}, {"GPU": 3.0})]

    @pytest.mark.parametrize(
        ("count", "bundle", "strategy", "fits"),
        [
            (5, {"GPU": 1}, "PACK", True),
            (6, {"GPU": 1}, "PACK", False),
            (5, {"GPU": 1}, "SPREAD", True),
            (3, {"GPU": 1}, "STRICT_PACK", True),
            (4, {"GPU": 1}, "STRICT_PACK", False),
            (2, {"GPU": 1}, "STRICT_SPREAD", True),
            (3, {"GPU": 1}, "STRICT_SPREAD", False),
            (2, {"GPU": 2}, "PACK", True),
            (3, {"GPU": 2}, "PACK", False),
            (10, {"GPU": 0.5}, "PACK", True),
            (6, {"GPU": 0.6}, "PACK", False),
            (80, {"CPU": 0.1}, "PACK", True),
            (81, {"CPU": 0.1}, "PACK", False),
            (1, {"disk": 1}, "PACK", False),
        ],
    )
    def test_can_ever_fit(self, count: int, bundle: dict[str, float], strategy: str, fits: bool) -> None:
        assert capacity.can_ever_fit(self.nodes, Request(count, bundle, strategy)) is fits
        assert not capacity.can_ever_fit([], Request(count, bundle, strategy))

    def test_a_bundle_no_node_holds_is_explained(self) -> None:
        text = capacity.describe(self.nodes, Request(1, {"GPU": 4}, "PACK"))
        assert "8 CPU, 5 GPU on 2 nodes, free: 8 CPU, 3 GPU" in text
        assert "a bundle never spans nodes, and no node holds {GPU: 4}" in text
