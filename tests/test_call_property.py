"""A reply is never given to another call, and nothing waits for ever, whatever is interleaved on one group.

Hypothesis makes up sequences of calls, timeouts, cancels, streams, exceptions, deaths and heals for a real group. Every
call carries a tag of its own, which each rank sends back beside its number: a result with another tag is another
call's. What may come instead of a result is known from what was done to the call.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from faulty_worker import HANG, kill
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ray_shm
from ray_shm import ActorGroup, RpcCancelledError, RpcError, RpcTimeoutError, WorkerDiedError

SIZE = 3
RANKS = list(range(SIZE))
LARGE = 300_000  # bytes: beside the ring, in an arena of its own
ITEMS = 40  # of a stream: more than may be under way unread
KILLS = [0, 0, 0, 0, 0, 0, 1, 2]  # in one sequence; each costs a start of a process


class Tagger:
    """Sends back what it got. `pause`: seconds."""

    def __init__(self) -> None:
        self.number = ray_shm.get_context().rank

    def tag(self, tag, pause=0.0, payload=b""):
        if pause:
            time.sleep(pause)
        return self.number, tag, payload

    def fail(self, tag, rank):
        if self.number == rank:
            raise ValueError(tag)
        return self.number, tag, b""

    def items(self, tag, count):
        for i in range(count):
            yield tag, i


@dataclass
class Sent:
    """A call. may: kinds of errors, or of its ranks' failures, that something done to it explains.

    future: None where it was not sent; such a call is drawn, too, and nothing is done to it: what hypothesis draws from
    must not depend on how fast the machine is.
    """

    future: Any
    tag: int
    targets: list[int]
    payload: bytes = b""
    may: set[type[Exception]] = field(default_factory=set)
    fails: int | None = None  # the rank that was told to raise


group: ActorGroup
tags = itertools.count(1)


class Calls(RuleBasedStateMachine):
    under_way = Bundle("under_way")

    def __init__(self) -> None:
        super().__init__()
        self.dead: set[int] = set()
        self.kills_left = 0
        self.sent: list[Sent] = []

    # ---- rules ----------------------------------------------------------------------------------------------------

    some_ranks = st.sets(st.sampled_from(RANKS), min_size=1).map(sorted) | st.permutations(RANKS)
    pauses = st.sampled_from([0.0, 0.0, 0.0, 0.002, 0.02])
    payloads = st.sampled_from([b"", b"x" * 100, b"y" * LARGE])

    @initialize(kills=st.sampled_from(KILLS))
    def allow_kills(self, kills: int) -> None:
        self.kills_left = kills

    @rule(target=under_way, ranks=some_ranks, pause=pauses, payload=payloads)
    def send(self, ranks: list[int], pause: float, payload: bytes) -> Any:
        return self._send("tag", ranks, (pause, payload), payload=payload)

    @rule(target=under_way, ranks=some_ranks, rank=st.sampled_from(RANKS))
    def send_what_fails(self, ranks: list[int], rank: int) -> Any:
        return self._send("fail", ranks, (rank,), fails=rank if rank in ranks else None)

    @rule(target=under_way, ranks=some_ranks, timeout=st.sampled_from([0.0, 0.0005, 0.002, 0.01]), pause=pauses)
    def send_with_a_timeout(self, ranks: list[int], timeout: float, pause: float) -> Any:
        return self._send("tag", ranks, (pause,), timeout=timeout, may={RpcTimeoutError})

    @rule(sent=consumes(under_way))
    def collect(self, sent: Sent) -> None:
        self._end(sent)

    @rule(sent=consumes(under_way), timeout=st.sampled_from([0.0, 0.001, 0.005]))
    def collect_in_a_hurry(self, sent: Sent, timeout: float) -> None:
        sent.may.add(RpcTimeoutError)
        self._end(sent, timeout)

    @rule(sent=consumes(under_way))
    def cancel(self, sent: Sent) -> None:
        if sent.future is None:
            return
        sent.may.add(RpcCancelledError)
        cancelled = sent.future.cancel()
        assert sent.future.done()
        assert not cancelled or isinstance(sent.future.exception(), RpcCancelledError)
        self._end(sent)

    @rule(ranks=some_ranks, wanted=st.integers(0, ITEMS))
    def stream_in_part(self, ranks: list[int], wanted: int) -> None:
        tag = next(tags)
        try:
            with group.stream("items", HANG, (tag, ITEMS), target_ranks=ranks) as items:
                taken = list(itertools.islice(items, wanted))
        except RpcError as error:
            self._check_deaths(error, ranks)
        else:
            self._check_items(taken, tag, ranks, wanted)

    @rule(ranks=some_ranks)
    def stream_to_the_end(self, ranks: list[int]) -> None:
        tag = next(tags)
        try:
            taken = list(group.stream("items", HANG, (tag, ITEMS), target_ranks=ranks))
        except RpcError as error:
            self._check_deaths(error, ranks)
        else:
            self._check_items(taken, tag, ranks, ITEMS * len(ranks))

    @rule(ranks=some_ranks)
    def call_from_threads(self, ranks: list[int]) -> None:
        wrong: list[object] = []

        def call() -> None:
            for _ in range(5):
                tag = next(tags)
                try:
                    results = group.collective_rpc("tag", HANG, (tag,), target_ranks=ranks)
                except RpcError as error:
                    if not any(isinstance(failure, WorkerDiedError) for failure in error.failures.values()):
                        wrong.append(error)
                else:
                    wrong.extend(r for r, rank in zip(results, ranks, strict=True) if r != (rank, tag, b""))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * HANG)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []

    @precondition(lambda self: self.kills_left > 0 and len(self.dead) < SIZE)
    @rule(rank=st.sampled_from(RANKS))
    def kill(self, rank: int) -> None:
        if rank in self.dead:
            return
        self.kills_left -= 1
        self.dead.add(rank)
        for sent in self.sent:
            sent.may.add(WorkerDiedError)
        kill(group, rank)

    @precondition(lambda self: self.dead)
    @rule()
    def heal(self) -> None:
        assert group.heal(2 * HANG) == sorted(self.dead)
        self.dead.clear()

    @invariant()
    def the_dead_are_known(self) -> None:
        assert sorted(worker.rank for worker in group.workers if worker.state == "dead") == sorted(self.dead)

    def teardown(self) -> None:
        for sent in list(self.sent):
            self._end(sent)
        if self.dead:
            self.heal()
        tag = next(tags)
        assert group.collective_rpc("tag", HANG, (tag,)) == [(rank, tag, b"") for rank in RANKS]
        assert group.stats().in_flight == 0

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _send(
        self, method: str, targets: list[int], args: tuple[Any, ...], timeout: float = HANG, **known: Any
    ) -> Sent:
        tag = next(tags)
        try:
            future = group.collective_rpc(method, timeout, (tag, *args), target_ranks=targets, non_block=True)
        except RpcError as error:
            self._check_deaths(error, targets)
            assert self.dead & set(targets)
            return Sent(None, tag, targets)
        except RpcTimeoutError:
            assert RpcTimeoutError in known.get("may", ())
            return Sent(None, tag, targets)
        sent = Sent(future, tag, targets, **known)
        self.sent.append(sent)
        return sent

    def _end(self, sent: Sent, timeout: float | None = None) -> None:
        """Each call ends, and in a way that something done to it explains."""
        if sent.future is None:
            return
        self.sent.remove(sent)
        try:
            results = sent.future.result(timeout)
        except RpcTimeoutError as error:
            assert RpcTimeoutError in sent.may, "a call waited for ever"
            for rank, result in error.results.items():
                assert result == (rank, sent.tag, sent.payload)
        except RpcCancelledError:
            assert RpcCancelledError in sent.may
        except RpcError as error:
            self._check_failures(error, sent)
        else:
            assert sent.fails is None
            assert results == [(rank, sent.tag, sent.payload) for rank in sent.targets]

    def _check_failures(self, error: RpcError, sent: Sent) -> None:
        assert set(error.failures) <= set(sent.targets)
        for rank, failure in error.failures.items():
            if isinstance(failure, WorkerDiedError):
                assert WorkerDiedError in sent.may
            else:
                assert (type(failure), failure.args, rank) == (ValueError, (sent.tag,), sent.fails)

    def _check_deaths(self, error: RpcError, targets: list[int]) -> None:
        assert error.failures
        assert set(error.failures) <= self.dead & set(targets)
        assert all(isinstance(failure, WorkerDiedError) for failure in error.failures.values())

    def _check_items(self, taken: list[Any], tag: int, targets: list[int], wanted: int) -> None:
        assert not self.dead & set(targets)
        assert len(taken) == wanted
        for rank in targets:
            of_rank = [item for r, item in taken if r == rank]
            assert of_rank == [(tag, i) for i in range(len(of_rank))]


def launch() -> ActorGroup:
    return ray_shm.launch(Tagger, num_workers=SIZE)


@pytest.mark.parametrize(
    ("examples", "steps"), [(10, 20), pytest.param(150, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_whatever_is_interleaved_every_call_gets_its_own_replies(ray_local: None, examples: int, steps: int) -> None:
    global group
    with launch() as group:
        run_state_machine_as_test(
            Calls,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],  # a real group: what failed is shown as it is, not made smaller
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.parametrize("calls", [2_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_timeouts_about_as_long_as_the_calls(ray_local: None, calls: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Many expire; no reply ever comes to the wrong call, nor among the results that a timeout keeps."""
    dice = random.Random(0)
    expired = wrong = 0
    open_calls: deque[tuple[int, Any]] = deque()

    def check(tag: int, outcome: Any) -> None:
        nonlocal expired, wrong
        try:
            results = dict(enumerate(outcome()))
        except RpcTimeoutError as error:
            expired += 1
            results = error.results
        wrong += sum(result != (rank, tag, b"") for rank, result in results.items())

    with launch() as own:
        latencies = []
        for _ in range(500):
            begun = time.perf_counter()
            own.collective_rpc("tag", HANG, (0,))
            latencies.append(time.perf_counter() - begun)
        latency = statistics.median(latencies)
        for tag in range(1, calls + 1):
            timeout = latency * dice.uniform(0.1, 2.5)
            if dice.random() < 0.5:
                check(tag, lambda tag=tag, timeout=timeout: own.collective_rpc("tag", timeout, (tag,)))
                continue
            try:
                open_calls.append((tag, own.collective_rpc("tag", timeout, (tag,), non_block=True)))
            except RpcTimeoutError:
                expired += 1
            if len(open_calls) > dice.randrange(8):
                old, future = open_calls.popleft()
                check(old, future.result)
        for old, future in open_calls:
            check(old, future.result)
        assert own.collective_rpc("tag", HANG, (-1,)) == [(rank, -1, b"") for rank in RANKS]
        assert own.stats().in_flight == 0
    with capsys.disabled():
        print(f"\n{calls} calls of about {latency * 1e6:.0f} µs, {expired} timed out, {wrong} wrong replies")
    assert wrong == 0
    assert 0 < expired < calls


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    globals().pop("group", None)
