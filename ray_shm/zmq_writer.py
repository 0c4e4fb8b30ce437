"""The writer of a queue across nodes: sends messages (lists of byte frames) to remote readers over one ROUTER socket.

Runs in the process that made the queue. ROUTER/DEALER and not PUB/SUB, which drops silently at its high-water mark.
The socket is bound once, to its node's address, and never again. CURVE encrypts: the writer's key travels inside the
handle only, so a stranger who does not hold it gets no further than the handshake, and a reader talks to nobody else.
What readers send is of fixed layout and is never unpickled. No waiting policy here: its owner waits.

A reader that reads nothing costs bounded memory (zmq_credit.py); what has not left this process yet is held here as
one copy for all readers. zmq_socket.py says when a peer counts as gone, which is looked for before anything is sent.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from ray_shm import zmq_socket, zmq_wire
from ray_shm.errors import PeerLostError, StartError
from ray_shm.handle import ZmqAddress
from ray_shm.locks import acquired
from ray_shm.ring import Buffer
from ray_shm.zmq_credit import Credit, Terms
from ray_shm.zmq_socket import LINGER, Endpoint, Socket
from ray_shm.zmq_wire import Head, Hello

_SHARED = 1024  # bytes: from here on one copy for all readers is cheaper than one for each
_LONGEST_WORD = 4096  # bytes that a reader may send at once; its longest word is a hello


@dataclass(slots=True, eq=False)
class _Peer:
    """What the writer knows of one reader."""

    rank: int
    pid: int
    host: str
    nonce: bytes
    credit: Credit
    identity: bytes  # zmq's name of the connection that messages go to, once `has_hello`
    has_hello: bool = False
    has_lifeline: bool = False
    left: bool = False  # it said goodbye
    lost: bool = False  # a connection of its is gone
    replaced: bool = False  # its rank was readmitted; kept for as long as a connection of its is open

    @property
    def complete(self) -> bool:
        return self.has_hello and self.has_lifeline

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) at {self.host}"


class ZmqWriter:
    """The sending end. Not thread-safe: its owner holds a lock, except for `missing`, `late`, `pid`, `refused`, `drop`
    and `wake`.

    In a forked child it is abandoned at once, by itself; only `close`, which does nothing then, may be called there.

    Attributes:
        address: for the handle.
    """

    def __init__(self, ranks: Sequence[int], bound: int, ip: str, port_range: tuple[int, int] | None = None) -> None:
        """Bind to `ip`, at port 0 or the first free port of `port_range`.

        Args:
            ranks: of the readers to come. bound: unread bytes per reader; a larger message goes through alone.
            ip: this node's address, or a name for it. port_range: first and last port to try.

        Raises:
            ValueError: `ip` is a wildcard, or `port_range` is none.
            StartError: the address is not this node's, or every port is taken. Nothing remains.
        """
        ip = zmq_socket.node_address(ip)
        self._ranks = frozenset(ranks)
        self._absent = set(ranks)  # have not attached
        self._terms = Terms(bound)
        self._sent = 0  # messages
        self._token = secrets.token_bytes(16)
        self._claims: dict[int, _Peer] = {}  # rank -> who said hello first
        self._peers: dict[bytes, _Peer] = {}  # by identity; those whom messages go to
        self._connections: dict[int, _Peer | None] = {}  # by descriptor; None: has not said a valid hello
        self._strangers: set[int] = set()  # descriptors of open connections that are counted as refused
        self._dropped: set[int] = set()
        self._replaced: dict[int, bytes] = {}  # readmitted rank -> nonce of the reader that had it last
        self._told_ready = False
        self._refused = 0
        self._using = threading.RLock()  # the socket; held while it is polled
        self._word: list[zmq.Frame] = []  # received, and not yet listened to
        self._torn = False  # a message was sent to some readers and not to others
        public, secret = zmq.curve_keypair()
        router = zmq_socket.open_socket(zmq.ROUTER, ":" in ip)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.MAXMSGSIZE, _LONGEST_WORD)
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = public, secret
        self._end = Endpoint(router, zmq_socket.ACCEPTED_AND_LOST)
        try:
            self._end.address = zmq_socket.bind(router, ip, port_range)
        except (ValueError, StartError):
            self._end.close(0)
            raise
        self.address = ZmqAddress(self._end.address, public, self._token)

    @property
    def _socket(self) -> Socket:
        return self._end.main

    @property
    def refused(self) -> int:
        """Connections that said something other than a valid hello, or ended before one was heard."""
        self._glance()
        return self._refused

    def missing(self) -> list[int]:
        """Ranks that have not attached yet."""
        self._glance()
        return sorted(self._absent - self._dropped)

    def late(self) -> list[tuple[int, int]]:
        """(rank, bytes behind) of the readers that have unread messages."""
        return [(p.rank, p.credit.bytes) for p in self._live() if p.credit.late]

    def pid(self, rank: int) -> int:
        """Process id, on its own node, of the reader that attached as `rank`; 0 where none has."""
        return next((p.pid for p in list(self._peers.values()) if p.rank == rank and not p.replaced), 0)

    @property
    def dropped(self) -> set[int]:
        return self._dropped

    def room(self, nbytes: int) -> bool:
        """Whether every reader has attached and may be sent a message of `nbytes` now.

        Raises:
            PeerLostError: readers closed their ends or are gone; `ranks` names them. Nothing was sent; `drop` them to
                go on with the others.
        """
        self.probe()
        return self._absent <= self._dropped and all(p.credit.fits(nbytes) for p in self._live())

    def poll(self, seconds: float) -> bool:
        """Wait until some reader says something (True), a connection comes or goes, or `wake`; at most `seconds`."""
        with self._using:
            return self._end.poll(seconds)

    def wake(self) -> None:
        """End a `poll` in another thread."""
        self._end.wake()

    def probe(self) -> None:
        """Look for readers that are gone, also while they are awaited.

        Raises:
            PeerLostError: as `room`.
        """
        with self._using:
            self._hear()
        self._require([p for p in self._live() if p.lost or p.left])

    def send(self, frames: Sequence[Buffer], nbytes: int) -> None:
        """Send to every reader, after `room` said so. The caller may change its buffers as soon as this returns.

        Args:
            frames: flat byte buffers. nbytes: their sum.

        Raises:
            PeerLostError: readers went meanwhile; `ranks` names them. The message is sent: the others get it, once.
        """
        self._require([])
        head = Head.of(self._sent, self._terms.asks(self._sent, nbytes), frames)
        live = self._live()
        parts = [head.pack(), *self._parts(frames, head, len(live))]
        self._torn = True  # until all have it: a signal's exception may come in between
        with self._using:
            self._deliver(parts, live)
            for piece in zmq_wire.pieces(frames, head):
                self._deliver([zmq.Frame(piece, copy=True)], live)
        self._sent += 1
        for peer in live:
            peer.credit.spend(nbytes)
        self._torn = False
        self._require([peer for peer in live if peer.lost], "The message is sent: the other readers get it.")

    def ready(self) -> None:
        """Tell the readers that all have attached."""
        with self._using:
            self._told_ready = True
            self._deliver([zmq_wire.READY], self._live())

    def drop(self, rank: int) -> None:
        """Never wait for `rank` again, nor send to it. Should it still live, it finds the connection broken at last."""
        self._dropped.add(rank)
        self._end.wake()

    def readmit(self, rank: int) -> None:
        """Let a new reader attach as `rank`, which was dropped; it gets what is sent from now on.

        Whatever still comes from the old one, by connections or words on their way, is told by its nonce.

        Raises:
            PeerLostError: an exception came amid a message; nothing can be sent any more.
        """
        self._require([])
        with self._using:
            self._hear()  # words of the old one are refused as long as it is dropped
            old = self._claims.pop(rank, None)
            if old is not None:
                old.replaced = True
                self._replaced[rank] = old.nonce
                self._forget(old)
            self._absent.add(rank)
            self._dropped.discard(rank)

    def close(self, linger: float = LINGER) -> None:
        """Tell the readers, and wait until they have read what was sent, `linger` seconds at most. Idempotent.

        A reader that is still busy then has the messages in its own process, and reads them later, unless they are more
        than the network carries in that time.
        """
        if self._end.inherited:  # another thread of the parent may have held what follows
            return
        with self._using:
            try:
                if not (self._torn or self._end.closed):
                    self._hear()
                    self._deliver([zmq_wire.pack_count(zmq_wire.CLOSED, self._sent)], self._live())
                    self._await_read(time.monotonic() + linger)
            finally:
                self._end.close()

    def abandon(self) -> None:
        """In a forked child, where it happens by itself: forget the sockets without touching the parent's queue."""
        self._end.abandon()

    def _await_read(self, until: float) -> None:
        # Closing a TCP connection with words of the reader's unread makes the kernel throw away what is not yet sent.
        while any(p.credit.late for p in self._live() if not (p.lost or p.left)):
            left = until - time.monotonic()
            if left <= 0:
                return
            self._end.poll(left)
            self._hear()

    def _live(self) -> list[_Peer]:
        return [p for p in list(self._peers.values()) if p.rank not in self._dropped and not p.replaced]

    def _require(self, gone: list[_Peer], outcome: str = "Nothing was sent.") -> None:
        if self._torn:
            raise PeerLostError(
                "an exception, as a signal's, came amid a message to remote readers, and some have only part of it: "
                "close the queue and make a new one",
                sorted(self._ranks - self._dropped),
            )
        if gone:
            left = ", ".join(str(p) for p in gone if p.left)
            lost = ", ".join(str(p) for p in gone if not p.left)
            what = [f"{left} closed its end of the queue"] * bool(left)
            what += [f"the queue's connection to {lost} is gone: its process ended or its host is silent"] * bool(lost)
            raise PeerLostError(
                f"{'; '.join(what)}. {outcome} Close the queue and make a new one, or drop the reader.",
                [p.rank for p in gone],
            )

    @staticmethod
    def _parts(frames: Sequence[Buffer], head: Head, n_readers: int) -> list[Buffer | zmq.Frame]:
        # A zmq.Frame is a copy in zmq's own memory that all sends share; anything else is copied by each send.
        large = {index for index, _ in head.large}
        return [
            b"" if i in large else zmq.Frame(f, copy=True) if n_readers > 1 and len(f) >= _SHARED else f
            for i, f in enumerate(frames)
        ]

    def _deliver(self, parts: Sequence[Buffer | zmq.Frame], peers: Sequence[_Peer]) -> None:
        for peer in peers:
            if not peer.lost:
                try:
                    self._socket.send_multipart([peer.identity, *parts])
                except zmq.ZMQError:  # EHOSTUNREACH: the connection is gone
                    peer.lost = True

    def _glance(self) -> None:
        """Hear, from any thread, unless the owner is at it."""
        taken = False
        try:
            taken = acquired(self._using, False)
            # Not amid a message, in a signal handler: hearing may have to answer.
            if taken and not (self._end.closed or self._torn) and self._hear():
                self._end.wake()  # the owner may be about to wait for what was just heard
        finally:
            if taken:
                self._using.release()

    def _hear(self) -> bool:
        """Take in all that readers have said and what became of connections. Whether there was anything."""
        heard = 0
        while self._word or zmq_socket.readable(self._socket):
            parts = self._word  # a signal's handler that looks at this queue meanwhile may deal with it, too
            try:
                zmq_socket.receive(self._socket, parts)
            except zmq.Again:
                break
            if len(parts) > 1:  # else a part was lost, see zmq_socket.receive
                self._listen(parts[0].bytes, parts[1])
            if self._word is parts:
                self._word = []
            heard += 1
        return self._watch() + heard > 0

    def _listen(self, identity: bytes, part: zmq.Frame) -> None:
        """Heard again from the start where a signal's handler broke it off."""
        peer, word = self._peers.get(identity), part.bytes
        if peer is None or word[:1] in (zmq_wire.HELLO, zmq_wire.LIFELINE):
            self._welcome(identity, part)
        elif word[:1] == zmq_wire.BYE:
            peer.left = True
        elif word[:1] == zmq_wire.ACK:
            with contextlib.suppress(zmq_wire.WireError):
                peer.credit.acknowledge(zmq_wire.unpack_count(word))

    def _watch(self) -> int:
        """Bring the table of connections up to date; how many came or went."""
        count = 0
        for event, descriptor in self._end.monitor.events():
            count += 1
            if event == zmq.EVENT_ACCEPTED:
                self._connections.setdefault(descriptor, None)
            elif descriptor in self._connections:
                peer = self._connections[descriptor]
                if peer is not None:
                    peer.lost = True  # first: after an exception the event comes again, but not the connection
                self._connections.pop(descriptor, None)
                if peer is not None:
                    self._lose(peer)
                else:
                    self._turn_away(descriptor)
                self._strangers.discard(descriptor)
        return count

    def _lose(self, peer: _Peer) -> None:
        peer.lost = True
        if not peer.complete and self._claims.get(peer.rank) is peer:  # it never attached, so another may
            del self._claims[peer.rank]
            self._peers.pop(peer.identity, None)
        self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        """Nothing more comes from a reader that was replaced, once its connections are gone."""
        if peer.replaced and peer not in self._connections.values():
            self._peers.pop(peer.identity, None)

    def _welcome(self, identity: bytes, word: zmq.Frame) -> None:
        """Hear the first word of a connection; or another one of a lifeline or a stranger."""
        descriptor = int(word.get(zmq.SRCFD))
        self._watch()  # its start was announced before its first word came
        if descriptor not in self._connections:
            return  # it is over, and was counted then
        try:
            hello = Hello.unpack(word.bytes)
        except zmq_wire.WireError:
            self._turn_away(descriptor)
            return
        if not secrets.compare_digest(hello.token, self._token):
            self._turn_away(descriptor)
            return
        peer = self._claims.get(hello.rank)
        why = self._reason_to_refuse(hello, peer)
        if why:
            self._turn_away(descriptor)
            self._deliver([zmq_wire.REFUSED + why.encode()], [self._peer(hello, identity, word)])
            return
        if peer is None:
            peer = self._claims[hello.rank] = self._peer(hello, identity, word)
        if hello.kind == zmq_wire.LIFELINE:
            peer.has_lifeline = True
        else:
            peer.identity, peer.has_hello = identity, True
            self._peers[identity] = peer
        self._connections[descriptor] = peer  # which shares its fate
        if peer.complete and peer.rank in self._absent:
            self._deliver([zmq_wire.pack_count(zmq_wire.START, self._sent)], [peer])
            if self._told_ready:
                self._deliver([zmq_wire.READY], [peer])
            self._absent.discard(peer.rank)  # last, as nothing is sent before

    def _reason_to_refuse(self, hello: Hello, holder: _Peer | None) -> str:
        if hello.rank not in self._ranks:
            return f"it has no remote reader {hello.rank}"
        if hello.rank in self._dropped:
            return f"it has given up rank {hello.rank}"
        if self._replaced.get(hello.rank) == hello.nonce:
            return f"another reader is to replace it as rank {hello.rank}"
        if holder is not None and holder.nonce != hello.nonce:
            return f"{holder} reads it as that rank already"
        return ""

    def _peer(self, hello: Hello, identity: bytes, word: zmq.Frame) -> _Peer:
        host = str(word.get("Peer-Address"))
        credit = Credit(self._terms, self._sent, self._sent)
        return _Peer(hello.rank, hello.pid, host, hello.nonce, credit, identity)

    def _turn_away(self, descriptor: int) -> None:
        """Count a stranger's connection, once."""
        if descriptor not in self._strangers:
            self._strangers.add(descriptor)
            self._refused += 1
