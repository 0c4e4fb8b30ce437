"""The reservation a group runs in: a placement group, and one bundle of it per worker. Runs in the driver.

      reserve() ── placement_group given ────────────► use it: wait until it is ready, pick bundles with room
                ├─ called inside a placement group ──► use that one: pick bundles with room, or PlacementError
                └─ neither ──────────────────────────► create one and own it: wait, or PlacementError

Only an owned placement group is ever removed. Creates no actors, and does not decide ranks (see topology).
"""

from __future__ import annotations

import logging
import math
import socket
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.placement_group import placement_group as create_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_shm.deadline import Deadline
from ray_shm.errors import PlacementError
from ray_shm.placement import occupancy
from ray_shm.placement.capacity import Request, can_ever_fit, describe, may_grow, read_nodes, show

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")

_POLL_FIRST, _POLL_LAST = 0.002, 0.1  # s between looks at a pending group: it is placed in 10–40 ms if it can be
_FIRST_JUDGEMENT, _JUDGEMENT_EVERY = 0.1, 1.0  # s until, and between, the question whether it can ever be placed
_FIRST_PROGRESS, _PROGRESS_EVERY = 2.0, 10.0  # s
_SETTLE = 2.0  # s given to bundles that look taken: Ray's view lags, and a group just closed still shows
_REMOVAL = 10.0  # s to wait for Ray to confirm a removal, which takes about 10 ms
_HEAD_ANSWERS = 2.0  # s for a connection to it

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerResources:
    """What one worker asks Ray for.

    Attributes:
        cpus: CPU cores, fractions allowed. gpus: a whole number, or a fraction below 1 of one GPU.
        custom: other resources by name; "memory" is in bytes.

    Raises:
        ValueError: negative or non-finite amounts, 1.5 GPUs, CPU or GPU in `custom`.
    """

    cpus: float = 0
    gpus: float = 0
    custom: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("CPU", "GPU"):
            if name in self.custom:
                raise ValueError(f"{name} is not a custom resource: use {name.lower()}s_per_worker")
        for name, amount in {"CPU": self.cpus, "GPU": self.gpus, **self.custom}.items():
            if not (math.isfinite(amount) and amount >= 0):
                raise ValueError(f"a worker cannot ask for {amount!r} {name}: it must be 0 or more")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"a worker gets whole GPUs or a part of one, not {self.gpus:g}")

    def needs(self) -> dict[str, float]:
        """The resources asked for, without zeros; empty if nothing is."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: float(amount) for name, amount in asked.items() if amount > 0}

    def bundle(self) -> dict[str, float]:
        """The bundle to reserve. Ray refuses an empty one, so a worker that asks for nothing gets a trace of CPU."""
        return self.needs() or {"CPU": 0.001}

    def actor_options(self) -> dict[str, Any]:
        """Keywords for ``ray.remote(...).options``. A GPU bundle gives no GPU to an actor that does not ask for it."""
        custom = {name: amount for name, amount in self.custom.items() if amount > 0}
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if "memory" in custom:
            options["memory"] = custom.pop("memory")
        return {**options, "resources": custom}


class Reservation:
    """One bundle for each worker of a group. A context manager; leaving it removes what is owned.

    Dropped without ``remove()``, an owned, not detached placement group is removed with a ResourceWarning.

    Attributes:
        placement_group: Ray's handle.
        bundle_indices: a bundle per worker, all different, in no meaningful order.
        owned: whether `reserve` created the placement group, and ``remove()`` removes it.
    """

    def __init__(
        self,
        placement_group: PlacementGroup,
        bundle_indices: Sequence[int],
        needs: Mapping[str, float],
        *,
        owned: bool,
        lifetime: str | None = None,
    ) -> None:
        self.placement_group = placement_group
        self.bundle_indices = list(bundle_indices)
        self.owned = owned
        self._claim = occupancy.Claim(placement_group, bundle_indices, needs)
        to_remove = placement_group if owned and lifetime != "detached" else None
        self._finalizer = weakref.finalize(self, _release_dropped, self._claim, to_remove)
        self._finalizer.atexit = False  # at exit Ray removes what is not detached

    def scheduling_strategy(self, i: int) -> PlacementGroupSchedulingStrategy:
        """Puts the `i`-th worker into its bundle. Tasks and actors the worker starts run outside of the group."""
        return PlacementGroupSchedulingStrategy(
            placement_group=self.placement_group,
            placement_group_bundle_index=self.bundle_indices[i],
            placement_group_capture_child_tasks=False,
        )

    def remove(self) -> None:
        """Give the bundles back. Idempotent; also after ``ray.shutdown()``.

        An owned placement group is removed, with every actor still in it, and its removal awaited (10 s at most,
        10 ms as a rule). One that is not owned stays as it is.
        """
        if self._finalizer.detach() is None:
            return
        self._claim.release()
        if self.owned:
            _remove(self.placement_group)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        whose = "owned" if self.owned else "not owned"
        return f"Reservation({self.placement_group.id.hex()}, bundles {self.bundle_indices}, {whose})"


def reserve(
    num_workers: int,
    resources: WorkerResources,
    *,
    placement_group: PlacementGroup | None = None,
    strategy: str = "PACK",
    bundle_label_selector: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    deadline: Deadline,
    name: str = "",
    lifetime: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Reservation:
    """Reserve a bundle for each of `num_workers` workers, and wait until they are placed.

    Args:
        num_workers: 1 or more.
        resources: what each worker asks for.
        placement_group: bundles to use instead of new ones. Without it, and inside a placement group (a Serve
            replica, a training worker), the current one is used; a new group is never nested into it silently.
        strategy: Ray's, for a new placement group; an existing one keeps its own.
        bundle_label_selector: node labels of a new placement group: one selector for all bundles, or one per bundle.
        deadline: when to give up waiting.
        name: of a new placement group. lifetime: None, or "detached" to outlive the caller.
        progress: called with a line of text after 2 s of waiting, then every 10 s.

    Raises:
        ValueError: a request that is wrong in itself.
        PlacementError: not placed by the deadline, or certain never to be (known only of a Ray started by
            ``ray.init()``, whose nodes are all it will have); an existing placement group without enough bundles with
            room. A placement group made here is removed before anything is raised, KeyboardInterrupt included.
    """
    request = Request(num_workers, resources.bundle(), strategy)
    selectors = _validate(request, placement_group, bundle_label_selector, lifetime)
    if placement_group is not None:
        return _use(placement_group, request, resources, deadline, progress, current=False)
    current = get_current_placement_group()
    if current is None:
        return _create(request, resources, selectors, deadline, name, lifetime, progress)
    if selectors is not None:
        raise ValueError(
            "bundle_label_selector cannot change the placement group this process runs in; "
            "pass placement_group= with one that was created with these labels"
        )
    return _use(current, request, resources, deadline, progress, current=True)


def _validate(
    request: Request,
    placement_group: PlacementGroup | None,
    selector: Mapping[str, str] | Sequence[Mapping[str, str]] | None,
    lifetime: str | None,
) -> list[dict[str, str]] | None:
    """The label selectors, one per bundle. Asks Ray nothing."""
    if request.count < 1:
        raise ValueError(f"num_workers must be 1 or more, got {request.count}")
    if request.strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {request.strategy!r}; Ray has {', '.join(STRATEGIES)}")
    if lifetime not in (None, "detached"):
        raise ValueError(f'lifetime must be None or "detached", got {lifetime!r}')
    if placement_group is not None and placement_group.is_empty:
        raise ValueError("placement_group is PlacementGroup.empty(); leave it out to get a new one")
    if selector is None:
        return None
    if placement_group is not None:
        raise ValueError("bundle_label_selector is for a new placement group; the given one has its labels already")
    if isinstance(selector, Mapping):
        return [dict(selector) for _ in range(request.count)]
    if len(selector) != request.count:
        raise ValueError(f"bundle_label_selector has {len(selector)} entries for {request.count} bundles")
    return [dict(s) for s in selector]


# -- a placement group of our own ------------------------------------------------------------------------------------


def _create(
    request: Request,
    resources: WorkerResources,
    selectors: list[dict[str, str]] | None,
    deadline: Deadline,
    name: str,
    lifetime: str | None,
    progress: Callable[[str], None] | None,
) -> Reservation:
    group = create_placement_group(
        [dict(request.bundle) for _ in range(request.count)],
        strategy=request.strategy,
        name=name,
        lifetime=lifetime,
        bundle_label_selector=selectors,
    )
    try:
        _wait_created(group, deadline, _Patience(str(request), request, selectors, progress))
        return Reservation(group, range(request.count), resources.needs(), owned=True, lifetime=lifetime)
    except BaseException:  # KeyboardInterrupt is the likeliest while waiting
        _remove(group)
        raise


class _Patience:
    """How long one wait for a placement group has lasted, and what is to be said and judged meanwhile."""

    def __init__(
        self,
        what: str,
        request: Request | None,  # None for a group that someone else made: its shape is not ours to judge
        selectors: Sequence[Mapping[str, str]] | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._what, self._request, self._selectors, self._progress = what, request, selectors, progress
        self._started = time.monotonic()
        self._next_judgement = self._started + _FIRST_JUDGEMENT
        self._next_progress = self._started + _FIRST_PROGRESS

    def tick(self) -> None:
        """Speak and judge where it is time. Raises PlacementError once it is certain that waiting is in vain."""
        now = time.monotonic()
        if self._request is not None and now >= self._next_judgement:
            self._next_judgement = now + _JUDGEMENT_EVERY
            if not can_ever_fit(read_nodes(), self._request) and not may_grow():
                raise self.error("can never be placed", "This Ray was started by ray.init() and gets no more nodes.")
        if self._progress is not None and now >= self._next_progress:
            self._next_progress = now + _PROGRESS_EVERY
            self._progress(f"waiting for {self._what}: {self._cluster()}")

    def error(self, outcome: str, hint: str) -> PlacementError:
        waited = time.monotonic() - self._started
        labels = f" with node labels {list(self._selectors)}" if self._selectors else ""
        return PlacementError(f"{self._what}{labels} {outcome}, after {waited:.1f} s: {self._cluster()}.\n{hint}")

    def _cluster(self) -> str:
        request = self._request or Request(0, {"CPU": 1.0}, "PACK")
        return describe(read_nodes(), request)


def _wait_created(group: PlacementGroup, deadline: Deadline, patience: _Patience) -> None:
    """Polls: PlacementGroup.wait() counts in whole seconds and holds Ctrl-C back for as long."""
    pause = _POLL_FIRST
    while True:
        group_state = placement_group_table(group).get("state")
        if group_state == "CREATED":
            return
        if group_state in (None, "REMOVED"):
            raise patience.error("cannot be used: the placement group was removed", "Create it anew.")
        if deadline.expired():
            raise patience.error("could not be placed", "Free resources, ask for less, or wait longer (start_timeout).")
        patience.tick()
        time.sleep(deadline.slice(pause))
        pause = min(pause * 1.5, _POLL_LAST)


# -- a placement group that exists ------------------------------------------------------------------------------------


def _use(
    group: PlacementGroup,
    request: Request,
    resources: WorkerResources,
    deadline: Deadline,
    progress: Callable[[str], None] | None,
    *,
    current: bool,
) -> Reservation:
    shapes = Counter(show(spec) for spec in placement_group_table(group).get("bundles", {}).values())
    what = f"placement group {group.id.hex()}, {' + '.join(f'{n} × {shape}' for shape, n in shapes.items())},"
    _wait_created(group, deadline, _Patience(what, None, None, progress))
    settled = Deadline.after(deadline.slice(_SETTLE))
    while True:
        bundles = occupancy.read_bundles(group)
        chosen = _choose(bundles, resources, request.count)
        if chosen is not None:
            return Reservation(group, chosen, resources.needs(), owned=False)
        able = sum(1 for bundle in bundles if occupancy.fits(bundle.unclaimed, resources.needs()))
        if able < request.count or settled.expired():
            raise PlacementError(_explain_bundles(group, bundles, request, resources, current))
        time.sleep(settled.slice(_POLL_LAST))


def _choose(bundles: Sequence[occupancy.Bundle], resources: WorkerResources, count: int) -> list[int] | None:
    """A bundle per worker: empty ones first, and none with GPUs for a worker that wants none, if it can be helped."""
    room = [bundle for bundle in bundles if occupancy.fits(bundle.free, resources.needs())]
    room.sort(key=lambda b: (b.occupied, "GPU" in b.total and not resources.gpus, b.index))
    return [bundle.index for bundle in room[:count]] if len(room) >= count else None


def _explain_bundles(
    group: PlacementGroup,
    bundles: Sequence[occupancy.Bundle],
    request: Request,
    resources: WorkerResources,
    current: bool,
) -> str:
    needs = resources.needs()
    free = [b for b in bundles if occupancy.fits(b.free, needs)]
    taken = [b for b in bundles if occupancy.fits(b.total, needs) and b not in free]
    rows = "\n".join(
        f"  bundle {b.index}: has {show(b.total)}, free {show(b.free)}{', occupied' * b.occupied}" for b in bundles
    )
    role = "which this process runs in" if current else "as given"
    new = f"ray.util.placement_group([{dict(request.bundle)}] * {request.count}, strategy={request.strategy!r})"
    advice = (
        f"To reserve outside of it pass placement_group={new}; or ask for {request.count} bundles "
        f"{show(request.bundle)} more where this process is deployed (on Serve: placement_group_bundles)."
        if current
        else f"Pass placement_group={new}, or close what occupies its bundles."
    )
    return (
        f"{request.count} workers with {show(request.bundle)} each need a bundle each, and placement group "
        f"{group.id.hex()}, {role}, has {len(free)} with room ({len(taken)} more are taken):\n{rows}\n{advice}"
    )


# -- giving back ------------------------------------------------------------------------------------------------------


def _release_dropped(claim: occupancy.Claim, owned: PlacementGroup | None) -> None:
    claim.release()
    if owned is not None and ray.is_initialized():
        _remove(owned, wait=False)
        warnings.warn(f"placement group {owned.id.hex()} was dropped without remove()", ResourceWarning, stacklevel=2)


def remove_abandoned(group: PlacementGroup) -> None:
    """Remove a placement group whose owner is gone, unless that has been done. Waits for nothing, raises nothing."""
    _remove(group, wait=False)


def _remove(group: PlacementGroup, wait: bool = True) -> None:
    """Remove `group` if the Ray that has it still runs. Every Ray call here would start a new Ray otherwise."""
    confirmed = Deadline.after(_REMOVAL if wait else 0.0)
    try:
        if ray.is_initialized() and not _gcs_answers():
            _logger.warning("placement group %s: Ray's head has gone, and its placement groups with it", group.id.hex())
            return
        if ray.is_initialized() and _exists(group):
            remove_placement_group(group)
        while ray.is_initialized() and not confirmed.expired() and _exists(group):
            time.sleep(confirmed.slice(_POLL_FIRST))
    except Exception:  # Ray went away meanwhile: it takes its placement groups along
        _logger.warning("placement group %s: the removal was not confirmed", group.id.hex(), exc_info=True)


def _exists(group: PlacementGroup) -> bool:
    """False also for a group of an earlier Ray."""
    return placement_group_table(group).get("state") not in (None, "REMOVED")


def _gcs_answers() -> bool:
    """Whether Ray's head listens. Calls to one that was killed block for a minute, and then end this process."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _HEAD_ANSWERS).close()
    except OSError:
        return False
    return True
