"""Passes frames between the clients of a driver actor and the workers, and looks into none of them.

    client -> its request queue -> poll (by the leader) -> the workers' request queue    the same frames,
    client <- its reply queue   <- RelayedCall.take     <- the worker's reply queue      the same call ids

Runs in the driver actor. A client's call ids are its own (admission.CALLS_PER_CLIENT), so nothing is readdressed, and
all that is known of a call is its prefix: who has to reply. What a call means (results, grace, timeouts) is the
client's business. A request for which the workers' queue has no room stays unread, so the client comes to wait, too.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from typing import Any

from ray_shm.actors import admission, wire
from ray_shm.actors.admission import Application, Ranks, Welcome
from ray_shm.actors.call import Call, CallOptions, closed_error
from ray_shm.actors.client_line import ClientLine, Inbox, RayLine, ShmLine
from ray_shm.actors.rank import Rank
from ray_shm.actors.runtime import GroupRuntime
from ray_shm.deadline import Deadline
from ray_shm.errors import (
    GroupClosedError,
    PeerLostError,
    QueueClosedError,
    RayShmError,
    RpcError,
    RpcTimeoutError,
    StartError,
    WorkerDiedError,
)
from ray_shm.late_cause import DeathCause
from ray_shm.ring import MAX_READERS, Buffer
from ray_shm.segment import AttachError, SegmentRef, pid_space, start_time

logger = logging.getLogger("ray_shm")

_NEVER, _AT_ONCE = Deadline.after(None), Deadline.after(0)
_BURST = 64  # requests of one client taken before the workers' replies are looked at again
_SETTLE = 10.0  # seconds to have released groups formed again
_CLOSE_GRACE = 1.0  # seconds that clients get to read their last replies
_NO_REPLY = (wire.CANCEL, wire.CREDIT)
_RELAYED = (wire.CALL, wire.STREAM, wire.STATUS, wire.STACKS, *_NO_REPLY)


class RelayedCall(Call):
    """A client's call under way: passes each reply on. Done when no more replies can come."""

    __slots__ = ("line",)

    def __init__(self, request: wire.Request, line: ClientLine, world_size: int, options: CallOptions) -> None:
        targets = request.targets or range(world_size)
        reply_rank = None if request.reply_rank == wire.EVERY_RANK else request.reply_rank
        name = "stream" if request.kind == wire.STREAM else "call"
        super().__init__(request.call_id, f"{name} of {line.name}", targets, reply_rank, None, _NEVER, options)
        self.line = line
        line.calls[self.call_id] = self

    def take(self, reply: wire.Reply) -> None:
        self._pass_on(reply.frames, reply)
        if reply.status == wire.ITEM:
            return
        self.missing.discard(reply.rank)
        if reply.status == wire.FAILED:
            self.failures[reply.rank] = _Unseen()
            if self.grace_at is None:  # of the client's own grace; then other ranks may never say anything
                grace, now = self.options.failure_grace, time.monotonic()
                self.release_at, self.grace_at = now + grace / 2, now + 2 * grace + 1
                if self.missing:
                    self.line.look_again_in(grace / 2)
        elif reply.rank == self.reply_rank:
            self.finish()
        if not self.missing:
            self.finish()

    def add_failure(self, rank: int, error: Exception) -> None:
        """A death: the client hears of it as news of the group."""
        self.missing.discard(rank)
        if not self.missing or rank == self.reply_rank:
            self.finish()

    def grace_is_over(self) -> bool:
        # Only where one rank's result is wanted do others keep silent; else each of them replies some day.
        return self.done if self.reply_rank is None else super().grace_is_over()

    def finish(self) -> None:
        self.line.calls.pop(self.call_id, None)
        super().finish()

    def refuse(self, error: Exception) -> None:
        """It could not be sent."""
        for rank in self.targets:
            self._pass_on(wire.encode_failure(self.call_id, 0, rank, error), None)
        self.finish()

    def _pass_on(self, frames: Any, reply: wire.Reply | None) -> None:
        try:
            self.line.send(frames)
        except StartError as exc:  # no memory for a large reply
            if reply is not None and reply.status != wire.FAILED:
                self.line.send(wire.encode_failure(self.call_id, reply.epoch, reply.rank, exc))


class _Unseen(Exception):
    """Stands for what a rank raised, which only the client unpickles."""


class Relay:
    """All clients of one driver actor.

    Args:
        bell: the segment of the bell that the dispatcher's leader sleeps on. ringers: how many numbers are taken.
    """

    def __init__(self, runtime: GroupRuntime, bell: SegmentRef, ringers: int) -> None:
        self._runtime = runtime
        self._dispatcher = dispatcher = runtime.dispatcher
        self._bell = bell
        self._options = runtime.options
        self._lines: tuple[ClientLine, ...] = ()
        self._numbers = itertools.count(1)
        self._first_ringer = ringers + 1
        self._refusing = False
        self._settler: threading.Thread | None = None
        self._causes: deque[WorkerDiedError] = deque()  # known, and not yet told
        self._told = self._state()
        dispatcher.on_death = self._tell_death
        dispatcher.add_poll(self.poll)
        silent = CallOptions(slow_call_warning=None)
        # One thread leads whenever no other does, for as long as the group lives.
        dispatcher.serve(Call(dispatcher.new_id(), "requests of clients", (), None, None, _NEVER, silent))
        runtime.subscribe(self._note_cause)

    # ---- coming and going -----------------------------------------------------------------------------------------

    def admit(self, application: Application) -> Welcome:
        """Raises GroupClosedError. StartError: no memory for its replies."""
        with self._dispatcher.lead.held():
            if self._refusing or self._runtime.closed:
                raise closed_error()
            line, why_far = self._make_line(application)
            self._lines = (*self._lines, line)
            ranks = self._ranks()
            deaths = list(self._dispatcher.dead.values())
        runtime = self._runtime
        board = runtime.board.ref if runtime.board is not None else None
        options = CallOptions(self._options.failure_grace, self._options.slow_call_warning, self._options.max_in_flight)
        return Welcome(
            number=line.number,
            replies=line.replies,
            why_far=why_far,
            bell=self._bell if line.replies is not None else None,
            ringer=line.ringer,
            board=board if line.replies is not None else None,
            pid=os.getpid(),
            started=start_time(os.getpid()),
            pid_space=pid_space(),
            node_ip=own_ip(),
            worker_name=runtime.worker_name,
            ranks=ranks,
            deaths=deaths,
            options=options,
            bundles=runtime.reservation.placement_group if runtime.reservation.owned else None,
        )

    def line(self, number: int) -> RayLine | None:
        """The client of this number, if it is reached through Ray and still here."""
        for line in self._lines:
            if line.number == number and isinstance(line, RayLine):
                return line
        return None

    def _make_line(self, application: Application) -> tuple[ClientLine, str]:
        number, ring = next(self._numbers), self._dispatcher.lead.bell.ring
        if application.requests is None or application.control is None:
            return RayLine(number, application, ring), "it has no memory to share"
        used = {line.ringer for line in self._lines}
        ringer = next(r for r in range(self._first_ringer, MAX_READERS + 2) if r not in used)
        try:
            return ShmLine(number, ringer, application, application.requests, application.control, ring), ""
        except AttachError as exc:
            return RayLine(number, application, ring), str(exc)

    def _drop(self, line: ClientLine) -> None:
        """It is gone: its calls are cancelled."""
        self._lines = tuple(other for other in self._lines if other is not line)
        for call in list(line.calls.values()):
            self._dispatcher.abandon_rest(call)
            self._dispatcher.forget(call)
            call.finish()
        line.close()
        self._dispatcher.lead.bell.ring()  # no sleeper has seen a value that the next one with its number may store
        (logger.info if line.gone == "it left" else logger.warning)("client %s: %s", line.name, line.gone)

    # ---- by the leader --------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take what the clients sent, and tell them the news."""
        for line in self._lines:
            if not line.quiet():
                self._serve(line)
        while self._causes:
            death = self._causes.popleft()
            cause = DeathCause(death.cause, death.signal, death.exit_code)
            self._publish((admission.CAUSE, death.rank, death.pid, cause))
        if self._told != (state := self._state()):
            self._told = state
            self._publish((admission.RANKS, self._ranks()))

    def _serve(self, line: ClientLine) -> None:
        try:
            self._take_all(line, line.control, True)
            self._take_all(line, line.requests, False)
        except Exception as exc:  # what it sent cannot be read: it died, or is no client of ours
            if not line.gone:
                logger.exception("client %s", line.name)
            line.gone = line.gone or f"its requests cannot be read: {exc}"
        if line.gone:
            self._drop(line)

    def _take_all(self, line: ClientLine, inbox: Inbox, to_control: bool) -> None:
        for _ in range(_BURST):
            frames = inbox.poll()
            if frames is None or not self._forward(line, frames, to_control):
                return
            inbox.release()
        self._dispatcher.lead.bell.ring()  # there may be more: have another look

    def _forward(self, line: ClientLine, frames: list[memoryview], to_control: bool) -> bool:
        """Pass a request on; False: not now."""
        request = wire.decode_request(frames, 0)
        if request.kind in _NO_REPLY:
            told = self._tell(frames)
            cancelled = line.calls.get(request.call_id) if request.kind == wire.CANCEL else None
            if told and cancelled is not None:
                self._runtime.releaser.release_cancelled(cancelled)
            return told
        if request.kind not in _RELAYED:
            raise ValueError(f"a request of kind {request.kind} is not a client's to send")
        if self._refusing or not (to_control or self._is_settled()):
            return False
        call = RelayedCall(request, line, self._dispatcher.world_size, self._options)
        try:
            self._dispatcher.forward(call, frames, to_control)
        except (RpcTimeoutError, GroupClosedError):
            call.finish()
            return False
        except RpcError as exc:
            if self._is_healing():
                call.finish()
                return False
            dead = all(isinstance(error, WorkerDiedError) for error in exc.failures.values())
            call.finish() if dead else call.refuse(exc)  # of a death the client has heard, or does so now
        except RayShmError as exc:
            call.refuse(exc)
        return True

    def _tell(self, frames: list[memoryview]) -> bool:
        control = self._runtime.control
        try:
            if control is not None:
                control.send(frames, _AT_ONCE)
        except TimeoutError:
            return False
        except (QueueClosedError, PeerLostError):
            pass  # the group is closed, or the rank is gone: there is nobody to tell
        return True

    def _is_settled(self) -> bool:
        """Whether no groups wait to be formed again, which comes before the next call and on another thread."""
        if self._settler is not None:
            return False
        if self._dispatcher.before_call is None:
            return True
        self._settler = threading.Thread(target=self._settle, name="ray_shm-settle", daemon=True)
        self._settler.start()
        return False

    def _settle(self) -> None:
        try:
            settle = self._dispatcher.before_call
            if settle is not None:
                settle(Deadline.after(_SETTLE))
        except Exception as exc:  # the group is being closed, or stuck: the next collective says so
            logger.warning("groups could not be formed again: %s", exc)
        finally:
            self._settler = None
            self._dispatcher.lead.bell.ring()

    # ---- news -----------------------------------------------------------------------------------------------------

    def _publish(self, news: tuple[Any, ...]) -> None:
        frames: list[Buffer] = wire.encode_result(0, self._dispatcher.epoch, 0, news, wire.NEWS)
        for line in self._lines:
            line.send(frames)

    def _tell_death(self, death: WorkerDiedError) -> None:
        self._publish((admission.DEATH, death.rank, death.pid, self._is_healing()))

    def _note_cause(self, death: WorkerDiedError) -> None:
        self._causes.append(death)
        self._dispatcher.lead.bell.ring()

    def _is_healing(self) -> bool:
        return self._runtime.healer is not None and self._runtime.healer.healing

    def _state(self) -> tuple[int, bool]:
        return self._dispatcher.epoch, self._is_healing()

    def _ranks(self) -> Ranks:
        ranks = {
            rank: Rank(e.place, e.position, None, e.transport, e.visible, e.stacks_fd)
            for rank, e in self._runtime.ranks.items()
        }
        heals = self._runtime.healer.heals if self._runtime.healer is not None else 0
        return Ranks(ranks, frozenset(self._dispatcher.dead), self._dispatcher.epoch, heals, self._is_healing())

    # ---- the end --------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Take no more calls; streams end, other calls go on."""
        with self._dispatcher.lead.held():
            self._refusing = True
            for line in self._lines:
                for call in list(line.calls.values()):
                    if call.method.startswith("stream"):
                        self._dispatcher.abandon_rest(call)

    def close(self, why: str) -> None:
        """Tell all clients that the group is closed, and let go of them. The dispatcher is closed."""
        lines, self._lines = self._lines, ()
        frames = wire.encode_result(0, self._dispatcher.epoch, 0, (admission.CLOSED, why), wire.NEWS)
        for line in lines:
            line.send(frames)
        for line in lines:
            line.close(_CLOSE_GRACE)


def own_ip() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())
