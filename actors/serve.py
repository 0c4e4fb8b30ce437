"""Ray Serve: one replica owns one actor group, placed in the replica's own placement group.

    Serve's controller ── placement group per replica ──► bundle 0: GroupReplica, the driver of its group
                                                          bundles 1..N: its workers, one each

`deployment_options` runs wherever the application is built; GroupReplica runs in the replica's process, on the thread
of Serve's user event loop, which is not the main thread. Imports no Serve: it only gives Serve what Serve looks for.
Whatever ends the replica ends its group: a scale-down through ``__del__``, a SIGKILL since workers watch their driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.placement_group import get_current_placement_group, placement_group_table

from ray_shm.actors.call import Reduce
from ray_shm.actors.group import ActorGroup
from ray_shm.actors.launch import launch
from ray_shm.actors.wire import Method
from ray_shm.actors.worker import ping
from ray_shm.errors import GroupClosedError, PlacementError
from ray_shm.placement.bundles import STRATEGIES, WorkerResources
from ray_shm.placement.occupancy import Claim

# Serve replaces a replica after three failed checks in a row; with its default of 10 s between them, a replica that has
# lost a worker would go on failing requests for half a minute. A check is one empty call of the group.
HEALTH_CHECK_PERIOD = 2.0  # seconds
_DECIDED_HERE = ("placement_group_bundles", "placement_group_strategy")
_DECIDED_BY_SERVE = ("placement_group", "strategy", "bundle_label_selector", "driver", "name", "namespace", "lifetime")


def deployment_options(
    num_workers: int,
    *,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 0,
    resources_per_worker: Mapping[str, float] | None = None,
    replica_cpus: float = 1,
    strategy: str = "PACK",
    **more: Any,
) -> dict[str, Any]:
    """Keywords for ``@serve.deployment(...)`` or ``Deployment.options(...)`` of a GroupReplica.

    Args:
        num_workers: workers of each replica's group, 1 or more.
        gpus_per_worker, cpus_per_worker, resources_per_worker: what each worker gets, as in `ray_shm.launch`.
        replica_cpus: CPU cores of the replica itself, which only passes calls on.
        strategy: of the replica's placement group: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        more: further options, as Serve knows them: ``autoscaling_config``, ``max_ongoing_requests``, ... What
            ``ray_actor_options`` asks for besides CPUs is the replica's own. ``health_check_period_s`` is 2 s unless
            given; ``health_check_timeout_s`` (Serve's 30 s) bounds how long a group may be busy before it counts as
            stuck.

    Raises:
        TypeError: an option that is decided here, or a num_workers that is no int.
        ValueError: wrong amounts, an unknown strategy, an option that Serve has not for replicas with bundles.
    """
    if not isinstance(num_workers, int) or isinstance(num_workers, bool):
        raise TypeError(f"num_workers must be an int, not {num_workers!r}")
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}: a replica's group needs at least 1 worker")
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; Ray has {', '.join(STRATEGIES)}")
    if taken := [name for name in _DECIDED_HERE if name in more]:
        raise TypeError(
            f"{' and '.join(taken)}: made here from num_workers, *_per_worker, replica_cpus and strategy; leave it out"
        )
    if more.get("max_replicas_per_node") is not None:
        raise ValueError("Serve has no max_replicas_per_node for replicas with a placement group; leave it out")
    actor_options, own_bundle = _replica(replica_cpus, more.pop("ray_actor_options", None) or {})
    worker = WorkerResources(cpus_per_worker, gpus_per_worker, dict(resources_per_worker or {}))
    return {
        "placement_group_bundles": [own_bundle, *(worker.bundle() for _ in range(num_workers))],
        "placement_group_strategy": strategy,
        "ray_actor_options": actor_options,
        "health_check_period_s": HEALTH_CHECK_PERIOD,
        **more,
    }


class GroupReplica:
    """A Serve deployment whose every replica owns one group of `worker_cls`. To be subclassed, or used as it is::

        @serve.deployment(**deployment_options(4, gpus_per_worker=1, max_ongoing_requests=64))
        class Model(GroupReplica):
            async def __call__(self, request):
                return await self.collective_rpc("generate", args=(await request.json(),), unique_reply_rank=0)

        serve.run(Model.bind(Worker, args=("path/to/weights",)))

    Calls of concurrent requests overlap and never block the event loop. What a worker raises is the error of that
    request (an RpcError to callers of a handle, status 500 over HTTP); the replica stays usable. The constructor
    returns once the group is ready. A subclass with an ``__init__``, ``check_health`` or ``__del__`` of its own calls
    this class's in it.

    Args:
        worker_cls: any class, as for `ray_shm.launch`.
        launch_options: as for `ray_shm.launch`: ``args``, ``kwargs``, ``groups``, ``backend``, ``transport``,
            ``runtime_env``, ``start_timeout``. How many workers and what each gets is read off the replica's placement
            group, and needs no saying twice.

    Attributes:
        group: the ActorGroup; its blocking methods block the event loop, so await its `collective_rpc_async`.

    Raises:
        TypeError: an option that Serve decides. PlacementError: no placement group, or one that does not fit.
        StartError: as `ray_shm.launch`. After each of these nothing is left, and Serve tries again or gives up.
    """

    _group: ActorGroup | None = None  # the class attribute is for __del__ after a failed start
    _own_bundle: Claim | None = None

    def __init__(self, worker_cls: type, **launch_options: Any) -> None:
        if taken := [name for name in _DECIDED_BY_SERVE if name in launch_options]:
            raise TypeError(
                f"{' and '.join(taken)}: a replica's group sits in the replica's placement group and ends with it; "
                "leave it out here, and give deployment_options() what concerns placement"
            )
        own_bundle, shares = _placement()
        self._own_bundle = own_bundle
        try:
            self._group = launch(worker_cls, **{**shares, **launch_options})
        except BaseException:
            own_bundle.release()
            raise

    @property
    def group(self) -> ActorGroup:
        if self._group is None:
            raise GroupClosedError("this replica has no group: GroupReplica.__init__ was not called, or it failed")
        return self._group

    async def collective_rpc(
        self,
        method: Method,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        target_ranks: Sequence[int] | None = None,
        unique_reply_rank: int | None = None,
        reduce: Reduce | None = None,
    ) -> Any:
        """`ActorGroup.collective_rpc_async` of the group; through a handle: ``handle.collective_rpc.remote(...)``.

        Over HTTP nobody gets here unless a subclass's ``__call__`` lets them.
        """
        return await self.group.collective_rpc_async(
            method,
            timeout,
            args,
            kwargs,
            target_ranks=target_ranks,
            unique_reply_rank=unique_reply_rank,
            reduce=reduce,
        )

    async def check_health(self) -> None:
        """What Serve calls; after three failures in a row it replaces the replica.

        Has no timeout of its own: how long a busy group may take to answer is Serve's ``health_check_timeout_s``.

        Raises:
            RpcError: a worker is dead. GroupClosedError.
        """
        await self.group.collective_rpc_async(ping)

    def __del__(self) -> None:
        # Serve calls this, and nothing else, when it stops a replica: on its event loop, after the last request. Being
        # killed instead (a stop that takes longer than graceful_shutdown_timeout_s) ends the group, too, less gently.
        if self._group is not None:
            self._group.close()
        if self._own_bundle is not None:
            self._own_bundle.release()
            self._own_bundle = None


def _replica(cpus: float, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The replica's own actor options, and the bundle that holds them."""
    if "num_cpus" in options:
        raise TypeError("ray_actor_options has num_cpus: give replica_cpus instead")
    custom = dict(options.get("resources") or {})
    if options.get("memory"):
        custom["memory"] = options["memory"]
    resources = WorkerResources(cpus, options.get("num_gpus") or 0, custom)
    return {**options, "num_cpus": cpus}, resources.bundle()


def _placement() -> tuple[Claim, dict[str, Any]]:
    """A claim on the replica's own bundle, and what to launch in the others."""
    placement_group = get_current_placement_group()
    bundles: Mapping[int, Mapping[str, float]] = {}
    if placement_group is not None:
        bundles = placement_group_table(placement_group)["bundles"]
    if placement_group is None or len(bundles) < 2:
        raise PlacementError(
            f"this process (bundles: {dict(bundles) or 'none'}) has no bundles for a group's workers: "
            "deploy with serve.deployment(**ray_shm.serve.deployment_options(num_workers, ...))"
        )
    shares = [dict(bundles[index]) for index in sorted(bundles)[1:]]
    if any(share != shares[0] for share in shares):
        raise PlacementError(f"the workers' bundles differ: {shares}; deploy with deployment_options()")
    # Ray's view of what is free lags: without the claim a worker could be put into bundle 0, and wait there for ever.
    return Claim(placement_group, [0], bundles[0]), {
        "num_workers": len(shares),
        "cpus_per_worker": shares[0].pop("CPU", 0),
        "gpus_per_worker": shares[0].pop("GPU", 0),
        "resources_per_worker": shares[0],
    }
