"""A process that is a Ray Client (ray://) has no memory in the cluster: its frames go through Ray calls.

The client runs as a script against a real Ray Client server, which is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import ray
from free_ports import free_port

import ray_shm

START = 60.0  # seconds for the server
RUN = 150.0
NOTICED = 20.0


@pytest.fixture(scope="module")
def address(ray_local):
    port = free_port("127.0.0.1")
    gcs = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.util.client.server", "--mode", "legacy"]
    server = subprocess.Popen(
        [*command, "--address", gcs, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"ray://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


SCRIPT = """
    import sys, time
    import numpy as np
    import ray, ray_shm

    class Worker:
        def __init__(self, base): self.base, self.log = base, []
        def add(self, k): return self.base + k
        def echo(self, value): return value
        def fail(self): raise ValueError("told to fail")
        def count(self, n): yield from range(n)
        def sleep(self, seconds):
            try:
                time.sleep(seconds)
            except ray_shm.RpcCancelledError:
                self.log.append("cancelled")
                raise
        def history(self): return self.log

    def body(address):
        ray.init(address)
        with ray_shm.launch(Worker, num_workers=2, args=(ray_shm.Scatter([10, 20]),), name="far") as group:
            assert "driver actor 'far'" in repr(group), group
            assert group.collective_rpc("add", args=(1,)) == [11, 21]
            futures = [group.collective_rpc("add", args=(i,), non_block=True) for i in range(100)]
            assert [f.result(60) for f in futures] == [[10 + i, 20 + i] for i in range(100)]
            array = np.arange(500_000)
            for got in group.collective_rpc("echo", args=(array,)):
                np.testing.assert_array_equal(got, array)
                got[0] += 1
            try:
                group.collective_rpc("fail")
            except* ValueError as caught:
                assert sorted(caught.failures) == [0, 1]
            else:
                raise AssertionError("no error")
            assert sorted(group.stream("count", args=(20,))) == sorted((r, i) for i in range(20) for r in (0, 1))
            future = group.collective_rpc("sleep", args=(300,), non_block=True)
            while [row.method for row in group.status(timeout=5)] != ["sleep"] * 2:
                pass
            assert future.cancel()
            assert group.collective_rpc("history", timeout=60) == [["cancelled"]] * 2
            with ray_shm.connect("far") as other:
                assert other.collective_rpc("add", args=(2,)) == [12, 22]
            group.check_health(60)
            try:
                ray_shm.launch(Worker, num_workers=1, args=(1,), driver="local")
            except ValueError as exc:
                assert "Ray Client" in str(exc)
            else:
                raise AssertionError("no error")
            left = ray_shm.connect("shared")
            assert left.collective_rpc("meet_me") == ["here"]
            left.close()
        ray.shutdown()
        print("all is well")

    if __name__ == "__main__":
        body(sys.argv[1])
"""


KILLED = """
    import os, sys, time
    import ray, ray_shm

    class Worker:
        def where(self): return ray.get_runtime_context().get_node_id(), os.getpid()

    if __name__ == "__main__":
        ray.init(sys.argv[1])
        group = ray_shm.launch(Worker, num_workers=2, gpus_per_worker=1)
        print(*(pid for _, pid in group.collective_rpc("where")), flush=True)
        time.sleep(300)
"""


def test_a_killed_client_takes_its_group_along(address):
    """Long before Ray gives up waiting for it to connect again, after 30 s."""
    gpus = ray.available_resources()["GPU"]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        try:
            workers = [psutil.Process(int(pid)) for pid in client.stdout.readline().split()]
            assert len(workers) == 2
        finally:
            client.kill()
        killed = time.monotonic()
        assert psutil.wait_procs(workers, timeout=NOTICED)[1] == []
        while ray.available_resources().get("GPU") != gpus:
            assert time.monotonic() - killed < NOTICED
            time.sleep(0.05)


class Host:
    def meet_me(self):
        return "here"


def test_everything_works_through_ray(address):
    with ray_shm.launch(Host, num_workers=1, name="shared") as shared:
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN, check=False)
        assert done.stdout.strip().endswith("all is well"), done.stdout + done.stderr
        assert shared.collective_rpc("meet_me") == ["here"]
        with pytest.raises(ValueError, match="no actor group 'far'"):
            ray_shm.connect("far")
