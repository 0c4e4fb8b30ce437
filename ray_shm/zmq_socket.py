"""The ZeroMQ sockets of one end of a queue: how they are set up, awaited, watched, closed, and left alone by a fork.

Runs in every process that has an end of a queue across nodes. Knows nothing of messages (zmq_wire.py).

A peer is gone when its TCP connection is: at once when its process ended, whatever ended it, because its kernel closes
the connection. Where the peer's host fell silent (power or cable pulled) the kernel's keepalive finds out, SILENCE
seconds after the last answer. ZeroMQ's own heartbeats are off: a thread of the process answers those, so a process
that is stopped (SIGSTOP, a debugger) would look dead; the kernel answers keepalive for a stopped process, too.

Keepalive does not run on a connection with bytes on their way, which are retransmitted for a quarter of an hour, or
have no place at a stopped reader. So each reader holds a second connection, its lifeline, that never carries anything
after the greeting, and is lost to the writer when either one is. In the direction from reader to writer there are only
acknowledgements, so a reader needs no more than a limit on retransmission: it notices SILENCE seconds after the last
answer, or after the last word of its own.

What this does not see: a process that runs, or is stopped, and never reads. It is late, for as long as that lasts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket as tcp
import struct
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import zmq

from ray_shm.errors import StartError

Socket: TypeAlias = "zmq.Socket[bytes]"

_IDLE, _INTERVAL, _PROBES = 2, 1, 3  # seconds of silence before the first probe, between probes, and how many
SILENCE = _IDLE + _INTERVAL * _PROBES  # seconds
LINGER = 2.0  # seconds that a closed end leaves readers to take what was sent
_NEVER_MS = 3_600_000  # before a connection is made again; with -1, zmq drops what has arrived when one breaks
_MOST_SOCKETS = 16_384  # per process; zmq's default of 1,023 is 200 readers
_EVENT = struct.Struct("=HI")

ACCEPTED_AND_LOST = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
BROKEN = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_context: zmq.Context[Socket] | None = None
_context_lock = threading.Lock()


def open_socket(kind: int, ipv6: bool) -> Socket:
    """A socket that neither drops nor blocks, and whose connection, once broken, is not made again."""
    global _context
    with _context_lock:
        if _context is None:
            _context = zmq.Context()
            _context.set(zmq.MAX_SOCKETS, _MOST_SOCKETS)
        made = _context.socket(kind)
    options = {
        zmq.SNDHWM: 0,  # our own window bounds what is under way; zmq's would drop or block
        zmq.RCVHWM: 0,
        zmq.LINGER: int(LINGER * 1000),
        zmq.RECONNECT_IVL: _NEVER_MS,
        zmq.CONNECT_TIMEOUT: SILENCE * 1000,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: _IDLE,
        zmq.TCP_KEEPALIVE_INTVL: _INTERVAL,
        zmq.TCP_KEEPALIVE_CNT: _PROBES,
        zmq.IPV6: int(ipv6),
    }
    for option, value in options.items():
        made.setsockopt(option, value)
    return made


def receive(socket: Socket, parts: list[zmq.Frame]) -> None:
    """Complete `parts`, the next message, without waiting.

    What a signal's handler breaks off the next call goes on with: each part is taken and kept in one C call. Only in
    pyzmq itself, just after it has taken one, a handler may still lose it.

    Raises:
        zmq.Again: nothing has come.
    """
    take: Any = socket.recv  # its overloads say more than map can match
    while not parts or parts[-1].more:
        parts.extend(map(take, (zmq.NOBLOCK,), (False,)))


def readable(looked_at: Socket) -> bool:
    """Whether there is something to receive; a third of the price of an exception that says no."""
    return bool(int(looked_at.get(zmq.EVENTS)) & zmq.POLLIN)


def node_address(ip: str) -> str:
    """`ip`, or what a host name stands for, as an address that other nodes can be told.

    Raises:
        ValueError: a wildcard. StartError: a name that cannot be resolved.
    """
    bare = ip.strip("[]")
    try:
        address = bare if bare in ("", "*") else tcp.getaddrinfo(bare, None, type=tcp.SOCK_STREAM)[0][4][0]
    except OSError as exc:
        raise StartError(f"cannot resolve {ip!r}, the address to bind a queue's socket to: {exc}") from exc
    if address in ("", "*") or _is_wildcard(str(address)):
        raise ValueError(
            f"connect_ip={ip!r} is a wildcard, but the handle has to carry an address at which other nodes reach this "
            "one: pass this node's address"
        )
    return str(address)


def _is_wildcard(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_unspecified


def bind(bound: Socket, ip: str, port_range: tuple[int, int] | None) -> str:
    """Bind to `ip`, at port 0 or the first free port of `port_range` (inclusive). Returns the endpoint.

    Raises:
        ValueError: not a range of ports. StartError: every port is taken, or the address is not this node's.
    """
    host = f"[{ip}]" if ":" in ip else ip
    low, high = port_range or (0, 0)
    if port_range is not None and not 1 <= low <= high <= 65535:
        raise ValueError(f"port_range={port_range} must be (first, last), both from 1 to 65535")
    for port in range(low, high + 1):
        try:
            bound.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EADDRINUSE and port_range is not None:
                continue
            raise StartError(
                f"cannot bind a queue's socket to {ip} (port {port}): {exc}. Is it this node's address?"
            ) from exc
        return bound.getsockopt_string(zmq.LAST_ENDPOINT)
    raise StartError(
        f"cannot bind a queue's socket to {ip}: all ports of port_range {low}-{high} are taken. Free one, or pass a "
        "wider range."
    )


class Monitor:
    """What happens to the TCP connections of one socket."""

    def __init__(self, watched: Socket, events: int) -> None:
        endpoint = f"inproc://ray_shm-monitor-{secrets.token_hex(8)}"
        watched.monitor(endpoint, events)
        self._watched = watched
        self._parts: list[zmq.Frame] = []  # of an event that is not dealt with yet
        self.socket = watched.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # else zmq's I/O thread, which all queues share, blocks on a full pipe
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def events(self) -> Iterator[tuple[int, int]]:
        """(kind, descriptor of the connection) of what has happened since the last call.

        One whose user is interrupted comes again.
        """
        while not self.socket.closed and (self._parts or readable(self.socket)):
            parts = self._parts
            try:
                receive(self.socket, parts)
            except zmq.Again:
                return
            if len(parts[0]) == _EVENT.size:  # else a part was lost, see `receive`
                yield _EVENT.unpack(parts[0].bytes)
            if self._parts is parts:
                self._parts = []

    def close(self) -> None:
        for _ in self.events():
            pass
        if not self._watched.closed:
            self._watched.disable_monitor()
        self.socket.close()


class Endpoint:
    """The sockets of one end: `main`, which is read and monitored, and others that are only kept."""

    def __init__(self, main: Socket, events: int, others: Sequence[Socket] = ()) -> None:
        self.main = main
        self.monitor = Monitor(main, events)
        self.address = ""  # tcp://host:port that it is bound or connected to, once it is
        self.closed = False
        self._others = list(others)
        self._pid = os.getpid()
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._alarm_lock = threading.Lock()  # so that nobody rings a descriptor that was closed and given out again
        self._poller = zmq.Poller()
        for polled in (main, self.monitor.socket, self._alarm):
            self._poller.register(polled, zmq.POLLIN)
        _open_endpoints.add(self)

    @property
    def inherited(self) -> bool:
        """Whether this process was forked from the one that made it."""
        return os.getpid() != self._pid

    def poll(self, seconds: float) -> bool:
        """Until the other end says something (True), a connection comes or goes, or `wake`; at most `seconds`."""
        ready = dict(self._poller.poll(int(seconds * 1000) + 1))
        if self._alarm in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._alarm)
        return self.main in ready

    def wake(self) -> None:
        """End a `poll`, now or the next one. From any thread, unlike everything else here."""
        with self._alarm_lock:
            if not self.closed:
                os.eventfd_write(self._alarm, 1)

    def close(self, linger: float = LINGER) -> None:
        """What was sent may still go out for `linger` seconds, in the background. Idempotent.

        Does nothing in a forked child, which has to `abandon`.
        """
        if self.inherited:
            return
        self._end(self._alarm_lock)
        self.monitor.close()
        for one in (self.main, *self._others):
            one.close(int(linger * 1000))
        _open_endpoints.discard(self)

    def abandon(self) -> None:
        """In a forked child: forget the sockets, which are the parent's, who does not notice. Sends and awaits nothing.

        Happens in every forked child by itself, and does nothing in the process that made the sockets. Idempotent.
        """
        if self.inherited:
            self._end(contextlib.nullcontext())  # the parent's lock may be held for ever
            for one in (self.main, self.monitor.socket, *self._others):
                one.close()  # pyzmq remembers the process too, and calls nothing of zmq's in another one

    def _end(self, lock: contextlib.AbstractContextManager[object]) -> None:
        with lock:
            self.closed = True
            alarm, self._alarm = self._alarm, -1
            if alarm >= 0:  # no signal's handler comes in between
                os.close(alarm)

    def __del__(self) -> None:
        if getattr(self, "_alarm", -1) >= 0 and not sys.is_finalizing():
            os.close(self._alarm)


_open_endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _close_inherited(endpoints: Sequence[str]) -> None:
    """Close this process's descriptors of TCP sockets that are bound or connected to one of `endpoints`."""
    wanted = {endpoint.removeprefix("tcp://") for endpoint in endpoints}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            inherited = tcp.socket(fileno=fd)
        except OSError:  # not a socket, or the descriptor that listed the folder
            continue
        if wanted.isdisjoint(_addresses(inherited)):
            inherited.detach()
        else:
            inherited.close()


def _addresses(sock: tcp.socket) -> Iterator[str]:
    if sock.family in (tcp.AF_INET, tcp.AF_INET6):
        for name in (sock.getsockname, sock.getpeername):
            with contextlib.suppress(OSError):  # not connected
                host, port = name()[:2]
                yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _after_fork_in_child() -> None:
    global _context, _context_lock
    _context_lock = threading.Lock()  # another thread may have held it
    inherited, _context = _context, None
    if inherited is None:
        return
    ends = list(_open_endpoints)
    _open_endpoints.clear()
    # As long as a child holds a connection open, the other end cannot see that the parent is gone.
    _close_inherited([end.address for end in ends])
    for end in ends:
        end.abandon()
    inherited.term()  # as above: only marks it


os.register_at_fork(after_in_child=_after_fork_in_child)
