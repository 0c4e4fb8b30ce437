"""The RPC suite on one node, through shared memory and (slow: test_two_nodes.py runs it, too) through ZeroMQ."""

from __future__ import annotations

import pytest
from rpc_suite import SIZE, Probe, RpcSuite, warm_up

import ray_shm


@pytest.fixture(scope="module", params=["shm", pytest.param("zmq", marks=pytest.mark.slow)])
def group(request, ray_local):
    with ray_shm.launch(Probe, num_workers=SIZE, transport=request.param) as group:
        assert {w.transport for w in group.workers} == {request.param}
        warm_up(group)
        yield group


class TestRpc(RpcSuite):
    pass
