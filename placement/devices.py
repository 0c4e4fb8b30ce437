"""The GPUs a worker really got, against what was promised. `current_place` runs in the worker, `verify` in the driver.

Ray pins by setting CUDA_VISIBLE_DEVICES in the worker; a user's runtime_env can replace it, and then two ranks share a
GPU without a word. Does not touch the devices themselves and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.util

from ray_shm.errors import PlacementError
from ray_shm.placement.topology import WorkerPlace, sort_gpu_ids

# AMD's runtime reads its own variable, which Ray sets in its stead there.
_VISIBLE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def current_place(bundle_index: int) -> WorkerPlace:
    """Where this process runs. To be called inside the worker actor."""
    context = ray.get_runtime_context()
    visible = [os.environ[name] for name in _VISIBLE_VARIABLES if name in os.environ]
    return WorkerPlace(
        bundle_index=bundle_index,
        node_id=context.get_node_id(),
        node_ip=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        gpu_ids=_assigned_gpu_ids(context),
        cuda_visible_devices=visible[0] if visible else None,
    )


def verify(places: Sequence[WorkerPlace], gpus_per_worker: float, overridden: bool = False) -> None:
    """Check that every worker got the GPUs it was promised, and sees exactly those.

    Args:
        places: what the workers reported.
        gpus_per_worker: a whole number, or a fraction below 1, for which one GPU may be shared.
        overridden: CUDA_VISIBLE_DEVICES was set on purpose by the caller, or Ray was told not to set it: the number of
            GPUs and their sharing are checked, the variable is not.

    Raises:
        PlacementError: a worker with another number of GPUs; one whose CUDA_VISIBLE_DEVICES shows others; two
            workers of a node with the same GPU although whole GPUs were asked for.
    """
    if gpus_per_worker == 0:
        return
    promised = max(1, int(gpus_per_worker))
    for place in places:
        if len(place.gpu_ids) != promised:
            raise PlacementError(
                f"{_name(place)} was promised {gpus_per_worker:g} GPU but Ray assigned it {_ids(place.gpu_ids)}; "
                "is the actor created with num_gpus, in a bundle that has them?"
            )
        if not overridden:
            _verify_visible(place)
    if gpus_per_worker >= 1:
        _verify_exclusive(places)


def _verify_visible(place: WorkerPlace) -> None:
    shown = place.cuda_visible_devices
    if shown is not None and {s.strip() for s in shown.split(",")} == set(place.gpu_ids):
        return
    seen = "is not set" if shown is None else f"is {shown!r}"
    raise PlacementError(
        f"{_name(place)} was assigned {_ids(place.gpu_ids)} by Ray, but its CUDA_VISIBLE_DEVICES {seen}. "
        'Most likely runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": ...}} of the group or of ray.init() replaces '
        "Ray's value: remove it there, and let gpus_per_worker choose the devices. "
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES in the environment has this effect, too."
    )


def _verify_exclusive(places: Sequence[WorkerPlace]) -> None:
    holders: dict[tuple[str, str], WorkerPlace] = {}
    for place in places:
        for gpu_id in place.gpu_ids:
            other = holders.setdefault((place.node_id, gpu_id), place)
            if other is not place:
                raise PlacementError(
                    f"GPU {gpu_id} of node {place.node_ip} was given twice: to {_name(other)} and to {_name(place)}, "
                    "although whole GPUs were asked for. Does another Ray on that node, or a user's environment "
                    "variable, name the same devices?"
                )


def _assigned_gpu_ids(context: Any) -> tuple[str, ...]:
    """The GPUs Ray assigned to this worker; empty if it asked for none."""
    env_vars = (context.runtime_env or {}).get("env_vars") or {}
    if any(name in env_vars for name in _VISIBLE_VARIABLES):
        # get_accelerator_ids() takes the user's value for the node's list and so repeats the user's value: Ray's own
        # assignment is then to be had from the raw slots only.
        slots = _gpu_slots()
        if slots is not None:
            on_node = _visible_on_node()
            return sort_gpu_ids(on_node[s] if s < len(on_node) else str(s) for s in slots)
    return sort_gpu_ids(context.get_accelerator_ids().get("GPU", ()))


def _gpu_slots() -> set[int] | None:
    """Indices into the node's list of GPUs; None where this Ray does not tell."""
    try:
        held: Mapping[str, Any] = ray._private.worker.global_worker.core_worker.resource_ids()
    except AttributeError:
        return None
    # In a placement group a GPU is listed twice, as GPU_group_<id> and as GPU_group_<index>_<id>: a set.
    return {int(slot) for name, slots in held.items() if name.split("_group_")[0] == "GPU" for slot, _ in slots}


def _visible_on_node() -> list[str]:
    """The node's GPUs as its raylet, this worker's parent, was started with; empty for all, in order."""
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    for name in _VISIBLE_VARIABLES:
        for entry in environment:
            if entry.startswith(f"{name}=".encode()):
                return [s.strip() for s in entry.decode().split("=", 1)[1].split(",") if s.strip()]
    return []


def _name(place: WorkerPlace) -> str:
    return f"the worker in bundle {place.bundle_index} (pid {place.pid}, node {place.node_ip})"


def _ids(gpu_ids: Sequence[str]) -> str:
    return f"GPU {', '.join(gpu_ids)}" if gpu_ids else "no GPU"
