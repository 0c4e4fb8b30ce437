"""Shared 32-bit words that processes wait on, and memory fences: Linux system calls through ctypes. In every process.

A word lives in shared memory. One side changes it and then always wakes; the other side reads it, looks at the state
that the word stands for, and sleeps only if the word still holds the value read. Waking without a "somebody sleeps"
flag costs 0.28 µs and has no store-load race; a flag would need a fence (3.5 µs a park, measured).

Fences. CPython makes plain moves, which carry no ordering of their own:

    x86-64   stores become visible in program order, loads are done in program order, and no store overtakes an earlier
             load; only a load may overtake an earlier store to another word.
    aarch64  any two accesses to different words may be reordered.

`fence_all` is membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED): every thread of every registered process, the caller
included, passes a full barrier between the call's begin and its end; a thread that is not running passes one when it is
scheduled. So *one* side of a pair pays for both: what the other side does needs no instruction at all. `fence` is that
on aarch64, and None on x86-64, where program order is enough. (PRIVATE_EXPEDITED reaches no other process.)

Only shared (not process-private) futexes are used. What this file does not do: decide how long to spin (waiting.py)
or what a word means (ring.py).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
from collections.abc import Callable

from ray_shm.errors import StartError

_MACHINE = platform.machine()
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283}
_FUTEX_WAIT, _FUTEX_WAKE = ctypes.c_int(0), ctypes.c_int(1)
_GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 2, 4
_EVERYBODY = ctypes.c_int(0x7FFFFFFF)
_NULL = ctypes.c_void_p(0)
_ZERO = ctypes.c_int(0)
_FUTEX = ctypes.c_long(_SYS_FUTEX.get(_MACHINE, -1))
_MEMBARRIER = ctypes.c_long(_SYS_MEMBARRIER.get(_MACHINE, -1))

# Waiting gives up the GIL; waking and fencing keep it: those calls are shorter than handing the GIL over.
_wait_call = ctypes.CDLL(None).syscall
_short_call = ctypes.PyDLL(None).syscall


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


@functools.cache
def has_membarrier() -> bool:
    """Register this process, so that `fence_all` of others reaches it. False: refused (an old seccomp filter)."""
    return int(_short_call(_MEMBARRIER, ctypes.c_int(_REGISTER_GLOBAL_EXPEDITED), _ZERO, _ZERO)) == 0


# A forked child is a process of its own to the kernel, and no longer registered.
os.register_at_fork(after_in_child=has_membarrier.cache_clear)

fence_all: Callable[[], object] = functools.partial(
    _short_call, _MEMBARRIER, ctypes.c_int(_GLOBAL_EXPEDITED), _ZERO, _ZERO
)


# None where program order is enough, so that hot paths pay one comparison.
fence: Callable[[], object] | None = fence_all if _MACHINE == "aarch64" else None


def require_supported() -> None:
    """Register with membarrier, and refuse a machine whose memory ordering this package does not argue for.

    Raises:
        StartError: not Linux on x86-64 or aarch64, or aarch64 where the kernel or a seccomp filter refuses membarrier.
    """
    if platform.system() != "Linux" or _MACHINE not in _SYS_FUTEX:
        raise StartError(
            f"shared memory needs Linux on x86-64 or aarch64; this is {platform.system()} on {_MACHINE}. "
            'Use transport="zmq", or a MessageQueue without local readers.'
        )
    if not has_membarrier() and fence is not None:
        raise StartError(
            "shared memory on aarch64 needs membarrier(GLOBAL_EXPEDITED), which this kernel or a seccomp "
            'filter refuses. Allow it, or use transport="zmq".'
        )


class Word:
    """One u32 in a mapping: load, store, wake, wait. Holds the mapping alive for as long as somebody waits.

    `wake()` wakes every waiter. Call it after `store`; the system call's entry drains the store buffer first.
    """

    __slots__ = ("_address", "_cell", "_index", "_words", "wake")

    def __init__(self, mapping: mmap.mmap, words: memoryview, offset: int) -> None:
        """`words` is the mapping cast to "I"; `offset` is in bytes and a multiple of 4."""
        self._words = words
        self._index = offset // 4
        self._cell = ctypes.c_uint32.from_buffer(mapping, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._cell))
        # A partial of prebuilt arguments: half a microsecond less than a method that passes them.
        self.wake: Callable[[], object] = functools.partial(_short_call, _FUTEX, self._address, _FUTEX_WAKE, _EVERYBODY)

    def load(self) -> int:
        # One `mov` in CPython 3.11-3.13; struct.unpack_from would copy byte-wise and may tear.
        return self._words[self._index]

    def store(self, value: int) -> None:
        self._words[self._index] = value

    def wait(self, seen: int, seconds: float) -> None:
        """Sleep while the word holds `seen`, at most `seconds`. Returns early on a wake or a signal."""
        _wait_call(_FUTEX, self._address, _FUTEX_WAIT, ctypes.c_uint32(seen), _timespec(seconds), _NULL, _ZERO)


@functools.lru_cache(maxsize=64)
def _timespec(seconds: float) -> object:
    whole = int(seconds)
    return ctypes.byref(_Timespec(whole, int((seconds - whole) * 1e9)))
