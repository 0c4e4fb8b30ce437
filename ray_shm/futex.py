"""Shared 32-bit words that processes wait on: Linux futexes through ctypes. Runs in every process.

A word lives in shared memory. One side changes it and then always wakes; the other side reads it, looks at the state
that the word stands for, and sleeps only if the word still holds the value read. Waking without a "somebody sleeps"
flag costs 0.28 µs and has no store-load race; a flag would need a fence (3.5 µs a park, measured).

Only shared (not process-private) futexes are used. What this file does not do: decide how long to spin (waiting.py)
or what a word means (ring.py).
"""

from __future__ import annotations

import ctypes
import mmap
import platform

from ray_shm.errors import StartError

_SYS_FUTEX = {"x86_64": 202}
_FUTEX_WAIT = ctypes.c_int(0)
_FUTEX_WAKE = ctypes.c_int(1)
_EVERYBODY = ctypes.c_int(0x7FFFFFFF)
_NULL = ctypes.c_void_p(0)
_ZERO = ctypes.c_int(0)
_NUMBER = ctypes.c_long(_SYS_FUTEX.get(platform.machine(), -1))

# Waiting gives up the GIL; waking keeps it: the call is shorter than handing the GIL over.
_wait_call = ctypes.CDLL(None).syscall
_wake_call = ctypes.PyDLL(None).syscall


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def require_supported() -> None:
    """Refuse a machine whose memory ordering this package does not yet argue for.

    Raises:
        StartError: not Linux on x86-64. Sequence words and cursors are published by plain stores, which other
            processors may reorder; a group falls back to ZeroMQ there.
    """
    if platform.system() != "Linux" or platform.machine() not in _SYS_FUTEX:
        raise StartError(
            f"shared memory needs Linux on x86-64; this is {platform.system()} on {platform.machine()}. "
            'Use transport="zmq".'
        )


class Word:
    """One u32 in a mapping: load, store, wait, wake. Holds the mapping alive for as long as somebody waits."""

    __slots__ = ("_address", "_cell", "_index", "_words")

    def __init__(self, mapping: mmap.mmap, words: memoryview, offset: int) -> None:
        """`words` is the mapping cast to "I"; `offset` is in bytes and a multiple of 4."""
        self._words = words
        self._index = offset // 4
        self._cell = ctypes.c_uint32.from_buffer(mapping, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._cell))

    def load(self) -> int:
        # One `mov` in CPython 3.11-3.13; struct.unpack_from would copy byte-wise and may tear.
        return self._words[self._index]

    def store(self, value: int) -> None:
        self._words[self._index] = value

    def wake(self) -> None:
        """Wake every waiter. Call after `store`; the system call's entry drains the store buffer first."""
        _wake_call(_NUMBER, self._address, _FUTEX_WAKE, _EVERYBODY)

    def wait(self, seen: int, seconds: float) -> None:
        """Sleep while the word holds `seen`, at most `seconds`. Returns early on a wake or a signal."""
        whole = int(seconds)
        spec = _Timespec(whole, int((seconds - whole) * 1e9))
        _wait_call(_NUMBER, self._address, _FUTEX_WAIT, ctypes.c_uint32(seen), ctypes.byref(spec), _NULL, _ZERO)
