"""Every method of coordinator groups against NumPy: 1 to 4 ranks, both constructions, one host and two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import conformance_checks
import pytest
from conformance_checks import ALL
from free_ports import free_port
from netns import Host, HostProcess, lay_cable
from rank_pool import LOOPBACK, WATCHDOG, Pool, Rank

import ray_shm
from ray_shm.coordinator import StatelessGroupCoordinator

LAYOUTS = {  # every world size; a rank's place in a group is not its rank
    "1": [[0], [1], [2], [3]],
    "2": [[3, 1], [0, 2]],
    "3": [[2, 0, 3], [1]],
    "4": [[0, 1, 2, 3]],
    "stages": [[0, 2], [1, 3]],
    "tensors": [[0, 1], [2, 3]],
}
SIZES = ["1", "2", "3", "4"]


def run_all(groups: dict[str, StatelessGroupCoordinator], size: str) -> None:
    for name, check in ALL.items():
        try:
            check(groups[size])
        except Exception as exc:
            exc.add_note(f"check {name} in {groups[size]}")
            raise


# Plain processes with explicit ports, and no Ray


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    try:
        pool.run(construct, {name: [[free_port(LOOPBACK)] for _ in ranks] for name, ranks in LAYOUTS.items()})
        yield pool
    finally:
        codes = pool.close()
    assert codes == [0] * 4


def construct(me: Rank, ports: dict[str, list[list[int]]]) -> None:
    for name, ranks in LAYOUTS.items():
        me.kept[name] = me.group(name, ranks, coord_store=None, host=LOOPBACK, group_ports=ports[name])


def check_all(me: Rank, size: str) -> None:
    import sys

    run_all(me.kept, size)
    assert "ray" not in sys.modules


def check_parts(me: Rank) -> None:
    conformance_checks.parts_are_gathered(me.kept["stages"], me.kept["tensors"])


@pytest.mark.parametrize("size", SIZES)
def test_plain_processes_with_explicit_ports(pool: Pool, size: str) -> None:
    pool.run(check_all, size)


def test_plain_processes_gather_the_parts_of_a_dictionary(pool: Pool) -> None:
    pool.run(check_parts)


# Ray's actors


class Worker:
    def run_all(self, size: str) -> None:
        run_all(self._groups(), size)

    def run_parts(self) -> None:
        conformance_checks.parts_are_gathered(*[self._groups()[name] for name in ("stages", "tensors")])

    def _groups(self) -> dict[str, Any]:
        return {name: ray_shm.get_context().group(name) for name in LAYOUTS}


@pytest.fixture(scope="module")
def actors(ray_local: None) -> Iterator[ray_shm.ActorGroup]:
    with ray_shm.launch(Worker, num_workers=4, gpus_per_worker=1, groups=LAYOUTS) as group:
        yield group


@pytest.mark.parametrize("size", SIZES)
def test_actors(actors: ray_shm.ActorGroup, size: str) -> None:
    actors.collective_rpc("run_all", args=(size,), timeout=WATCHDOG)


def test_actors_gather_the_parts_of_a_dictionary(actors: ray_shm.ActorGroup) -> None:
    actors.collective_rpc("run_parts", timeout=WATCHDOG)


# Two hosts, two processes on each


@pytest.fixture(scope="module")
def cable() -> Iterator[tuple[Host, Host]]:
    yield from lay_cable()


@pytest.fixture(scope="module")
def processes(cable: tuple[Host, Host]) -> list[HostProcess]:
    here, there = cable
    processes = [here, here.spawn(), there, there.spawn()]
    ips = [here.ip, here.ip, there.ip, there.ip]
    for rank, process in enumerate(processes):
        process.start(construct_there, rank, ips)
    for process in processes:
        process.result()
    return processes


def construct_there(me: Any, rank: int, ips: list[str]) -> None:
    me.groups = {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        [first] = [ranks[0] for ranks in layout if rank in ranks]
        me.groups[name] = StatelessGroupCoordinator(
            layout,
            rank % 2,
            "gloo",
            False,
            group_name=name,
            host=ips[first],
            group_ports=[[29_500 + 10 * number + index] for index in range(len(layout))],
            global_rank=rank,
            global_world_size=4,
            bind_host=ips[rank],
            timeout=WATCHDOG,
        )


def check_all_there(me: Any, size: str) -> None:
    run_all(me.groups, size)


def check_parts_there(me: Any) -> None:
    conformance_checks.parts_are_gathered(me.groups["stages"], me.groups["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_two_hosts(processes: list[HostProcess], size: str) -> None:
    for process in processes:
        process.start(check_all_there, size)
    for process in processes:
        process.result()


@pytest.mark.slow
def test_two_hosts_gather_the_parts_of_a_dictionary(processes: list[HostProcess]) -> None:
    for process in processes:
        process.start(check_parts_there)
    for process in processes:
        process.result()
