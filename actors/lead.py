"""Who waits for news: one thread at a time leads, the others follow. Runs in the driver's process.

The leader sleeps on one word, the bell, and completes everybody's calls with what arrives. A follower sleeps on an
event of its own until its call is done, or the lead is free. The thread that serves callbacks hands the lead to whoever
calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from ray_shm.deadline import Deadline
from ray_shm.ring import Bell
from ray_shm.waiting import Waiter

_NEVER = Deadline.after(None)


class Awaited(Protocol):
    """What a thread waits for. wakeup: the event that it sleeps on while it follows; made when first needed."""

    wakeup: threading.Event | None

    @property
    def ready(self) -> bool: ...


class Lead:
    """The lead, and who follows. `bell`: what rings when there may be news.

    Attributes:
        wanted: a caller would like the lead, if the callback thread has it.
    """

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.wanted = False
        self._mutex = threading.Lock()
        self._taken = False
        self._leader: int | None = None
        self._claims = threading.Lock()  # one claim at a time
        self._claim: int | None = None  # thread for which the lead is kept free
        self._followers: list[Awaited] = []
        self._waiter = Waiter()  # the leader's

    def take(self) -> bool:
        """Lead, unless somebody does."""
        with self._mutex:
            return self._take()

    def take_or_follow(self, awaited: Awaited, ask: bool) -> bool:
        """Lead, or become a follower; `ask`: the present leader would hand it over."""
        with self._mutex:
            if self._take():
                return True
            if awaited.wakeup is None:
                awaited.wakeup = threading.Event()
            self._followers.append(awaited)
        if ask:
            self.wanted = True
            self.bell.ring()
        return False

    @property
    def claimed(self) -> bool:
        """Whoever leads is to give the lead to the thread in `held`."""
        return self._claim is not None

    def is_mine(self) -> bool:
        return self._leader == threading.get_ident()

    def give(self) -> None:
        """Let a follower take it: all are woken, one takes it, the others follow that one."""
        with self._mutex:
            self._wake_followers()
            self.wanted = False
            self._taken = False
            self._leader = None  # last: an exception amid this (Ctrl-C) has it done again

    def _wake_followers(self) -> None:
        for awaited in self._followers:
            if awaited.wakeup is not None:
                awaited.wakeup.set()
        self._followers.clear()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lead without waiting for anything, to change what leaders use. Waits until the present leader lets go."""
        turn = _Turn()
        with self._claims:
            self._claim = threading.get_ident()
            self.bell.ring()
            try:
                while not self.take_or_follow(turn, True):
                    self.follow(turn, _NEVER)
                try:
                    yield
                finally:
                    self._claim = None
                    self.give()
            finally:
                self._claim = None
                with self._mutex:
                    if not self._taken:  # Ctrl-C before the lead came: those who were turned away may have it
                        self._wake_followers()

    def turn(self) -> Awaited:
        """To follow with where one awaits no call of one's own."""
        return _Turn()

    def sleep(self, ready: Callable[[], bool], deadline: Deadline) -> None:
        """The leader's wait."""
        self._waiter.wait(ready, self.bell.word, deadline)

    def follow(self, awaited: Awaited, deadline: Deadline) -> None:
        """A follower's wait, until it is woken or the deadline comes."""
        wakeup = awaited.wakeup
        if wakeup is not None and not awaited.ready:  # ready is set before wakeup is looked at
            wakeup.wait(deadline.remaining())
            wakeup.clear()
            if awaited.ready:
                wakeup.set()  # for others that wait for the same
        with self._mutex, contextlib.suppress(ValueError):
            self._followers.remove(awaited)

    def _take(self) -> bool:
        if self._taken or (self._claim is not None and self._claim != threading.get_ident()):
            return False
        self._leader = threading.get_ident()
        self._taken = True
        return True


class _Turn:
    """Awaits nothing but the lead."""

    ready = False

    def __init__(self) -> None:
        self.wakeup: threading.Event | None = None
