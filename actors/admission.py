"""How a client joins a driver actor, and what it is told later: values that travel between the two.

Ray carries the application and the welcome; news comes among the replies (wire.NEWS), so that it keeps its place there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

from ray.util.placement_group import PlacementGroup

from ray_shm.actors import wire
from ray_shm.actors.call import CallOptions
from ray_shm.actors.rank import Rank
from ray_shm.errors import StartError, WorkerDiedError
from ray_shm.handle import Handle
from ray_shm.segment import SegmentRef

CALLS_PER_CLIENT = 10**12  # call ids of client n start at n times this: no two clients share one, so none is translated

# First element of what news carries, and what follows it.
DEATH = "death"  # rank, pid, whether the group heals by itself now
CAUSE = "cause"  # rank, pid, late_cause.DeathCause
RANKS = "ranks"  # Ranks
CLOSED = "closed"  # why, in words

P = ParamSpec("P")


@dataclass(frozen=True)
class Application:
    """Who wants to join. requests, control: the queues it sends through; None: it has no memory to share."""

    pid: int
    started: int  # segment.start_time
    node: str  # its host name, for messages
    requests: Handle | None
    control: Handle | None


@dataclass(frozen=True)
class Ranks:
    """The ranks at one moment. dead: of them. healing: dead ones are being replaced by the group itself."""

    ranks: dict[int, Rank]
    dead: frozenset[int]
    epoch: int
    heals: int
    healing: bool


@dataclass(frozen=True)
class Welcome:
    """What a client gets to know.

    Attributes:
        number: the client's. replies: the queue it reads; None: frames go through Ray, `why_far` says why.
        bell, ringer: what it rings after sending, and as whom. board: of the ranks' status.
        pid, started, pid_space, node_ip: of the driver actor's process.
        deaths: of ranks that are dead now. bundles: the placement group that the actor made, None if it was given one.
    """

    number: int
    replies: Handle | None
    why_far: str
    bell: SegmentRef | None
    ringer: int
    board: SegmentRef | None
    pid: int
    started: int
    pid_space: str
    node_ip: str
    worker_name: str
    ranks: Ranks
    deaths: list[WorkerDiedError]
    options: CallOptions
    bundles: PlacementGroup | None


@dataclass(frozen=True)
class Answer:
    """What a method of the driver actor returned, or the frames of what it raised: Ray would rewrap that."""

    value: Any
    error: list[bytes]

    def get(self) -> Any:
        if not self.error:
            return self.value
        error = wire.decode_reply(self.error).error()
        if isinstance(error, StartError) and error.failures:
            error.__cause__ = next(iter(error.failures.values()))
        raise error


def answering(method: Callable[P, Any]) -> Callable[P, Answer]:
    """For methods of the driver actor: what is returned or raised as an Answer."""

    @functools.wraps(method)
    def answer(*args: P.args, **kwargs: P.kwargs) -> Answer:
        try:
            return Answer(method(*args, **kwargs), [])
        except Exception as exc:
            return Answer(None, [bytes(frame) for frame in wire.encode_failure(0, 0, 0, exc)])

    return answer
