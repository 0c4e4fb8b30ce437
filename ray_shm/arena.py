"""The writer's side of large payloads: blocks of memory behind the ring, in the same memfd. Runs in the writer.

One memfd, and not further ones as it grows: readers open it once, when they attach, so what was published can still be
read after the writer died; no queue needs more than one descriptor at its writer; and a hole punched into it gives
memory back at once, whatever readers have mapped.

A block holds one message: ``count u64 | length u64 x count | frames``, each frame at a multiple of 64. Its states, and
who may touch it:

    free      the writer writes it
    unread    its record stands in the ring: nobody writes, readers read
    leased    all cursors are past the record; while some reader's lease word equals the block's generation, that reader
              still holds objects that lie in it
    hollow    its memory was given back; only the range is left, for the next block of that size

A reader stores its lease word before its cursor, and zero when the last object is gone; the writer looks at cursors
first, then (after a fence) at lease words. What this file does not do: leases themselves (lease.py), and waiting.

A signal's handler may raise between any two steps, and leave lists and sums half changed. What is true then stands in
the blocks, each of whose attributes is one store; `Arena.recover` makes the rest anew.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ray_shm.errors import StartError
from ray_shm.ring import Buffer
from ray_shm.segment import require_memory
from ray_shm.windows import Window, punch_hole

IDLE_SECONDS = 10.0  # how long a free block keeps its memory
UNSENT = -1
_FINEST = 1 << 16  # sizes are multiples of this, and of a sixteenth of the power of two below
_ALIGN = 64
WHERE = struct.Struct("<QQQiI")  # what a record says of its block: offset, size, bytes used, lease index, generation
_COUNT = struct.Struct("<Q")
_THREADED_COPY = 8 << 20  # bytes from which a copy is shared by threads
_COPY_THREADS = min(4, len(os.sched_getaffinity(0)))


@dataclass(slots=True, eq=False)
class Block:
    """A range of the memfd."""

    offset: int
    size: int
    window: Window | None = None  # None: hollow
    backed: bool = False  # has memory, perhaps
    end: int = UNSENT  # ring position behind the record that names it
    nbytes: int = 0  # of the message
    filling: bool = False  # somebody writes to it at this moment
    lease: int = -1  # index of the lease words; -1: readers copy out
    generation: int = 0
    free_since: float = 0.0
    passing: bool = False  # beyond the cap: its memory is given back as soon as it was read


def block_bytes(nbytes: int) -> int:
    """Size class of a block for `nbytes`: at most a sixteenth, or 64 KiB, more than needed."""
    step = max(_FINEST, 1 << max(0, nbytes.bit_length() - 5))
    return -(-nbytes // step) * step


def layout(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where frames of these lengths begin in a block, and the bytes of all."""
    at = -(-8 * (1 + len(lengths)) // _ALIGN) * _ALIGN
    starts = []
    for length in lengths:
        starts.append(at)
        at = -(-(at + length) // _ALIGN) * _ALIGN
    return starts, at


class Arena:
    """Blocks of one queue, at most `cap` bytes of memory in all but for one passing block. Not thread-safe."""

    def __init__(self, fd: int, start: int, cap: int) -> None:
        """`start`: page-aligned offset behind the ring."""
        self._fd = fd
        self._end = start
        self.cap = cap
        self.reserved = 0  # bytes of memory in blocks, free ones included
        self.blocks: list[Block] = []  # all there ever were
        self.closed = False
        self._free: list[Block] = []
        self._hollow: list[Block] = []

    def allocate(self, nbytes: int, passing: bool = False) -> Block | None:
        """A block for `nbytes`; None: the cap is reached. `passing`: go beyond the cap then.

        Raises:
            StartError: the machine or a memory cgroup has less left than that; nothing was taken.
        """
        size = block_bytes(nbytes)
        found = _best(self._free, size)
        if found is not None:
            self._free.remove(found)
            return found
        while self.reserved + size > self.cap and self._free:
            self._give_back(min(self._free, key=lambda block: block.free_since))
        beyond = self.reserved + size > self.cap
        if beyond and not passing:
            return None
        try:
            block = self._reserve(size, beyond)
        except StartError:
            if not self._free:
                raise
            for idle in list(self._free):
                self._give_back(idle)
            block = self._reserve(size, beyond)
        block.passing = beyond
        return block

    def free(self, block: Block) -> None:
        block.end = UNSENT
        block.free_since = time.monotonic()
        block.lease = -1
        self._free.append(block)
        if block.passing:
            self._give_back(block)

    def trim(self) -> None:
        """Give back the memory of blocks that nobody has used for IDLE_SECONDS."""
        before = time.monotonic() - IDLE_SECONDS
        for block in [block for block in self._free if block.free_since < before]:
            self._give_back(block)

    def _reserve(self, size: int, beyond: bool) -> Block:
        block = _best([b for b in self._hollow if beyond or self.reserved + b.size <= self.cap], size)
        fresh = block is None
        if block is None:
            block = Block(self._end, size)
        require_memory(block.size, "a large message")
        block.backed = True
        try:
            os.posix_fallocate(self._fd, block.offset, block.size)
            block.window = Window(self._fd, block.offset, block.size, private=False)
        except OSError as exc:
            raise StartError(
                f"cannot reserve {block.size:,} bytes of shared memory for a large message: {exc}"
            ) from exc
        if fresh:
            self._end += block.size
            self.blocks.append(block)
        else:
            self._hollow.remove(block)
        self.reserved += block.size
        return block

    def _give_back(self, block: Block) -> None:
        self._free.remove(block)
        self._unmap(block)
        punch_hole(self._fd, block.offset, block.size)
        self.reserved -= block.size
        block.passing = block.backed = False
        self._hollow.append(block)

    def _unmap(self, block: Block) -> None:
        window = block.window
        if window is not None:
            try:
                window.unmap()
            finally:
                if not window.address:  # nobody is to write to what is not mapped
                    block.window = None

    def recover(self) -> None:
        """After an exception that came at any time: free what no record names. The owner has looked at `end`."""
        for block in self.blocks:
            if block.window is None and block.backed:
                punch_hole(self._fd, block.offset, block.size)
                block.backed = False
        beyond = os.fstat(self._fd).st_size - self._end  # reserved for a block that was not finished
        if beyond > 0:
            punch_hole(self._fd, self._end, beyond)
        self._free = [block for block in self.blocks if block.end == UNSENT and block.window is not None]
        self._hollow = [block for block in self.blocks if block.window is None]
        self.reserved = sum(block.size for block in self.blocks if block.window is not None)
        for block in [block for block in self._free if block.passing]:
            self._give_back(block)

    def close(self) -> None:
        """Unmap all, but for a block that is being filled. The memory goes with the last descriptor and mapping."""
        self.closed = True
        for block in self.blocks:
            if not block.filling:
                self._unmap(block)


def _best(blocks: Sequence[Block], size: int) -> Block | None:
    """The smallest of at least `size`, and not over twice that; of those the one used last, which caches still hold."""
    return min((b for b in blocks if size <= b.size <= 2 * size), key=lambda b: (b.size, -b.free_since), default=None)


def fill(block: Block, frames: Sequence[Buffer], lengths: Sequence[int]) -> None:
    """Copy a message in; the frames are the caller's again when this returns."""
    if block.window is None:
        raise RuntimeError("a block without memory: a bug in ray-shm")
    view = block.window.view()
    view[: 8 * (1 + len(lengths))] = struct.pack(f"<{1 + len(lengths)}Q", len(lengths), *lengths)
    for start, frame, length in zip(layout(lengths)[0], frames, lengths, strict=True):
        if length >= _THREADED_COPY and _COPY_THREADS > 1:
            _copy_with_threads(view[start : start + length], frame)
        elif length >= _FINEST:
            np.copyto(np.frombuffer(view[start : start + length], np.uint8), np.frombuffer(frame, np.uint8))
        else:
            view[start : start + length] = frame


def contents(view: memoryview) -> list[memoryview]:
    """The frames of a block."""
    (count,) = _COUNT.unpack_from(view)
    lengths = struct.unpack_from(f"<{count}Q", view, 8)
    return [view[start : start + n] for start, n in zip(layout(lengths)[0], lengths, strict=True)]


class _Copy:
    """One copy in parts by several threads. None of them reaches into the target once `run` has ended, however.

    Signals' handlers run in the main thread, so only the pool's threads change what is counted. No Condition: its
    methods are Python, in which a handler may raise and leave its lock taken.
    """

    def __init__(self, target: memoryview, source: Buffer, n_parts: int) -> None:
        self._to, self._of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
        self._part = -(-len(self._to) // n_parts // _ALIGN) * _ALIGN
        self._starts = deque(range(0, len(self._to), self._part))
        self._running = 0  # threads of the pool that copy a part at this moment
        self._lock = threading.Lock()
        self._over = threading.Lock()  # taken; given back whenever the last of them is through
        self._over.acquire()

    def run(self, pool: ThreadPoolExecutor) -> None:
        try:
            with contextlib.suppress(RuntimeError):  # the interpreter is on its way out
                for _ in range(len(self._starts) - 1):
                    pool.submit(self._help)
            while self._starts:
                with contextlib.suppress(IndexError):  # another thread was faster
                    self._copy(self._starts.popleft())
            self._await()
        except BaseException:  # Ctrl-C: the memory will be used again
            while True:
                try:
                    with self._lock:
                        self._starts.clear()
                    self._await()
                    break
                except BaseException:  # another Ctrl-C
                    continue
            raise

    def _help(self) -> None:
        while True:
            with self._lock:
                try:
                    at = self._starts.popleft()
                except IndexError:  # none is left
                    return
                self._running += 1
            try:
                self._copy(at)
            finally:
                with self._lock:
                    self._running -= 1
                    if not self._running and self._over.locked():
                        self._over.release()

    def _copy(self, at: int) -> None:
        np.copyto(self._to[at : at + self._part], self._of[at : at + self._part])

    def _await(self) -> None:
        while True:
            with self._lock:  # else one that has just taken a part would not be seen
                if not self._running:
                    return
            self._over.acquire()


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _copy_with_threads(target: memoryview, source: Buffer) -> None:
    """Two cores copy 37 GB/s where one copies 20 (measured): the calling thread copies its part, too."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_COPY_THREADS - 1, "ray_shm-copy")
    _Copy(target, source, _COPY_THREADS).run(_pool)


def _forget_pool() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
