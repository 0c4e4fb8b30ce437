"""A client's ends of the way to its driver actor: shared memory where both are on one node, else Ray calls.

Runs in the client's process. Both kinds have what a Dispatcher needs: two outboxes, and where replies come from. Once
the way has ended (`fail`), sending raises.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.client import ray as client_ray

from ray_shm.actors.admission import Application, Welcome
from ray_shm.actors.group_start import CHUNK_BYTES, CHUNKS, CONTROL_BYTES
from ray_shm.actors.lifeline import Address, Lifeline
from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, QueueClosedError, StartError
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import CLOSED, Bell, Buffer, bell_in
from ray_shm.segment import AttachError, Segment, start_time

logger = logging.getLogger("ray_shm")

JOIN_TIMEOUT = 90.0  # seconds; longer than the driver actor waits for a group that is being started
DRIVER = -1  # in place of a rank, for the one queue of replies
_RING = 256 << 10
_MOST_UNTAKEN = 64 << 20  # bytes under way through Ray
_LOOK = 0.05  # seconds between looks for replies while that bound is reached
_LEAVE_WAIT = 5.0
_NEVER = Deadline.after(None)


class DriverLine:
    """One way to a driver actor. welcome: what the actor said."""

    requests: Outbox
    control: Outbox
    welcome: Welcome

    def __init__(self) -> None:
        self.ended: Exception | None = None

    def fail(self, error: Exception) -> None:
        """From now on sending raises `error`; the first one counts."""
        self.ended = self.ended or error

    @property
    def replies(self) -> Mapping[int, QueueReader]:
        return {}

    def close(self) -> None:
        """Leave, and free everything; the dispatcher is closed. Idempotent."""
        raise NotImplementedError


class Outbox:
    """Common to both kinds; see dispatcher.Outbox. A death is the driver actor's business: nobody is dropped here."""

    bell: Bell | None = None

    def __init__(self, line: DriverLine, to_control: bool) -> None:
        self._line = line
        self._to_control = to_control

    def send(
        self, frames: Sequence[Buffer], deadline: Deadline = _NEVER, on_wait: Callable[[], object] | None = None
    ) -> None:
        """Raises TimeoutError, and what ended the line."""

        def look() -> None:
            self._require_line()
            if on_wait is not None:
                on_wait()

        self._require_line()
        self._put(frames, deadline, look)

    def drop(self, rank: int) -> None:
        pass

    def _put(self, frames: Sequence[Buffer], deadline: Deadline, on_wait: Callable[[], object]) -> None:
        raise NotImplementedError

    def _require_line(self) -> None:
        if self._line.ended is not None:
            if self._to_control:
                raise QueueClosedError("the driver actor is gone")
            raise copy.copy(self._line.ended)


# -- through shared memory ---------------------------------------------------------------------------------------------


class _ShmOutbox(Outbox):
    def __init__(self, line: DriverLine, to_control: bool, chunk_bytes: int, chunks: int, ring_bytes: int) -> None:
        super().__init__(line, to_control)
        # It wakes nobody: the driver actor sleeps on its own bell, which is rung after each message.
        self.writer = QueueWriter(
            [0], [], chunk_bytes, chunks, None, watch_readers=False, wakes=False, ring_bytes=ring_bytes
        )
        self.bell = self.writer.bell
        self.ring_driver: Callable[[], None] = lambda: None

    def _put(self, frames: Sequence[Buffer], deadline: Deadline, on_wait: Callable[[], object]) -> None:
        self.writer.send(frames, deadline, on_wait)
        self.ring_driver()


class ShmDriverLine(DriverLine):
    """Through shared memory. Raises AttachError, with `welcome.number` to leave, where one end cannot be reached."""

    def __init__(self, actor: Any) -> None:
        super().__init__()
        with contextlib.ExitStack() as made:
            self.requests = requests = _ShmOutbox(self, False, CHUNK_BYTES, CHUNKS, _RING)
            made.callback(requests.writer.close)
            self.control = control = _ShmOutbox(self, True, CONTROL_BYTES, 1, CONTROL_BYTES)
            made.callback(control.writer.close)
            self.welcome = welcome = ask_to_join(actor, requests.writer, control.writer)
            if welcome.replies is None or welcome.bell is None:
                raise _Refused(welcome)
            try:
                self._reader = made.enter_context(contextlib.closing(QueueReader(welcome.replies, 0)))
                segment = made.enter_context(contextlib.closing(Segment.attach(welcome.bell)))
            except AttachError as exc:
                raise _OneWay(welcome) from exc
            bell = bell_in(segment, welcome.ringer)
            requests.ring_driver = control.ring_driver = self._ring_driver = bell.ring
            self._open = made.pop_all()

    @property
    def replies(self) -> Mapping[int, QueueReader]:
        return {DRIVER: self._reader}

    def is_cut(self) -> bool:
        """The driver actor has closed its end, and everything is read."""
        shm = self._reader.shm
        return shm is not None and shm.ring.phase == CLOSED and not shm.ring.readable()

    def close(self) -> None:
        ring, self._ring_driver = self._ring_driver, lambda: None
        self._open.close()
        ring()  # the actor sees that the queues are closed
        for outbox in (self.requests, self.control):  # with them goes the mapping of its bell
            if isinstance(outbox, _ShmOutbox):
                outbox.ring_driver, outbox.bell = self._ring_driver, None


class _Refused(Exception):
    """The actor cannot reach this process's memory; args[0]: its welcome, through Ray."""


class _OneWay(Exception):
    """This process cannot reach the actor's memory; args[0]: a welcome that is of no use."""


# -- through Ray -------------------------------------------------------------------------------------------------------


class _RayOutbox(Outbox):
    def __init__(self, line: RayDriverLine, to_control: bool) -> None:
        super().__init__(line, to_control)
        self._way = line

    def _put(self, frames: Sequence[Buffer], deadline: Deadline, on_wait: Callable[[], object]) -> None:
        self._way.send(self._to_control, frames, deadline, on_wait)


class RayDriverLine(DriverLine):
    """Through calls of the driver actor. Also the Source of its replies, fed by one thread.

    Attributes:
        ring: what to call when there are some. lost: what to call when there will be none any more, with the reason.
    """

    def __init__(self, actor: Any, welcome: Welcome, owns: bool) -> None:
        super().__init__()
        self.welcome = welcome
        self._where: tuple[Address, bytes] | None = ask(actor.lifeline, welcome.number, owns, timeout=JOIN_TIMEOUT)
        self._lifeline: Lifeline | None = None
        self.requests = _RayOutbox(self, False)
        self.control = _RayOutbox(self, True)
        self.ring: Callable[[], None] = lambda: None
        self.lost: Callable[[str], None] = lambda why: None
        self._actor = actor
        self._sending = threading.Lock()
        self._taken_more = threading.Condition()
        self._sequence = 0
        self._sent = self._taken = 0  # bytes of requests; taken: by the driver actor
        self._inbox: deque[list[memoryview]] = deque()
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ray_shm-driver-actor", daemon=True)

    def start(self) -> None:
        """Receive, once `ring` and `lost` are set."""
        self._thread.start()

    def send(
        self, to_control: bool, frames: Sequence[Buffer], deadline: Deadline, on_wait: Callable[[], object]
    ) -> None:
        while self._sent - self._taken >= _MOST_UNTAKEN:
            on_wait()
            if deadline.expired():
                raise TimeoutError(
                    f"{self._sent - self._taken:,} bytes are on their way to the driver actor, which has not taken them"
                )
            with self._taken_more:
                self._taken_more.wait(deadline.slice(_LOOK))
        message = [bytes(frame) for frame in frames]
        with self._sending:
            self._sent += sum(map(len, message))
            self._actor.forward.remote(self.welcome.number, self._sequence, to_control, message)
            self._sequence += 1

    def take(self) -> Iterator[list[memoryview]]:
        while self._inbox:
            yield self._inbox.popleft()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._arrived.put(None)
        if ray.is_initialized():
            with contextlib.suppress(Exception):  # the actor is gone, or Ray on its way down
                self._actor.leave.remote(self.welcome.number)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LEAVE_WAIT)
        if self._lifeline is not None:
            self._lifeline.close()

    def _connect_lifeline(self) -> None:
        if self._where is None:
            return
        try:
            self._lifeline = Lifeline(*self._where)
        except OSError as exc:
            logger.info(
                "the driver actor at %s:%d cannot be reached (%s): if this process is killed, it hears of it "
                "from Ray, half a minute later",
                *self._where[0],
                exc,
            )

    def _run(self) -> None:
        """Ask for replies, again and again. Never blocks inside of Ray, which may be torn down meanwhile."""
        self._connect_lifeline()
        try:
            while not self._closed:
                reference = self._actor.take.remote(self.welcome.number)
                reference.future().add_done_callback(self._arrived.put)
                future = self._arrived.get()
                if future is None:
                    return
                taken = future.result()
                if taken is None:
                    raise GroupClosedError("the driver actor does not know this client any more")
                self._receive(*taken)
        except Exception as exc:
            if not self._closed:
                self.lost(" ".join(str(exc).split())[:300])

    def _receive(self, messages: list[list[bytes]], taken: int) -> None:
        for frames in messages:
            # What arrives is the receiver's own, and writable; see codec.decode.
            self._inbox.append([memoryview(frames[0]), *(memoryview(bytearray(f)) for f in frames[1:])])
        with self._taken_more:
            self._taken = taken
            self._taken_more.notify_all()
        if messages:
            self.ring()


# -- joining -----------------------------------------------------------------------------------------------------------


def join(actor: Any, owns: bool) -> DriverLine:
    """Become a client of `actor`. owns: the group ends with this process.

    Raises:
        GroupClosedError: it is gone, or its group is closed. StartError: no memory, or no answer in time.
    """
    if client_ray.is_connected():
        return RayDriverLine(actor, ask_to_join(actor, None, None), owns)
    try:
        return ShmDriverLine(actor)
    except _Refused as exc:
        return RayDriverLine(actor, exc.args[0], owns)
    except _OneWay as exc:  # it hears us, we do not hear it
        logger.info("the driver actor's memory cannot be reached (%s): replies come through Ray", exc.__cause__)
        return RayDriverLine(actor, ask_to_join(actor, None, None), owns)


def ask_to_join(actor: Any, requests: QueueWriter | None, control: QueueWriter | None) -> Welcome:
    """Raises GroupClosedError, StartError."""
    application = Application(
        os.getpid(),
        start_time(os.getpid()),
        socket.gethostname(),
        requests.handle if requests is not None else None,
        control.handle if control is not None else None,
    )
    welcome: Welcome = ask(actor.join, application, timeout=JOIN_TIMEOUT)
    return welcome


def ask(method: Any, *args: Any, timeout: float | None) -> Any:
    """The value of an `answering` method of the driver actor.

    Raises:
        what the method raised. GroupClosedError: the actor is gone. StartError: no answer within `timeout` seconds.
    """
    try:
        answer = ray.get(method.remote(*args), timeout=timeout)
    except ray.exceptions.GetTimeoutError as exc:
        raise StartError(f"the driver actor did not answer within {timeout} s; is its node reachable?") from exc
    except ray.exceptions.RayActorError as exc:
        raise gone_error(" ".join(str(exc).split())[:300]) from exc
    return answer.get()


def gone_error(why: str) -> GroupClosedError:
    return GroupClosedError(f"the driver actor of the group is gone, and its workers with it: {why}. Launch a new one.")
