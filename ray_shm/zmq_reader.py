"""A reader of a queue across nodes: receives messages (lists of byte frames) from one ZmqWriter.

Runs in each process that receives from another node. It talks to the holder of the key in its handle only (CURVE), and
hands on nothing else. zmq_writer.py says when it acknowledges, zmq_socket.py when the writer counts as gone. No
unpickling and no waiting policy here.
"""

from __future__ import annotations

import contextlib
import secrets

import zmq

from ray_shm import zmq_socket, zmq_wire
from ray_shm.errors import PeerLostError, RayShmError, StartError
from ray_shm.handle import ZmqAddress
from ray_shm.zmq_socket import SILENCE, Endpoint, Socket
from ray_shm.zmq_wire import Head, Hello


class ZmqReader:
    """The receiving end of `rank`. Not thread-safe: its owner holds a lock. `wake` may come from any thread.

    In a forked child it is abandoned at once, by itself; only `close`, which does nothing then, may be called there.

    Attributes:
        ready: the writer has seen every reader. closed_by_writer: it closed the queue, and all was read.
    """

    def __init__(self, address: ZmqAddress, rank: int, pid: int) -> None:
        """Connect, in the background: `ready`, `broken` and `peek` tell how it went."""
        self._endpoint = address.endpoint
        main, lifeline = (_connectable(address) for _ in range(2))
        main.setsockopt(zmq.TCP_MAXRT, SILENCE * 1000)
        self._end = Endpoint(main, zmq_socket.BROKEN, [lifeline])
        self._end.address = address.endpoint
        nonce = secrets.token_bytes(16)
        for connection, kind in ((lifeline, zmq_wire.LIFELINE), (main, zmq_wire.HELLO)):
            connection.connect(address.endpoint)
            connection.send(Hello(kind, address.token, rank, pid, nonce).pack())
        self._broken = False
        self._fault: RayShmError | None = None  # what ends reading, once all before it is read
        self._received = 0  # messages, or heads of them, and those from before this reader's START
        self._consumed = 0  # likewise
        self._said = 0  # of those, in an ACK
        self._frames: list[memoryview] | None = None  # of the message that is handed out
        self._asked = False  # it asks for an ACK
        self._parts: list[zmq.Frame] = []  # received, and not yet looked at
        self._arriving: list[memoryview] = []  # frames of a message with pieces still to come
        self._unfilled: list[memoryview] = []  # what these pieces go into
        self.ready = False
        self.closed_by_writer = False

    @property
    def socket(self) -> Socket:
        """To poll many readers at once; `peek` until None after each event, as one message may be fetched ahead."""
        return self._end.main

    @property
    def monitor(self) -> Socket:
        """To be polled beside `socket`: readable when the connection breaks; then see `broken`."""
        socket: Socket = self._end.monitor.socket
        return socket

    def poll(self, seconds: float) -> bool:
        """Wait until the writer says something (True), the connection breaks, or `wake`; at most `seconds`."""
        return self._end.poll(seconds)

    def wake(self) -> None:
        """End a `poll` in another thread."""
        self._end.wake()

    def broken(self) -> bool:
        """Whether the connection could not be made or is gone. What had arrived before can still be read."""
        for _ in self._end.monitor.events():
            self._broken = True
        return self._broken

    def peek(self) -> list[memoryview] | None:
        """Frames of the next message, or None; the same again until `release`.

        They are flat, writable, and this process's alone: nothing writes to or reuses them, before or after `release`,
        so they may be kept and decoded in place.

        Raises:
            PeerLostError: messages are missing. StartError: the writer refused this reader. Again on every call.
        """
        while self._frames is None and not self.closed_by_writer:
            if self._fault is not None:
                raise self._fault
            try:
                zmq_socket.receive(self._end.main, self._parts)
            except zmq.Again:
                self._acknowledge()  # all is read: the writer is to know how far this reader is
                return None
            self._take(self._parts)
        return self._frames

    def release(self) -> None:
        """Done with the message of `peek`."""
        self._frames = None
        self._consumed += 1
        if self._asked:
            self._acknowledge()
            return
        with contextlib.suppress(RayShmError):  # the next `peek` raises it
            self.peek()

    def close(self) -> None:
        """Tell the writer that this reader left. Idempotent."""
        try:
            if not self._end.closed:
                self._tell(zmq_wire.BYE)
        finally:
            self._end.close()

    def abandon(self) -> None:
        """In a forked child, where it happens by itself: forget the sockets without touching the parent's queue."""
        self._end.abandon()

    def _take(self, parts: list[zmq.Frame]) -> None:
        """Taken again from the start if a signal's handler broke it off: what changes does so at once, at an end."""
        try:
            if self._unfilled:
                self._fill(parts)
            elif (kind := parts[0].bytes[:1]) == zmq_wire.MESSAGE:
                self._begin(parts)
            elif kind == zmq_wire.START:
                self._received = self._consumed = self._said = zmq_wire.unpack_count(parts[0].bytes)
            elif kind == zmq_wire.READY:
                self.ready = True
            elif kind == zmq_wire.CLOSED:
                self._end_of_queue(parts[0].bytes)
            elif kind == zmq_wire.REFUSED:
                why = parts[0].bytes[1:].decode(errors="replace")
                self._fault = StartError(f"the queue at {self._endpoint} refused this reader: {why}")
            else:
                raise zmq_wire.WireError(f"a message of kind {kind!r}")
        except zmq_wire.WireError as exc:
            self._fault = PeerLostError(
                f"message {self._received} from {self._endpoint} did not arrive whole ({exc}): make a new queue"
            )
        self._parts = []

    def _begin(self, parts: list[zmq.Frame]) -> None:
        head = Head.unpack(parts[0].bytes, len(parts))
        if head.sequence != self._received:
            raise zmq_wire.WireError(f"got message {head.sequence}")
        frames = [memoryview(part.buffer) for part in parts[1:]]
        unfilled = []
        for index, length in head.large:
            frames[index] = memoryview(bytearray(length))
            unfilled.append(frames[index])
        self._received += 1
        self._asked = head.asks
        self.ready = True
        self._unfilled = unfilled
        if unfilled:
            self._arriving = frames
        else:
            self._frames = frames
        self._parts = []

    def _fill(self, parts: list[zmq.Frame]) -> None:
        target = self._unfilled[0]
        piece, rest = target[: zmq_wire.PIECE], target[zmq_wire.PIECE :]
        if len(parts) != 1 or len(parts[0]) != len(piece):
            raise zmq_wire.WireError("a piece is missing")
        piece[:] = parts[0].buffer
        unfilled = [rest, *self._unfilled[1:]] if len(rest) else self._unfilled[1:]
        if not unfilled:
            self._frames, self._arriving = self._arriving, []
        self._unfilled = unfilled
        self._parts = []

    def _end_of_queue(self, part: bytes) -> None:
        sent = zmq_wire.unpack_count(part)
        if sent != self._received:
            raise zmq_wire.WireError(f"{sent} were sent")
        self._acknowledge()
        self.closed_by_writer = True

    def _acknowledge(self) -> None:
        if self._said != self._consumed:
            consumed = self._consumed
            self._tell(zmq_wire.pack_count(zmq_wire.ACK, consumed))
            self._said = consumed  # second: said twice does no harm, and never would stop the writer

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the connection is gone for good, and nobody left to be told
            self._end.main.send(word, zmq.NOBLOCK)


def _connectable(address: ZmqAddress) -> Socket:
    made = zmq_socket.open_socket(zmq.DEALER, "[" in address.endpoint)
    made.curve_serverkey = address.server_key
    made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
    return made
