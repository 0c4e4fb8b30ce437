"""A piece of shared memory without a name: memfd, sealed, attached through /proc/<pid>/fd/<n>.

Runs in every process. The creator keeps its file descriptor open for life, so that late readers can attach; when the
last process that maps the memory is gone, the kernel frees it, whatever signal ended it: nothing can be left in
/dev/shm, and Docker's 64 MB limit there does not apply.

Layout of the first 64 bytes: magic (8), layout version u32, page size u32, size u64, nonce (16), zeros. What follows
belongs to whoever created the segment. What this file does not do: synchronise access (ring.py).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import struct
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_shm.errors import StartError

LAYOUT_VERSION = 2
NAME = "ray_shm"
_MAGIC = b"RAYSHM\x00\x01"
_HEADER = struct.Struct("<8sIIQ16s")
_CACHE_ROWS = ("inactive_file", "active_file")  # of memory.stat; cgroup v1 has them with total_ in front, too
_MADV_POPULATE_WRITE = 23
_ALWAYS_FREE = 64 << 20  # bytes that a reservation leaves to the rest of the machine


class AttachError(StartError):
    """A segment cannot be attached from this process (another machine or container, another user, or it is gone)."""


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Where a segment is, as a value that travels in handles.

    Attributes:
        pid: process that created it. fd: descriptor there. size: bytes. nonce: 128 random bits, compared on attach.
        boot_id, start_time: the creator's machine boot and its start in clock ticks; diagnostics only.
        growable: the memfd may grow behind `size`, which is what is mapped.
    """

    pid: int
    fd: int
    size: int
    nonce: bytes
    boot_id: str
    start_time: int
    growable: bool = False


class Segment:
    """A mapped segment; `create` in the owner, `attach` elsewhere. A context manager.

    Attributes:
        fd: the memfd: the creator's own, or read-only in who attached to a growable one; else -1.
    """

    def __init__(self, mapping: mmap.mmap, ref: SegmentRef, fd: int) -> None:
        self.mapping = mapping
        self.ref = ref
        self.size = ref.size
        self.fd = fd
        self.view = memoryview(mapping)
        self._held = [fd]  # for the finalizer, which is not to hold this object
        self._drop = None if fd < 0 else weakref.finalize(self, _close_dropped, self._held)
        if self._drop is not None:
            self._drop.atexit = False

    @classmethod
    def create(cls, size: int, purpose: str, growable: bool = False, reserved: int | None = None) -> Segment:
        """Make and reserve `size` bytes (rounded up to pages). `purpose` shows in /proc/<pid>/maps.

        `growable`: the owner may add ranges behind them, which others reach through `fd`.
        `reserved`: reserve only so many; who writes behind them sees to it that there is memory, see `populate`.

        Raises:
            StartError: the machine or a memory cgroup has less left than that; nothing remains.
        """
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        reserved = size if reserved is None else reserved
        require_memory(reserved, purpose)
        fd = -1
        try:
            fd = os.memfd_create(f"{NAME}:{purpose}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, reserved)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals(growable))
            mapping = mmap.mmap(fd, size)
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            raise StartError(f"cannot reserve {reserved} bytes of shared memory for {purpose}: {exc}") from exc
        nonce = secrets.token_bytes(16)
        mapping[: _HEADER.size] = _HEADER.pack(_MAGIC, LAYOUT_VERSION, mmap.PAGESIZE, size, nonce)
        ref = SegmentRef(os.getpid(), fd, size, nonce, boot_id(), start_time(os.getpid()), growable)
        return cls(mapping, ref, fd)

    @classmethod
    def attach(cls, ref: SegmentRef) -> Segment:
        """Map a segment of another (or the same) process on this node.

        Raises:
            AttachError: it cannot be reached from here, or is not the one that `ref` names.
        """
        try:
            mapping, fd = _map_checked(ref)
        except (OSError, ValueError) as exc:
            raise AttachError(
                f"cannot attach shared memory of pid {ref.pid} (fd {ref.fd}) from pid {os.getpid()}: {exc}. "
                "It is on another host or in another container, belongs to another user, or is gone."
            ) from exc
        return cls(mapping, ref, fd)

    def populate(self, start: int, end: int, purpose: str) -> None:
        """Take the memory of bytes `start` to `end` (multiples of a page) that were not reserved.

        Raises:
            StartError: there is not enough. A write there would end the process.
        """
        require_memory(end - start, purpose)
        try:
            self.mapping.madvise(_MADV_POPULATE_WRITE, start, end - start)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a kernel before 5.14 takes it at the first write
                raise StartError(f"cannot take {end - start} bytes of shared memory for {purpose}: {exc}") from exc

    def close(self) -> None:
        """Close the descriptor and drop the mapping once nothing uses it. Idempotent."""
        held = self._held
        fd, held[0], self.fd = held[0], -1, -1
        if fd >= 0:  # no signal's handler comes in between
            os.close(fd)
        if self._drop is not None:
            self._drop.detach()
        # The mapping itself goes with its last user: a thread asleep on a word in it must not lose the page.

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_dropped(held: list[int]) -> None:
    fd, held[0] = held[0], -1  # `close` comes after this where both are collected together
    if fd >= 0:
        os.close(fd)
        warnings.warn("shared memory was dropped without close()", ResourceWarning, stacklevel=2)


def _seals(growable: bool) -> int:
    return fcntl.F_SEAL_SHRINK | (0 if growable else fcntl.F_SEAL_GROW)


def _map_checked(ref: SegmentRef) -> tuple[mmap.mmap, int]:
    """The mapping, and for a growable segment a read-only descriptor: whoever has only that cannot write to it."""
    # O_PATH neither blocks on a FIFO nor has side effects on a device; only a memfd of ours is opened for real.
    path_fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        link = os.readlink(f"/proc/self/fd/{path_fd}")
        if not link.startswith(f"/memfd:{NAME}:"):
            raise ValueError(f"that descriptor is {link}")
        fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            mapping = _map(fd, ref)
        finally:
            os.close(fd)
        return mapping, os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_CLOEXEC) if ref.growable else -1
    finally:
        os.close(path_fd)


def _map(fd: int, ref: SegmentRef) -> mmap.mmap:
    seals, size = _seals(ref.growable), os.fstat(fd).st_size
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals != seals or size < ref.size or (size > ref.size and not ref.growable):
        raise ValueError("that memory is not sealed, or of another size")
    mapping = mmap.mmap(fd, ref.size)
    found = _HEADER.unpack(mapping[: _HEADER.size])
    if found != (_MAGIC, LAYOUT_VERSION, mmap.PAGESIZE, ref.size, ref.nonce):
        mapping.close()
        raise ValueError("that memory is another segment (its nonce, layout version or page size differs)")
    return mapping


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_space() -> str:
    """Names the host and pid namespace of this process: two processes with the same one can watch each other's pids."""
    return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"


def start_time(pid: int) -> int:
    """When `pid` started, in clock ticks since boot; 0 when there is no such process or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces
    return 0 if fields[0] in "ZX" else int(fields[19])


def require_memory(size: int, purpose: str) -> None:
    """Compare `size` bytes with what the machine and every memory cgroup above us have left.

    Asked before reserving, because a memory cgroup answers posix_fallocate with an OOM kill, not with an error.

    Raises:
        StartError: naming the limit and the numbers.
    """
    for name, left in _memory_left():
        if size + _ALWAYS_FREE > left:
            raise StartError(
                f"cannot reserve {size:,} bytes of shared memory for {purpose}: {name} leaves {left:,} bytes "
                f"(of which {_ALWAYS_FREE:,} are kept free). Free memory, raise the limit, or send less at once."
            )


def _memory_left() -> Iterator[tuple[str, int]]:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield "the machine (MemAvailable)", int(line.split()[1]) * 1024
    try:
        cgroups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return
    for line in cgroups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _cgroup_left(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            yield from _cgroup_left(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _cgroup_left(root: Path, path: str, limit: str, usage: str) -> Iterator[tuple[str, int]]:
    here = root / path.lstrip("/")
    for folder in [here, *here.parents]:
        try:
            most = (folder / limit).read_text().strip()
            if most != "max":
                used = int((folder / usage).read_text()) - _page_cache(folder)
                yield f"memory cgroup {folder}", int(most) - used
        except (OSError, ValueError):
            pass  # not mounted, or the root, which has no limit
        if folder == root:
            return


def _page_cache(folder: Path) -> int:
    """Bytes of files cached on behalf of a cgroup and all below it, which count as used and are given up at need.

    Without this, a container that has just read its model's weights would look full.
    """
    rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    names = ("total_inactive_file", "total_active_file") if "total_inactive_file" in rows else _CACHE_ROWS
    return sum(int(rows.get(name, 0)) for name in names)
