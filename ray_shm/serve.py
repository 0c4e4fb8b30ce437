"""Ray Serve, for ``from ray_shm.serve import GroupReplica, deployment_options``; see `ray_shm.actors.serve`."""

from ray_shm.actors.serve import GroupReplica, deployment_options

__all__ = ["GroupReplica", "deployment_options"]
