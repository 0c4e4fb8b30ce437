"""Raw windows onto ranges of a memfd: shared ones for the writer, private (copy-on-write) ones for readers.

Runs in every process. Not mmap.mmap: that keeps a descriptor for every mapping, of which a process may have 1,024, and
closes the mapping under whoever still holds an address. A window stays mapped until `unmap`, which its owner calls
once nothing refers to it. What this file does not do: decide who may touch which range (arena.py, lease.py).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from itertools import pairwise

import numpy as np

_PROT = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_PUNCH_HOLE = 0x01 | 0x02  # and keep the file's size
_PAGE = mmap.PAGESIZE
# By the highest byte of a word of /proc/self/pagemap, whose first bits are present, swapped, of a file.
_IS_OWN = np.array([byte >> 5 in (0b100, 0b010, 0b110, 0b011, 0b111) for byte in range(256)])
_SCAN_PAGES = 1 << 16  # of which 512 KiB are read at once

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Window:
    """`size` mapped bytes at `address`, which is 0 once they are unmapped."""

    __slots__ = ("address", "holders", "size")

    def __init__(self, fd: int, offset: int, size: int, private: bool) -> None:
        """Map; `private`: what is written here is seen by nobody else, and what others write before is seen here.

        Raises:
            OSError: no address space or too many mappings.
        """
        kind = mmap.MAP_PRIVATE | _MAP_NORESERVE if private else mmap.MAP_SHARED
        address = _libc.mmap(None, size, _PROT, kind, fd, offset)
        if address is None or address == ctypes.c_void_p(-1).value:
            _raise_errno()
        self.address: int = address
        self.size = size
        self.holders: set[int] = set()  # who refers to memory in it; its owner's to keep

    def view(self) -> memoryview:
        """All of it, writable. Does not keep the window mapped."""
        return memoryview((ctypes.c_char * self.size).from_address(self.address)).cast("B")

    def unmap(self) -> None:
        """Idempotent."""
        address, self.address = self.address, 0
        if address:  # no signal's handler comes in between
            _libc.munmap(address, self.size)


def own_pages(address: int, size: int) -> None:
    """Make every page of a private window this process's own, contents unchanged, as a write to each would.

    Raises:
        OSError: no memory.
    """
    if _libc.madvise(address, size, _MADV_POPULATE_WRITE) == 0:
        return
    if ctypes.get_errno() != errno.EINVAL:
        _raise_errno()
    view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")  # Linux before 5.14
    for at in range(0, size, _PAGE):
        view[at] = view[at]


def drop_own_pages(pagemap: int, address: int, size: int) -> None:
    """Give up the pages of a private window that this process has written: it shows the file's content again.

    Looks for them in /proc/self/pagemap (descriptor `pagemap`): dropping every page instead costs 8.7 ms for 256 MiB,
    and 11 ms more to fault them in again.
    """
    first, count = address // _PAGE, size // _PAGE
    for start in range(0, count, _SCAN_PAGES):
        number = min(_SCAN_PAGES, count - start)
        words = os.pread(pagemap, 8 * number, 8 * (first + start))
        own = _IS_OWN[np.frombuffer(words, np.uint8)[7::8]]
        for begin, end in _runs(own):
            _libc.madvise((first + start + begin) * _PAGE, (end - begin) * _PAGE, mmap.MADV_DONTNEED)


def drop_all_pages(address: int, size: int) -> None:
    """The same without looking."""
    _libc.madvise(address, size, mmap.MADV_DONTNEED)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of every stretch of true values."""
    if not flags.any():
        return []
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in list(pairwise(edges))[::2]]


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Free the memory of a range of a memfd at once, whoever maps it; it reads as zeros then."""
    if _libc.fallocate(fd, _PUNCH_HOLE, offset, size) != 0:
        _raise_errno()


def _raise_errno() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
