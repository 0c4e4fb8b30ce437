"""Notices that workers died, tells the dispatcher at once, and finds out why. Runs in the driver's process.

    signs of a death                                     told at once       some milliseconds later
    the death word (same node, before memory is freed) \\
    the pidfd (same node)                               }--> report(death)   cause: exit status + Ray's reason
    Ray's resolution of `run` (any node)               /                       -> death.cause, .signal, .exit_code
    lost(): a connection that broke (any node)        /                        -> subscribers, on a thread of their own

The first sign counts; a rank is reported once until it is replaced. Threads: that of the death words, one that sleeps
on the pidfds and completes causes, and from the first completed death on one for the subscribers; Ray's call in, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray_shm.actors.death_reason import RaysWord, join_causes, rays_word
from ray_shm.actors.death_reason import reason as reason
from ray_shm.death_word import DeathWords
from ray_shm.errors import WorkerDiedError
from ray_shm.exit_cause import ExitWatch
from ray_shm.late_cause import LateCause, never_waiting
from ray_shm.placement.topology import RankPlace

CAUSE_GRACE = 0.8  # seconds for the exit status and Ray's reason; less than LateCause's readers wait
STATUS_GRACE = 0.1  # seconds for the exit status once Ray has given a reason that says something
_JOIN = 2.0  # seconds that `stop` gives a thread: a subscriber at work, or one that waits for whom a collection stopped

logger = logging.getLogger("ray_shm")

Subscriber = Callable[[WorkerDiedError], object]


@dataclass(eq=False)
class _Life:
    """One process of a rank, from `add` until its death is explained or it is removed."""

    rank: int
    place: RankPlace
    exit: ExitWatch | None
    end_word_watch: Callable[[], None] | None = None
    late: LateCause | None = None  # set with `death`
    death: WorkerDiedError | None = None
    sign: str = ""  # what a broken connection looked like
    until: float = 0.0  # time.monotonic() when its cause is completed with what is known
    status: int | None = None
    rays_word: RaysWord | None = None

    def is_explained(self) -> bool:
        """Whether nothing more is known soon. Looks at the exit status."""
        told = self.exit is None or self.exit.has_told()
        if self.exit is not None and self.status is None:
            self.status = self.exit.status()
        if time.monotonic() >= self.until:
            return True
        return self.rays_word is not None and (told or self.status is not None or self.rays_word.lives)


@dataclass
class _State:
    """Guarded by the watch's lock."""

    lives: dict[int, _Life] = field(default_factory=dict)  # rank → its present process
    dying: list[_Life] = field(default_factory=list)  # reported, and not yet explained
    removed: list[_Life] = field(default_factory=list)  # to be closed by the thread that polls
    subscribers: list[Subscriber] = field(default_factory=list)
    stopped: bool = False


class DeathWatch:
    """Watches ranks from `add` to `remove`, `replace` or `stop`.

    Args:
        report: called at once and once for each death, from any thread, with a death whose cause is still to come.
            Short; it must not read the death's text.
        board: writable shared memory that holds the death words; None: there are none.
    """

    def __init__(self, report: Callable[[WorkerDiedError], object], board: memoryview | None = None) -> None:
        self._report = report
        self._board = board
        self._words = DeathWords()
        self._lock = threading.RLock()  # a collection while it is held may stop a dropped group's watch, this one
        self._state = _State()
        self._explained: queue.SimpleQueue[WorkerDiedError | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="ray_shm-supervision", daemon=True)
        self._thread.start()

    def add(self, rank: int, place: RankPlace, run: Any, *, visible: bool, slot: int | None = None) -> None:
        """Watch a rank whose process holds its death word by now, if it ever will.

        Args:
            run: reference of the actor's `run`. visible: its pid means something in this process.
            slot: byte offset of its death word in the board; None: it cannot reach the board.
        """
        life = _Life(rank, place, _exit_watch(place.place.pid) if visible else None)
        with self._lock:
            if not self._state.stopped:
                self._state.lives[rank] = life
            elif life.exit is not None:
                life.exit.close()
            self._notify()
        board = self._board
        if board is not None and slot is not None:
            life.end_word_watch = self._words.watch(
                board, slot, place.place.pid, lambda: self._died(life, "its main thread ended")
            )
        me = weakref.ref(self)  # Ray keeps the callback for as long as the actor runs

        def ended(future: Any) -> None:
            if (watch := me()) is not None:
                watch._ray_says(life, future)

        run.future().add_done_callback(ended)

    def remove(self, rank: int) -> None:
        """Its end is expected from now on. A death already reported is still explained, and told to subscribers."""
        with self._lock:
            life = self._state.lives.pop(rank, None)
            if life is not None and life not in self._state.dying:
                self._state.removed.append(life)
            end_word_watch = None if life is None else life.end_word_watch
            self._notify()
        if end_word_watch is not None:
            end_word_watch()

    def replace(self, rank: int, place: RankPlace, run: Any, *, visible: bool, slot: int | None = None) -> None:
        """A new process has this rank; the arguments are those of `add`."""
        self.remove(rank)
        self.add(rank, place, run, visible=visible, slot=slot)

    def lost(self, rank: int, why: str) -> None:
        """The connection to this rank broke for good, `why` in words: counts as its death. From any thread."""
        with self._lock:
            life = self._state.lives.get(rank)
        if life is not None:
            self._died(life, why)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Have `callback` called with every death from now on, once its cause is known or nobody told in time.

        It runs on a thread of this watch, one call at a time; what it raises is logged. Returns a function that ends
        the subscription, idempotent.
        """
        with self._lock:
            self._state.subscribers.append(callback)
        return lambda: self._unsubscribe(callback)

    def stop(self) -> None:
        """From now on ends are expected. Joins the threads; a subscriber at work gets 2 s. Idempotent."""
        with self._lock:
            if self._state.stopped:
                return
            self._state.stopped = True
            self._notify()
        self._words.close()
        self._explained.put(None)
        for thread in (self._thread, self._teller):
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN)

    def _unsubscribe(self, callback: Subscriber) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._state.subscribers.remove(callback)

    def _ray_says(self, life: _Life, future: Any) -> None:
        """On a thread of Ray's."""
        try:
            error = future.exception()
        except Exception as exc:  # cancelled, as Ray is shut down
            error = exc
        word = rays_word(error)
        with self._lock:
            life.rays_word = word
            if not word.vague:
                life.until = min(life.until, time.monotonic() + STATUS_GRACE)
            self._notify()
        self._died(life, "")

    def _died(self, life: _Life, sign: str) -> None:
        with self._lock:
            if self._state.stopped or life.death is not None or self._state.lives.get(life.rank) is not life:
                return
            where = life.place.place
            life.late, life.sign = LateCause(), sign
            life.death = WorkerDiedError(life.rank, where.pid, where.node_ip, life.late)
            vague = life.rays_word is None or life.rays_word.vague
            life.until = time.monotonic() + (CAUSE_GRACE if vague else STATUS_GRACE)
            death = life.death
        try:
            with never_waiting():
                self._report(death)
        except Exception:
            logger.exception("the death of rank %d could not be told to the calls that wait for it", life.rank)
        with self._lock:
            stopped = self._state.stopped
            if not stopped:
                self._state.dying.append(life)
                self._notify()
        if stopped:
            life.late.fill(join_causes(life.status, life.rays_word, sign))

    def _notify(self) -> None:
        """Have the thread look again. The caller holds the lock."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        with never_waiting():
            while self._await_news():
                with self._lock:
                    watched = [life for life in self._state.lives.values() if life.death is None]
                    dying = list(self._state.dying)
                for life in watched:
                    if life.exit is not None and life.exit.has_ended():
                        self._died(life, "its process is gone")
                for life in dying:
                    if life.is_explained():
                        self._explain(life)
            self._end()

    def _await_news(self) -> bool:
        """Sleep until something may have changed; False when stopped."""
        poll = select.poll()
        with self._lock:
            state = self._state
            poll.register(self._wake, select.POLLIN)
            for life in state.removed:
                _close(life)
            state.removed.clear()
            if state.stopped:
                return False
            for life in state.lives.values():
                if life.exit is not None and life.death is None:
                    poll.register(life.exit.pidfd, select.POLLIN)
            for life in state.dying:
                if life.exit is not None and not life.exit.has_told():
                    poll.register(life.exit.pidfd, life.exit.events)
            nearest = min((life.until for life in state.dying), default=None)
        seconds = None if nearest is None else max(0.0, nearest - time.monotonic())
        poll.poll(None if seconds is None else seconds * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        return True

    def _explain(self, life: _Life) -> None:
        """Complete a death's cause with what is known, and hand it to the subscribers."""
        with self._lock:
            self._state.dying.remove(life)
            tell = bool(self._state.subscribers) and not self._state.stopped
            if tell and self._teller is None:
                self._teller = threading.Thread(target=self._tell, name="ray_shm-on-death", daemon=True)
                self._teller.start()
        if life.late is not None:
            life.late.fill(join_causes(life.status, life.rays_word, life.sign))
        _close(life)
        if tell and life.death is not None:
            self._explained.put(life.death)

    def _tell(self) -> None:
        while (death := self._explained.get()) is not None:
            with self._lock:
                subscribers = list(self._state.subscribers)
            for callback in subscribers:
                try:
                    callback(death)
                except Exception:
                    logger.exception("a callback for worker deaths raised, for rank %d", death.rank)

    def _end(self) -> None:
        """Nobody waits for a cause any more, and no descriptor is left."""
        with self._lock:
            dying, lives = list(self._state.dying), list(self._state.lives.values())
            self._state.lives.clear()
        for life in dying:
            self._explain(life)
        for life in lives:
            _close(life)
        with self._lock:
            os.close(self._wake)
            self._wake = -1
            self._board = None


def _exit_watch(pid: int) -> ExitWatch | None:
    try:
        return ExitWatch(pid)
    except OSError:  # no pidfds here, or it is gone already; Ray's word remains
        return None


def _close(life: _Life) -> None:
    """Ray may keep the object itself for as long as the actor lives."""
    life.end_word_watch = None
    if life.exit is not None:
        life.exit.close()
