"""The ways to call a group of workers that ``ray-shm bench rpc`` compares. Runs in the driver's process.

A Peer opens into a Caller, once for each number of workers. All Callers of a number exist at the same time, and each
has processes of its own; a call ends with the last worker's reply. The workers do nothing with what they get.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
from ray.dag import DAGContext, InputNode, MultiOutputNode

from ray_shm.actors.launch import launch

PAYLOAD = b"x" * 100
OURS, OURS_ACTOR = "ray-shm", "ray-shm, driver actor"
GRAPH, CALLS, MONARCH = "Ray compiled graph", "Ray actor calls", "Monarch"
GRAPH_IN_FLIGHT = 10  # Ray's default for a compiled graph; more raise RayCgraphCapacityExceeded
PUT_FROM = 64 << 10  # bytes; from here on Ray calls get a reference, below Ray copies the argument into each call
_GRAPH_TIMEOUT = 60  # seconds; on a busy machine the first call takes over its default of 10


class UnavailableError(Exception):
    """A peer cannot be measured here; the text says why."""


class Noop:
    """The worker of all peers."""

    def noop(self, payload: object) -> None:
        return None


@dataclass(frozen=True)
class Caller:
    """A peer that is ready. call: one call with this payload. burst: so many calls with PAYLOAD, all sent at once."""

    call: Callable[[Any], object]
    burst: Callable[[int], object]


@dataclass(frozen=True)
class Peer:
    """open: for a number of workers; raises UnavailableError."""

    name: str
    open: Callable[[int], AbstractContextManager[Caller]]


@contextlib.contextmanager
def _local(count: int, **options: Any) -> Iterator[Caller]:
    with launch(Noop, num_workers=count, **options) as group:

        def burst(number: int) -> None:
            futures = [group.collective_rpc("noop", args=(PAYLOAD,), non_block=True) for _ in range(number)]
            for future in futures:
                future.result()

        yield Caller(lambda payload: group.collective_rpc("noop", args=(payload,)), burst)


@contextlib.contextmanager
def _driver_actor(count: int) -> Iterator[Caller]:
    with contextlib.ExitStack() as stack:
        try:
            caller = stack.enter_context(_local(count, driver="actor"))
        except ValueError as exc:  # refused before anything is started
            raise UnavailableError(str(exc)) from exc
        yield caller


def plain_actor(cls: type) -> Any:
    """An ordinary Ray actor, as its user would make it; starting."""
    return ray.remote(num_cpus=0)(cls).remote()


@contextlib.contextmanager
def plain_actors(count: int, cls: type = Noop) -> Iterator[list[Any]]:
    """So many of them; those in the list at the end are killed."""
    actors = [plain_actor(cls) for _ in range(count)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


@contextlib.contextmanager
def _actor_calls(count: int) -> Iterator[Caller]:
    with plain_actors(count) as actors:

        def call(payload: Any) -> None:
            large = not isinstance(payload, bytes) and payload.nbytes >= PUT_FROM
            argument = ray.put(payload) if large else payload
            ray.get([actor.noop.remote(argument) for actor in actors])

        def burst(number: int) -> None:
            ray.get([actor.noop.remote(PAYLOAD) for _ in range(number) for actor in actors])

        call(PAYLOAD)
        yield Caller(call, burst)


@contextlib.contextmanager
def _compiled_graph(count: int) -> Iterator[Caller]:
    with plain_actors(count) as actors:
        with InputNode() as payload:
            graph = MultiOutputNode([actor.noop.bind(payload) for actor in actors])
        DAGContext.get_current().get_timeout = _GRAPH_TIMEOUT
        compiled = graph.experimental_compile()

        def burst(number: int) -> None:
            in_flight: deque[Any] = deque()
            for _ in range(number):
                if len(in_flight) == GRAPH_IN_FLIGHT:
                    ray.get(in_flight.popleft())
                in_flight.append(compiled.execute(PAYLOAD))
            while in_flight:
                ray.get(in_flight.popleft())

        try:
            yield Caller(lambda payload: ray.get(compiled.execute(payload)), burst)
        finally:
            compiled.teardown()


@contextlib.contextmanager
def _monarch(count: int) -> Iterator[Caller]:
    if importlib.util.find_spec("monarch") is None:
        raise UnavailableError("the package torchmonarch is not installed")
    actor: Any = importlib.import_module("monarch.actor")

    class MonarchNoop(actor.Actor):  # type: ignore[misc]
        @actor.endpoint  # type: ignore[untyped-decorator]
        def noop(self, payload: object) -> None:
            return None

    processes = actor.this_host().spawn_procs({"workers": count})
    try:
        mesh = processes.spawn("noop", MonarchNoop)

        def burst(number: int) -> None:
            for future in [mesh.noop.call(PAYLOAD) for _ in range(number)]:
                future.get()

        yield Caller(lambda payload: mesh.noop.call(payload).get(), burst)
    finally:
        processes.stop().get()


PEERS = (
    Peer(OURS, _local),
    Peer(OURS_ACTOR, _driver_actor),
    Peer(GRAPH, _compiled_graph),
    Peer(CALLS, _actor_calls),
    Peer(MONARCH, _monarch),
)
