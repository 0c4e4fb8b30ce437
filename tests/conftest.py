"""Fixtures for all tests: a real local Ray, and a check after every test that nothing is left over."""

from __future__ import annotations

import faulthandler
import gc
import os
import time
from collections import Counter
from collections.abc import Iterator

import leaks
import pytest

# Before anything imports ray: a hang shows its stacks, and nothing is sent or fetched.
faulthandler.enable()
os.environ.update(
    dict([leaks.MARK.split("=", 1)]),
    HF_HUB_OFFLINE="1",
    PYTHONPATH=os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")])),  # for workers
    RAY_DEDUP_LOGS="0",
    RAY_USAGE_STATS_ENABLED="0",
    SPT_NOENV="1",  # Ray's process titles leave the environment in /proc readable, where the leak check looks
    TOKENIZERS_PARALLELISM="false",
)

GRACE = 5.0  # seconds for what is on its way out: a killed actor's process, a group being removed


def _wait_for_no_leak(before: Counter[str]) -> list[str]:
    """What is there now and was not before, once that is nothing or the grace is over."""
    deadline = time.monotonic() + GRACE
    while True:
        left = leaks.snapshot() - before
        if not left or time.monotonic() > deadline:
            return sorted(left.elements())
        gc.collect()  # an exception's traceback may still hold the frame that owns a resource
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves a descriptor, port, thread, process, placement group or /dev/shm file.

    What wider fixtures hold (`ray_local`, a module's own cluster) is there before, so it does not count.
    """
    before = leaks.snapshot()
    yield
    left = _wait_for_no_leak(before)
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """A real Ray on this machine with 8 CPUs and 8 GPUs, which Ray takes on trust, one for each module.

    A module that makes its own cluster does not use this fixture: Ray never outlives a module.
    """
    import ray

    if ray.is_initialized():
        pytest.fail("Ray still runs from another module, whose fixture must call ray.shutdown()", pytrace=False)
    before = leaks.snapshot()
    ray.init(address="local", num_cpus=8, num_gpus=8, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
    left = _wait_for_no_leak(before)
    if left:
        pytest.fail("after ray.shutdown() there remained:\n  " + "\n  ".join(left), pytrace=False)
