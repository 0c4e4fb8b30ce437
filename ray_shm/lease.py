"""A reader's side of large payloads: memory of the writer's arena that received objects lie in, until they are gone.

Runs in the readers. A block is mapped copy-on-write, so what a receiver writes nobody else sees; and it is leased, so
it never changes under what the receiver holds::

    objects (arrays, tensors, slices, views of views) -> memoryview -> block (a ctypes array) <- Lease (a weak
    reference)

Everything that lies in the block keeps the ctypes array alive, through the buffer protocol or as its base. When that is
collected, wherever and in whatever thread, the lease drops the pages that were written to and stores zero in its lease
word, which one process only ever writes. That takes no lock: it may happen inside of `enqueue`. What a signal's handler
raises meanwhile (Ctrl-C) Python drops, with the rest of the callback: so two of them watch each block.

`weakref.finalize` would not do: on a memoryview it fires while views of it live, and at interpreter exit it runs while
arrays live. A forked child is not covered by its parent's lease; so before a fork, live leases become private memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

from ray_shm.errors import QueueClosedError
from ray_shm.windows import Window, drop_all_pages, drop_own_pages, own_pages

_live: dict[int, Lease] = {}  # by id: a weak reference hashes as what it refers to
_TAKING = -1  # in place of an id, among those that hold a window
_pagemap = -1  # descriptor of /proc/self/pagemap


class Lease(weakref.ref):  # type: ignore[type-arg]  # to a ctypes array
    """One message's memory, held by this process."""

    __slots__ = ("again", "index", "key", "nbytes", "owner", "window")

    owner: Leases
    key: tuple[int, int]
    window: Window
    nbytes: int
    index: int
    again: weakref.ref[Any]  # to the same, whose callback finishes what a signal broke off


class Leases:
    """The leases of one reading end, and its windows onto the arena."""

    def __init__(self, fd: int, words: memoryview, give_back: Callable[[int], None]) -> None:
        """`fd` is this object's to close. `words`: this reader's lease words."""
        self._fd = fd
        self._words = words
        self._give_back = give_back
        self._windows: dict[tuple[int, int], Window] = {}
        self._newest: dict[int, int] = {}  # by index of a lease word, the id of the lease whose word it is
        self._closed = False

    def window(self, offset: int, size: int) -> Window:
        """This process's copy-on-write view of a block. Raises OSError where it cannot be mapped."""
        window = self._windows.get((offset, size))
        if window is None:
            window = self._windows[offset, size] = Window(self._fd, offset, size, private=True)
        return window

    def take(self, key: tuple[int, int], nbytes: int, index: int, generation: int) -> memoryview:
        """The first `nbytes` of the block at `key` (offset, size), leased until nothing refers to them any more.

        `index` -1: the memory is the writer's again once the message is released; it only stays mapped for so long.
        Taken again, as after a signal's exception, whose traceback may keep the first one for long, it lasts for as
        long as the newest.
        """
        window = self.window(*key)
        window.holders.add(_TAKING)
        if self._closed:  # by a signal's handler, perhaps before the window had a holder
            raise QueueClosedError("this end of the queue was closed in this process; make a new queue")
        block = (ctypes.c_char * nbytes).from_address(window.address)
        lease = Lease(block, _returned)
        lease.owner, lease.key, lease.window, lease.nbytes, lease.index = self, key, window, nbytes, index
        lease.again = weakref.ref(block, functools.partial(_finish, id(lease)))
        if index >= 0:
            self._newest[index] = id(lease)  # first: an older one that ends now leaves the word alone
            self._words[index] = generation  # before the cursor is stored
        _live[id(lease)] = lease  # a signal may break this off before here or after: `returned` undoes the rest
        window.holders.add(id(lease))
        window.holders.discard(_TAKING)
        return memoryview(block).cast("B")

    def returned(self, lease: Lease) -> None:
        """Nothing refers to the memory of `lease` any more. On any thread, at any time, also twice; takes no lock."""
        # Else it was only read, or was taken again, or is given back already; and the block may be somebody's.
        leased = lease.index >= 0 and self._newest.get(lease.index) == id(lease) and self._words[lease.index] != 0
        if leased and id(lease) in lease.window.holders:  # else it may be unmapped
            address, size = lease.window.address, _whole_pages(lease.nbytes)
            try:
                drop_own_pages(_open_pagemap(), address, size)
            except OSError:  # no /proc/self/pagemap: slower, but the same
                drop_all_pages(address, size)
        # `holders` first and `_closed` second, the other way round than `close`: one of the two unmaps.
        lease.window.holders.discard(id(lease))
        if self._closed and not lease.window.holders:
            self._unmap(lease.key)
        if leased:
            self._give_back(lease.index)

    def close(self) -> None:
        """Unmap what nobody holds; what is held is unmapped when it is returned. Idempotent."""
        self._closed = True
        for key, window in list(self._windows.items()):
            if not window.holders:
                self._unmap(key)
        fd, self._fd = self._fd, -1
        if fd >= 0:  # no signal's handler comes in between
            os.close(fd)

    def _unmap(self, key: tuple[int, int]) -> None:
        window = self._windows.get(key)
        if window is not None:
            try:
                window.unmap()
            finally:
                if not window.address:
                    self._windows.pop(key, None)


def held() -> tuple[int, int]:
    """(leases, bytes) that this process holds, of all queues."""
    leases = [lease for lease in list(_live.values()) if lease.index >= 0]
    return len(leases), sum(lease.nbytes for lease in leases)


def _returned(lease: Any) -> None:
    _finish(id(lease), lease)


def _finish(key: int, _: Any) -> None:
    lease = _live.get(key)
    if lease is None or lease() is not None:  # done; or done, and another one has its id by now
        return
    if sys.is_finalizing():  # the objects may still be looked at, and the writer sees the end of the process
        return
    lease.owner.returned(lease)
    _live.pop(key, None)


def _open_pagemap() -> int:
    global _pagemap
    if _pagemap < 0:
        _pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    return _pagemap


def _whole_pages(size: int) -> int:
    return -(-size // 4096) * 4096


def _make_private() -> None:
    """A child's copy of what lies in a lease must not change when the parent gives the lease back."""
    for lease in list(_live.values()):
        own_pages(lease.window.address, _whole_pages(lease.nbytes))


def _forget() -> None:
    """In the child: the lease words and the pagemap are the parent's."""
    global _pagemap
    _live.clear()
    if _pagemap >= 0:
        with contextlib.suppress(OSError):
            os.close(_pagemap)
        _pagemap = -1


os.register_at_fork(before=_make_private, after_in_child=_forget)
