"""A worker's control thread: answers status, stack and release requests, and cancels calls. Runs in the workers.

It needs the interpreter's lock for a moment. Where user code holds that in C, `faulthandler`'s signal still writes the
stacks, without any lock; see `StackFile`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_shm.actors import wire
from ray_shm.actors.status_board import StatusRow
from ray_shm.actors.worker_groups import WorkerGroups
from ray_shm.actors.worker_loop import WorkerLoop
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError
from ray_shm.queue_reader import QueueReader

NAME = "ray_shm-control"
STACK_SIGNAL = signal.SIGRTMIN + 7
_CLOSE_WAIT = 2.0  # seconds
_WAKE_AGAIN = 0.005  # seconds

Groups = Mapping[str, Any]


class StackFile:
    """Where the stacks of this process are written at STACK_SIGNAL, by a handler that takes no lock.

    The driver, on the same node, sends the signal and reads the file through /proc/<pid>/fd/<fd>.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("ray_shm:stacks", os.MFD_CLOEXEC)
        os.set_blocking(self.fd, False)
        faulthandler.register(STACK_SIGNAL, file=self.fd, all_threads=True, chain=False)

    def close(self) -> None:
        faulthandler.unregister(STACK_SIGNAL)
        os.close(self.fd)


class ControlThread:
    """Serves the control queue until it is closed by the driver, or `close`."""

    def __init__(
        self, requests: QueueReader, rank: int, loop: WorkerLoop, row: StatusRow, groups: WorkerGroups
    ) -> None:
        self._requests = requests
        self._rank = rank
        self._loop = loop
        self._row = row
        self._groups = groups
        self._main = threading.main_thread().ident
        self._answers: dict[int, Callable[[wire.Request], object]] = {
            wire.CANCEL: self._cancel,
            wire.CREDIT: lambda request: loop.grant(request.call_id, request.payload()),
            wire.STATUS: lambda request: self._standing(),
            wire.STACKS: lambda request: all_stacks(self._main),
            wire.RELEASE: lambda request: self._release(*request.payload()),
            wire.COUNTS: lambda request: counts_of(groups),
            wire.ABANDON: lambda request: groups.abandon(*request.payload()),
        }
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self._thread.start()

    def close(self) -> None:
        until = Deadline.after(_CLOSE_WAIT)
        while self._thread.is_alive() and not until.expired():
            self._requests.stop_waiting()  # again: it may have been on its way into the sleep
            self._thread.join(_WAKE_AGAIN)
        self._requests.close()

    def _run(self) -> None:
        with contextlib.suppress(RayShmError):  # the driver closed it, or is gone: orphan_watch.py acts on that
            while True:
                cancellation = self._loop.cancellation
                if not self._requests.await_message(Deadline.after(cancellation.repeat_after())):
                    cancellation.repeat()
                elif (frames := self._requests.poll()) is not None:
                    request = wire.decode_request(frames, self._rank, self._requests.owned)
                    try:
                        if request.position is not None:
                            self._answer(request)
                    finally:
                        del frames
                        request.frames = ()
                        self._requests.release()

    def _answer(self, request: wire.Request) -> None:
        try:
            answer = self._answers[request.kind](request)
            reply = wire.encode_result(request.call_id, request.epoch, self._rank, answer)
        except Exception as exc:  # a bug, or a group of coordinators in an unexpected state: the caller hears of it
            reply = wire.encode_failure(request.call_id, request.epoch, self._rank, exc)
        if request.kind not in (wire.CANCEL, wire.CREDIT, wire.ABANDON):
            self._loop.reply(reply)
            self._loop.ring()

    def _cancel(self, request: wire.Request) -> None:
        for call_id, why in request.payload():
            self._loop.cancellation.cancel(call_id, why)

    def _standing(self) -> Any:
        return replace(self._row.standing(), operation=operation_of(self._groups))

    def _release(self, failed: Sequence[int], reason: str, epoch: int, call_id: int, idle: bool) -> list[str]:
        """Release the groups with a rank that will not come; the names of those that are to be formed again.

        epoch: the last formation that is meant. call_id: if this call runs here; 0: in any case. idle: also the groups
        that are in no operation yet.
        """
        standing = self._row.standing()
        meant = [
            (name, group)
            for name, group in list(self._groups.items())
            if set(group.ranks) & set(failed) and group.epoch <= epoch
        ]
        # Else it is over here, and another one may be in an operation of its own.
        runs = not call_id or (standing.call_id == call_id and standing.state != "idle")
        waiting = [name for name, group in meant if runs and (idle or group.operation is not None)]
        for name in waiting:
            self._groups[name].release(reason)
        return [name for name, group in meant if name in waiting or group.is_lost]  # by an interrupted broadcast, say


def counts_of(groups: Groups) -> wire.Counts:
    """Asked where this rank is in no call that is awaited of it: what it may be in was given up, or timed out."""
    return {
        (name, tuple(group.ranks)): None if group.is_lost or group.operation else (group.epoch, group.operations)
        for name, group in list(groups.items())
    }


def operation_of(groups: Groups) -> str:
    """The collective that the main thread is in, in words."""
    for name, group in list(groups.items()):
        operation = getattr(group, "operation", None)
        if operation is not None:
            return f"{operation} of group {name!r}"
    return ""


def all_stacks(main: int | None) -> str:
    """The stacks of all threads, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)!r}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != own
    )
