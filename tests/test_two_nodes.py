"""The RPC suite on a cluster of two nodes, with ZeroMQ between the driver and every worker."""

from __future__ import annotations

import pytest
import ray
from rpc_suite import SIZE, Probe, RpcSuite, warm_up

import ray_shm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, monkeypatch_module):
    from ray.cluster_utils import Cluster

    # A cluster leaves its address where every ray.init() of this machine would find it.
    monkeypatch_module.setenv("RAY_TMPDIR", str(tmp_path_factory.mktemp("r")))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    cluster.add_node(num_cpus=4, node_ip_address="127.0.0.2")
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def group(cluster):
    with ray_shm.launch(Probe, num_workers=SIZE, transport="zmq", cpus_per_worker=1, strategy="SPREAD") as group:
        assert {w.transport for w in group.workers} == {"zmq"}
        assert len({w.node_id for w in group.workers}) == 2
        warm_up(group)
        yield group


class TestTwoNodes(RpcSuite):
    def test_ranks_are_sorted_by_node_the_drivers_first(self, group):
        nodes = [w.node_id for w in group.workers]
        assert nodes[0] == ray.get_runtime_context().get_node_id()
        assert nodes == sorted(nodes, key=nodes.index)  # each node's ranks stand together
        assert [w.local_rank for w in group.workers] == [0, 1, 0, 1]
