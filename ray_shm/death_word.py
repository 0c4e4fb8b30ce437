"""Tells of a process's death before its memory is torn down: a word in shared memory that the kernel writes.

    worker, main thread                         kernel, at that thread's exit          driver, one thread for all ranks
    holds a robust process-shared mutex,  --->  OWNER_DIED into the mutex's word, ---> futex_waitv on every word
    with the WAITERS bit set                    wakes one waiter                       -> on_death()

A pidfd tells only once the address space is gone: 9 ms later with torch imported, 20 ms later with 4 GiB of memory.
Needs glibc (its mutex begins with the word) and Linux 5.16 (futex_waitv); where either is missing, and for a process
that died before it held its mutex, pidfds alone tell.

Slot of SLOT_BYTES bytes, 8-byte aligned, written by the worker only::

    0    pthread_mutex_t; its first u32 is the futex word: thread id | WAITERS | OWNER_DIED, 0: not held
    48   u32  process id of the holder: whose word this is; 0 before the first

A slot may be used again by another process once the one before is gone. A child that the holder forks holds nothing,
so its end says nothing. The thread's id in the word is that of its own pid namespace; the kernel compares it there.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import threading
from collections.abc import Callable

from ray_shm import futex
from ray_shm.futex import Word

SLOT_BYTES = 64
MOST_WORDS = 127  # that one thread can wait for: the kernel takes 128, and one is our own

_JOIN = 2.0  # seconds that `close` gives the thread, which may wait for a lock that a collection interrupted
_MUTEX_BYTES = 48  # glibc: 40 on x86-64, 48 on aarch64
_OWNER = 48
_WAITERS, _OWNER_DIED, _THREAD_ID = 0x80000000, 0x40000000, 0x3FFFFFFF
_PROCESS_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST
_SYS_FUTEX_WAITV = 449  # the same on every architecture
_FUTEX_32 = 2  # a shared futex of 32 bits


class HeldWord:
    """What a worker holds for as long as it lives, or until `release`."""

    def __init__(self, memory: memoryview, offset: int, libc: ctypes.CDLL) -> None:
        self._pid = os.getpid()
        self._libc = libc
        self._mutex = (ctypes.c_char * _MUTEX_BYTES).from_buffer(memory, offset)
        # The kernel finds the mutex through the thread's list until the very end: not even the interpreter's own end
        # may unmap it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._mutex))

    def release(self) -> None:
        """From now on the end of this process is not told here. By the holding thread only. Idempotent."""
        if os.getpid() != self._pid:  # a forked child
            return
        self._pid = 0
        self._libc.pthread_mutex_unlock(self._mutex)
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._mutex))


def hold(memory: memoryview, offset: int) -> HeldWord | None:
    """Have the kernel tell of this process's death in the slot at `offset` of `memory`. On the main thread only.

    Returns:
        None where this C library or machine cannot: pidfds alone tell, then.

    Raises:
        RuntimeError: another thread, whose end would pass for the process's.
    """
    if threading.get_native_id() != os.getpid():
        raise RuntimeError(
            "a death word must be held by the main thread: the end of another is not that of the process"
        )
    libc = ctypes.CDLL(None)
    word, owner = _words(memory, offset)
    memory[offset : offset + SLOT_BYTES] = bytes(SLOT_BYTES)  # what a process before us left
    if not _has_robust_mutexes(libc):
        return None
    held = HeldWord(memory, offset, libc)
    if not _lock(libc, held) or word.load() & _THREAD_ID != os.getpid():  # another C library's mutex begins otherwise
        held.release()
        return None
    # Nobody else ever takes the mutex, so nobody else writes to the word while its owner lives.
    word.store(word.load() | _WAITERS)
    if futex.fence is not None:
        futex.fence()  # ORDER: word before owner; the word of the process before us must be gone
    owner.store(os.getpid())
    word.wake()
    return held


class DeathWords:
    """Watches words of other processes, by one thread, which starts with the first and ends with `close`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection while it is held may close a dropped group's words, these
        self._watched: dict[_Watched, None] = {}  # in the order of coming
        self._changed = _SharedWord(memoryview(mmap.mmap(-1, mmap.PAGESIZE)), 0)
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(
        self, memory: memoryview, offset: int, pid: int, on_death: Callable[[], object]
    ) -> Callable[[], None] | None:
        """Call `on_death` once, on the watching thread, when the process that holds the slot's mutex dies.

        Args:
            pid: of that process, as it knows itself. It may come to hold the mutex later, or never.
            on_death: short.

        Returns:
            a function that ends the watch, idempotent; None where nothing will be told: the kernel has no futex_waitv,
            MOST_WORDS are watched, or this object is closed.
        """
        if not has_futex_waitv():
            return None
        watched = _Watched(*_words(memory, offset), pid, on_death)
        with self._lock:
            if self._closed or len(self._watched) >= MOST_WORDS:
                return None
            self._watched[watched] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ray_shm-death-words", daemon=True)
                self._thread.start()
            self._notify()
        return lambda: self._end(watched)

    def close(self) -> None:
        """End all watches and the thread. Idempotent, from anywhere."""
        with self._lock:
            self._closed = True
            self._watched.clear()
            self._notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN)

    def _end(self, watched: _Watched) -> None:
        with self._lock:
            if self._watched.pop(watched, watched) is None:  # it was there
                self._notify()

    def _notify(self) -> None:
        self._changed.store((self._changed.load() + 1) & 0xFFFFFFFF)
        self._changed.wake()

    def _run(self) -> None:
        while (words := self._look()) is not None:
            _wait(words)

    def _look(self) -> list[tuple[_SharedWord, int]] | None:
        """Tell of the deaths; then what to sleep on, or None when this object is closed."""
        while True:
            change = self._changed.load()  # before the look at the watches: a later change ends the wait at once
            with self._lock:
                if self._closed:
                    return None
                watched = list(self._watched)
            seen = [(w, *w.look()) for w in watched]
            if not any(dead for _, _, dead in seen):
                return [(self._changed, change), *((w.word, value) for w, value, _ in seen)]
            for w in [w for w, _, dead in seen if dead]:
                with self._lock:
                    was_watched = self._watched.pop(w, w) is None
                if was_watched:
                    w.on_death()


class _Watched:
    __slots__ = ("on_death", "owner", "pid", "word")

    def __init__(self, word: _SharedWord, owner: _SharedWord, pid: int, on_death: Callable[[], object]) -> None:
        self.word, self.owner, self.pid, self.on_death = word, owner, pid, on_death

    def look(self) -> tuple[int, bool]:
        """The word, and whether it says that our process died."""
        ours = self.owner.load() == self.pid  # ORDER: word before owner; here, read the other way round
        value = self.word.load()
        return value, ours and bool(value & _OWNER_DIED)


class _SharedWord(Word):
    """A word whose address can be told to the kernel beside others."""

    __slots__ = ("address",)

    def __init__(self, memory: memoryview, offset: int) -> None:
        super().__init__(memory, memory.cast("B").cast("I"), offset)  # type: ignore[arg-type]  # any buffer will do
        self.address = ctypes.addressof(self._cell)


def _words(memory: memoryview, offset: int) -> tuple[_SharedWord, _SharedWord]:
    """The futex word and the owner's."""
    return _SharedWord(memory, offset), _SharedWord(memory, offset + _OWNER)


def _has_robust_mutexes(libc: ctypes.CDLL) -> bool:
    return all(hasattr(libc, name) for name in ("pthread_mutexattr_setrobust", "pthread_mutexattr_setpshared"))


def _lock(libc: ctypes.CDLL, held: HeldWord) -> bool:
    attributes = (ctypes.c_char * 64)()  # pthread_mutexattr_t: 4 bytes in glibc
    steps: list[tuple[Callable[..., int], tuple[object, ...]]] = [
        (libc.pthread_mutexattr_init, (attributes,)),
        (libc.pthread_mutexattr_setpshared, (attributes, ctypes.c_int(_PROCESS_SHARED))),
        (libc.pthread_mutexattr_setrobust, (attributes, ctypes.c_int(_ROBUST))),
        (libc.pthread_mutex_init, (held._mutex, attributes)),
        (libc.pthread_mutex_lock, (held._mutex,)),
    ]
    return all(function(*arguments) == 0 for function, arguments in steps)


class _Waiter(ctypes.Structure):
    """struct futex_waitv."""

    _fields_ = [
        ("value", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


def _wait(words: list[tuple[_SharedWord, int]]) -> int:
    """Sleep while every word holds its value. Returns 0, or the errno: EAGAIN where one does not, EINTR."""
    waiters = (_Waiter * len(words))(*(_Waiter(value, word.address, _FUTEX_32, 0) for word, value in words))
    libc = _errno_libc()
    result = libc.syscall(
        ctypes.c_long(_SYS_FUTEX_WAITV), waiters, ctypes.c_uint(len(words)), ctypes.c_uint(0), None, ctypes.c_int(0)
    )
    return 0 if result >= 0 else ctypes.get_errno()


@functools.cache
def _errno_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def has_futex_waitv() -> bool:
    """Whether the kernel has it and no filter refuses it."""
    word = _SharedWord(memoryview(mmap.mmap(-1, mmap.PAGESIZE)), 0)
    return _wait([(word, 1)]) == errno.EAGAIN  # it holds 0
