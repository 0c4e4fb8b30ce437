"""Waiting for what torch's process groups have begun, until a deadline, and who is late when it comes.

Runs in every worker. Tried with torch 2.13: a wait for one of gloo's collectives that comes to its end leaves the group
as it is, and another may follow; after one for a send or a recv all of gloo's connections are closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from ray_shm.arrivals import Attempt
from ray_shm.deadline import Deadline
from ray_shm.store import first_line

_GLOO_LATER = 60.0  # seconds
_ROUNDING = 0.001  # seconds; torch cuts timeouts off to whole milliseconds, and the deadline has to be over
_PAIRWISE_TYPES = (12, 13, 14)  # torch's OpType SEND, RECV, RECVANYSOURCE, which Python sees as numbers


class LateError(TimeoutError):
    """The deadline came, and it is known by whom this rank was kept waiting. late: their ranks in the group."""

    def __init__(self, message: str, late: list[int]) -> None:
        super().__init__(message)
        self.late = late


def wait(work: Any, deadline: Deadline) -> None:
    """Raises RuntimeError where the group is lost or the deadline comes; torch works on with the tensors in the latter
    case, until the sockets are closed. Nccl gets no deadline: it would wait for the GPU.
    """
    left = deadline.remaining()
    if isinstance(deadline, Attempt) and deadline.patience is not None and not _is_pairwise(work):
        if _is_done(work, deadline.patience):
            return
        deadline.tell()
        left = deadline.remaining()
    work.wait(*() if left is None else (timedelta(seconds=left + _ROUNDING),))


def _is_done(work: Any, seconds: float) -> bool:
    """Waits; False if it took longer, which leaves gloo's collectives as they are (torch 2.13)."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError as exc:
        if "Operation timed out" in str(exc):
            return False
        raise
    return True


def _is_pairwise(work: Any) -> bool:
    """A send or recv whose wait comes to its end closes all of gloo's connections, so that there is no second wait."""
    return int(work._get_op_type()) in _PAIRWISE_TYPES


def wait_for_pairs(works: Sequence[Any], peers: Sequence[int], deadline: Deadline) -> None:
    """Waits for sends to and receives from `peers`.

    Raises:
        LateError: the deadline came; `late` are the peers that have not done their part.
    """
    late: set[int] = set()
    cause: RuntimeError | None = None
    for work, peer in zip(works, peers, strict=True):
        try:
            wait(work, deadline)
        except RuntimeError as exc:
            if not deadline.expired():
                raise
            late.add(peer)
            cause = cause or exc
    if cause is not None:
        raise LateError(first_line(cause), sorted(late)) from cause


def timed(options: Any, deadline: Deadline) -> Any:
    """Has gloo's own timer, which would come at the group's timeout, come later than this operation's: it closes the
    connections at once, and whoever waits has something to say before that."""
    if deadline.timeout is not None:
        options.timeout = timedelta(seconds=deadline.timeout + _GLOO_LATER)
    return options
