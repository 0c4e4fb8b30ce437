"""Reservations, devices and ports, with a real Ray on one node and on two."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_shm.deadline import Deadline
from ray_shm.errors import PlacementError
from ray_shm.placement.bundles import Reservation, WorkerResources, reserve
from ray_shm.placement.devices import verify
from ray_shm.placement.topology import WorkerPlace, assign_ranks

PLENTY = 60.0  # s; against hangs only
GPU = WorkerResources(gpus=1)


def soon() -> Deadline:
    return Deadline.after(1.0)


def plenty() -> Deadline:
    return Deadline.after(PLENTY)


def live_groups() -> list[str]:
    return [key for key, row in placement_group_table().items() if row["state"] != "REMOVED"]


def worker_class() -> Any:
    """An actor class made in a function is pickled by value: Ray's workers cannot import test modules."""

    @ray.remote(num_cpus=0)
    class Worker:
        def place(self, bundle_index: int) -> WorkerPlace:
            from ray_shm.placement.devices import current_place

            return current_place(bundle_index)

    return Worker


def start(reservation: Reservation, resources: WorkerResources, count: int, **options: Any) -> list[WorkerPlace]:
    """Start an actor in each of the first `count` bundles, ask them for their places, and end them."""
    actors = [
        worker_class()
        .options(**resources.actor_options(), scheduling_strategy=reservation.scheduling_strategy(i), **options)
        .remote()
        for i in range(count)
    ]
    try:
        asked = [actor.place.remote(i) for actor, i in zip(actors, reservation.bundle_indices, strict=False)]
        places: list[WorkerPlace] = ray.get(asked, timeout=PLENTY)
        return places
    finally:
        for actor in actors:
            ray.kill(actor)


class TestBeforeRay:
    @pytest.mark.parametrize(
        "bad",
        [
            {"num_workers": 0},
            {"num_workers": -1},
            {"strategy": "PILE"},
            {"lifetime": "forever"},
            {"bundle_label_selector": [{"zone": "a"}]},
            {"placement_group": PlacementGroup.empty()},
        ],
        ids=lambda bad: next(iter(bad)),
    )
    def test_a_wrong_request_is_refused_without_ray(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            reserve(**{"num_workers": 2, "resources": GPU, "deadline": plenty(), **bad})
        assert not ray.is_initialized()

    @pytest.mark.parametrize(
        "bad",
        [
            {"cpus": -1},
            {"gpus": -0.5},
            {"gpus": 1.5},
            {"gpus": float("nan")},
            {"cpus": float("inf")},
            {"custom": {"disk": -1}},
            {"custom": {"GPU": 1}},
        ],
        ids=str,
    )
    def test_wrong_resources_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            WorkerResources(**bad)

    def test_bundle_and_actor_options(self) -> None:
        assert WorkerResources().bundle() == {"CPU": 0.001}
        assert WorkerResources().actor_options() == {"num_cpus": 0, "num_gpus": 0, "resources": {}}
        full = WorkerResources(cpus=2, gpus=0.5, custom={"memory": 1e6, "disk": 3, "unused": 0})
        assert full.bundle() == {"CPU": 2, "GPU": 0.5, "memory": 1e6, "disk": 3}
        assert full.actor_options() == {"num_cpus": 2, "num_gpus": 0.5, "memory": 1e6, "resources": {"disk": 3}}


@pytest.fixture(scope="class")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("local_ray")
class TestOnOneNode:
    """4 CPUs and 8 GPUs, fake: Ray only counts them."""

    @pytest.fixture(autouse=True)
    def nothing_left(self) -> Iterator[None]:
        yield
        assert live_groups() == []

    def test_third_of_three_is_refused_with_the_numbers(self) -> None:
        with reserve(4, GPU, deadline=plenty()) as first, reserve(4, GPU, deadline=plenty()) as second:
            assert first.owned
            assert sorted(first.bundle_indices) == [0, 1, 2, 3]
            with pytest.raises(PlacementError) as refused:
                reserve(4, GPU, deadline=soon())
            text = str(refused.value)
            assert "4 × {GPU: 1} (PACK) could not be placed, after 1." in text
            assert "the cluster has 4 CPU, 8 GPU on 1 node, free: 4 CPU, 0 GPU" in text
            assert sorted(live_groups()) == sorted(r.placement_group.id.hex() for r in (first, second))
            second.remove()
            reserve(4, GPU, deadline=plenty()).remove()

    def test_what_can_never_fit_is_refused_without_a_deadline(self) -> None:
        with pytest.raises(PlacementError, match=r"9 × \{GPU: 1\} \(PACK\) can never be placed"):
            reserve(9, GPU, deadline=Deadline.after(None))
        with pytest.raises(PlacementError, match=r"STRICT_SPREAD needs 2 different nodes.*1 of 1 can"):
            reserve(2, GPU, strategy="STRICT_SPREAD", deadline=Deadline.after(None))

    def test_interrupted_while_waiting(self) -> None:
        said: list[str] = []

        def interrupt(text: str) -> None:
            said.append(text)
            signal.raise_signal(signal.SIGINT)

        with reserve(5, GPU, deadline=plenty()):
            with pytest.raises(KeyboardInterrupt):
                reserve(4, GPU, deadline=plenty(), progress=interrupt)
            assert len(live_groups()) == 1
        assert "waiting for 4 × {GPU: 1} (PACK): the cluster has 4 CPU, 8 GPU on 1 node, free: 4 CPU, 3 GPU" in said[0]

    def test_dropped_it_is_removed_and_warned_about(self) -> None:
        reservations = [reserve(1, GPU, deadline=plenty())]
        group = reservations[0].placement_group
        with pytest.warns(ResourceWarning, match=group.id.hex()):
            reservations.clear()
        Reservation(group, [0], {}, owned=True).remove()  # waits for the removal to be confirmed

    def test_workers_get_different_gpus(self) -> None:
        with reserve(3, GPU, deadline=plenty()) as reservation:
            places = start(reservation, GPU, 3)
            verify(places, 1)
            assert len({p.gpu_ids for p in places}) == 3
            assert [p.cuda_visible_devices for p in places] == [p.gpu_ids[0] for p in places]
            ranks = assign_ranks(places, ray.get_runtime_context().get_node_id())
            assert [r.place.gpu_ids for r in ranks] == sorted(p.gpu_ids for p in places)
            # A GPU of a neighbour in the user's runtime_env: what Ray assigned is still what is reported.
            overridden = start(reservation, GPU, 1, runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "7"}})
            assert overridden[0].gpu_ids == places[0].gpu_ids
            with pytest.raises(PlacementError, match=r"VISIBLE_DEVICES is '7'.*env_vars"):
                verify(overridden, 1)

    def test_fractions_share_a_gpu_and_none_is_none(self) -> None:
        half = WorkerResources(gpus=0.5)
        with reserve(2, half, deadline=plenty()) as reservation:
            shared = start(reservation, half, 2)
            verify(shared, 0.5)
            assert shared[0].gpu_ids == shared[1].gpu_ids
            with pytest.raises(PlacementError, match="given twice"):
                verify(shared, 1)
        nothing = WorkerResources()
        with reserve(1, nothing, deadline=plenty()) as reservation:
            places = start(reservation, nothing, 1, runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "3"}})
            assert [(p.gpu_ids, p.cuda_visible_devices) for p in places] == [((), "3")]
            verify(places, 0)

    def test_a_given_group_is_used_and_kept(self) -> None:
        group = placement_group([{"GPU": 1}, {"CPU": 1}, {"GPU": 1}, {"GPU": 1}])
        with reserve(2, GPU, placement_group=group, deadline=plenty()) as first:
            assert first.bundle_indices == [0, 2]
            assert not first.owned
            with reserve(1, GPU, placement_group=group, deadline=plenty()) as second:
                assert second.bundle_indices == [3]
                # One bundle serves one worker: the taken ones are no place for another, though nothing runs yet.
                with pytest.raises(PlacementError, match=r"has 0 with room \(3 more are taken\)"):
                    reserve(1, GPU, placement_group=group, deadline=soon())
            with reserve(1, WorkerResources(cpus=1), placement_group=group, deadline=plenty()) as cpu:
                assert cpu.bundle_indices == [1]
        with pytest.raises(PlacementError, match=r"4 workers.*has 3 with room"):
            reserve(4, GPU, placement_group=group, deadline=plenty())
        with pytest.raises(ValueError, match="bundle_label_selector"):
            reserve(1, GPU, placement_group=group, bundle_label_selector={"zone": "a"}, deadline=plenty())
        assert live_groups() == [group.id.hex()]
        Reservation(group, [0], {}, owned=True).remove()
        with pytest.raises(PlacementError, match="was removed"):
            reserve(1, GPU, placement_group=group, deadline=plenty())

    def test_a_given_group_that_is_not_ready_by_the_deadline(self) -> None:
        group = placement_group([{"GPU": 9}])
        with pytest.raises(PlacementError, match=rf"{group.id.hex()}, 1 × \{{GPU: 9\}}, could not be placed"):
            reserve(1, GPU, placement_group=group, deadline=soon())
        assert live_groups() == [group.id.hex()]
        Reservation(group, [0], {}, owned=True).remove()

    def test_inside_a_group_its_free_bundles_are_used(self) -> None:
        @ray.remote
        class Replica:
            """As Serve starts one: in bundle 0, with the bundles for its children behind."""

            def __init__(self) -> None:
                self.reservations: list[Reservation] = []

            def reserve(self, num_workers: int, **resources: float) -> tuple[list[int], bool] | str:
                from ray_shm.placement import bundles

                try:
                    made = bundles.reserve(
                        num_workers, bundles.WorkerResources(**resources), deadline=Deadline.after(PLENTY)
                    )
                except PlacementError as refused:
                    return str(refused)
                self.reservations.append(made)
                return made.bundle_indices, made.owned

            def remove(self) -> None:
                while self.reservations:
                    self.reservations.pop().remove()

        @ray.remote(num_cpus=0, num_gpus=1)
        class Occupant:
            def ready(self) -> None:
                pass

        def inside(index: int) -> PlacementGroupSchedulingStrategy:
            return PlacementGroupSchedulingStrategy(group, index)

        def ask(num_workers: int, **resources: float) -> Any:
            return ray.get(replica.reserve.remote(num_workers, **resources), timeout=PLENTY)

        group = placement_group([{"CPU": 2}, {"GPU": 1}, {"GPU": 1}])
        replica = Replica.options(num_cpus=1, scheduling_strategy=inside(0)).remote()

        assert ask(2, gpus=1) == ([1, 2], False)
        refused = ask(1, gpus=1)  # nothing runs in them yet, but they are spoken for
        assert "which this process runs in, has 0 with room (2 more are taken)" in refused
        assert "placement_group=ray.util.placement_group([{'GPU': 1.0}] * 1, strategy='PACK')" in refused
        ray.get(replica.remove.remote())
        assert "has 2 with room (0 more are taken)" in ask(3, gpus=1)

        occupant = Occupant.options(scheduling_strategy=inside(1)).remote()
        ray.get(occupant.ready.remote(), timeout=PLENTY)
        assert ask(1, gpus=1) == ([2], False)
        ray.get(replica.remove.remote())
        assert "has 1 with room (1 more are taken)" in ask(2, gpus=1)
        ray.kill(occupant)
        assert ask(2, gpus=1) == ([1, 2], False)  # as soon as Ray shows the bundle free again

        assert ask(1, cpus=1) == ([0], False)  # its own bundle has a CPU left
        assert "has 0 with room (1 more are taken)" in ask(1, cpus=2)
        assert live_groups() == [group.id.hex()]
        Reservation(group, [0], {}, owned=True).remove()


@pytest.fixture(scope="class")
def cluster() -> Iterator[Cluster]:
    """In a folder of its own (short: sockets lie there), or any `ray.init()` on this machine would join the cluster."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster(initialize_head=True, head_node_args={"num_gpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_gpus=2, node_ip_address="127.0.0.2")
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.usefixtures("cluster")
class TestOnTwoNodes:
    """One GPU beside the driver, two on 127.0.0.2. `ray start` clusters may grow: nothing here is certain to fail."""

    @pytest.fixture
    def nodes(self) -> dict[str, str]:
        """Node id by IP address."""
        return {row["NodeManagerAddress"]: row["NodeID"] for row in ray.nodes() if row["Alive"]}

    def test_strict_strategies_explain_the_nodes(self, nodes: dict[str, str]) -> None:
        with pytest.raises(PlacementError) as packed:
            reserve(3, GPU, strategy="STRICT_PACK", deadline=soon())
        text = str(packed.value)
        assert "could not be placed, after 1." in text
        assert "3 GPU on 2 nodes" in text
        assert all(f"node {ip}: has 1 CPU, " in text for ip in nodes)
        assert "STRICT_PACK needs one node that holds all 3 × {GPU: 1}; the largest holds 2" in text
        with pytest.raises(PlacementError, match=r"STRICT_SPREAD needs 3 different nodes .* 2 of 2 can"):
            reserve(3, GPU, strategy="STRICT_SPREAD", deadline=soon())
        assert live_groups() == []

    def test_ranks_start_beside_the_driver(self) -> None:
        driver = ray.get_runtime_context().get_node_id()
        with reserve(3, GPU, deadline=plenty()) as reservation:
            places = start(reservation, GPU, 3)
        verify(places, 1)
        ranks = assign_ranks(places, driver)
        assert [(r.node_rank, r.local_rank, r.place.gpu_ids) for r in ranks] == [
            (0, 0, ("0",)),
            (1, 0, ("0",)),
            (1, 1, ("1",)),
        ]
        assert [r.place.node_id == driver for r in ranks] == [True, False, False]
        assert {r.place.node_ip for r in ranks[1:]} == {"127.0.0.2"}
        with pytest.raises(PlacementError, match="given twice"):
            verify([replace(p, node_id=driver) for p in places], 1)

    def test_labels_choose_the_node(self, nodes: dict[str, str]) -> None:
        there = nodes["127.0.0.2"]
        with reserve(2, GPU, bundle_label_selector={"ray.io/node-id": there}, deadline=plenty()) as reservation:
            table = placement_group_table(reservation.placement_group)
        assert list(table["bundles_to_node_id"].values()) == [there, there]

    def test_remove_after_shutdown_starts_no_ray(self, cluster: Cluster) -> None:
        subprocess.run([sys.executable, "-c", SHUTDOWN_AND_BACK, cluster.address], timeout=PLENTY, check=True)


SHUTDOWN_AND_BACK = """
import sys
import ray
from ray_shm.deadline import Deadline
from ray_shm.placement.bundles import WorkerResources, reserve

def connect():
    ray.init(address=sys.argv[1], log_to_driver=False)

def state(reservation):
    return ray.util.placement_group_table(reservation.placement_group).get("state")

connect()
plain = reserve(1, WorkerResources(), deadline=Deadline.after(60))
detached = reserve(1, WorkerResources(), lifetime="detached", deadline=Deadline.after(60))
ray.shutdown()
plain.remove()
if ray.is_initialized():
    sys.exit("remove() started a new Ray")
connect()
if state(detached) != "CREATED":
    sys.exit("the detached group did not outlive its job")
detached.remove()
detached.remove()
if state(detached) != "REMOVED":
    sys.exit("remove() did not wait until the detached group was removed")
ray.shutdown()
"""
