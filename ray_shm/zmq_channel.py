"""Messages (lists of byte frames) to readers on other nodes: one ROUTER at the writer, a DEALER at each reader.

Runs in every process: ZmqWriter in the one that sends, ZmqReader in each that receives. ROUTER/DEALER and not
PUB/SUB, which drops silently at its high-water mark. The writer's socket is bound to its node's address and port 0,
and is never rebound. CURVE encrypts: the writer's key travels inside the handle only, and a stranger who does not hold
it gets no further than the handshake. Readers send no pickles, and unpickle only what the handle's writer sent.

Reader to writer: ``HELLO token rank pid`` | ``ACK sequence`` | ``BYE``. Writer to reader: ``READY`` | ``MESSAGE
sequence frames...`` | ``CLOSED`` | ``PROBE``, which says nothing. The writer keeps at most WINDOW messages, and the
queue's bound of bytes, without an ACK at each reader, so a slow reader costs bounded memory. A connection that broke is
not made again: both ends raise PeerLostError, because messages may be missing.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq

from ray_shm.errors import PeerLostError, StartError
from ray_shm.handle import ZmqAddress
from ray_shm.ring import Buffer

WINDOW = 1024  # messages without an ACK, per reader
HEARTBEAT_MS = 2000
LINGER_MS = 2000  # how long a closed socket may still deliver what was sent
_NEVER_MS = 3_600_000  # before a connection is made again; with -1, zmq drops what has arrived when one breaks
HELLO, ACK, BYE, READY, MESSAGE, CLOSED, PROBE = b"H", b"A", b"B", b"R", b"M", b"C", b"P"
_HELLO = struct.Struct("<16sIQ")
_SEQUENCE = struct.Struct("<Q")
_EVENT = struct.Struct("=HI")
_HANDSHAKES = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_BROKEN = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_context: zmq.Context[zmq.Socket[bytes]] | None = None
_context_lock = threading.Lock()


def _socket(kind: int) -> zmq.Socket[bytes]:
    global _context
    with _context_lock:
        if _context is None:
            _context = zmq.Context()
        socket = _context.socket(kind)
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        socket.setsockopt(option, 0)  # our own window bounds what is under way; zmq's would drop or block
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
    return socket


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


class _Monitor:
    """What happens to the connections of one socket: a count of each kind of event that was asked for."""

    def __init__(self, watched: zmq.Socket[bytes], events: int) -> None:
        endpoint = f"inproc://ray_shm-monitor-{secrets.token_hex(8)}"
        watched.monitor(endpoint, events)
        self._watched = watched
        self.socket = watched.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # else zmq's I/O thread, which all queues share, blocks on a full pipe
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self._seen: Counter[int] = Counter()

    def counts(self) -> Counter[int]:
        while not self.socket.closed:
            try:
                event, *_ = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._seen[_EVENT.unpack(event)[0]] += 1
        return self._seen

    def close(self) -> None:
        self.counts()
        self._watched.disable_monitor()
        self.socket.close()


@dataclass(slots=True)
class _Peer:
    """What the writer knows of one reader."""

    rank: int
    pid: int
    sent: int = 0  # messages
    acknowledged: int = 0
    sizes: deque[int] = field(default_factory=deque)  # bytes of the messages sent and not acknowledged
    bytes: int = 0
    left: bool = False


class ZmqWriter:
    """The sending end. Not thread-safe: its owner holds a lock."""

    def __init__(self, ranks: Sequence[int], bound: int, ip: str) -> None:
        """Bind to `ip`, port 0. `bound`: unread bytes per reader; a larger message goes through alone.

        Raises:
            StartError: the address cannot be bound here.
        """
        self._ranks = frozenset(ranks)
        self._absent = set(ranks)
        self._bound = bound
        self._token = secrets.token_bytes(16)
        self._peers: dict[bytes, _Peer] = {}
        self._dropped: set[int] = set()
        self._refused = 0  # messages from peers that hold no valid token
        public, secret = zmq.curve_keypair()
        self._socket = _socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
        if ":" in ip:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._monitor = _Monitor(self._socket, _HANDSHAKES)
        try:
            self._socket.bind(f"tcp://{_host(ip)}:0")
        except zmq.ZMQError as exc:
            self._monitor.close()
            self._socket.close(0)
            raise StartError(f"cannot bind a queue's socket to {ip}: {exc}. Is it this node's address?") from exc
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = ZmqAddress(endpoint, public, self._token)

    @property
    def refused(self) -> int:
        """Handshakes that failed, and messages without a valid token.

        One handshake under way may count for a moment: zmq does not say which of the connections has succeeded.
        """
        seen = self._monitor.counts()
        unproven = seen[zmq.EVENT_ACCEPTED] - seen[zmq.EVENT_HANDSHAKE_SUCCEEDED]
        return self._refused + min(unproven, seen[zmq.EVENT_DISCONNECTED])

    def missing(self) -> list[int]:
        """Ranks that have not said hello yet."""
        self._hear()
        return sorted(self._absent - self._dropped)

    def late(self) -> list[tuple[int, int]]:
        """(rank, bytes behind) of the readers that have unread messages."""
        return [(p.rank, p.bytes) for p in self._live() if p.sent != p.acknowledged]

    def room(self, nbytes: int) -> bool:
        """Whether every reader has said hello and may be sent a message of `nbytes` now.

        Raises:
            PeerLostError: a reader closed its end. Nothing was sent.
        """
        self._hear()
        self._require([peer for peer in self._live() if peer.left])
        return self._absent <= self._dropped and all(
            peer.sent == peer.acknowledged
            or (peer.sent - peer.acknowledged < WINDOW and peer.bytes + nbytes <= self._bound)
            for peer in self._live()
        )

    def poll(self, seconds: float) -> bool:
        """Wait until some reader says something, at most `seconds`."""
        return bool(self._socket.poll(int(seconds * 1000) + 1))

    def probe(self) -> None:
        """Look for readers whose connection is gone, while one waits for them.

        Raises:
            PeerLostError: naming them.
        """
        self._monitor.counts()
        self._require([p for i, p in self._peers.items() if p.rank not in self._dropped and not self._send([i, PROBE])])

    def send(self, frames: Sequence[Buffer], nbytes: int) -> None:
        """Send to every reader.

        Raises:
            PeerLostError: a reader's connection is gone, or it closed. The others got the message.
        """
        lost = []
        for identity, peer in self._peers.items():
            if peer.rank in self._dropped:
                continue
            head = [identity, MESSAGE, _SEQUENCE.pack(peer.sent)]
            if peer.left or not self._send([*head, *frames]):
                lost.append(peer)
                continue
            peer.sent += 1
            peer.sizes.append(nbytes)
            peer.bytes += nbytes
        self._require(lost)

    @staticmethod
    def _require(lost: list[_Peer]) -> None:
        if lost:
            who = ", ".join(f"rank {p.rank} (pid {p.pid})" for p in lost)
            raise PeerLostError(
                f"the queue's connection to {who} is gone; close the queue or make a new one", [p.rank for p in lost]
            )

    def ready(self) -> None:
        for identity in self._peers:
            self._send([identity, READY])

    def drop(self, rank: int) -> None:
        """Never wait for `rank` again. The owner knows that its process is gone."""
        self._dropped.add(rank)

    def close(self) -> None:
        """Tell the readers. Idempotent."""
        if self._socket.closed:
            return
        for identity in self._peers:
            self._send([identity, CLOSED])
        self._monitor.close()
        self._socket.close()

    def _live(self) -> list[_Peer]:
        return [p for p in self._peers.values() if p.rank not in self._dropped]

    def _send(self, parts: Sequence[Buffer]) -> bool:
        # copy=True: the caller may change its buffers as soon as enqueue returns.
        try:
            self._socket.send_multipart(parts)
        except zmq.ZMQError:  # EHOSTUNREACH: the connection is gone
            return False
        return True

    def _hear(self) -> None:
        while True:
            try:
                identity, kind, *rest = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                self._refused += 1
                continue
            peer = self._peers.get(identity)
            if peer is None:
                self._welcome(identity, kind, rest)
            elif kind == ACK:
                self._acknowledge(peer, _SEQUENCE.unpack(rest[0])[0])
            elif kind == BYE:
                peer.left = True

    def _welcome(self, identity: bytes, kind: bytes, rest: list[bytes]) -> None:
        with contextlib.suppress(IndexError, struct.error):
            token, rank, pid = _HELLO.unpack(rest[0])
            if kind == HELLO and secrets.compare_digest(token, self._token) and rank in self._ranks:
                self._peers[identity] = _Peer(rank, pid)
                self._absent.discard(rank)
                return
        self._refused += 1

    @staticmethod
    def _acknowledge(peer: _Peer, sequence: int) -> None:
        while peer.acknowledged <= sequence and peer.sizes:
            peer.acknowledged += 1
            peer.bytes -= peer.sizes.popleft()


class ZmqReader:
    """The receiving end of `rank`. Not thread-safe: its owner holds a lock."""

    def __init__(self, address: ZmqAddress, rank: int, pid: int) -> None:
        self._endpoint = address.endpoint
        self._socket = _socket(zmq.DEALER)
        if "[" in address.endpoint:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.curve_serverkey = address.server_key
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
        self._monitor = _Monitor(self._socket, _BROKEN)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor.socket, zmq.POLLIN)
        self._socket.connect(address.endpoint)
        self._socket.send_multipart([HELLO, _HELLO.pack(address.token, rank, pid)])
        self._next = 0
        self.ready = False
        self.closed_by_writer = False
        self._frames: list[memoryview] | None = None

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To poll many readers at once."""
        return self._socket

    def poll(self, seconds: float) -> None:
        """Wait until the writer says something or the connection breaks, at most `seconds`."""
        self._poller.poll(int(seconds * 1000) + 1)

    def broken(self) -> bool:
        """Whether the connection could not be made or is gone. What had arrived before can still be read."""
        return any(event & _BROKEN for event in self._monitor.counts())

    def peek(self) -> list[memoryview] | None:
        """Frames of the next message, or None; the same again until `release`.

        Raises:
            PeerLostError: messages are missing, because the connection broke in between.
        """
        while self._frames is None and not self.closed_by_writer:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            self._note(parts)
        return self._frames

    def _note(self, parts: list[zmq.Frame]) -> None:
        kind = parts[0].bytes
        self.ready = self.ready or kind in (READY, MESSAGE)
        self.closed_by_writer = kind == CLOSED
        if kind == MESSAGE:
            (sequence,) = _SEQUENCE.unpack(parts[1].bytes)
            if sequence != self._next:
                raise PeerLostError(
                    f"message {self._next} from {self._endpoint} was lost (got {sequence}): the connection broke"
                )
            self._frames = [memoryview(part.buffer) for part in parts[2:]]

    def release(self) -> None:
        self._frames = None
        self._tell(ACK, _SEQUENCE.pack(self._next))
        self._next += 1

    def close(self) -> None:
        """Tell the writer that this reader left. Idempotent."""
        if not self._socket.closed:
            self._tell(BYE)
            self._monitor.close()
            self._socket.close()

    def _tell(self, *parts: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # the connection is gone for good, and nobody left to be told
            self._socket.send_multipart(parts, zmq.NOBLOCK)
