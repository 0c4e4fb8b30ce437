"""Executor: the calls that an inference engine makes, named as engines name them, on top of an ActorGroup.

Runs in the driver's process. The worker class implements the methods of the same names; those that the engine does not
call are not needed. After an RpcError the executor can be used as long as the ranks live: a failed step has not
necessarily failed on all ranks, so it is for the engine to say whether the model's state is still the same on all.
"""

from __future__ import annotations

import os
from typing import Any, Literal, overload

from ray_shm.actors.future import RpcFuture
from ray_shm.actors.group import ActorGroup
from ray_shm.actors.model_step import OUTPUT_RANK, execute_model


class Executor:
    """Drives a group of model workers, which it owns: `shutdown` closes it. A context manager. Any thread may call it.

    Attributes:
        group: the ActorGroup, for any other call.
    """

    def __init__(self, group: ActorGroup) -> None:
        self.group = group

    def determine_available_memory(self) -> int:
        """Bytes that every rank can give to its KV cache: the smallest of the ranks' answers.

        Raises:
            RpcError: a rank failed. GroupClosedError.
        """
        return int(self.group.collective_rpc("determine_available_memory", reduce="min"))

    def get_kv_cache_spec(self) -> Any:
        """The KV cache layout, which has to be the same on all ranks, by value.

        Raises:
            RpcError: a rank failed. GroupClosedError.
            MismatchError: they differ; its text says where and how each rank does, `results` has each rank's own.
        """
        return self.group.collective_rpc("get_kv_cache_spec", reduce="equal")

    def initialize(self, kv_cache_config: Any) -> None:
        """Have every rank allocate its KV cache. A `Scatter` gives each rank a configuration of its own.

        Raises:
            RpcError: a rank failed; ranks that did allocate keep theirs. GroupClosedError.
        """
        self.group.collective_rpc("initialize", args=(kv_cache_config,))

    @overload
    def execute_model(self, scheduler_output: Any, non_block: Literal[False] = False) -> Any: ...
    @overload
    def execute_model(self, scheduler_output: Any, non_block: Literal[True]) -> RpcFuture: ...
    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step of the model on all ranks. Waits for all of them; the outputs of the others never leave their ranks.

        Args:
            scheduler_output: what to compute; every rank gets it.
            non_block: return at once. The ranks take steps in the order sent, so an engine can send the next one
                while this one runs.

        Returns:
            rank 0's output, or an RpcFuture of it.

        Raises:
            RpcError: any rank failed, whether or not rank 0 did. GroupClosedError. With `non_block`, by the future.
        """
        return self.group.collective_rpc(execute_model, args=(scheduler_output,), reduce=_output, non_block=non_block)

    def profile(self, is_start: bool, *, directory: str | os.PathLike[str] | None = None) -> list[str] | None:
        """As `ActorGroup.profile`: start torch.profiler in every rank, or stop it and get the paths of its traces."""
        return self.group.profile(is_start, directory=directory)

    def check_health(self, timeout: float | None = 10.0) -> None:
        """Have every rank answer within `timeout` seconds; a rank answers after the calls sent to it before.

        Raises:
            RpcError: ranks are dead. RpcTimeoutError: ranks are late. GroupClosedError.
        """
        self.group.check_health(timeout)

    def shutdown(self) -> None:
        """Let steps in flight finish, and close the group. Idempotent; afterwards all else raises GroupClosedError."""
        self.group.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<Executor of {self.group!r}>"


def _output(results: list[Any]) -> Any:
    return results[OUTPUT_RANK]
