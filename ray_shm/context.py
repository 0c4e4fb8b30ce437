"""What a worker knows of itself: rank, node, GPUs, and the coordinator groups it is in. Runs in workers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ray_shm.coordinator import StatelessGroupCoordinator


@dataclass(frozen=True)
class WorkerContext:
    """A worker's place in its group; exists before the worker's constructor runs.

    Attributes:
        rank: 0..world_size-1, in the group. local_rank: among the group's ranks on this node.
        node_rank: number of this node among the group's nodes. node_id, node_ip: as Ray names the node.
        gpu_ids: ids that Ray assigned to this worker, as in CUDA_VISIBLE_DEVICES; empty without GPUs.
    """

    rank: int
    local_rank: int
    world_size: int
    node_rank: int
    node_id: str
    node_ip: str
    gpu_ids: tuple[str, ...]
    _groups: Mapping[str, StatelessGroupCoordinator] = field(default_factory=dict, repr=False)
    _lists: Callable[[], Mapping[str, list[list[int]]]] = field(default=dict, repr=False)  # of all groups, by name

    @property
    def device(self) -> torch.device:
        """The first GPU of this worker, or the CPU. Imports torch."""
        import torch

        return torch.device("cuda", 0) if self.gpu_ids and torch.cuda.is_available() else torch.device("cpu")

    def group(self, name: str = "world") -> StatelessGroupCoordinator:
        """The coordinator group `name` that this rank is in, declared at the launch or created since.

        "world" needs no declaration; it connects at its first operation, which every rank has to call.

        Raises:
            LookupError: there is no such group, or this rank is outside of it.
        """
        try:
            return self._groups[name]
        except KeyError:
            raise LookupError(self._no_group(name)) from None

    def _no_group(self, name: str) -> str:
        lists = self._lists()
        if name in lists:
            why = f"rank {self.rank} is outside of group {name!r}, which is {lists[name]}"
        else:
            why = f"there is no group {name!r}; there are {sorted(lists)}"
        return (
            f"{why}; rank {self.rank} is in {sorted(self._groups)}. Declare groups with launch(groups={{{name!r}: "
            f"[[0, 1], [2, 3]]}}), or make them in the driver with ActorGroup.create_groups({{{name!r}: [[0, 1]]}})"
        )


_current: WorkerContext | None = None


def set_context(context: WorkerContext | None) -> None:
    """Called by the worker's runtime before the constructor, and at its end."""
    global _current
    _current = context


def get_context() -> WorkerContext:
    """The context of the worker that this process is.

    Raises:
        RuntimeError: this process is no worker of an actor group.
    """
    if _current is None:
        raise RuntimeError("get_context() works inside a worker of an actor group only; this process is none")
    return _current
