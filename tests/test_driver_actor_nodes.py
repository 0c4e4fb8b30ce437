"""Driver actors on a cluster of two nodes (on one machine): where they sit, and workers that only ZeroMQ reaches."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import ray

import ray_shm

HANG = 60.0
FAR = "127.0.0.2"


pytestmark = pytest.mark.slow  # a cluster of its own, and three groups


class Worker:
    def rank(self):
        return ray_shm.get_context().rank

    def node_ip(self):
        return ray_shm.get_context().node_ip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # A cluster leaves its address where every ray.init() of this machine would find it.
        patch.setenv("RAY_TMPDIR", str(tmp_path_factory.mktemp("r")))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=3, node_ip_address=FAR)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def seat_of(group):
    return group._runtime._line.welcome.node_ip


def test_the_driver_actor_sits_where_most_workers_are(cluster):
    with ray_shm.launch(Worker, num_workers=4, cpus_per_worker=1, name="spread", strategy="SPREAD") as group:
        nodes = group.collective_rpc("node_ip")
        assert nodes[:3] == [FAR] * 3  # the driver's node first
        assert nodes[3] != FAR
        assert seat_of(group) == FAR
        assert group.collective_rpc("rank") == [0, 1, 2, 3]


def test_it_stays_beside_its_creator_where_that_is_as_good(cluster):
    with ray_shm.launch(Worker, num_workers=1, cpus_per_worker=1, driver="actor") as group:
        assert group.collective_rpc("node_ip") == [seat_of(group)]


def test_workers_that_only_zeromq_reaches(cluster):
    with ray_shm.launch(Worker, num_workers=2, cpus_per_worker=1, driver="actor", transport="zmq") as group:
        assert {w.transport for w in group.workers} == {"zmq"}
        assert type(group._runtime._line).__name__ == "ShmDriverLine"
        futures = [group.collective_rpc(lambda w, i: i, args=(i,), non_block=True) for i in range(200)]
        assert [f.result(HANG) for f in futures] == [[i, i] for i in range(200)]
        pid = group.workers[1].pid
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + HANG
        while group.workers[1].state != "dead" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert group.heal(HANG) == [1]
        assert group.collective_rpc("rank", timeout=HANG) == [0, 1]
        assert not Path(f"/proc/{pid}").exists()
