"""Queues between the members of a torch process group: who shares memory with whom is tried out, never guessed.

Runs in every member, all at the same time. Each step is one all_gather of small pickled values over the group::

    1  probe    who will write publishes a page of shared memory; everybody publishes its address
    2  outcome  who will read tries to attach to it: those who can are local readers, the others use ZeroMQ
    3  handle   who writes makes the queue and publishes its handle
    4  attach   (one writer only) readers attach and say whether that worked, so that nobody waits for one that failed

A failure on one rank is raised on all. Ranks are ranks in the group. Imports torch.
"""

from __future__ import annotations

import mmap
import socket
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ray_shm import futex
from ray_shm.errors import StartError
from ray_shm.handle import Handle
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.segment import Segment, SegmentRef

_SOME_HOST = "192.0.2.1"  # reserved for documentation: stands for "elsewhere", and is never sent anything


@dataclass(frozen=True, slots=True)
class Probe:
    """A page that one rank shares, for the others to try to attach to, and its address."""

    ref: SegmentRef | None  # None: this rank will not write, or its platform has no shared memory
    ip: str


def make_one_writer(
    pg: Any, max_chunk_bytes: int, max_chunks: int, writer_rank: int, external: Handle | None
) -> tuple[QueueWriter | QueueReader, Handle]:
    """This rank's end of a queue from `writer_rank` to all others, and the queue's handle.

    With `external`, which counts at `writer_rank` only, every rank reads the queue of that handle instead.
    See MessageQueue.create_from_process_group.
    """
    group = _Group(pg)
    group.require_member(writer_rank, "writer_rank")
    writes = group.rank == writer_rank
    writer: QueueWriter | None = None
    probes, attached = try_out(group, writes and external is None, reads=True)
    readers = [r for r in range(group.size) if r != writer_rank]
    local = [r for r in readers if attached[r][writer_rank]]
    remote = [r for r in readers if not attached[r][writer_rank]]
    try:
        if writes and external is None:
            ip = route_to(probes[remote[0]].ip) if remote else None
            writer = QueueWriter(local, remote, max_chunk_bytes, max_chunks, ip)
        own: Any = external or (writer.handle if writer else None)
    except (StartError, ValueError) as exc:
        own = exc
    handle: Handle = group.gather_or_raise(own)[writer_rank]
    return _attach(group, writer, handle), handle


def _attach(group: _Group, writer: QueueWriter | None, handle: Handle) -> QueueWriter | QueueReader:
    end: QueueWriter | QueueReader | None = writer
    failure = None
    if end is None:
        try:
            end = QueueReader(handle, group.rank)
        except (StartError, ValueError) as exc:
            failure = exc
    try:
        group.gather_or_raise(failure)
        if end is None:
            raise StartError(f"rank {group.rank} has no end of the queue: a bug in ray-shm")
    except BaseException:
        if end is not None:
            end.close()
        raise
    return end


def make_one_reader(
    pg: Any, max_chunk_bytes: int, max_chunks: int, reader_rank: int
) -> tuple[QueueWriter, list[Handle], bool]:
    """This rank's queue to `reader_rank`, the handles of all ranks there, and whether this rank is the reader.

    See MessageQueue.create_from_process_group_single_reader.
    """
    group = _Group(pg)
    group.require_member(reader_rank, "reader_rank")
    reads = group.rank == reader_rank
    probes, attached = try_out(group, True, reads)
    local = attached[reader_rank][group.rank]
    writer: QueueWriter | None = None
    own: Any
    try:
        ends: tuple[list[int], list[int]] = ([reader_rank], []) if local else ([], [reader_rank])
        writer = QueueWriter(*ends, max_chunk_bytes, max_chunks, None if local else route_to(probes[reader_rank].ip))
        own = writer.handle
    except (StartError, ValueError) as exc:
        own = exc
    try:
        handles = group.gather_or_raise(own)
        if writer is None:
            raise StartError(f"rank {group.rank} has no queue: a bug in ray-shm")
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    return writer, handles if reads else [], reads


def try_out(group: Gathering, writes: bool, reads: bool) -> tuple[list[Probe], list[list[bool]]]:
    """Every rank's probe, and for every rank whose probes it can attach to.

    Args:
        writes, reads: what this rank will do; it has no probe, or tries none, otherwise.

    Raises:
        StartError: on every rank, where one has no memory for its probe.
    """
    segment: Segment | None = None
    own: Any
    try:
        if writes and _is_supported():
            segment = Segment.create(mmap.PAGESIZE, "probe")
        own = Probe(segment.ref if segment else None, group.own_address())
    except StartError as exc:
        own = exc
    try:
        probes = group.gather_or_raise(own)
        return probes, group.gather([reads and _can_attach(probe.ref) for probe in probes])
    finally:
        if segment is not None:
            segment.close()


class Gathering:
    """Members that all give a small value, and all get everybody's.

    Attributes:
        rank: this member's, in the group. size: number of members.
    """

    rank: int
    size: int

    def gather(self, own: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        raise NotImplementedError

    def own_address(self) -> str:
        """This host's address, as the other members reach it."""
        raise NotImplementedError

    def gather_or_raise(self, own: Any) -> list[Any]:
        """As `gather`; where a rank's value is an exception, raise on every rank, naming those ranks."""
        gathered = self.gather(own)
        failures = {rank: value for rank, value in enumerate(gathered) if isinstance(value, Exception)}
        if failures:
            text = "; ".join(f"rank {rank}: {exc}" for rank, exc in failures.items())
            raise StartError(f"no queue was made: {text}", failures)
        return gathered


class _Group(Gathering):
    """A ProcessGroup (of WORLD or built without it), or a StatelessGroupCoordinator."""

    def __init__(self, pg: Any) -> None:
        self._pg = getattr(pg, "cpu_group", pg)
        self.rank = self._pg.rank()
        self.size = self._pg.size()

    def require_member(self, rank: int, role: str) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{role}={rank} is outside the process group: it has ranks 0 to {self.size - 1}")

    def gather(self, own: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        try:
            # The only collective on objects that takes a group without WORLD and names no rank.
            dist.all_gather_object(gathered, own, group=self._pg)
        except RuntimeError as exc:
            raise StartError(f"rank {self.rank} cannot agree on a queue with its process group: {exc}") from exc
        return gathered

    def own_address(self) -> str:
        """Towards the host of the group's store, else towards anywhere."""
        return route_to(self._store_host() or _SOME_HOST)

    def _store_host(self) -> str | None:
        try:
            store = self._pg.get_group_store()
        except (AttributeError, RuntimeError):  # a torch without it, or a group without a store
            return None
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        return getattr(store, "host", None)


def route_to(host: str) -> str:
    """The address of this host from which packets to `host` leave; 127.0.0.1 where no route leads there.

    A UDP socket that is "connected" sends nothing: the kernel only looks the route up.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _is_supported() -> bool:
    try:
        futex.require_supported()
    except StartError:
        return False
    return True


def _can_attach(ref: SegmentRef | None) -> bool:
    if ref is None or not _is_supported():
        return False
    try:
        Segment.attach(ref).close()
    except StartError:
        return False
    return True
