"""The RPC suite on one node: through shared memory, with the queues here or in a driver actor, and through ZeroMQ.

(The last is slow, and test_two_nodes.py runs it, too.)
"""

from __future__ import annotations

import pytest
from rpc_suite import SIZE, Probe, RpcSuite, warm_up

import ray_shm


@pytest.fixture(scope="module", params=["shm", "actor", pytest.param("zmq", marks=pytest.mark.slow)])
def group(request, ray_local):
    driver, transport = ("actor", "shm") if request.param == "actor" else ("local", request.param)
    with ray_shm.launch(Probe, num_workers=SIZE, driver=driver, transport=transport) as group:
        assert {w.transport for w in group.workers} == {transport}
        warm_up(group)
        yield group


class TestRpc(RpcSuite):
    pass
