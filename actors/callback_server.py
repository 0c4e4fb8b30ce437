"""One thread for waiters that never call in: asyncio, done-callbacks. Runs in the driver's process, started lazily."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from ray_shm.actors.call import Call

if TYPE_CHECKING:
    from ray_shm.actors.dispatcher import Dispatcher


CALLBACK_THREAD = "ray_shm-callbacks"
CLOSE_WAIT = 5.0  # seconds for a callback that runs while the group is closed


class CallbackServer:
    """Waits for the watched calls as any caller would, so that replies are drained and callbacks run."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._arrived: deque[Call] = deque()
        self._watched: set[Call] = set()
        self._work = threading.Event()
        self.wakeup: threading.Event | None = threading.Event()  # what it sleeps on while it follows; lead.Awaited
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=CALLBACK_THREAD, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ready(self) -> bool:
        """What it follows for is the lead, and news."""
        return self.has_news()

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def has_news(self) -> bool:
        """There is something to look at before going on to wait."""
        return bool(self._arrived) or self._closed

    def watch(self, call: Call) -> None:
        if call not in self._watched:
            self._arrived.append(call)
            self._kick()

    def close(self) -> None:
        self._closed = True
        self._kick()
        if not self.is_this_thread():
            self._thread.join(CLOSE_WAIT)

    def _kick(self) -> None:
        self._work.set()
        self._dispatcher.lead.bell.ring()  # where this thread leads
        if self.wakeup is not None:  # where it follows
            self.wakeup.set()

    def _run(self) -> None:
        while not self._closed:
            self._work.wait()
            self._work.clear()
            self._serve()

    def _serve(self) -> None:
        while not self._closed:
            while self._arrived:
                self._watched.add(self._arrived.popleft())
            self._watched = {call for call in self._watched if not call.done}
            if not self._watched:
                return
            current = min(self._watched, key=lambda c: float("inf") if c.deadline.at is None else c.deadline.at)
            try:
                self._dispatcher.wait_once(current, current.deadline)
            except Exception as exc:  # the deadline came: whoever holds the future gets it from there
                current.give_up(exc)
