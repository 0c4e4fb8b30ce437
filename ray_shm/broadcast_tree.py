"""How the messages of one member of a group come to the others: through shared memory, and one hop to each other node.

A pure value. Runs in every worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tree:
    """Who gets the messages of one member from whom. Ranks in the group.

    Attributes:
        local: those who read the member's own shared memory.
        branches: leader on another node -> those who read its shared memory.
    """

    local: list[int]
    branches: dict[int, list[int]]

    @classmethod
    def of(cls, src: int, attached: Sequence[Sequence[bool]]) -> Tree:
        """attached[r][w]: whether `r` can attach to the memory of `w`."""
        others = [r for r in range(len(attached)) if r != src]
        local = [r for r in others if attached[r][src]]
        branches: dict[int, list[int]] = {}
        rest = [r for r in others if r not in local]
        while rest:
            leader, *others = rest
            branches[leader] = [r for r in others if attached[r][leader]]
            rest = [r for r in others if r not in branches[leader]]
        return cls(local, branches)

    def source(self, src: int, rank: int) -> int:
        """Whose queue `rank` reads."""
        return next((leader for leader, readers in self.branches.items() if rank in readers), src)
