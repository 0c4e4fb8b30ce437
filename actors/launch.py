"""launch(): from a class and a number to a running group. Runs in the driver's process.

    ray.init if need be -> reserve bundles -> create actors -> hello (where, which GPUs, does it see our memory)
      -> ranks -> queues -> start (groups, constructor) -> run -> ready

Whatever fails on the way, all that was made is taken back before the error is raised.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.cloudpickle
from ray.util.client import ray as client_ray
from ray.util.placement_group import PlacementGroup

from ray_shm import codec, futex
from ray_shm.actors import wire
from ray_shm.actors.group import ActorGroup
from ray_shm.actors.progress import Progress
from ray_shm.actors.runtime import GroupRuntime, Rank
from ray_shm.actors.spec import Groups, Hello, Started, StartSpec, require_groups
from ray_shm.actors.starting import gather
from ray_shm.actors.worker import WorkerActor
from ray_shm.deadline import Deadline
from ray_shm.errors import RayShmError, StartError
from ray_shm.placement import devices
from ray_shm.placement.bundles import Reservation, WorkerResources, reserve
from ray_shm.placement.topology import RankPlace, assign_ranks
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.segment import Segment, pid_space

CHUNK_BYTES, CHUNKS = 24 << 20, 10  # bound of unread requests, as MessageQueue's default
TRANSPORTS = ("auto", "shm", "zmq")
BACKENDS = ("auto", "gloo", "nccl")


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
            connected before the constructor runs. "world" is always there, and connects when first used.
        backend: of the coordinator groups: "gloo", "nccl", or "auto" (nccl where there are GPUs).
        driver: "auto" or "local": the queues live in this process, and the group ends with it.
        name, namespace, lifetime: of a driver actor, which this version does not have: leave `name` and `lifetime` out.
        transport: "auto" (shared memory where it can be reached, else ZeroMQ), "shm" or "zmq" for all ranks.
        runtime_env: of the actors, as Ray knows it.
        start_timeout: seconds until the group must be ready.

    Raises:
        ValueError, TypeError: wrong arguments; nothing was started.
        PlacementError: the cluster cannot place the workers in time.
        StartError: a worker died or raised while starting, or was late; `failures` has each rank's exception.
        After each of these nothing is left: no actor, placement group, memory, or port.
    """
    _require_arguments(worker_cls, num_workers, transport, backend, driver, name, lifetime, start_timeout)
    declared = require_groups(groups, num_workers)
    resources = WorkerResources(cpus_per_worker, gpus_per_worker, dict(resources_per_worker or {}))
    payloads = _pickle_workers(worker_cls, args, kwargs or {}, num_workers)
    deadline = Deadline.after(start_timeout)
    progress = Progress(worker_cls.__name__)
    _ensure_ray(progress)
    progress(f"placing {num_workers} workers, each with {resources.bundle()}")
    reservation = reserve(
        num_workers,
        resources,
        placement_group=placement_group,
        strategy=strategy,
        bundle_label_selector=bundle_label_selector,
        deadline=deadline,
        name=f"{namespace}:{worker_cls.__name__}:{secrets.token_hex(4)}",  # unique: Ray refuses a name twice
        progress=progress,
    )
    runtime = GroupRuntime(worker_cls.__name__, reservation)
    try:
        _Launch(runtime, progress, deadline, transport, backend).run(resources, payloads, declared, runtime_env)
        progress(f"ready: {runtime.summary()}")
    except BaseException:
        runtime.abort()
        raise
    return ActorGroup(runtime)


class _Launch:
    """The steps of one start, in order. What they make is registered with the runtime at once, which can abort."""

    def __init__(
        self, runtime: GroupRuntime, progress: Progress, deadline: Deadline, transport: str, backend: str
    ) -> None:
        self._runtime = runtime
        self._progress = progress
        self._deadline = deadline
        self._transport = transport
        self._backend = backend

    def run(
        self,
        resources: WorkerResources,
        payloads: list[bytes],
        groups: Groups,
        runtime_env: dict[str, Any] | None,
    ) -> None:
        actors = self._create_actors(self._runtime.reservation, resources, runtime_env, len(payloads))
        hellos = self._hello(actors)
        devices.verify([h.place for h in hellos], resources.gpus)
        ranks = assign_ranks([h.place for h in hellos], ray.get_runtime_context().get_node_id())
        actor_of = {h.place.bundle_index: (actor, h) for actor, h in zip(actors, hellos, strict=True)}
        placed = [(rank, *actor_of[rank.place.bundle_index]) for rank in ranks]
        requests = self._make_requests(placed)
        started = self._start(placed, requests, payloads, groups)
        self._connect(placed, requests, started)

    def _create_actors(
        self, reservation: Reservation, resources: WorkerResources, runtime_env: dict[str, Any] | None, count: int
    ) -> list[Any]:
        actor_class = ray.remote(WorkerActor)
        self._progress(f"starting {count} worker processes")
        for i in range(count):
            options = {**resources.actor_options(), "scheduling_strategy": reservation.scheduling_strategy(i)}
            if runtime_env:
                options["runtime_env"] = runtime_env
            self._runtime.actors.append(actor_class.options(**options).remote(reservation.bundle_indices[i]))
        return self._runtime.actors

    def _hello(self, actors: list[Any]) -> list[Hello]:
        probe = None if self._transport == "zmq" else _probe()
        with probe or contextlib.nullcontext():
            refs = [actor.hello.remote(probe.ref if probe else None) for actor in actors]
            labels = [f"bundle {i}" for i in self._runtime.reservation.bundle_indices]
            hellos: list[Hello] = gather(refs, labels, "start its process", self._deadline, self._progress)
        far = [h for h in hellos if not h.attached]
        if self._transport == "shm" and far:
            raise StartError(
                f'transport="shm" but {len(far)} of {len(hellos)} workers cannot reach the driver\'s shared memory: '
                f'pid {far[0].place.pid} on {far[0].place.node_ip}: {far[0].why_not} Use transport="auto".'
            )
        return hellos

    def _make_requests(self, placed: list[tuple[RankPlace, Any, Hello]]) -> QueueWriter:
        local = [rank.rank for rank, _, hello in placed if hello.attached]
        remote = [rank.rank for rank, _, hello in placed if not hello.attached]
        ip = ray.util.get_node_ip_address()
        requests = QueueWriter(local, remote, CHUNK_BYTES, CHUNKS, ip, watch_readers=False)
        self._runtime.requests = requests
        return requests

    def _start(
        self,
        placed: list[tuple[RankPlace, Any, Hello]],
        requests: QueueWriter,
        payloads: list[bytes],
        groups: Groups,
    ) -> list[Started]:
        refs = []
        own_space = pid_space()
        for rank, actor, hello in placed:
            visible = hello.pid_space == own_space
            spec = StartSpec(
                rank=rank,
                world_size=len(placed),
                epoch=0,
                worker=payloads[rank.rank],
                requests=requests.handle,
                replies_local=hello.attached,
                groups=groups,
                backend=self._backend,
                store=placed[0][2].store,
                driver_pid=os.getpid() if visible else None,
                driver_nice=os.getpriority(os.PRIO_PROCESS, 0) if visible else None,
            )
            refs.append(actor.start.remote(spec))
            self._runtime.ranks[rank.rank] = Rank(rank, actor, "shm" if hello.attached else "zmq", visible)
        labels = [f"rank {r.rank} (pid {r.place.pid}, node {r.place.node_ip})" for r, _, _ in placed]
        return gather(refs, labels, "start", self._deadline, self._progress, _failure)

    def _connect(
        self, placed: list[tuple[RankPlace, Any, Hello]], requests: QueueWriter, started: list[Started]
    ) -> None:
        for (rank, _, _), answer in zip(placed, started, strict=True):
            if answer.replies is None:
                raise StartError(f"rank {rank.rank} gave no reply queue: a bug in ray-shm")
            self._runtime.replies[rank.rank] = QueueReader(answer.replies, 0)
        self._runtime.go()
        try:
            requests.wait_until_ready(self._deadline)
            for reader in self._runtime.replies.values():
                if reader.shm is not None:  # the others belong to the thread of RemoteReplies by now
                    reader.wait_until_ready(self._deadline)
            self._runtime.check_health(self._deadline.remaining())
        except (TimeoutError, RayShmError) as exc:
            raise StartError(f"the workers started, but the group does not answer: {exc}") from exc


def _require_arguments(
    worker_cls: type,
    num_workers: int,
    transport: str,
    backend: str,
    driver: str,
    name: str | None,
    lifetime: str | None,
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
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {BACKENDS}")
    if driver not in ("auto", "local") or name is not None or lifetime is not None:
        raise ValueError(
            "this version has local drivers only: leave out driver='actor', name and lifetime. "
            "The group ends with the process that launched it."
        )
    if start_timeout <= 0:
        raise ValueError(f"start_timeout={start_timeout} must be more than 0 seconds")
    if transport == "shm":
        futex.require_supported()


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
    if client_ray.is_connected():
        raise StartError(
            "this process is a Ray Client (ray://), which has no shared memory or sockets in the cluster; "
            "run launch() on a node of the cluster, or inside a Ray task or actor"
        )
    if not ray.is_initialized():
        progress("starting Ray")
        ray.init(logging_level="warning")


def _probe() -> Segment | None:
    """A page of shared memory to find out which workers can attach to ours; None where there is none."""
    try:
        futex.require_supported()
    except StartError:
        return None
    return Segment.create(4096, "probe")


def _failure(answer: Started, rank: int) -> tuple[str, BaseException] | None:
    """(what failed, the exception) where a worker's start raised."""
    if not answer.error:
        return None
    return answer.stage, wire.decode_reply(answer.error).error()
