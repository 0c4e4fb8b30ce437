"""What the driver tells a worker to start with, and what the worker answers: values that travel through Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_shm.connection import BACKENDS
from ray_shm.handle import Handle
from ray_shm.placement.topology import RankPlace, WorkerPlace
from ray_shm.ring import Buffer

Groups = Mapping[str, list[list[int]]]
WORLD = "world"


@dataclass(frozen=True)
class GroupPlan:
    """A coordinator group as it was declared: disjoint lists of ranks, each of which is connected, and the backend."""

    lists: list[list[int]]
    backend: str

    @property
    def members(self) -> list[int]:
        return sorted(rank for ranks in self.lists for rank in ranks)


Plans = Mapping[str, GroupPlan]


@dataclass(frozen=True)
class Hello:
    """First answer of a fresh worker actor.

    Attributes:
        place: where it runs. attached: it reaches the driver's shared memory, so it is local to the driver.
        why_not: the reason in words where it does not. pid_space: where its pid means something; see segment.pid_space.
    """

    place: WorkerPlace
    attached: bool
    why_not: str
    pid_space: str


@dataclass(frozen=True)
class StartSpec:
    """Everything a worker needs to become rank `rank.rank`.

    Attributes:
        worker: pickle of (class, args, kwargs) of the user's worker. requests: queue of requests to all ranks.
        control: queue of orders to all ranks' control threads. It attaches to both later, when told to.
        replies_local: the driver reads this rank's replies through shared memory.
        groups: those declared. lazy_groups: they connect when first used, not before the constructor. backend: of the
        group "world". store: where rank 0 serves the store. port_range: ports for what listens to other nodes, or None.
        driver_pid, driver_nice: the driver's process id and niceness, where this worker can see it, else None.
    """

    rank: RankPlace
    world_size: int
    epoch: int
    worker: bytes
    requests: Handle
    control: Handle
    replies_local: bool
    groups: Plans
    lazy_groups: bool
    backend: str
    store: tuple[str, int]
    port_range: tuple[int, int] | None
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
class Form:
    """An order to form the coordinator groups `plans`, which are new, now; those who are in none only note the names.

    store: where rank 0 serves the store.
    """

    plans: Plans
    epoch: int
    store: tuple[str, int]


@dataclass(frozen=True)
class Reform:
    """An order to form the coordinator groups `names` ([]: all) again as `epoch`, on the store at `store`.

    dead: ranks that are gone, and where they were; a group with one of them is of no use before the next formation.
    plans: all groups there are, for those who may have missed orders; None: nobody has.
    """

    names: list[str]
    epoch: int
    store: tuple[str, int]
    dead: dict[int, str]
    plans: Plans | None = None


@dataclass(frozen=True)
class Dissolve:
    """An order to destroy the coordinator groups `names`, as far as they came about.

    epoch: of a formation that failed, which is over now; None: of none.
    """

    names: list[str]
    epoch: int | None = None


def require_groups(groups: Groups | None, world_size: int, backend: str = "auto") -> dict[str, GroupPlan]:
    """The groups a caller declares, checked and copied.

    Raises:
        ValueError: the name "world", a rank that does not exist, a rank twice under one name, or no such backend.
        TypeError: not a mapping of names to lists of lists of ranks.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {BACKENDS}")
    if not isinstance(groups or {}, Mapping):
        raise TypeError(
            f'groups must map names to lists of lists of ranks, as {{"tp": [[0, 1], [2, 3]]}}, not {groups!r}'
        )
    return {name: GroupPlan(_require_lists(name, lists, world_size), backend) for name, lists in (groups or {}).items()}


def _require_lists(name: str, lists: Iterable[Iterable[int]], world_size: int) -> list[list[int]]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"group name {name!r}: give a name that is not empty")
    if name == WORLD:
        raise ValueError(f"the group name {WORLD!r} is reserved: every rank is in it without a declaration")
    try:
        copied = [list(ranks) for ranks in lists]
    except TypeError as exc:
        raise TypeError(f"group {name!r} = {lists!r}: give a list of lists of ranks, as [[0, 1], [2, 3]]") from exc
    flat = [rank for ranks in copied for rank in ranks]
    wrong = sorted((r for r in flat if not isinstance(r, int) or not 0 <= r < world_size), key=repr)
    twice = sorted({r for r in flat if isinstance(r, int) and flat.count(r) > 1})
    if wrong or twice or not flat or not all(copied):
        raise ValueError(
            f"group {name!r} = {copied}: give non-empty, disjoint lists of ranks 0..{world_size - 1}"
            + (f"; there is no rank {wrong}" if wrong else "")
            + (f"; ranks {twice} appear twice: overlapping groups need a name each" if twice else "")
        )
    return copied
