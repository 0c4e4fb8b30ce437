"""Where the ranks stand, and their stacks: what shared memory says, completed by what their control threads answer.

Runs in the driver's process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_shm.actors import wire
from ray_shm.actors.control import STACK_SIGNAL
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.status_board import Standing
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError

_WRITTEN_WAIT = 1.0  # seconds for the signal's handler to have written the stacks
_LOOK = 0.005  # seconds between looks
_COMPLETE = b"Current thread"  # with which faulthandler heads the thread that got the signal
_NO_ANSWER = "no answer: its node or process does not respond, or its main thread holds the interpreter's lock"


def standings(dispatcher: Dispatcher, row: Callable[[int], Standing | None], timeout: float) -> dict[int, Standing]:
    """Where each living rank stands. A rank of this node that cannot answer in `timeout` seconds still has its row."""
    answers = _ask(dispatcher, wire.STATUS, "status", dispatcher.alive, timeout)
    found = {rank: answers.get(rank) or row(rank) for rank in dispatcher.alive}
    return {rank: standing for rank, standing in found.items() if standing is not None}


def stacks(dispatcher: Dispatcher, places: Mapping[int, Any], ranks: Sequence[int], timeout: float) -> dict[int, str]:
    """The stacks of these ranks' threads. Where the control thread cannot answer, a signal has them written."""
    alive = [rank for rank in ranks if rank not in dispatcher.dead]
    found: dict[int, str] = _ask(dispatcher, wire.STACKS, "stacks", alive, timeout)
    for rank in ranks:
        if rank in dispatcher.dead:
            found[rank] = str(dispatcher.dead[rank])
        elif rank not in found:
            entry = places[rank]
            text = _written(entry.place.place.pid, entry.stacks_fd) if entry.visible else ""
            found[rank] = text or _NO_ANSWER
    return {rank: found[rank] for rank in ranks}


def _ask(dispatcher: Dispatcher, kind: int, name: str, ranks: Sequence[int], timeout: float) -> dict[int, Any]:
    """What the control threads answered in time."""
    if not ranks:
        return {}
    deadline = Deadline.after(timeout)
    try:
        call = dispatcher.submit_order(kind, name, None, ranks, Deadline.after(0))
    except (RayShmError, TimeoutError):  # a rank died just now, or one has not listened for long
        return {}
    with contextlib.suppress(RayShmError, TimeoutError):
        dispatcher.wait(call, deadline)
    return dict(call.results)


def _written(pid: int, fd: int) -> str:
    """What `faulthandler` of process `pid` writes into its file at our signal; "" where that does not work."""
    try:
        with open(f"/proc/{pid}/fd/{fd}", "rb+", buffering=0) as file:
            pidfd = os.pidfd_open(pid)
            try:
                file.truncate(0)
                signal.pidfd_send_signal(pidfd, STACK_SIGNAL)
            finally:
                os.close(pidfd)
            return _settled(file)
    except OSError:
        return ""


def _settled(file: Any) -> str:
    """The file's text once it has stopped growing."""
    until, before = time.monotonic() + _WRITTEN_WAIT, b""
    while time.monotonic() < until:
        time.sleep(_LOOK)
        file.seek(0)
        now = file.read().lstrip(b"\0")
        if now == before and _COMPLETE in now:
            break
        before = now
    return str(before.decode(errors="replace"))
