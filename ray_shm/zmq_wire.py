"""What travels between the two ends of a queue across nodes, as values: kinds of messages and their layout.

    reader -> writer   HELLO and LIFELINE (token, rank, pid, nonce), ACK (messages consumed), BYE
    writer -> reader   START (messages sent), READY, MESSAGE (head, then frames), pieces, CLOSED (messages sent),
                       REFUSED (why)

A reader makes two connections and names itself on both with the same nonce. HELLO's carries everything else;
LIFELINE's carries nothing more, ever (zmq_socket.py says what for). Once both are made the writer says START: the first
message for this reader, which may take the place of one that is gone, is the next one after so many.

A MESSAGE is one multipart: its head, and one part per frame. A frame larger than PIECE is an empty part there; its
bytes follow, in messages of one part of PIECE bytes each, the last one shorter, before anything else is sent. So a
large frame is encrypted, sent and decrypted piece by piece at the same time, and neither end holds it encrypted as a
whole (measured over loopback, two cores: 64 MiB in one part 340 ms, in pieces of 256 KiB 140 ms).

Runs in every process. No sockets here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray_shm.ring import Buffer

HELLO, LIFELINE, ACK, BYE = b"H", b"L", b"A", b"B"
START, READY, MESSAGE, CLOSED, REFUSED = b"S", b"R", b"M", b"C", b"X"
PIECE = 256 << 10  # bytes
_HELLO = struct.Struct("<c16sIQ16s")
_COUNT = struct.Struct("<cQ")
_HEAD = struct.Struct("<cBIIQ")
_LARGE = struct.Struct("<IQ")


class WireError(ValueError):
    """Bytes that are not what the other end sends."""


@dataclass(frozen=True, slots=True)
class Hello:
    """How a reader names itself, on either of its connections.

    Attributes:
        kind: HELLO or LIFELINE. token: from the handle. rank, pid: the reader's. nonce: 16 random bytes, the same on
            both connections of a reader.
    """

    kind: bytes
    token: bytes
    rank: int
    pid: int
    nonce: bytes

    def pack(self) -> bytes:
        return _HELLO.pack(self.kind, self.token, self.rank, self.pid, self.nonce)

    @classmethod
    def unpack(cls, part: bytes) -> Hello:
        """Raises WireError."""
        if len(part) != _HELLO.size or part[:1] not in (HELLO, LIFELINE):
            raise WireError("not a hello")
        return cls(*_HELLO.unpack(part))


def pack_count(kind: bytes, count: int) -> bytes:
    """An ACK (messages consumed), START or CLOSED (messages sent), from the queue's start."""
    return _COUNT.pack(kind, count)


def unpack_count(part: bytes) -> int:
    """Raises WireError."""
    if len(part) != _COUNT.size:
        raise WireError("not a count")
    return int(_COUNT.unpack(part)[1])


@dataclass(frozen=True, slots=True)
class Head:
    """The first part of a MESSAGE.

    Attributes:
        sequence: of the message, from 0. asks: the reader is to send an ACK once it has consumed it. n_frames: how many
            there are. large: (index, length in bytes) of the frames whose bytes follow in pieces.
    """

    sequence: int
    asks: bool
    n_frames: int
    large: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sequence: int, asks: bool, frames: Sequence[Buffer]) -> Head:
        large = tuple((i, len(frame)) for i, frame in enumerate(frames) if len(frame) > PIECE)
        return cls(sequence, asks, len(frames), large)

    def pack(self) -> bytes:
        head = _HEAD.pack(MESSAGE, self.asks, self.n_frames, len(self.large), self.sequence)
        return head + b"".join(_LARGE.pack(*entry) for entry in self.large) if self.large else head

    @classmethod
    def unpack(cls, part: bytes, n_parts: int) -> Head:
        """Of a message that came in `n_parts` parts. Raises WireError."""
        if len(part) < _HEAD.size:
            raise WireError("a short head")
        _, asks, n_frames, n_large, sequence = _HEAD.unpack_from(part)
        if len(part) != _HEAD.size + n_large * _LARGE.size or n_parts != 1 + n_frames:
            raise WireError(f"a head of {n_frames} frames with {n_parts - 1}")
        large = tuple(_LARGE.iter_unpack(part[_HEAD.size :]))
        if any(index >= n_frames for index, _ in large):
            raise WireError("a large frame that is not there")
        return cls(sequence, bool(asks), n_frames, large)


def pieces(frames: Sequence[Buffer], head: Head) -> Iterator[memoryview]:
    """The bytes of a message's large frames, in the order in which they travel; views, not copies."""
    for index, length in head.large:
        view = memoryview(frames[index])
        for start in range(0, length, PIECE):
            yield view[start : start + PIECE]
