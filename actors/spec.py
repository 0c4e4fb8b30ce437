"""What the driver tells a worker to start with, and what the worker answers: values that travel through Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_shm.handle import Handle
from ray_shm.placement.topology import RankPlace, WorkerPlace
from ray_shm.ring import Buffer

Groups = Mapping[str, list[list[int]]]
WORLD = "world"


@dataclass(frozen=True)
class Hello:
    """First answer of a fresh worker actor.

    Attributes:
        place: where it runs. attached: it reaches the driver's shared memory, so it is local to the driver.
        why_not: the reason in words where it does not. store: (host, port) of the port it holds for the group's store.
        pid_space: where its pid means something; see segment.pid_space.
    """

    place: WorkerPlace
    attached: bool
    why_not: str
    store: tuple[str, int]
    pid_space: str


@dataclass(frozen=True)
class StartSpec:
    """Everything a worker needs to become rank `rank.rank`.

    Attributes:
        worker: pickle of (class, args, kwargs) of the user's worker. requests: queue of requests to all ranks.
        control: queue of orders to all ranks' control threads. It attaches to both later, when told to.
        replies_local: the driver reads this rank's replies through shared memory. store: where rank 0 serves the store.
        lazy_groups: the declared groups connect when first used, not before the constructor.
        driver_pid, driver_nice: the driver's process id and niceness, where this worker can see it, else None.
    """

    rank: RankPlace
    world_size: int
    epoch: int
    worker: bytes
    requests: Handle
    control: Handle
    replies_local: bool
    groups: Groups
    lazy_groups: bool
    backend: str
    store: tuple[str, int]
    driver_pid: int | None
    driver_nice: int | None


@dataclass(frozen=True)
class Started:
    """A worker's answer to its StartSpec: its reply queue, or the frames of the error that its start raised.

    stacks_fd: its descriptor of the file with its stacks; see control.StackFile.
    """

    replies: Handle | None
    error: list[Buffer]
    stage: str
    seconds: float
    stacks_fd: int


@dataclass(frozen=True)
class Reform:
    """An order to form the coordinator groups `names` ([]: all) again as `epoch`, on the store at `store`.

    dead: ranks that are gone; a group with one of them is of no use before the next formation.
    """

    names: list[str]
    epoch: int
    store: tuple[str, int]
    dead: list[int]


def require_groups(groups: Groups | None, world_size: int) -> dict[str, list[list[int]]]:
    """A checked copy of the groups a caller declares.

    Raises:
        ValueError: the name "world", a rank that does not exist, or a rank twice under one name.
    """
    checked: dict[str, list[list[int]]] = {}
    for name, lists in (groups or {}).items():
        if name == WORLD:
            raise ValueError(f"the group name {WORLD!r} is reserved: every rank is in it without a declaration")
        checked[name] = [list(ranks) for ranks in lists]
        flat = [rank for ranks in checked[name] for rank in ranks]
        wrong = sorted({r for r in flat if not isinstance(r, int) or not 0 <= r < world_size})
        twice = sorted({r for r in flat if flat.count(r) > 1})
        if wrong or twice or not flat or not all(checked[name]):
            raise ValueError(
                f"group {name!r} = {checked[name]}: give non-empty, disjoint lists of ranks 0..{world_size - 1}"
                + (f"; there is no rank {wrong}" if wrong else "")
                + (f"; ranks {twice} appear twice" if twice else "")
            )
    return checked
