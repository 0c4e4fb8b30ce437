"""Which ranks belong to one coordinator group, and where this rank stands among them.

A pure value: no torch, no sockets. Runs in every worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_shm.connection import GroupConnection


@dataclass(frozen=True, slots=True)
class Membership:
    """This rank's list out of a group's lists.

    Attributes:
        index: which of the lists, 0-based; the other lists are groups of the same name beside this one.
        ranks: global ranks, in the order given.
        rank_in_group: position of this rank in `ranks`.
    """

    index: int
    ranks: tuple[int, ...]
    rank_in_group: int

    @classmethod
    def find(cls, group_ranks: Sequence[Sequence[int]], global_rank: int) -> Membership:
        """The list that contains `global_rank`.

        Raises:
            ValueError: no list contains it, a rank is in two lists or twice in one, or a rank is negative.
        """
        listed = [rank for ranks in group_ranks for rank in ranks]
        twice = sorted({rank for rank in listed if listed.count(rank) > 1})
        if twice:
            raise ValueError(
                f"group_ranks {list(group_ranks)}: ranks {twice} are listed more than once; give overlapping groups "
                "a name of their own each"
            )
        if any(rank < 0 for rank in listed):
            raise ValueError(f"group_ranks {list(group_ranks)}: ranks start at 0")
        for index, ranks in enumerate(group_ranks):
            if global_rank in ranks:
                return cls(index, tuple(ranks), list(ranks).index(global_rank))
        raise ValueError(f"rank {global_rank} is in none of group_ranks {list(group_ranks)}")

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def member(self, rank_in_group: int, role: str) -> int:
        """`rank_in_group` if it is one; `role` names the argument in the error."""
        if not 0 <= rank_in_group < len(self.ranks):
            raise ValueError(
                f"{role}={rank_in_group} is outside the group: it has ranks 0 to {len(self.ranks) - 1} "
                f"(positions in the group, whose global ranks are {list(self.ranks)})"
            )
        return rank_in_group

    def peer(self, rank_in_group: int, role: str) -> int:
        """`rank_in_group` if it is another member than this rank."""
        if self.member(rank_in_group, role) == self.rank_in_group:
            raise ValueError(f"{role}={rank_in_group} is this rank itself; name another member of the group")
        return rank_in_group


class Member:
    """This rank's place in a group, as attributes; what the parts of a coordinator have in common.

    Attributes:
        rank: this rank, global. ranks: global ranks of the members. world_size: how many they are.
        rank_in_group: position of this rank in `ranks`, 0-based.
    """

    _link: GroupConnection  # set by the coordinator

    def __init__(self, members: Membership) -> None:
        self._members = members
        self.ranks = list(members.ranks)
        self.world_size = members.world_size
        self.rank_in_group = members.rank_in_group
        self.rank = self.ranks[self.rank_in_group]

    def size(self) -> int:
        """Number of members."""
        return self.world_size

    @property
    def first_rank(self) -> int:
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        return self.ranks[-1]

    @property
    def next_rank(self) -> int:
        """Global rank of the member after this one; of the first after the last."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the member before this one; of the last before the first."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1
