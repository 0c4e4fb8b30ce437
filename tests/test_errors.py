"""What errors say, and that they stay themselves through copies, pickles and `except*`."""

from __future__ import annotations

import copy
import pickle
import threading
import traceback
from typing import Any

import cloudpickle
import pytest

from ray_shm.actors.death_reason import RaysWord, join_causes, rays_word
from ray_shm.errors import PeerLostError, RemoteTraceback, RpcError, WorkerDiedError
from ray_shm.late_cause import NOT_KNOWN_YET, DeathCause, LateCause, never_waiting

KILLED = DeathCause("killed by signal 9 (SIGKILL)", signal=9)


class OutOfMemoryError(RuntimeError):
    pass


class Shy(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("frozen")


def remote(error: Exception, *frames: str) -> Exception:
    """`error` as it comes from a worker; `frames` as in "model.py:80", the innermost last."""
    lines = [f'  File "/srv/{f.split(":")[0]}", line {f.split(":")[1]}, in step\n    x = y\n' for f in frames]
    text = "Traceback (most recent call last):\n" + "".join(lines) + f"{type(error).__name__}: {error}\n"
    error.__cause__ = RemoteTraceback(text)
    return error


def oom(*frames: str) -> Exception:
    return remote(
        OutOfMemoryError("CUDA out of memory\nTried to allocate 2 GiB"), *(frames or ("a.py:1", "model.py:80"))
    )


def dead(rank: int, pid: int = 81, node: str = "10.0.0.2", cause: Any = KILLED) -> WorkerDiedError:
    return WorkerDiedError(rank, pid, node, cause)


def test_identical_failures_are_told_together_and_a_death_first() -> None:
    failures = {rank: oom() for rank in (0, 1, 2, 4, 5, 6, 7)} | {3: dead(3)}
    assert str(RpcError("call 412 'train'", failures, targets=8)) == (
        "call 412 'train' failed on 8 of 8 ranks: rank 3: killed by signal 9 (SIGKILL) (pid 81, node 10.0.0.2); "
        "ranks 0-2,4-7: OutOfMemoryError: CUDA out of memory (model.py:80)"
    )


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        ({0: ValueError("no")}, "rank 0: ValueError: no"),
        ({0: KeyError(), 1: KeyError()}, "ranks 0-1: KeyError"),
        ({0: oom("model.py:80"), 1: oom("model.py:81")}, "rank 0: {oom} (model.py:80); rank 1: {oom} (model.py:81)"),
        ({1: ValueError("a"), 0: TypeError("a")}, "rank 1: ValueError: a; rank 0: TypeError: a"),
        ({0: Shy()}, "rank 0: Shy: (its text cannot be shown)"),
        ({0: Frozen("solid")}, "rank 0: Frozen: solid"),
        ({0: ValueError("x" * 301)}, "rank 0: ValueError: " + "x" * 299 + "…"),
        (
            {5: dead(5, 90), 2: dead(2, 82), 4: dead(4, 70, "10.0.0.3")},
            "ranks 2,4-5: killed by signal 9 (SIGKILL) (pids 90,82, node 10.0.0.2; pid 70, node 10.0.0.3)",
        ),
        (
            {0: dead(0, cause="unknown: its process is gone")},
            "rank 0: died, cause unknown: its process is gone (pid 81, node 10.0.0.2)",
        ),
        (
            {0: PeerLostError("rank 1 is gone"), 2: ValueError("mine")},
            "rank 2: ValueError: mine; rank 0: PeerLostError: rank 1 is gone",
        ),
    ],
)
def test_the_text_of_failures(failures: dict[int, Exception], text: str) -> None:
    text = text.replace("{oom}", "OutOfMemoryError: CUDA out of memory")
    assert (
        str(RpcError("call 1 'f'", failures, targets=8)) == f"call 1 'f' failed on {len(failures)} of 8 ranks: {text}"
    )


def test_late_ranks_are_named_with_where_they_stand() -> None:
    where = {1: "in all_reduce of 'tp'", 2: "in all_reduce of 'tp'", 5: "running 'train' for 41.0 s"}
    error = RpcError("call 7 'train'", {0: ValueError("no")}, [1, 2, 3, 5], targets=6, late_where=where)
    assert str(error) == (
        "call 7 'train' failed on 1 of 6 ranks: rank 0: ValueError: no; no outcome yet from "
        "ranks 1-2 (in all_reduce of 'tp'), rank 3, rank 5 (running 'train' for 41.0 s)"
    )


def test_without_a_number_of_targets_the_message_says_what_happened() -> None:
    error = RpcError("call 7 'train' was not sent", {3: dead(3)}, [0, 1])
    assert str(error) == (
        "call 7 'train' was not sent: rank 3: killed by signal 9 (SIGKILL) (pid 81, node 10.0.0.2); "
        "no outcome yet from ranks 0-1"
    )


def test_the_innermost_frame_is_that_of_the_exception_itself() -> None:
    """Not that of the one it was raised from, nor what its own text looks like."""
    error = remote(ValueError("no"), "model.py:80")
    first = 'Traceback (most recent call last):\n  File "/srv/deep.py", line 3, in f\nKeyError: 1\n\n'
    text = f"{first}The above exception was the direct cause of the following exception:\n\n{error.__cause__.text}"
    error.__cause__ = RemoteTraceback(text + '  File "<string>", line 9\n')
    assert str(RpcError("call 1 'f'", {0: error}, targets=1)).endswith("ValueError: no (model.py:80)")


def test_the_root_cause_is_a_death_then_no_victim_then_the_earliest() -> None:
    victim, own, later, death = PeerLostError("x"), ValueError("own"), ValueError("later"), dead(3)
    released = RuntimeError("released")
    released.ray_shm_victim = True  # type: ignore[attr-defined]
    assert RpcError("c", {0: victim, 1: own, 2: later, 3: death}).root_cause is death
    assert RpcError("c", {0: victim, 4: released, 2: later, 1: own}).root_cause is later
    assert RpcError("c", {4: released, 0: victim}).root_cause is released


@pytest.mark.parametrize("how", [pickle, cloudpickle, None])
def test_copies_keep_everything(how: Any) -> None:
    failures = {2: oom(), 3: dead(3).during("call 7 'train' was pending")}
    error = RpcError("call 7 'train'", failures, [1], targets=4, late_where={1: "running"})
    twin = copy.copy(error) if how is None else how.loads(how.dumps(error))
    assert twin is not error
    assert type(twin) is RpcError
    assert str(twin) == str(error)
    assert twin.late_ranks == [1]
    assert list(twin.failures) == [2, 3]
    assert twin.exceptions == tuple(twin.failures.values())
    assert "model.py" in str(twin.failures[2].__cause__)
    death = twin.root_cause
    assert (death.rank, death.pid, death.node, death.signal, death.exit_code) == (3, 81, "10.0.0.2", 9, None)
    assert str(death) == str(failures[3])


def test_except_star_keeps_the_ranks() -> None:
    error = RpcError("call 7 'train'", {0: oom(), 2: ValueError("no"), 3: ValueError("no")}, targets=4)
    parts: list[RpcError] = []
    try:
        raise error
    except* ValueError as found:
        parts.append(found)
    except* OutOfMemoryError as found:
        parts.append(found)
    assert [list(part.failures) for part in parts] == [[2, 3], [0]]
    assert type(parts[0]) is RpcError
    assert str(parts[0]) == "call 7 'train' failed on 2 of 4 ranks: ranks 2-3: ValueError: no"


def test_a_printed_traceback_shows_the_text_and_the_remote_frames() -> None:
    shown = "".join(traceback.format_exception(RpcError("call 7 'train'", {0: oom()}, targets=1)))
    assert "ray_shm.errors.RpcError: call 7 'train' failed on 1 of 1 ranks: rank 0: OutOfMemoryError" in shown
    assert 'File "/srv/model.py", line 80' in shown


def test_the_text_of_a_death() -> None:
    assert str(dead(3).during("call 7 'train' was pending")) == (
        "worker rank 3 (pid 81, node 10.0.0.2) died while call 7 'train' was pending: killed by signal 9 (SIGKILL). "
        "Its results are lost; heal() replaces it, and until then the other ranks can be called by target_ranks."
    )
    plain = WorkerDiedError(3, 81, "10.0.0.2", "its node is gone")
    assert (plain.cause, plain.signal, plain.exit_code, plain.doing) == ("its node is gone", None, None, "")


def test_a_cause_that_comes_late_is_waited_for() -> None:
    late = LateCause(wait=60.0)
    death = dead(3, cause=late)
    error = RpcError("call 7 'train'", {3: death.during("call 7")}, targets=4)
    reader = threading.Thread(target=lambda: texts.append(str(error)))
    texts: list[str] = []
    reader.start()
    late.fill(KILLED)
    late.fill(DeathCause("another"))  # the first counts
    reader.join(60.0)
    assert texts == [
        "call 7 'train' failed on 1 of 4 ranks: rank 3: killed by signal 9 (SIGKILL) (pid 81, node 10.0.0.2)"
    ]
    assert (death.signal, death.exit_code) == (9, None)


def test_a_cause_that_does_not_come_is_unknown() -> None:
    death = dead(3, cause=LateCause(wait=0.0))
    assert death.cause == NOT_KNOWN_YET.text
    assert pickle.loads(pickle.dumps(death)).cause == NOT_KNOWN_YET.text


def test_who_fills_causes_in_waits_for_none() -> None:
    """Else it would wait for itself; the test's own time limit would tell."""
    death = dead(3, cause=LateCause(wait=10_000.0))
    with never_waiting():
        assert death.cause == NOT_KNOWN_YET.text
        with never_waiting():
            pass
        assert "unknown" in str(copy.copy(death))


@pytest.mark.parametrize(
    ("status", "ray", "cause"),
    [
        (9, None, KILLED),
        (9, RaysWord("connection error", vague=True), KILLED),
        (
            9,
            RaysWord("the node ran low on memory"),
            DeathCause("killed by signal 9 (SIGKILL); Ray says: the node ran low on memory", signal=9),
        ),
        (11 | 0x80, None, DeathCause("killed by signal 11 (SIGSEGV), core dumped", signal=11)),
        (40, None, DeathCause("killed by signal 40 (SIGRTMIN+6)", signal=40)),
        (3 << 8, RaysWord("connection error", vague=True), DeathCause("exited with code 3", exit_code=3)),
        (1 << 8, RaysWord("killed by `ray.kill`"), DeathCause("killed by `ray.kill`", exit_code=1)),
        (0, RaysWord("exits with an exit code 4"), DeathCause("exits with an exit code 4", exit_code=4)),
        (None, RaysWord("its node died"), DeathCause("its node died")),
        (None, RaysWord("gone", vague=True), DeathCause("unknown: its connection broke; Ray says: gone")),
        (None, None, DeathCause("unknown: its connection broke, and Ray has not said why")),
    ],
)
def test_an_exit_status_and_rays_word_make_one_cause(
    status: int | None, ray: RaysWord | None, cause: DeathCause
) -> None:
    assert join_causes(status, ray, "its connection broke") == cause


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (None, RaysWord("its loop ended without being asked to", lives=True)),
        (RuntimeError(""), RaysWord("RuntimeError")),
        (Shy(), RaysWord("(its text cannot be shown)")),
        (RuntimeError("The actor is dead because its node has died."), RaysWord("its node has died")),
        (
            RuntimeError(
                "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 81\n"
                "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
                "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes "
                "include: (1) the process was killed by the OOM killer due to high memory usage."
            ),
            RaysWord("Worker unexpectedly exits with a connection error code 2. End of file", vague=True),
        ),
    ],
)
def test_what_ray_says_is_told_in_one_line(error: BaseException | None, word: RaysWord) -> None:
    assert rays_word(error) == word
