"""MessageQueue: one writer, many readers, local ones through shared memory and remote ones through ZeroMQ.

The public face of the queue, a drop-in for vLLM's class of that name. It holds one end, a QueueWriter or a QueueReader,
and adds pickling. Runs in every process that sends or receives.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ray_shm import codec
from ray_shm.cuda_ipc import StaleError
from ray_shm.deadline import Deadline
from ray_shm.handle import Handle
from ray_shm.queue_end import QueueStats
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Buffer

MAX_CHUNK_BYTES = 24 << 20
MAX_CHUNKS = 10
_NEVER = Deadline.after(None)


def _decode(frames: Sequence[Buffer], owned: bool) -> Any:
    return codec.decode(frames, 0, owned)


class MessageQueue:
    """A queue's writing end (made by the constructor) or reading end (made by `create_from_handle`).

    Args:
        n_reader: number of readers.
        n_local_reader: how many of them are on this node and read through shared memory; the others use ZeroMQ.
        local_reader_ranks: ranks of the local readers; default ``range(n_local_reader)``. Remote readers have the
            smallest other ranks.
        max_chunk_bytes, max_chunks: their product bounds the unread bytes; one object larger than that still goes
            through, alone. Memory is taken as it is needed.
        connect_ip: this node's address, or a name of it, to bind the ZeroMQ socket to; default 127.0.0.1.
        max_arena_bytes: most shared memory for large messages, those included that readers still hold; default 1 GiB,
            or twice the bound on unread bytes if that is more. Once readers hold half of it they copy large messages
            out. One message that finds no room beside what they hold goes through alone, beyond it.
        drop_dead_readers: go on without readers that are gone, instead of raising PeerLostError.
        port_range: (first, last) port to bind instead of any free one.

    Raises:
        ValueError: counts and ranks that do not fit together, or a wildcard as address. StartError: no memory, or the
            address is not ours, or its ports are taken.
    """

    def __init__(
        self,
        n_reader: int,
        n_local_reader: int,
        local_reader_ranks: Sequence[int] | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
        max_chunks: int = MAX_CHUNKS,
        connect_ip: str | None = None,
        *,
        max_arena_bytes: int | None = None,
        drop_dead_readers: bool = False,
        port_range: tuple[int, int] | None = None,
    ) -> None:
        local = tuple(range(n_local_reader) if local_reader_ranks is None else local_reader_ranks)
        _require_counts(n_reader, n_local_reader, local, max_chunk_bytes, max_chunks)
        if max_arena_bytes is not None and max_arena_bytes < 1:
            raise ValueError(f"max_arena_bytes={max_arena_bytes} must be at least 1")
        others = (r for r in range(n_reader + len(local)) if r not in local)
        remote = [next(others) for _ in range(n_reader - n_local_reader)]
        self._writer: QueueWriter | None = QueueWriter(
            local,
            remote,
            max_chunk_bytes,
            max_chunks,
            connect_ip,
            port_range=port_range,
            max_arena_bytes=max_arena_bytes,
            drop_dead_readers=drop_dead_readers,
        )
        self._reader: QueueReader | None = None
        self._handle = self._writer.handle

    @classmethod
    def create_from_handle(cls, handle: Handle, rank: int) -> MessageQueue:
        """Attach as reader `rank`; -1, as in vLLM, stands for the only remote reader.

        Raises:
            StartError: `rank` is a local reader and the memory cannot be reached from this process.
            ValueError: the handle is of another version, or has no place for `rank`.
        """
        return cls._around(QueueReader(handle, rank), handle)

    @classmethod
    def create_from_process_group(
        cls,
        pg: Any,
        max_chunk_bytes: int,
        max_chunks: int,
        writer_rank: int = 0,
        external_writer_handle: Handle | None = None,
        blocking: bool = True,
    ) -> MessageQueue:
        """One writer, read by all other members of a torch process group. Every member calls it.

        Members that can map the writer's memory read through it, the others through ZeroMQ.

        Args:
            pg: a ProcessGroup, of torch's WORLD or built without it, or a StatelessGroupCoordinator. The handle
                travels over it, so it has to be as trusted as the queue.
            max_chunk_bytes, max_chunks: as in MessageQueue.
            writer_rank: rank in `pg` that writes.
            external_writer_handle: at `writer_rank`, the handle of a queue made elsewhere, with all ranks of `pg` among
                its readers: then every member, `writer_rank` too, reads that queue.
            blocking: return once every reader has attached; else call `wait_until_ready` later.

        Returns:
            the writing end at `writer_rank`, a reading end of that rank elsewhere.

        Raises:
            ValueError: a rank or count out of range. StartError: on all members, naming the rank that failed (no
                memory, a handle without a place for it); nothing remains.
        """
        from ray_shm import process_group_queues

        _require_chunks(max_chunk_bytes, max_chunks)
        self = cls._around(
            *process_group_queues.make_one_writer(pg, max_chunk_bytes, max_chunks, writer_rank, external_writer_handle)
        )
        if blocking:
            self._require_ready()
        return self

    @classmethod
    def create_from_process_group_single_reader(
        cls, pg: Any, max_chunk_bytes: int, max_chunks: int, reader_rank: int = 0, blocking: bool = False
    ) -> tuple[MessageQueue, list[Handle]]:
        """A queue from each member of a torch process group to one of them. Every member calls it.

        Args:
            pg, max_chunk_bytes, max_chunks: as in `create_from_process_group`.
            reader_rank: rank in `pg` that reads; its own queue is made, too.
            blocking: the other members return once the reader has attached to their queue. The reader never waits: it
                attaches after this call.

        Returns:
            the own writing end, and at the reader the handles of all ranks, in rank order (elsewhere an empty list):
            attach with ``create_from_handle(handles[i], reader_rank)``.

        Raises:
            as `create_from_process_group`.
        """
        from ray_shm import process_group_queues

        _require_chunks(max_chunk_bytes, max_chunks)
        writer, handles, reads = process_group_queues.make_one_reader(pg, max_chunk_bytes, max_chunks, reader_rank)
        self = cls._around(writer, writer.handle)
        if blocking and not reads:
            self._require_ready()
        return self, handles

    def _require_ready(self) -> None:
        try:
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise

    @classmethod
    def _around(cls, end: QueueWriter | QueueReader, handle: Handle) -> MessageQueue:
        self = cls.__new__(cls)
        self._writer = end if isinstance(end, QueueWriter) else None
        self._reader = end if isinstance(end, QueueReader) else None
        self._handle = handle
        return self

    def export_handle(self) -> Handle:
        """What a reader needs to attach; picklable. Treat as a secret: it admits to the queue."""
        return self._handle

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Writer: until every reader has attached. Reader: until the writer has seen that.

        Raises:
            TimeoutError: after `timeout` seconds, naming who is missing; the queue stays usable.
        """
        (self._writer or self._require_reader()).wait_until_ready(Deadline.after(timeout))

    def enqueue(self, obj: Any, timeout: float | None = None) -> None:
        """Send `obj` to every reader. Its buffers may be changed as soon as this returns.

        Raises:
            TimeoutError: after `timeout` seconds without room, naming the late readers; nothing was sent and the queue
                stays usable. PeerLostError: a reader is gone. QueueClosedError. Whatever pickling raises.
        """
        deadline = _NEVER if timeout is None else Deadline.after(timeout)
        writer = self._writer or self._require_writer()
        try:
            writer.send(codec.encode(obj, b"", writer.sharer), deadline)
        except StaleError:  # meanwhile a reader was replaced
            writer.send(codec.encode(obj), deadline)

    def dequeue(
        self, timeout: float | None = None, indefinite: bool = False, *, cancel: threading.Event | None = None
    ) -> Any:
        """The next object, all of its memory its own.

        Args:
            timeout: seconds; None waits for ever. indefinite: wait for ever whatever `timeout` says (as vLLM's).
            cancel: once set, the wait ends within 50 ms.

        Raises:
            TimeoutError: nothing came; the queue stays usable. QueueCancelledError: `cancel` was set; likewise.
            QueueClosedError: either end was closed and all is read. PeerLostError: the writer is gone, likewise.
            Whatever unpickling raises; that message is consumed.
        """
        deadline = _NEVER if timeout is None or indefinite else Deadline.after(timeout)
        return (self._reader or self._require_reader()).receive(_decode, deadline, cancel)

    def broadcast_object(self, obj: Any = None) -> Any:
        """`enqueue` and return `obj` at the writer, `dequeue` at a reader. Raises as those do."""
        if self._writer is None:
            return self.dequeue()
        self.enqueue(obj)
        return obj

    @contextlib.contextmanager
    def acquire_write(self, timeout: float | None = None) -> Iterator[memoryview]:
        """A writable buffer of max_chunk_bytes, sent whole when the ``with`` ends without an exception.

        Raises:
            as `enqueue`, when the block ends.
        """
        writer = self._require_writer()
        buffer = memoryview(bytearray(self._handle.max_chunk_bytes))
        yield buffer
        writer.send([buffer], Deadline.after(timeout))

    @contextlib.contextmanager
    def acquire_read(
        self, timeout: float | None = None, indefinite: bool = False, *, cancel: threading.Event | None = None
    ) -> Iterator[memoryview]:
        """The next message's bytes, read-only, valid inside the ``with``; consumed when it ends.

        Raises:
            as `dequeue`.
        """
        deadline = Deadline.after(None if indefinite else timeout)
        with self._require_reader().message(deadline, cancel) as frames:
            yield frames[0].toreadonly()

    def stats(self) -> QueueStats:
        """Counters of this end, as they stand."""
        return (self._writer or self._require_reader()).stats()

    def close(self) -> None:
        """Leave the queue. Readers may still read what a closed writer had sent. Idempotent, from any thread."""
        (self._writer or self._require_reader()).close()

    shutdown = close

    def __enter__(self) -> MessageQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_writer(self) -> QueueWriter:
        if self._writer is None:
            raise RuntimeError("this is a reading end: only the process that made the queue can enqueue")
        return self._writer

    def _require_reader(self) -> QueueReader:
        if self._reader is None:
            raise RuntimeError("this is the writing end: readers attach with MessageQueue.create_from_handle")
        return self._reader


def _require_counts(
    n_reader: int, n_local_reader: int, local: tuple[int, ...], max_chunk_bytes: int, max_chunks: int
) -> None:
    if not 0 <= n_local_reader <= n_reader or n_reader < 1:
        raise ValueError(f"n_reader={n_reader} and n_local_reader={n_local_reader}: need 0 <= local <= all, all >= 1")
    if len(local) != n_local_reader or len(set(local)) != len(local) or any(r < 0 for r in local):
        raise ValueError(f"local_reader_ranks={list(local)} must be {n_local_reader} different ranks")
    _require_chunks(max_chunk_bytes, max_chunks)


def _require_chunks(max_chunk_bytes: int, max_chunks: int) -> None:
    if max_chunk_bytes < 1 or max_chunks < 1:
        raise ValueError(f"max_chunk_bytes={max_chunk_bytes} and max_chunks={max_chunks} must be at least 1")
