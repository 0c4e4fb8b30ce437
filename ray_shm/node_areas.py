"""The memory in which the members of one node's group lay their tensors: two areas each, for even and for odd steps.

Runs in every worker, behind the lines of a `NodeBoard`, which says who may read and write when. Imports torch.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch

from ray_shm import node_board
from ray_shm.errors import StartError
from ray_shm.segment import Segment

PURPOSE = "small collectives"  # shows in /proc/<pid>/maps
FOLDS: dict[str, Callable[..., Any]] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
_CHUNK = 16384  # elements that are reduced at once: they stay in the cache, and torch starts no threads for them
_MOST_VIEWS = 256
_ROUNDED = (torch.float16, torch.bfloat16)


class NodeAreas:
    """The areas of all members, and the own one's memory, which is taken at the first use only.

    Attributes:
        capacity: bytes of one area, a multiple of a page.
    """

    def __init__(self, segment: Segment, size: int, own: int, capacity: int) -> None:
        self.capacity = capacity
        self._segment, self._size, self._own = segment, size, own
        self._begin = node_board.data(size)
        # Keeps the memory mapped, as the views do; torch and ctypes are given addresses.
        self._bytes = torch.frombuffer(segment.mapping, dtype=torch.uint8)
        self._address = self._bytes.data_ptr()
        self._populated = [0, 0]  # bytes of the own areas, by parity
        self._views: dict[tuple[torch.dtype, int, int, int], list[torch.Tensor]] = {}

    def put(self, parity: int, flat: torch.Tensor) -> None:
        self._require(parity, flat.nbytes)
        ctypes.memmove(self._address + self._at(self._own, parity), flat.data_ptr(), flat.nbytes)

    def take(self, rank: int, parity: int, to: int, nbytes: int, offset: int = 0) -> None:
        ctypes.memmove(to + offset, self._address + self._at(rank, parity) + offset, nbytes)

    def fold(self, parity: int, op: str, flat: torch.Tensor, into: torch.Tensor, begin: int, end: int) -> None:
        """Reduce elements `begin` to `end` of all ranks' tensors, which are like `flat`, into those of `into`."""
        function, rounded = FOLDS[op], flat.dtype in _ROUNDED and op in ("sum", "product")
        for low in range(begin, end, _CHUNK):
            high = min(low + _CHUNK, end)
            parts = self._parts(flat.dtype, parity, low, high)
            out = into if high - low == into.numel() else into[low:high]
            total = function(parts[0].float(), parts[1]) if rounded else function(parts[0], parts[1], out=out)
            for part in parts[2:]:
                function(total, part, out=total)
            if rounded:
                out.copy_(total)

    def fold_slice(self, parity: int, op: str, flat: torch.Tensor) -> None:
        """Reduce this rank's slice into its own area of the next step."""
        self._require(1 - parity, flat.nbytes)
        own = self._parts(flat.dtype, 1 - parity, 0, flat.numel())[self._own]
        self.fold(parity, op, flat, own, *_slice(flat, self._own, self._size))

    def take_slices(self, parity: int, flat: torch.Tensor) -> None:
        for rank in range(self._size):
            begin, end = _slice(flat, rank, self._size)
            width = flat.itemsize
            self.take(rank, parity, flat.data_ptr(), (end - begin) * width, begin * width)

    def _at(self, rank: int, parity: int) -> int:
        return self._begin + (2 * rank + parity) * self.capacity

    def _require(self, parity: int, nbytes: int) -> None:
        """Have memory for so many bytes of the own area; it is taken at the first use only."""
        taken = self._populated[parity]
        if nbytes > taken:
            wanted = min(self.capacity, max(mmap.PAGESIZE, 1 << (nbytes - 1).bit_length()))
            at = self._at(self._own, parity)
            try:
                self._segment.populate(at + taken, at + wanted, PURPOSE)
            except StartError as exc:
                raise RuntimeError(str(exc)) from exc
            self._populated[parity] = wanted

    def _parts(self, dtype: torch.dtype, parity: int, begin: int, end: int) -> list[torch.Tensor]:
        """Elements `begin` to `end` of each rank's area, as tensors of `dtype`, kept for the next time."""
        key = (dtype, parity, begin, end)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            begin, end = begin * dtype.itemsize, end * dtype.itemsize
            starts = [self._at(rank, parity) for rank in range(self._size)]
            with torch.inference_mode(False):  # else a caller in that mode would leave views that no other may write to
                views = self._views[key] = [self._bytes[at + begin : at + end].view(dtype) for at in starts]
        return views


def _slice(flat: torch.Tensor, rank: int, size: int) -> tuple[int, int]:
    """The elements that `rank` reduces. No two ranks write to one cache line."""
    per_line = 64 // flat.itemsize
    lines = -(-flat.numel() // per_line)
    return lines * rank // size * per_line, min(flat.numel(), lines * (rank + 1) // size * per_line)
