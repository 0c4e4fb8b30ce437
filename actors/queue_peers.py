"""What ``ray-shm bench queue`` measures: ways to send one payload to n processes and have each of them reply.

Every peer has two ends, with the same call on both: the driver's writing end and one reading end in each worker.

    driver                                                  worker of rank r
    WriterEnd(desk), specs()[r]      -- control pipe -->    ReaderEnd(spec, seat)
    connect([info, ...])             <-- control pipe --    info
    call(): (method, args, kwargs)   ---- the peer ---->    receive()     together: serve()
            waits for all replies    <--- the peer -----    reply()
    stop()                           ---- the peer ---->    serve() returns

A message is pickled with protocol 5, as vLLM's executor does it, and a reader drops the payload before it replies. What
this file does not do: start processes (bench_workers.py), take times (queue_bench.py), or watch for dead and late
workers: every wait here is without end, and is broken by a signal.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_shm.message_queue import MessageQueue

Payload = bytes | npt.NDArray[np.uint8]
Message = tuple[str, tuple[Payload, ...], dict[str, Any]]

STOP: Message = ("stop", (), {})
REPLY = (0, None)
LARGEST_BYTES = 1024  # larger payloads are arrays
ZERO_COPY = 64 << 10  # bytes of payload from which pyzmq is told not to copy; its own threshold
_GO, _END = b"g", b"s"  # one-byte messages of the floors


class UnavailableError(RuntimeError):
    """A peer of an optional package cannot be used: its rows are left out."""


@dataclass(frozen=True)
class Cell:
    """One rung of the ladder. payload_bytes: size of the payload. touch: readers sum all of it before they reply."""

    readers: int
    payload_bytes: int
    touch: bool = False

    def payload(self) -> Payload:
        """Bytes when small, else an array, every page of it written."""
        if self.payload_bytes <= LARGEST_BYTES:
            return b"x" * self.payload_bytes
        return np.ones(self.payload_bytes, dtype=np.uint8)


@dataclass(frozen=True)
class Desk:
    """What a writing end works with: its cell, and the driver's ends of the pipes to the first `cell.readers` workers.

    pipes: one duplex pipe for each worker. ping: (write, read) descriptors of two pipes to and from worker 0. folder:
    private to this run, for sockets; removed at the end.
    """

    cell: Cell
    payload: Payload
    pipes: Sequence[Connection]
    ping: tuple[int, int]
    folder: Path

    @property
    def message(self) -> Message:
        return ("noop", (self.payload,), {})


@dataclass(frozen=True)
class Seat:
    """What a reading end works with: its rank, and the worker's ends of the pipes in Desk; ping: (read, write)."""

    rank: int
    pipe: Connection
    ping: tuple[int, int]


class WriterEnd:
    """The driver's end of a peer."""

    def __init__(self, desk: Desk) -> None:
        self.message = desk.message
        self.pipes = desk.pipes

    def specs(self) -> list[Any]:
        """What each worker's ReaderEnd is made from, in rank order; as many as workers take part."""
        return [None] * len(self.pipes)

    def connect(self, infos: list[Any]) -> None:
        """Called with what each ReaderEnd has as its `info`, in rank order."""

    def call(self) -> None:
        """Send the payload to every reader and wait for the last reply."""
        raise NotImplementedError

    def stop(self) -> None:
        """End `serve` in every reader, without a reply."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the end holds. Idempotent."""


class ReaderEnd:
    """A worker's end of a peer."""

    info: Any = None

    def __init__(self, spec: Any, seat: Seat) -> None:
        self.pipe = seat.pipe

    def ready(self) -> None:
        """Called after the writer's `connect` began; returns when both ends are connected."""

    def receive(self) -> Message:
        raise NotImplementedError

    def reply(self) -> None:
        raise NotImplementedError

    def serve(self, touch: bool) -> None:
        """Answer calls until a stop arrives."""
        while True:
            method, args, _kwargs = self.receive()
            if method == "stop":
                return
            if touch:
                sum_all(args[0])
            del args  # the payload, and with it a lease on shared memory: given back before the reply
            self.reply()

    def close(self) -> None:
        """Give back what the end holds."""


def sum_all(payload: Payload) -> int:
    """Read every byte, in 64-bit words where that is possible: numpy sums single bytes ten times slower."""
    data = np.frombuffer(payload, np.uint8)
    return int((data if data.size % 8 else data.view(np.uint64)).sum())


# ---- ours ---------------------------------------------------------------------------------------------------------


class QueueWriter(WriterEnd):
    """A MessageQueue to all readers, and one back from each."""

    local = True

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        readers = desk.cell.readers
        self.requests = MessageQueue(readers, readers if self.local else 0)
        self.replies: list[MessageQueue] = []

    def specs(self) -> list[Any]:
        return [(self.requests.export_handle(), self.local)] * len(self.pipes)

    def connect(self, infos: list[Any]) -> None:
        self.replies.extend(MessageQueue.create_from_handle(handle, 0) for handle in infos)
        self.requests.wait_until_ready()
        for queue in self.replies:
            queue.wait_until_ready()

    def call(self) -> None:
        self.requests.enqueue(self.message)
        for queue in self.replies:
            queue.dequeue()

    def stop(self) -> None:
        self.requests.enqueue(STOP)

    def close(self) -> None:
        for queue in (self.requests, *self.replies):
            queue.close()


class ZmqQueueWriter(QueueWriter):
    """The same, with every reader treated as one of another node."""

    local = False


class QueueReader(ReaderEnd):
    def __init__(self, spec: Any, seat: Seat) -> None:
        super().__init__(spec, seat)
        handle, local = spec
        self.requests = MessageQueue.create_from_handle(handle, seat.rank)
        self.replies = MessageQueue(1, 1 if local else 0)
        self.info = self.replies.export_handle()

    def ready(self) -> None:
        self.requests.wait_until_ready()
        self.replies.wait_until_ready()

    def receive(self) -> Message:
        message: Message = self.requests.dequeue(indefinite=True)
        return message

    def reply(self) -> None:
        self.replies.enqueue(REPLY)

    def close(self) -> None:
        self.requests.close()
        self.replies.close()


# ---- multiprocessing.Pipe -----------------------------------------------------------------------------------------


class PipeWriter(WriterEnd):
    """Pickled once, sent to each reader in turn."""

    def call(self) -> None:
        self._send(self.message)
        for pipe in self.pipes:
            pipe.recv()

    def stop(self) -> None:
        self._send(STOP)

    def _send(self, message: Message) -> None:
        data = pickle.dumps(message, 5)
        for pipe in self.pipes:
            pipe.send_bytes(data)


class PipeReader(ReaderEnd):
    def receive(self) -> Message:
        message: Message = pickle.loads(self.pipe.recv_bytes())
        return message

    def reply(self) -> None:
        self.pipe.send(REPLY)


# ---- pyzmq --------------------------------------------------------------------------------------------------------


class PyzmqWriter(WriterEnd):
    """A PAIR socket to each reader over ipc; the array travels as a frame of its own, without a copy on our side."""

    def __init__(self, desk: Desk) -> None:
        import zmq

        super().__init__(desk)
        self.copy = desk.cell.payload_bytes < ZERO_COPY
        self.context = zmq.Context()
        self.sockets = [self.context.socket(zmq.PAIR) for _ in self.pipes]
        self.addresses = [f"ipc://{desk.folder}/{rank}" for rank in range(len(self.sockets))]
        for socket, address in zip(self.sockets, self.addresses, strict=True):
            socket.bind(address)

    def specs(self) -> list[Any]:
        return [(address, self.copy) for address in self.addresses]

    def call(self) -> None:
        self._send(self.message)
        for socket in self.sockets:
            pickle.loads(socket.recv())

    def stop(self) -> None:
        self._send(STOP)

    def _send(self, message: Message) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(message, 5, buffer_callback=buffers.append)
        frames: list[Any] = [head, *(buffer.raw() for buffer in buffers)]
        for socket in self.sockets:
            socket.send_multipart(frames, copy=self.copy)

    def close(self) -> None:
        self.context.destroy(linger=0)


class PyzmqReader(ReaderEnd):
    def __init__(self, spec: Any, seat: Seat) -> None:
        import zmq

        super().__init__(spec, seat)
        address, self.copy = spec
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.connect(address)

    def receive(self) -> Message:
        frames = self.socket.recv_multipart(copy=self.copy)
        head, *buffers = frames if self.copy else [frame.buffer for frame in frames]
        message: Message = pickle.loads(head, buffers=buffers)
        return message

    def reply(self) -> None:
        self.socket.send(pickle.dumps(REPLY, 5))

    def close(self) -> None:
        self.context.destroy(linger=0)


# ---- floors -------------------------------------------------------------------------------------------------------


class CopyWriter(WriterEnd):
    """One thread's np.copyto of the payload into a warm memfd; nobody is called."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.source = np.frombuffer(desk.payload, np.uint8)
        fd = os.memfd_create("ray-shm-bench", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.source.size)
            self.target = np.frombuffer(mmap.mmap(fd, self.source.size), np.uint8)  # unmapped with its last user
        finally:
            os.close(fd)

    def specs(self) -> list[Any]:
        return []

    def call(self) -> None:
        np.copyto(self.target, self.source)

    def stop(self) -> None:
        pass


class CopyAndSumsWriter(CopyWriter):
    """The same copy, while every worker sums private memory of that size: the floor where readers sum the payload."""

    def specs(self) -> list[Any]:
        return [self.source.size] * len(self.pipes)

    def call(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(_GO)
        super().call()
        for pipe in self.pipes:
            pipe.recv_bytes()

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(_END)


class SumsReader(ReaderEnd):
    def __init__(self, spec: Any, seat: Seat) -> None:
        super().__init__(spec, seat)
        self.own = np.ones(spec, dtype=np.uint8)

    def serve(self, touch: bool) -> None:
        while self.pipe.recv_bytes() == _GO:
            sum_all(self.own)
            self.pipe.send_bytes(_GO)


class PingWriter(WriterEnd):
    """One byte through a pipe to one process and back: what going to sleep and being woken costs, twice."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.to, self.back = desk.ping

    def specs(self) -> list[Any]:
        return [None]

    def call(self) -> None:
        os.write(self.to, _GO)
        os.read(self.back, 1)

    def stop(self) -> None:
        os.write(self.to, _END)


class PingReader(ReaderEnd):
    def __init__(self, spec: Any, seat: Seat) -> None:
        super().__init__(spec, seat)
        self.come, self.back = seat.ping

    def serve(self, touch: bool) -> None:
        while os.read(self.come, 1) == _GO:
            os.write(self.back, _GO)
