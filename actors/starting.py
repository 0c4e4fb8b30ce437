"""Waits for one step of every worker's start; the first failure becomes a StartError. Runs in the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ray_shm.actors.supervision import reason
from ray_shm.deadline import Deadline
from ray_shm.errors import StartError

_TICK = 1.0  # seconds between looks at the deadline
_PROGRESS_EVERY = 5.0
_OTHERS = 0.2  # seconds that other failures of the same cause get to show up, too

Failure = Callable[[Any, int], tuple[str, BaseException] | None]


def gather(
    refs: Sequence[Any],
    labels: Sequence[str],
    step: str,
    deadline: Deadline,
    progress: Callable[[str], None],
    failure: Failure = lambda answer, i: None,
) -> list[Any]:
    """The answers of `refs`, in order.

    Args:
        labels: names of the workers, for messages. step: what they do, as in "did not <step>".
        failure: looks into an answer for an error that the worker returned.

    Raises:
        StartError: a worker died, its answer is a failure, or it was late; with all failures known shortly after.
    """
    answers: dict[int, Any] = {}
    failures: dict[int, tuple[str, BaseException]] = {}
    waiting = {ref: i for i, ref in enumerate(refs)}
    silent = 0.0
    while waiting and not failures:
        if deadline.expired():
            late = ", ".join(labels[i] for i in waiting.values())
            raise StartError(f"{late} did not {step} within {deadline.timeout} s; {len(answers)} others did")
        done = _take(waiting, deadline.slice(_TICK))
        silent = 0.0 if done else silent + _TICK
        _sort(done, answers, failures, step, failure)
        if silent >= _PROGRESS_EVERY:
            silent = 0.0
            progress(
                f"{len(answers)}/{len(refs)} workers did {step}; waiting for {labels[next(iter(waiting.values()))]}"
            )
    if failures:
        _sort(_take(waiting, _OTHERS, everything=True), answers, failures, step, failure)
        raise _error(failures, labels, len(refs))
    progress(f"{len(refs)}/{len(refs)} workers did {step}")
    return [answers[i] for i in range(len(refs))]


def _take(waiting: dict[Any, int], seconds: float, everything: bool = False) -> list[tuple[Any, int]]:
    if not waiting:
        return []
    done, _ = ray.wait(list(waiting), num_returns=len(waiting) if everything else 1, timeout=seconds)
    return [(ref, waiting.pop(ref)) for ref in done]


def _sort(
    done: list[tuple[Any, int]],
    answers: dict[int, Any],
    failures: dict[int, tuple[str, BaseException]],
    step: str,
    failure: Failure,
) -> None:
    for ref, i in done:
        try:
            answer = ray.get(ref)
        except RayActorError as exc:
            failures[i] = (step, StartError(f"its process died: {reason(exc)}"))
        except RayError as exc:
            failures[i] = (step, exc)
        else:
            failed = failure(answer, i)
            if failed is None:
                answers[i] = answer
            else:
                failures[i] = failed


def _error(failures: dict[int, tuple[str, BaseException]], labels: Sequence[str], count: int) -> StartError:
    lines = [
        f"{labels[i]} failed in {stage}: {type(exc).__name__}: {exc}" for i, (stage, exc) in sorted(failures.items())
    ]
    others = count - len(failures)
    error = StartError(
        " | ".join(lines) + f". The other {others} workers were ended.", {i: exc for i, (_, exc) in failures.items()}
    )
    error.__cause__ = next(iter(failures.values()))[1]
    return error
