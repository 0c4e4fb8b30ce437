"""The driver actor's ends of the ways to its clients: shared memory where both are on one node, else Ray calls.

Runs in the driver actor. Whoever leads (see dispatcher.py) polls, sends and drops, and never waits here. What a client
does not read is kept, up to a bound; a client beyond it is `gone`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ray_shm import death_watch
from ray_shm.actors.admission import Application
from ray_shm.actors.call import Call
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError, StartError
from ray_shm.handle import Handle
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import CLOSED, Buffer, RingReader
from ray_shm.segment import start_time

MOST_UNREAD = 256 << 20  # bytes of replies kept for a client that does not read
LEASE = 30.0  # seconds without a sign of life until a client that is reached through Ray counts as gone
TAKE_WAIT = 5.0  # seconds that one of its calls for replies waits here
ACKNOWLEDGE_EVERY = 8 << 20  # bytes of its requests
_CHUNK_BYTES, _CHUNKS = 24 << 20, 10
_RING = 256 << 10
_SEARCH_EVERY = 1.0  # seconds
_NEVER, _AT_ONCE = Deadline.after(None), Deadline.after(0)


class Inbox(Protocol):
    """Requests as they came; see QueueReader."""

    def poll(self) -> list[memoryview] | None: ...

    def release(self) -> None: ...


class ClientLine:
    """One client. calls: those under way, by id. gone: why it is to be dropped, "" if it is not."""

    requests: Inbox
    control: Inbox

    def __init__(self, number: int, name: str, ringer: int, ring_driver: Callable[[], None]) -> None:
        self._ring_driver = ring_driver
        self.number = number
        self.name = name
        self.ringer = ringer
        self.calls: dict[int, Call] = {}
        self.gone = ""

    @property
    def replies(self) -> Handle | None:
        """What the client reads, if that is a queue."""
        return None

    def quiet(self) -> bool:
        """Nothing came, and it is not gone."""
        raise NotImplementedError

    def look_again_in(self, seconds: float) -> None:
        """Have the leader look at what is due then."""
        timer = threading.Timer(seconds, self._ring_driver)
        timer.daemon = True
        timer.start()

    def send(self, frames: Sequence[Buffer]) -> None:
        """Pass a message on; the frames are valid only now. Raises StartError: no memory; nothing was sent."""
        raise NotImplementedError

    def close(self, grace: float = 0.0) -> None:
        """Let go; what has not been read gets `grace` seconds. Idempotent."""
        raise NotImplementedError


class ShmLine(ClientLine):
    """Through shared memory.

    Args:
        ring_driver: has the leader look. Raises AttachError: the client's memory cannot be reached from here.
    """

    def __init__(
        self,
        number: int,
        ringer: int,
        application: Application,
        requests: Handle,
        control: Handle,
        ring_driver: Callable[[], None],
    ) -> None:
        super().__init__(number, f"pid {application.pid} on {application.node}", ringer, ring_driver)
        self._lock = threading.Lock()
        self._unread: deque[list[bytes]] = deque()
        self._unread_bytes = 0
        self._flusher: threading.Thread | None = None
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as made:
            self.requests = made.enter_context(contextlib.closing(QueueReader(requests, 0)))
            self.control = made.enter_context(contextlib.closing(QueueReader(control, 0)))
            # It wakes nobody: the client sleeps on the bell of its request queue, which is rung after each message.
            self._writer = made.enter_context(
                contextlib.closing(
                    QueueWriter(
                        [0], [], _CHUNK_BYTES, _CHUNKS, None, watch_readers=False, wakes=False, ring_bytes=_RING
                    )
                )
            )
            self._open = made.pop_all()
        if self.requests.shm is None or self.control.shm is None:
            raise QueueClosedError("a client's queue was closed while it joined")
        request_ring = self.requests.shm.ring
        self._request_ring: RingReader | None = request_ring
        self._news = (request_ring.news, self.control.shm.ring.news)
        self._ring_client: Callable[[], object] = request_ring.bell.ring
        self._client = application
        self._next_search = 0.0
        self._end_watch = death_watch.watch(application.pid, application.started, self._on_death)

    @property
    def replies(self) -> Handle | None:
        return self._writer.handle

    def quiet(self) -> bool:
        if self._end_watch is None:
            self._search()
        if self._news[0]() or self._news[1]():
            requests = self._request_ring
            if requests is None or (requests.phase == CLOSED and not requests.readable()):
                self.gone = self.gone or "it left"
            return False
        return not self.gone

    def send(self, frames: Sequence[Buffer]) -> None:
        if self._flusher is None or not self._keep(frames):
            try:
                self._writer.send(frames, _AT_ONCE)
            except TimeoutError:  # it does not read just now
                self._start_flusher(frames)
            except (QueueClosedError, PeerLostError):
                return
        self._ring_client()

    def close(self, grace: float = 0.0) -> None:
        if self._end_watch is not None:
            self._end_watch()
        flusher = self._flusher
        if flusher is not None and grace:
            flusher.join(grace)
        self._open.close()
        self._ring_client()
        # What keeps the client's memory mapped.
        self._request_ring, self._news, self._ring_client = None, (_yes, _yes), _yes

    def _on_death(self) -> None:
        self.gone = self.gone or "its process ended"
        self._ring_driver()

    def _search(self) -> None:
        """Find out that the client's process is gone where no pidfd tells."""
        now = time.monotonic()
        if now >= self._next_search and not self.gone:
            self._next_search = now + _SEARCH_EVERY
            if start_time(self._client.pid) != self._client.started:
                self.gone = "its process ended"

    def _keep(self, frames: Sequence[Buffer]) -> bool:
        """Put a message behind those that wait; False: none waits any more."""
        with self._lock:
            if self._flusher is None:
                return False
            self._add(frames)
            return True

    def _start_flusher(self, frames: Sequence[Buffer]) -> None:
        with self._lock:
            self._add(frames)
            self._flusher = threading.Thread(target=self._flush, name=f"ray_shm-client-{self.number}", daemon=True)
            self._flusher.start()

    def _add(self, frames: Sequence[Buffer]) -> None:
        self._unread.append([bytes(frame) for frame in frames])
        self._unread_bytes += sum(map(len, frames))
        if self._unread_bytes > MOST_UNREAD and not self.gone:
            self.gone = f"it has not read {self._unread_bytes:,} bytes of replies"
            self._ring_driver()

    def _flush(self) -> None:
        """Send what waits, as the client reads."""
        with contextlib.suppress(QueueClosedError, PeerLostError):
            while True:
                with self._lock:
                    if not self._unread:
                        self._flusher = None
                        return
                    frames = self._unread[0]
                try:
                    self._writer.send(frames, _NEVER)
                except StartError as exc:
                    self.gone = f"no memory for a reply to it: {exc}"
                    self._ring_driver()
                    return
                with self._lock:
                    self._unread.popleft()
                    self._unread_bytes -= sum(map(len, frames))
                self._ring_client()


def _yes() -> bool:
    return True


class FrameBox:
    """An Inbox of frames that Ray brought."""

    def __init__(self, released: Callable[[int], None]) -> None:
        self._frames: deque[list[memoryview]] = deque()
        self._released = released
        self.add = self._frames.append

    def poll(self) -> list[memoryview] | None:
        return self._frames[0] if self._frames else None

    def release(self) -> None:
        self._released(sum(map(len, self._frames.popleft())))


class RayLine(ClientLine):
    """Through calls of the driver actor's `forward` and `take`, which come on threads of their own."""

    def __init__(self, number: int, application: Application, ring_driver: Callable[[], None]) -> None:
        super().__init__(number, f"pid {application.pid} on {application.node} (through Ray)", 0, ring_driver)
        self.requests: FrameBox = FrameBox(self._note_taken)
        self.control: FrameBox = FrameBox(self._note_taken)
        self._changed = threading.Condition()
        self._early: dict[int, tuple[bool, list[memoryview]]] = {}  # Ray may deliver calls out of order
        self._next = 0
        self._taken = self._told_taken = 0  # bytes of requests consumed so far
        self._replies: list[list[bytes]] = []
        self._unread_bytes = 0
        self._closed = False
        self._heard = time.monotonic()

    def quiet(self) -> bool:
        if time.monotonic() - self._heard > LEASE:
            self.gone = self.gone or f"nothing was heard of it for {LEASE:.0f} s"
        return not self.gone and self.requests.poll() is None and self.control.poll() is None

    def receive(self, sequence: int, to_control: bool, frames: Sequence[bytes]) -> None:
        """Its message number `sequence`."""
        self._heard = time.monotonic()
        with self._changed:
            self._early[sequence] = to_control, [memoryview(frame) for frame in frames]
            while self._next in self._early:
                for_control, message = self._early.pop(self._next)
                (self.control if for_control else self.requests).add(message)
                self._next += 1
        self._ring_driver()

    def take(self) -> tuple[list[list[bytes]], int] | None:
        """(messages for it, bytes of its requests consumed so far), once there is news; None: the line is closed."""
        self._heard = time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._replies or self._closed or self.gone or self._taken - self._told_taken >= ACKNOWLEDGE_EVERY
                ),
                TAKE_WAIT,
            )
            self._heard = time.monotonic()
            if self.gone or (self._closed and not self._replies):
                return None
            replies, self._replies = self._replies, []
            self._unread_bytes = 0
            self._told_taken = self._taken
            self._changed.notify_all()
        return replies, self._told_taken

    def leave(self, why: str = "it left") -> None:
        """By the client's own wish, or because its process has ended."""
        self.gone = self.gone or why
        with self._changed:
            self._changed.notify_all()
        self._ring_driver()

    def send(self, frames: Sequence[Buffer]) -> None:
        message = [bytes(frame) for frame in frames]
        with self._changed:
            self._replies.append(message)
            self._unread_bytes += sum(map(len, message))
            if self._unread_bytes > MOST_UNREAD and not self.gone:
                self.gone = f"it has not taken {self._unread_bytes:,} bytes of replies"
            self._changed.notify_all()

    def close(self, grace: float = 0.0) -> None:
        with self._changed:
            if grace:
                self._changed.wait_for(lambda: not self._replies, grace)
            self._closed = True
            self._changed.notify_all()

    def _note_taken(self, nbytes: int) -> None:
        with self._changed:
            self._taken += nbytes
            if self._taken - self._told_taken >= ACKNOWLEDGE_EVERY:
                self._changed.notify_all()
