"""Rank: one rank of a group as the driver and its clients know it. Used in the driver's process and in its clients'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_shm.actors.status_board import Standing, StatusBoard
from ray_shm.placement.topology import RankPlace


@dataclass
class Rank:
    """A rank's place and process; a healed rank gets another one.

    Attributes:
        position: of its bundle in the reservation. actor: None at a client. transport: "shm" or "zmq".
        visible: its pid means something in this process.
        stacks_fd: its descriptor of the file with its stacks, -1 until it has started.
    """

    place: RankPlace
    position: int
    actor: Any
    transport: str
    visible: bool
    stacks_fd: int = -1

    def row(self, board: StatusBoard | None) -> Standing | None:
        """What it wrote into shared memory; None where this process cannot reach that."""
        if board is None or self.transport != "shm":
            return None
        try:
            return board.standing(self.place.rank)
        except ValueError:  # released under us: the group was closed
            return None

    def where(self, board: StatusBoard | None) -> str:
        """Where it is and what it does, in words."""
        place = self.place.place
        gpus = f", GPU {','.join(place.gpu_ids)}" if place.gpu_ids else ""
        row = self.row(board)
        doing = f", {row.words()}" if row is not None else ""
        return f"node {place.node_ip}{gpus}, pid {place.pid}{doing}"


def summary(worker_name: str, ranks: Mapping[int, Rank]) -> str:
    """As in "8 × Worker on 2 nodes through shm+zmq"."""
    nodes = len({entry.place.place.node_id for entry in ranks.values()})
    transports = "+".join(sorted({entry.transport for entry in ranks.values()}))
    return f"{len(ranks)} × {worker_name} on {nodes} node{'s' * (nodes > 1)} through {transports}"
