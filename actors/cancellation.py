"""Ends a call that was cancelled: skipped if it has not begun, interrupted if it runs. Runs in the workers.

The control thread learns of a cancelled call; the main thread runs user code. A signal to the main thread breaks
sleeps, lock waits and system calls, which an exception set from another thread (PyThreadState_SetAsyncExc) does not;
its handler raises, at once, and only where that very call still runs. Code that is inside a C function which never
looks for signals goes on to its end, and is interrupted then.

One signal is not enough. Python's C handler only notes it; where it runs just before the thread falls asleep in a C
function, after that has looked for signals, the thread sleeps on. (That is likely: the control thread gets the
interpreter's lock when the main thread gives it up in order to sleep.) So it is sent again, less and less often.

The signal is SIGURG: ignored by default, so a late one harms nobody, and next to nobody handles it. A handler that the
worker class installs for it is called for signals that are not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any

from ray_shm.errors import RpcCancelledError

SIGNAL = signal.SIGURG
_REMEMBERED = 10_000  # cancelled calls that have not come up
_FIRST_REPEAT, _LAST_REPEAT = 0.001, 1.0  # seconds until a signal is sent again, four times as long each time


class Cancellation:
    """Which call the main thread runs, and which were cancelled. Made on the main thread.

    Attributes:
        running: id of the call that may be interrupted now, 0: none. The main thread's.
        pending: calls cancelled and not yet come up, id → why; the control thread adds to it.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._main = threading.get_ident()
        self.running = 0
        self.pending: dict[int, str] = {}
        self._signalled = 0  # id of the call for which signals are sent, 0: none. The control thread's, as the next.
        self._repeat = _FIRST_REPEAT
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._previous = signal.signal(SIGNAL, self._on_signal)

    def cancel(self, call_id: int, why: str) -> None:
        """By the control thread."""
        self.pending[call_id] = why
        while len(self.pending) > _REMEMBERED:  # of calls that had ended before
            with contextlib.suppress(RuntimeError, StopIteration):  # the main thread takes its own out meanwhile
                self.pending.pop(next(iter(self.pending)), None)
        if self.running == call_id:  # else it looks at `pending` once it has set `running`
            self._signalled, self._repeat = call_id, _FIRST_REPEAT
            signal.pthread_kill(self._main, SIGNAL)

    def repeat_after(self) -> float | None:
        """Seconds until `repeat` is due; None: it is not. By the control thread."""
        if self._signalled and self.running != self._signalled:
            self._signalled = 0
        return self._repeat if self._signalled else None

    def repeat(self) -> None:
        """Signal again where the last one has had no effect. By the control thread."""
        if self._signalled and self.running == self._signalled:
            signal.pthread_kill(self._main, SIGNAL)
            self._repeat = min(4 * self._repeat, _LAST_REPEAT)

    def check(self, call_id: int) -> None:
        """Raises RpcCancelledError if this call was cancelled. By the main thread, once it has set `running`."""
        if call_id in self.pending:
            self.running = 0
            raise self._error(call_id)

    def require_running(self, call_id: int) -> None:
        """Raises RpcCancelledError, again, if this call was interrupted and its code went on nevertheless."""
        if self.running != call_id:
            raise self._error(call_id)

    def run_task(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it as a task, and give its result.

        A cancelled call cancels the task where it awaits, and interrupts it where it computes. Other tasks of the loop
        are left alone. However this ends, so has the task: it does not go on within the next call.
        """
        call_id, self.running = self.running, 0  # no interruption until the task can be found
        task = loop.create_task(coroutine)
        self._loop, self._task = loop, task
        self.running = call_id
        try:
            if self.running and call_id in self.pending:  # cancelled in between
                self.running = 0
                task.cancel()
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            if call_id in self.pending:
                raise self._error(call_id) from None
            raise
        finally:
            if not task.done():  # something else has ended the loop: SystemExit in another task, say
                task.cancel()
                with contextlib.suppress(Exception, asyncio.CancelledError):
                    loop.run_until_complete(task)
            self._loop = self._task = None

    def close(self) -> None:
        signal.signal(SIGNAL, self._previous if self._previous is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        call_id = self.running
        if call_id and call_id in self.pending:
            self.running = 0  # once: what the code does to clean up is not interrupted again
            loop, task = self._loop, self._task
            if loop is not None and task is not None and asyncio.current_task(loop) is not task:
                # It awaits. An exception here would end the loop, or another task of the user's, and not this one.
                loop.call_soon_threadsafe(task.cancel)
                return
            raise self._error(call_id)
        if callable(self._previous):
            self._previous(number, frame)

    def _error(self, call_id: int) -> RpcCancelledError:
        why = self.pending.pop(call_id, "its caller gave it up")
        return RpcCancelledError(f"call {call_id} was cancelled on rank {self._rank}: {why}")
