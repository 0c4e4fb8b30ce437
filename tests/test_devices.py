"""GPUs as the workers report them: pinned, all there, and nobody's twice. No Ray here."""

from __future__ import annotations

import pytest

from ray_shm.errors import PlacementError
from ray_shm.placement.devices import verify
from ray_shm.placement.topology import WorkerPlace


class TestVerify:
    @staticmethod
    def place(bundle: int, gpus: str, visible: str | None = "same", node: str = "a") -> WorkerPlace:
        ids = tuple(gpus.split(",")) if gpus else ()
        return WorkerPlace(bundle, node, "10.0.0.1", 100 + bundle, ids, gpus if visible == "same" else visible)

    def test_what_was_promised_passes(self) -> None:
        verify([self.place(0, "0"), self.place(1, "1"), self.place(2, "0", node="b")], 1)
        verify([self.place(0, "0,1", "1,0"), self.place(1, "2,3")], 2)
        verify([self.place(0, "0"), self.place(1, "0")], 0.5)
        verify([self.place(0, "", "0,1,2"), self.place(1, "", None)], 0)

    @pytest.mark.parametrize("visible", [None, "", "7", "3,7"])
    def test_other_visible_devices_name_the_likely_cause(self, visible: str | None) -> None:
        with pytest.raises(PlacementError, match=r"bundle 4 \(pid 104, node 10.0.0.1\).*GPU 3.*env_vars"):
            verify([self.place(4, "3", visible)], 1)
        verify([self.place(4, "3", visible)], 1, overridden=True)

    @pytest.mark.parametrize(("gpus", "promised"), [("", 1), ("0,1", 1), ("0", 2), ("", 0.5), ("0,1", 0.5)])
    def test_another_number_of_gpus(self, gpus: str, promised: float) -> None:
        with pytest.raises(PlacementError, match="promised"):
            verify([self.place(0, gpus)], promised, overridden=True)

    def test_one_gpu_twice(self) -> None:
        twice = [self.place(0, "0"), self.place(1, "1"), self.place(2, "1")]
        with pytest.raises(PlacementError, match=r"GPU 1 .* bundle 1 .* bundle 2 "):
            verify(twice, 1)
