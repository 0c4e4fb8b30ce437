"""A Ray cluster whose two nodes share nothing but a cable: calls across it, pulling it, and healing after that."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import Host, lay_cable
from reader_pool import Me

pytestmark = pytest.mark.slow  # two Ray nodes from nothing, for each test

HANG = 60.0
NOTICED = 15.0  # seconds; three times what the kernels take to give a connection up
FAR = "far"  # a resource that only the other host's node has


class Worker:
    def rank(self) -> int:
        import ray_shm

        return ray_shm.get_context().rank

    def where(self) -> tuple[str, int]:
        import ray_shm

        return ray_shm.get_context().node_ip, os.getpid()

    def sleep(self, rank: int) -> None:
        if self.rank() == rank:
            time.sleep(HANG)

    def echo(self, value: Any) -> Any:
        return value


def set_environment(folder: str) -> None:
    """Of the Ray processes that this one starts or is."""
    os.environ["RAY_TMPDIR"] = folder  # else ray.init() of any process on this machine finds the cluster's address
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="7" * 64)  # else Ray writes one into the home directory
    os.environ.update(RAY_health_check_period_ms="1000", RAY_health_check_timeout_ms="2000")
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy")]:
        del os.environ[name]  # gRPC would ask it for the other host


def start_node(me: Me, folder: str, *args: str) -> None:
    """A Ray node that lives as long as its host."""
    ray = os.path.join(sysconfig.get_path("scripts"), "ray")
    command = [ray, "start", *args, "--num-cpus=2", "--object-store-memory=80000000"]
    set_environment(folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def launch(me: Me, address: str, ip: str) -> list[tuple[str, int]]:
    """One worker on each host."""
    import ray

    import ray_shm

    ray.init(address=address, _node_ip_address=ip, log_to_driver=False)
    group = ray_shm.launch(Worker, num_workers=2, cpus_per_worker=1, strategy="STRICT_SPREAD")
    me.kept.append(group)
    return group.collective_rpc("where")


def call(me: Me, method: str, *args: Any) -> Any:
    return me.kept[0].collective_rpc(method, args=args, timeout=HANG)


def call_the_lost(me: Me, rank: int) -> tuple[str, dict[int, tuple[str, int, str]], float]:
    """A call in which `rank` sleeps while its cable is pulled."""
    import ray_shm

    started = time.monotonic()
    try:
        call(me, "sleep", rank)
    except ray_shm.RpcError as exc:
        deaths = {r: (type(e).__name__, e.pid, e.node) for r, e in exc.failures.items()}  # type: ignore[attr-defined]
        return str(exc), deaths, time.monotonic() - started
    raise AssertionError("the call returned")


def refused(me: Me) -> tuple[str, list[int]]:
    import ray_shm

    try:
        call(me, "rank")
    except ray_shm.RpcError as exc:
        return str(exc), sorted(exc.failures)
    raise AssertionError("the call returned")


def call_the_living(me: Me) -> Any:
    return me.kept[0].collective_rpc("where", target_ranks=[0], timeout=HANG)


def heal(me: Me) -> tuple[list[int], list[tuple[str, int]]]:
    group = me.kept[0]
    return group.heal(2 * HANG), group.collective_rpc("where", timeout=HANG)


def close(me: Me) -> None:
    import ray

    me.kept.pop().close()
    ray.shutdown()


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    for here, there in lay_cable():
        here.run(
            start_node,
            str(tmp_path_factory.mktemp("a")),
            "--head",
            f"--node-ip-address={here.ip}",
            "--port=6399",
            "--include-dashboard=false",
        )
        join(here, there, tmp_path_factory.mktemp("b"))
        yield here, there


def join(here: Host, there: Host, folder: Path) -> None:
    there.run(start_node, str(folder), f"--address={here.ip}:6399", f"--node-ip-address={there.ip}")


def test_a_pulled_cable_is_a_death_that_heals_once_the_node_is_back(
    hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory
) -> None:
    here, there = hosts
    places = here.run(launch, f"{here.ip}:6399", here.ip)
    assert [ip for ip, _ in places] == [here.ip, there.ip]
    assert here.run(call, "echo", b"x" * (8 << 20)) == [b"x" * (8 << 20)] * 2
    here.start(call_the_lost, 1)
    assert not here.pipe.poll(1.0)  # it waits for the other host
    there.set_link("down")
    text, deaths, took = here.result()
    assert deaths == {1: ("WorkerDiedError", places[1][1], there.ip)}
    assert f"(pid {places[1][1]}, node {there.ip})" in text
    assert took < NOTICED
    text, ranks = here.run(refused)
    assert ranks == [1]
    assert "heal()" in text
    assert here.run(call_the_living) == [places[0]]
    there.set_link("up")
    join(here, there, tmp_path_factory.mktemp("c"))
    healed, now = here.run(heal)
    assert healed == [1]
    assert now[0] == places[0]
    assert now[1][0] == there.ip
    assert now[1][1] != places[1][1]
    here.run(close)


def launch_groups(me: Me, address: str, ip: str) -> list[str]:
    """Two workers on each host, in coordinator groups."""
    import ray
    import test_conformance

    import ray_shm

    ray.init(address=address, _node_ip_address=ip, log_to_driver=False)
    group = ray_shm.launch(
        test_conformance.Worker, num_workers=4, cpus_per_worker=1, groups=test_conformance.LAYOUTS, start_timeout=50.0
    )
    me.kept.append(group)
    return [worker.node_ip for worker in group.workers]


def test_coordinator_groups_across_the_hosts(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    assert here.run(launch_groups, f"{here.ip}:6399", here.ip) == [here.ip, here.ip, there.ip, there.ip]
    for size in ("1", "2", "3", "4"):
        here.run(call, "run_all", size)
    here.run(call, "run_parts")
    here.run(close)
