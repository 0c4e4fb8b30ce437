"""connect() to a group that another process launched, and how a driver actor comes to be. Runs in the caller's process.

A driver actor is made on the node where most of its workers will be. Only Ray knows where that is, once it has
reserved their bundles, and what is reserved has to belong to the actor: so it reserves, says where, and where another
node is better, gives back and makes room for one there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.client import ray as client_ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_shm.actors import driver_line, termination
from ray_shm.actors.client import ClientRuntime, Ticket
from ray_shm.actors.driver_actor import MAX_CONCURRENCY, DriverActor, Seat
from ray_shm.deadline import Deadline
from ray_shm.errors import StartError
from ray_shm.segment import pid_space

if TYPE_CHECKING:
    from ray_shm.actors.group import ActorGroup
    from ray_shm.actors.group_start import Bundles, GroupSpec

_SEATS = 3  # nodes to try; Ray may place anew somewhere else
_SLACK = 15.0  # seconds beyond the timeout for the actor to say that it has come
_NAME_FREE = 10.0  # seconds until Ray gives the name of a killed actor away


def connect(name: str, namespace: str = "ray_shm") -> ActorGroup:
    """A handle of the group that was launched under `name`, from any process of the cluster.

    Several processes may call the group at once; their replies never cross. ``close()`` and leaving a ``with`` let go
    of the group; ``shutdown()`` ends it for everybody. Joins a running Ray cluster if this process has none.

    Raises:
        ValueError: no such name; it lists those there are. StartError: no cluster, or no answer. GroupClosedError.
    """
    from ray_shm.actors.group import ActorGroup

    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level="warning")
        except ConnectionError as exc:
            raise StartError(f"there is no Ray cluster to look for {name!r} in: {exc}") from exc
    try:
        actor = ray.get_actor(name, namespace)
    except ValueError as exc:
        raise ValueError(f"there is no actor group {name!r} in namespace {namespace!r}; {_names(namespace)}") from exc
    runtime = ClientRuntime(Ticket(actor, f"driver actor {name!r}"))
    runtime.join()
    return ActorGroup(runtime)


def _names(namespace: str) -> str:
    named = ray.util.list_named_actors(all_namespaces=True)
    here = sorted(str(row["name"]) for row in named if row["namespace"] == namespace)
    others = sorted({str(row["namespace"]) for row in named} - {namespace})
    found = f"it has {', '.join(map(repr, here))}" if here else "it has none"
    return found + (f" (other namespaces with actors: {', '.join(others)})" if others else "")


def start_driver(
    spec: GroupSpec,
    bundles: Bundles,
    name: str | None,
    namespace: str,
    lifetime: str | None,
    deadline: Deadline,
    progress: Callable[[str], None],
) -> ClientRuntime:
    """Launch a group in a driver actor, and join it.

    Raises:
        ValueError: the name is taken. PlacementError, StartError: see `launch`; nothing is left.
    """
    if bundles.placement_group is None and not client_ray.is_connected():
        current = get_current_placement_group()  # the actor does not run in it
        if current is not None and bundles.label_selector is None:
            bundles = replace(bundles, placement_group=current)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": MAX_CONCURRENCY}
    if name is not None:
        options.update(name=name, namespace=namespace, lifetime=lifetime)
    actor, seat = _seat(options, bundles, deadline, progress)
    pids = [seat.pid] if seat.pid_space == pid_space() else []
    try:
        progress(f"driver actor: pid {seat.pid} on node {seat.node_id[:8]}")
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        _ask(actor.launch, spec, deadline.remaining(), niceness, deadline=deadline)
        label = f"driver actor {name!r}" if name is not None else "a driver actor"
        runtime = ClientRuntime(Ticket(actor, label), owned=lifetime != "detached")
        runtime.join()
    except BaseException:
        termination.kill([actor], pids)
        raise
    return runtime


def _seat(
    options: dict[str, Any], bundles: Bundles, deadline: Deadline, progress: Callable[[str], None]
) -> tuple[Any, Seat]:
    """A driver actor that has reserved the bundles, on the node with most of them, or near it."""
    node = None if client_ray.is_connected() else ray.get_runtime_context().get_node_id()
    soft = True
    for attempt in range(1, _SEATS + 1):
        strategy = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft)
        actor = _create({**options, "scheduling_strategy": strategy}, deadline if attempt > 1 else Deadline.after(0))
        try:
            seat: Seat = _ask(actor.reserve, bundles, deadline.remaining(), deadline=deadline)
            if seat.node_id == seat.best_node_id or attempt == _SEATS:
                return actor, seat
            progress(f"most workers will be on node {seat.best_node_id[:8]}: the driver actor moves there")
            _ask(actor.give_back, deadline=deadline)
        except BaseException:
            termination.kill([actor], [])
            raise
        termination.kill([actor], [seat.pid] if seat.pid_space == pid_space() else [])
        node, soft = seat.best_node_id, attempt + 1 == _SEATS
    raise StartError("no node for the driver actor: a bug in ray-shm")


def _create(options: dict[str, Any], name_free: Deadline) -> Any:
    """Raises ValueError: the name is taken, and was not given free by the deadline."""
    patience = Deadline.after(name_free.slice(_NAME_FREE))
    while True:
        try:
            return ray.remote(DriverActor).options(**options).remote()
        except ValueError as exc:
            name = options.get("name")
            if name is None or "taken" not in str(exc):
                raise
            if patience.expired():
                raise ValueError(
                    f"the name {name!r} is taken in namespace {options['namespace']!r}: reach that group with "
                    f"ray_shm.connect({name!r}, namespace={options['namespace']!r}), or launch under another name"
                ) from exc
            time.sleep(0.02)


def _ask(method: Any, *args: Any, deadline: Deadline) -> Any:
    return driver_line.ask(method, *args, timeout=deadline.slice(1e6) + _SLACK)
