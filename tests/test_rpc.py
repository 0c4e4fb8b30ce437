"""The RPC suite on one node: through shared memory, and (slow) through a driver actor and through ZeroMQ.

By default test_driver_actor.py has calls of every kind through a driver actor, test_two_nodes.py all through ZeroMQ.
"""

from __future__ import annotations

import pytest
from rpc_suite import SIZE, Probe, RpcSuite, warm_up

import ray_shm

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("actor", "zmq")]


@pytest.fixture(scope="module", params=["shm", *SLOW])
def group(request, ray_local):
    driver, transport = ("actor", "shm") if request.param == "actor" else ("local", request.param)
    with ray_shm.launch(Probe, num_workers=SIZE, driver=driver, transport=transport) as group:
        assert {w.transport for w in group.workers} == {transport}
        warm_up(group)
        yield group


class TestRpc(RpcSuite):
    pass
