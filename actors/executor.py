"""Executor: the calls that an inference engine makes, named as engines name them, on top of an ActorGroup.

Runs in the driver's process. The worker class implements the methods of the same names.
"""

from __future__ import annotations

from typing import Any

from ray_shm.actors.group import ActorGroup


class Executor:
    """Drives a group of model workers; `shutdown` closes it. A context manager."""

    def __init__(self, group: ActorGroup) -> None:
        self.group = group

    def determine_available_memory(self) -> int:
        """Bytes that every rank can give to its KV cache: the smallest of the ranks' answers. Raises RpcError."""
        return int(self.group.collective_rpc("determine_available_memory", reduce="min"))

    def get_kv_cache_spec(self) -> Any:
        """The KV cache layout, which has to be the same on all ranks.

        Raises:
            RpcError: a rank failed. MismatchError: they differ; its text shows each rank's.
        """
        return self.group.collective_rpc("get_kv_cache_spec", reduce="equal")

    def initialize(self, kv_cache_config: Any) -> None:
        """Have every rank allocate its KV cache. Raises RpcError; ranks that did allocate keep theirs."""
        self.group.collective_rpc("initialize", args=(kv_cache_config,))

    def execute_model(self, scheduler_output: Any, *, non_block: bool = False) -> Any:
        """One step of the model on all ranks; rank 0's output, or an RpcFuture of it. Raises RpcError."""
        return self.group.collective_rpc(
            "execute_model", args=(scheduler_output,), unique_reply_rank=0, non_block=non_block
        )

    def check_health(self, timeout: float | None = 10.0) -> None:
        """As ActorGroup.check_health."""
        self.group.check_health(timeout)

    def shutdown(self) -> None:
        """Close the group. Idempotent."""
        self.group.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
