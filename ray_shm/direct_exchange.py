"""Messages between single members, and the collectives made of them: the part of `ProcessGroups` with send and recv.

Runs in every worker. Gloo gathers no parts of unequal size, and what its reduce_scatter does differs between torch's
versions (none at all, or an all_reduce of everything). Here every part goes straight to who needs it, in one hop,
and is added in the order of ranks: the same bits in every version, and the fewest bytes. Nccl does all of it itself.

Imports torch: only `process_group` imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import GatherOptions

from ray_shm.connection import PART_TAG
from ray_shm.deadline import NEVER, Deadline
from ray_shm.transfer import Transfer
from ray_shm.work_waits import wait, wait_for_pairs


class DirectExchange:
    """Tensors are flat and contiguous, and never empty; a RuntimeError means that the groups are of no use any more."""

    gloo: Any
    nccl: Any
    _rank: int
    _size: int

    def __init__(self) -> None:
        self._under_way: set[Transfer] = set()

    def _of(self, tensor: torch.Tensor) -> Any:
        raise NotImplementedError

    def send(self, tensor: torch.Tensor, dst: int, tag: int, deadline: Deadline) -> None:
        wait(self._of(tensor).send([as_bytes(tensor)], dst, tag), patience(tensor, deadline))

    def recv(self, tensor: torch.Tensor, src: int, tag: int, deadline: Deadline) -> None:
        wait(self._of(tensor).recv([as_bytes(tensor)], src, tag), patience(tensor, deadline))

    def send_all(self, tensors: Sequence[torch.Tensor], dst: int, tag: int, deadline: Deadline) -> None:
        """Messages to one member, begun together; they arrive in this order."""
        works = [self._of(tensor).send([as_bytes(tensor)], dst, tag) for tensor in tensors]
        for work, tensor in zip(works, tensors, strict=True):
            wait(work, patience(tensor, deadline))

    # What goes on after the call

    def start_send(self, transfer: Transfer, dst: int, tag: int, deadline: Deadline) -> None:
        transfer.works = [self._of(tensor).send([as_bytes(tensor)], dst, tag) for tensor in transfer.contents]
        self._under_way.add(transfer)

    def start_recv(self, transfer: Transfer, src: int, tag: int, deadline: Deadline) -> None:
        transfer.works = [self._of(tensor).recv([as_bytes(tensor)], src, tag) for tensor in transfer.contents]
        self._under_way.add(transfer)

    def finish(self, transfer: Transfer, deadline: Deadline) -> None:
        for work, tensor in zip(transfer.works, transfer.contents, strict=True):
            wait(work, patience(tensor, deadline))
        self._forget(transfer)

    def forget_transfers(self) -> None:
        """Works keep sockets open; what they had not moved by now is lost."""
        for transfer in list(self._under_way):
            self._forget(transfer)

    def _forget(self, transfer: Transfer) -> None:
        transfer.works = []
        self._under_way.discard(transfer)

    # Collectives

    def gather(self, gathered: list[torch.Tensor], part: torch.Tensor, dst: int, deadline: Deadline) -> None:
        """`gathered`: a place for every member's part, at `dst` only; else empty."""
        if not part.is_cpu:
            options = GatherOptions()
            options.rootRank = dst
            places = [[as_bytes(place) for place in gathered]] if gathered else []
            wait(self._of(part).gather(places, [as_bytes(part)], options), NEVER)
        elif gathered:
            gathered[self._rank].copy_(part)
            self._exchange([], [(r, gathered[r]) for r in self._others()], deadline)
        else:
            self._exchange([(dst, part)], [], deadline)

    def all_gatherv(self, gathered: list[list[torch.Tensor]], parts: list[torch.Tensor], deadline: Deadline) -> None:
        """`gathered`: for each of `parts`, a place for every member's; the only primitive that takes empty ones."""
        outgoing: list[tuple[int, torch.Tensor]] = []
        incoming: list[tuple[int, torch.Tensor]] = []
        for places, part in zip(gathered, parts, strict=True):
            if part.is_cpu:
                places[self._rank].copy_(part)
                outgoing += [(r, part) for r in self._others() if part.numel()]
                incoming += [(r, places[r]) for r in self._others() if places[r].numel()]
            else:
                wait(self._of(part).allgather([[as_bytes(place) for place in places]], [as_bytes(part)]), NEVER)
        self._exchange(outgoing, incoming, deadline)

    def reduce_scatter(self, total: torch.Tensor, parts: list[torch.Tensor], deadline: Deadline) -> None:
        """`total`: the sum of what the members have for this rank. `parts`: what this rank has for each; some empty."""
        if not total.is_cpu:
            wait(self._of(total).reduce_scatter([total], [parts]), NEVER)
            return
        received = [parts[r] if r == self._rank else torch.empty_like(total) for r in range(self._size)]
        outgoing = [(r, parts[r]) for r in self._others() if parts[r].numel()]
        self._exchange(outgoing, [(r, received[r]) for r in self._others() if total.numel()], deadline)
        total.copy_(received[0])
        for part in received[1:]:
            total += part

    def _others(self) -> list[int]:
        return [r for r in range(self._size) if r != self._rank]

    def _exchange(
        self,
        outgoing: list[tuple[int, torch.Tensor]],
        incoming: list[tuple[int, torch.Tensor]],
        deadline: Deadline,
    ) -> None:
        works = [self.gloo.recv([as_bytes(tensor)], src, PART_TAG) for src, tensor in incoming]
        works += [self.gloo.send([as_bytes(tensor)], dst, PART_TAG) for dst, tensor in outgoing]
        wait_for_pairs(works, [rank for rank, _ in (*incoming, *outgoing)], deadline)


def patience(tensor: torch.Tensor, deadline: Deadline) -> Deadline:
    """How long `wait` is to wait. Nccl's with a limit holds up the host until the GPU is through: never give it one."""
    return deadline if tensor.is_cpu else NEVER


def as_bytes(flat: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: gloo refuses to move dtypes that it cannot add."""
    return flat.view(torch.uint8)
