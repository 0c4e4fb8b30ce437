"""Fixtures for all tests: a real local Ray, and a check after every test that nothing is left over."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import leaks
import pytest

if TYPE_CHECKING:
    from fake_gpu import FakeMemory
    from rank_pool import Pool
    from reader_pool import Peer
    from zmq_ends import MakeChannel

    from ray_shm.message_queue import MessageQueue

# Before anything imports ray: a hang shows its stacks, and nothing is sent or fetched.
faulthandler.enable()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that share `ray_local` come last: it runs from the first of them to the end."""
    sharing = {item.path for item in items if "ray_local" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path in sharing)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A real Ray on this machine with 8 CPUs and 8 GPUs, which Ray takes on trust: one for all modules that use it.

    A module that makes its own cluster does not use this fixture: that never outlives the module.
    """
    with _local_ray():
        yield


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """The same for one module alone, which may shut it down."""
    with _local_ray():
        yield


@contextlib.contextmanager
def _local_ray() -> Iterator[None]:
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


@pytest.fixture(scope="module")
def what_stays() -> None:
    """What a process starts once and keeps (see injection.py) is no leak of the first test that needs it."""
    from injection import start_what_stays

    start_what_stays()


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Another process, for a test that may kill it or leave it hanging."""
    from reader_pool import peers_for

    with peers_for(1) as [made]:
        yield made


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """Two of them."""
    from reader_pool import peers_for

    with peers_for(2) as made:
        yield made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMemory]:
    """This process's, in files; what it shares must have been let go of in the end."""
    import gc

    from fake_gpu import send_tensors_as_from_a_gpu

    memory = send_tensors_as_from_a_gpu(monkeypatch)
    yield memory
    gc.collect()
    assert memory.kept == set()


@pytest.fixture(scope="module")
def spare() -> Iterator[list[Peer]]:
    """Two readers' processes with such a GPU: they have imported torch, which takes seconds."""
    from gpu_readers import has_gpu
    from reader_pool import peers_for

    with peers_for(2) as made:
        for peer in made:
            peer.run(has_gpu)
        yield made


@pytest.fixture
def gpu_queue(spare: list[Peer]) -> Iterator[MessageQueue]:
    """To these two, that shares tensors from the second on."""
    from gpu_readers import queue_to
    from reader_pool import close

    with queue_to(spare) as made:
        yield made
        for peer in spare:
            peer.run(close)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[BaseException]]]:
    """What `interrupted` raised where nobody gets it: in a callback, say of a lease."""
    from interrupts import Interrupted

    kinds: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: kinds.append(args.exc_type))
    yield kinds
    assert set(kinds) <= {Interrupted, ResourceWarning}  # the latter of a file that was just opened


@pytest.fixture
def make_channel() -> Iterator[MakeChannel]:
    """For channels between nodes with all their ends in this process."""
    from zmq_ends import channels

    with channels() as make:
        yield make


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files, and short: paths of sockets end at 107 characters, and pytest's own folders are long."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Opened at the end, whatever happens: nobody is left waiting."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Three ranks for a module's checks; its tests may kill some of them, and no other way to end early is right."""
    from rank_pool import Pool

    pool = Pool()
    yield pool
    assert set(pool.close()) <= {0, -signal.SIGKILL}


@pytest.fixture
def ends() -> Iterator[tuple[MessageQueue, MessageQueue]]:
    """Writer and reader of a queue, both in this process, whose memory nobody holds before and after."""
    from injection import HANG

    from ray_shm import lease
    from ray_shm.message_queue import MessageQueue

    gc.collect()
    assert lease.held() == (0, 0)
    with MessageQueue(1, 1) as writer, MessageQueue.create_from_handle(writer.export_handle(), 0) as reader:
        writer.wait_until_ready(HANG)
        yield writer, reader
    gc.collect()
    assert lease.held() == (0, 0)
