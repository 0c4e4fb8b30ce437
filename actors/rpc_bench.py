"""Benchmarks that print how fast calls are, beside their peers in the same run. Runs in the driver's process.

``ray-shm bench rpc``: the no-op ladder. For each number of workers three sets of actors exist at once, a group of ours,
plain Ray actors, and a compiled graph over plain actors; they take turns in short rounds, so that what else the
machine does meets all of them alike. Every call carries 100 bytes, and waits for the replies of all workers.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.dag import DAGContext, InputNode, MultiOutputNode
from rich.console import Console
from rich.table import Table

from ray_shm.actors.launch import launch

PAYLOAD = b"x" * 100
ROUNDS = 10
WARM_UP = 50

Call = Callable[[], object]


class Noop:
    """The worker of all peers."""

    def noop(self, payload: bytes) -> None:
        return None


@dataclass(frozen=True)
class Row:
    """Round trips of one peer, in microseconds."""

    peer: str
    workers: int
    calls: int
    p50_us: float
    p90_us: float
    p99_us: float


def bench_rpc(workers: Sequence[int], calls: int, as_json: bool) -> list[Row]:
    """Measure and print the ladder. Starts a local Ray if none runs, and then ends it."""
    started_ray = not ray.is_initialized()
    if started_ray:
        ray.init(logging_level="warning", include_dashboard=False)
    try:
        rows = [row for count in workers for row in _measure(count, calls)]
    finally:
        if started_ray:
            ray.shutdown()
    if as_json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
    else:
        _print(rows)
    return rows


def _measure(count: int, calls: int) -> list[Row]:
    with _ours(count) as ours, _ray_calls(count) as plain, _compiled_graph(count) as graph:
        peers = {"ray-shm collective_rpc": (ours, calls), "Ray compiled graph": (graph, calls)}
        peers["Ray actor calls"] = (plain, max(ROUNDS, calls // 5))
        times: dict[str, list[float]] = {name: [] for name in peers}
        for call, _ in peers.values():
            _time(call, WARM_UP)
        for _ in range(ROUNDS):
            for name, (call, number) in peers.items():
                times[name] += _time(call, max(1, number // ROUNDS))
    return [_row(name, count, sorted(values)) for name, values in times.items()]


def _time(call: Call, number: int) -> list[float]:
    times = []
    for _ in range(number):
        begun = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begun) / 1000)
    return times


def _row(peer: str, workers: int, values: list[float]) -> Row:
    def at(share: float) -> float:
        return round(values[min(len(values) - 1, int(len(values) * share))], 1)

    return Row(peer, workers, len(values), round(statistics.median(values), 1), at(0.9), at(0.99))


@contextlib.contextmanager
def _ours(count: int) -> Iterator[Call]:
    with launch(Noop, num_workers=count) as group:
        yield lambda: group.collective_rpc("noop", args=(PAYLOAD,))


@contextlib.contextmanager
def _actors(count: int) -> Iterator[list[Any]]:
    actor_class = ray.remote(num_cpus=0)(Noop)
    actors = [actor_class.remote() for _ in range(count)]
    try:
        ray.get([actor.noop.remote(PAYLOAD) for actor in actors])
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


@contextlib.contextmanager
def _ray_calls(count: int) -> Iterator[Call]:
    with _actors(count) as actors:
        yield lambda: ray.get([actor.noop.remote(PAYLOAD) for actor in actors])


@contextlib.contextmanager
def _compiled_graph(count: int) -> Iterator[Call]:
    with _actors(count) as actors:
        with InputNode() as payload:
            graph = MultiOutputNode([actor.noop.bind(payload) for actor in actors])
        DAGContext.get_current().get_timeout = 60  # seconds; on a busy machine the first call takes over its 10
        compiled = graph.experimental_compile()
        try:
            yield lambda: ray.get(compiled.execute(PAYLOAD))
        finally:
            compiled.teardown()


def _print(rows: list[Row]) -> None:
    ours = {row.workers: row.p50_us for row in rows if row.peer.startswith("ray-shm")}
    table = Table("workers", "peer", "p50 µs", "p90 µs", "p99 µs", "ray-shm is", title="no-op call, 100 B, all replies")
    for row in rows:
        ratio = row.p50_us / ours[row.workers]
        faster = "" if row.peer.startswith("ray-shm") else f"{ratio:.1f} × faster"
        numbers = [f"{v:,.1f}" for v in (row.p50_us, row.p90_us, row.p99_us)]
        table.add_row(str(row.workers), row.peer, *numbers, faster)
    Console().print(table)
