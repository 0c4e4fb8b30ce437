"""What `Executor.execute_model` calls in the workers: in a file of its own, so that they import no more than this."""

from __future__ import annotations

from typing import Any

from ray_shm.context import get_context

OUTPUT_RANK = 0


def execute_model(worker: Any, scheduler_output: Any) -> Any:
    """A step on this rank.

    Unlike with `unique_reply_rank`, where nobody waits for more than that rank's reply, any rank's failure is told;
    unlike in a call of the method by its name, no output is sent that nobody reads.
    """
    output = worker.execute_model(scheduler_output)
    return output if get_context().rank == OUTPUT_RANK else None
