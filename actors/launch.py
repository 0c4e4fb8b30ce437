"""launch(): from a class and a number to a running group. Runs in the process that calls it.

The arguments are checked and the worker class is pickled here; group_start.py does the rest, here or in a driver actor.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.cloudpickle
from ray.util.client import ray as client_ray
from ray.util.placement_group import PlacementGroup

from ray_shm import codec, futex
from ray_shm.actors import wire
from ray_shm.actors.call import CallOptions
from ray_shm.actors.client import ClientRuntime
from ray_shm.actors.connect import start_driver
from ray_shm.actors.group import ActorGroup
from ray_shm.actors.group_start import Bundles, GroupSpec, start_group
from ray_shm.actors.progress import Progress
from ray_shm.actors.runtime import GroupRuntime
from ray_shm.actors.spec import Groups, require_groups
from ray_shm.deadline import Deadline
from ray_shm.placement.bundles import WorkerResources
from ray_shm.placement.ports import require_port_range

DRIVERS = ("auto", "local", "actor")
TRANSPORTS = ("auto", "shm", "zmq")


def launch(
    worker_cls: type,
    *,
    num_workers: int,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 0,
    resources_per_worker: Mapping[str, float] | None = None,
    placement_group: PlacementGroup | None = None,
    strategy: str = "PACK",
    bundle_label_selector: Any = None,
    groups: Groups | None = None,
    backend: str = "auto",
    name: str | None = None,
    namespace: str = "ray_shm",
    lifetime: str | None = None,
    driver: str = "auto",
    transport: str = "auto",
    runtime_env: dict[str, Any] | None = None,
    start_timeout: float = 120.0,
    auto_heal: bool = False,
    max_in_flight: int = 10_000,
    failure_grace: float = 2.0,
    slow_call_warning: float | None = 10.0,
    port_range: tuple[int, int] | None = None,
) -> ActorGroup:
    """Start `num_workers` Ray actors that each hold a `worker_cls`, and connect them for collective calls.

    Starts a local Ray if none runs. Ranks are numbered by node, the driver's first, then by GPU.

    Args:
        worker_cls: any class; one of ``__main__`` or a notebook cell works, too. No base class.
        num_workers: 1 or more.
        args, kwargs: for the constructor; a `Scatter` value gives rank k its element k.
        gpus_per_worker, cpus_per_worker, resources_per_worker: what each worker asks Ray for.
        placement_group: bundles to use; default: the current placement group when called inside one, else a new one,
            with `strategy` and `bundle_label_selector` as Ray knows them, which the group owns.
        groups: coordinator groups by name, each a list of disjoint lists of ranks, e.g. ``{"tp": [[0, 1], [2, 3]]}``;
            connected before the constructor runs. "world" is always there, and connects when first used. More can be
            made later: `ActorGroup.create_groups`.
        backend: of the coordinator groups: "gloo", "nccl", or "auto" (nccl where there are GPUs).
        driver: "local": the queues live in this process (lowest latency), and the group ends with it. "actor": they
            live in a Ray actor on the node with most workers, through which several processes can call the group.
            "auto": an actor where `name` or `lifetime` is given or this process is a Ray Client, else local.
        name, namespace: of the driver actor, for `connect` and ``ray.get_actor``.
        lifetime: "detached": the group outlives this process, until ``shutdown()``. None: it ends with this process.
        transport: "auto" (shared memory where it can be reached, else ZeroMQ), "shm" or "zmq" for all ranks.
        runtime_env: of the actors, as Ray knows it.
        start_timeout: seconds until the group must be ready.
        auto_heal: replace ranks that die, as `ActorGroup.heal` does; calls that need them wait meanwhile.
        max_in_flight: calls under way at once; one more waits, as long as its timeout allows, until one has ended.
        failure_grace: seconds that the other ranks of a call get after one has raised; none after a death.
        slow_call_warning: seconds after which a call that somebody waits for is logged, with the late ranks and where
            they stand, and again after twice as long; None: never.
        port_range: (first, last) TCP port, for clusters with a firewall: the groups' store on rank 0's node, and the
            queues to and from ranks on other nodes listen there. A group needs 1 port on rank 0's node, 1 for each
            remote rank on its node, and 2 on the driver's. Default: any free port. Gloo and NCCL take no such range:
            their listeners take ports of the kernel's ``net.ipv4.ip_local_port_range``.

    Raises:
        ValueError, TypeError: wrong arguments, or a name that is taken; nothing was started.
        PlacementError: the cluster cannot place the workers in time.
        StartError: a worker died or raised while starting, or was late; `failures` has each rank's exception.
        After each of these nothing is left: no actor, placement group, memory, or port.
    """
    _require_arguments(worker_cls, num_workers, transport, start_timeout)
    in_actor = _requires_actor(driver, name, lifetime)
    options = _options(failure_grace, slow_call_warning, max_in_flight)
    declared = require_groups(groups, num_workers, backend)
    ports = require_port_range(port_range)
    resources = WorkerResources(cpus_per_worker, gpus_per_worker, dict(resources_per_worker or {}))
    payloads = _pickle_workers(worker_cls, args, kwargs or {}, num_workers)
    deadline = Deadline.after(start_timeout)
    progress = Progress(worker_cls.__name__)
    _ensure_ray(progress)
    unique = f"{namespace}:{worker_cls.__name__}:{secrets.token_hex(4)}"  # Ray refuses a name twice
    bundles = Bundles(num_workers, resources, placement_group, strategy, bundle_label_selector, unique)
    spec = GroupSpec(
        worker_cls.__name__, payloads, resources, declared, backend, transport, runtime_env, ports, auto_heal, options
    )
    runtime: GroupRuntime | ClientRuntime
    if in_actor:
        runtime = start_driver(spec, bundles, name, namespace, lifetime, deadline, progress)
    else:
        runtime = start_group(spec, bundles.reserve(deadline, progress), deadline, progress)
    progress(f"ready: {runtime.summary()}")
    return ActorGroup(runtime)


def _require_arguments(
    worker_cls: type,
    num_workers: int,
    transport: str,
    start_timeout: float,
) -> None:
    """Raises ValueError or TypeError; StartError where shared memory is asked for and not supported."""
    if not isinstance(worker_cls, type):
        raise TypeError(f"worker_cls must be a class, not {worker_cls!r}")
    if not isinstance(num_workers, int) or isinstance(num_workers, bool):
        raise TypeError(f"num_workers must be an int, not {num_workers!r}")
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}: a group needs at least 1 worker")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport={transport!r} is none of {TRANSPORTS}")
    if start_timeout <= 0:
        raise ValueError(f"start_timeout={start_timeout} must be more than 0 seconds")
    if transport == "shm":
        futex.require_supported()


def _requires_actor(driver: str, name: str | None, lifetime: str | None) -> bool:
    """Whether the queues have to live in a driver actor. Raises ValueError: the arguments contradict each other."""
    if driver not in DRIVERS:
        raise ValueError(f"driver={driver!r} is none of {DRIVERS}")
    if lifetime not in (None, "detached"):
        raise ValueError(f'lifetime={lifetime!r}: give "detached" for a group that outlives this process, or None')
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"name={name!r}: give a name that is not empty, or leave it out")
    if lifetime == "detached" and name is None:
        raise ValueError('lifetime="detached" needs name=..., by which ray_shm.connect(name) finds the group later')
    is_client = client_ray.is_connected()
    if driver == "local" and (name is not None or is_client):
        why = "this process is a Ray Client, which has no memory in the cluster" if is_client else f"name={name!r}"
        raise ValueError(f'driver="local", but {why}: give driver="actor", or leave driver out')
    return driver == "actor" or name is not None or is_client


def _options(failure_grace: float, slow_call_warning: float | None, max_in_flight: int) -> CallOptions:
    if failure_grace < 0:
        raise ValueError(f"failure_grace={failure_grace}: give 0 or more seconds")
    if slow_call_warning is not None and slow_call_warning <= 0:
        raise ValueError(f"slow_call_warning={slow_call_warning}: give more than 0 seconds, or None")
    if not isinstance(max_in_flight, int) or max_in_flight < 1:
        raise ValueError(f"max_in_flight={max_in_flight}: give 1 or more calls")
    return CallOptions(failure_grace, slow_call_warning, max_in_flight)


def _pickle_workers(worker_cls: type, args: Sequence[Any], kwargs: Mapping[str, Any], num_workers: int) -> list[bytes]:
    """(class, args, kwargs, the rank's own values) for each rank."""
    codec.use_cloudpickle(ray.cloudpickle)
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple or a list, not {type(args).__name__}")
    common_args, common_kwargs, own = wire.split_scatter(args, kwargs, num_workers)
    try:
        return [
            ray.cloudpickle.dumps((worker_cls, common_args, {**common_kwargs, wire.OWN_VALUES: values}))
            for values in own
        ]
    except Exception as exc:  # whatever a __reduce__ raises
        raise TypeError(f"{worker_cls.__name__} or its constructor arguments cannot be pickled: {exc}") from exc


def _ensure_ray(progress: Callable[[str], None]) -> None:
    if not ray.is_initialized():
        progress("starting Ray")
        ray.init(logging_level="warning")
