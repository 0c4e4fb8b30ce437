"""Replicas on a real Ray Serve: each owns one actor group, in the placement group that Serve made for it.

Ray Serve is imported inside of functions only, because every worker process imports this file for the classes below.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port

import ray_shm
from ray_shm.errors import PlacementError, RpcError, WorkerDiedError
from ray_shm.serve import GroupReplica, deployment_options

WATCHDOG = 90.0  # seconds; only a hang comes near
LOOPBACK = "127.0.77.2"  # nobody else binds here
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "autoscale.py"

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray Serve


class Worker:
    def __init__(self, farewells: str | None = None) -> None:
        """Leaves a file in the folder `farewells` when its process ends in good order."""
        if farewells is not None:
            atexit.register((Path(farewells) / str(os.getpid())).touch)

    def where(self) -> dict[str, Any]:
        context = ray_shm.get_context()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"rank": context.rank, "pid": os.getpid(), "gpus": list(context.gpu_ids), "visible": visible}

    def echo(self, value: Any) -> Any:
        return value

    def fail_on(self, rank: int) -> str:
        if ray_shm.get_context().rank == rank:
            raise ValueError(f"rank {rank} says no")
        return "fine"

    def meet(self, folder: str, mine: str, other: str) -> bool:
        """Returns once another call has said that it is here, too."""
        (Path(folder) / mine).touch()
        _wait(lambda: (Path(folder) / other).exists(), f"{other} to come")
        return True


class BrokenWorker:
    def __init__(self) -> None:
        raise ValueError("no such weights")


class Replica(GroupReplica):
    async def where(self) -> tuple[int, list[dict[str, Any]]]:
        return os.getpid(), await self.collective_rpc("where")

    async def __call__(self, request: Any) -> Any:
        """HTTP: the body is the method and its arguments."""
        method, *args = await request.json()
        return await self.collective_rpc(method, args=args)


@pytest.fixture(scope="module")
def http_address(ray_local: None) -> Iterator[str]:
    """A running Serve; where its proxy listens."""
    from ray import serve

    port = free_port(LOOPBACK)
    serve.start(http_options={"host": LOOPBACK, "port": port}, logging_config={"log_level": "ERROR"})
    yield f"http://{LOOPBACK}:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def model(http_address: str) -> Iterator[Any]:
    """Handle of a replica with two workers, for tests that leave it as it is."""
    with _deployed("model", (Worker, {}), "/model", max_ongoing_requests=32) as handle:
        yield handle


@contextmanager
def _deployed(
    name: str, bound: tuple[type, dict[str, Any]], route_prefix: str | None = None, **options: Any
) -> Iterator[Any]:
    """A handle of replicas with two workers each, of the class and with the launch options in `bound`."""
    from ray import serve

    worker_cls, launch_options = bound
    options = deployment_options(2, replica_cpus=0.5, graceful_shutdown_wait_loop_s=0.1, **options)
    application = serve.deployment(**options)(Replica).bind(worker_cls, **launch_options)
    try:
        yield serve.run(application, name=name, route_prefix=route_prefix)
    finally:
        serve.delete(name)


def _call(handle: Any, method: str, *args: Any, **options: Any) -> Any:
    return handle.collective_rpc.remote(method, args=args, **options).result(timeout_s=WATCHDOG)


def _wait(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WATCHDOG
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WATCHDOG} s for {what}")
        time.sleep(0.01)


def _gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


# -- the options ------------------------------------------------------------------------------------------------------


def test_options_reserve_the_replica_and_one_bundle_per_worker() -> None:
    options = deployment_options(
        3, gpus_per_worker=1, cpus_per_worker=2, resources_per_worker={"ssd": 1}, strategy="STRICT_PACK", name="llm"
    )
    worker = {"CPU": 2.0, "GPU": 1.0, "ssd": 1.0}
    assert options["placement_group_bundles"] == [{"CPU": 1.0}, worker, worker, worker]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert options["ray_actor_options"] == {"num_cpus": 1}
    assert options["name"] == "llm"


def test_what_the_replica_asks_for_itself_is_in_its_own_bundle() -> None:
    own = {"num_gpus": 1, "resources": {"ssd": 2}, "memory": 1000, "runtime_env": {"env_vars": {"A": "b"}}}
    options = deployment_options(1, replica_cpus=0, ray_actor_options=own)
    assert options["placement_group_bundles"] == [{"GPU": 1.0, "ssd": 2.0, "memory": 1000.0}, {"CPU": 0.001}]
    assert options["ray_actor_options"] == {**own, "num_cpus": 0}


def test_serve_takes_the_options_for_deployment_and_for_options() -> None:
    from ray import serve

    options = deployment_options(2, autoscaling_config={"min_replicas": 1, "max_replicas": 2}, max_ongoing_requests=7)
    for deployment in (serve.deployment(**options)(Replica), serve.deployment(Replica).options(**options)):
        assert deployment.max_ongoing_requests == 7
        assert deployment.ray_actor_options["num_cpus"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_workers": 0}, ValueError, "at least 1 worker"),
        ({"num_workers": True}, TypeError, "must be an int"),
        ({"strategy": "TIGHT"}, ValueError, "STRICT_PACK"),
        ({"gpus_per_worker": 1.5}, ValueError, "whole GPUs"),
        ({"replica_cpus": -1}, ValueError, "0 or more"),
        ({"resources_per_worker": {"GPU": 1}}, ValueError, "use gpus_per_worker"),
        ({"placement_group_bundles": [{"CPU": 1}]}, TypeError, "made here from num_workers"),
        ({"placement_group_strategy": "PACK"}, TypeError, "made here from num_workers"),
        ({"ray_actor_options": {"num_cpus": 2}}, TypeError, "replica_cpus"),
        ({"max_replicas_per_node": 1}, ValueError, "max_replicas_per_node"),
    ],
)
def test_options_that_are_wrong_or_collide_are_refused(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        deployment_options(**{"num_workers": 1, **arguments})


def test_what_serve_decides_cannot_be_given_to_the_group() -> None:
    with pytest.raises(TypeError, match=r"strategy and name: .*give deployment_options"):
        GroupReplica(Worker, strategy="PACK", name="llm")


def test_outside_of_a_placement_group_the_error_says_what_to_do(ray_local: None) -> None:
    with pytest.raises(PlacementError, match=r"deploy with serve.deployment\(\*\*ray_shm.serve.deployment_options"):
        GroupReplica(Worker)


# -- requests ---------------------------------------------------------------------------------------------------------


def test_concurrent_requests_overlap_and_get_their_own_answers(model: Any, tmp_path: Path) -> None:
    first = model.collective_rpc.remote("meet", args=(str(tmp_path), "a", "b"), target_ranks=[0])
    second = model.collective_rpc.remote("meet", args=(str(tmp_path), "b", "a"), target_ranks=[1])
    assert first.result(timeout_s=WATCHDOG) == second.result(timeout_s=WATCHDOG) == [True]
    responses = [model.collective_rpc.remote("echo", args=(i,)) for i in range(32)]
    assert [response.result(timeout_s=WATCHDOG) for response in responses] == [[i, i] for i in range(32)]


def test_a_workers_exception_is_the_error_of_that_request_only(model: Any) -> None:
    before = _call(model, "where")
    with pytest.raises(RpcError) as caught:
        _call(model, "fail_on", 1)
    assert list(caught.value.failures) == [1]
    assert isinstance(caught.value.root_cause, ValueError)
    assert str(caught.value.root_cause) == "rank 1 says no"
    assert caught.value.late_ranks == []
    assert _call(model, "where") == before


def test_over_http_a_workers_exception_is_status_500(model: Any, http_address: str) -> None:
    def post(*call: Any) -> Any:
        with urllib.request.urlopen(f"{http_address}/model", json.dumps(call).encode(), WATCHDOG) as response:
            return json.load(response)

    with pytest.raises(urllib.error.HTTPError) as caught:
        post("fail_on", 0)
    with caught.value as response:
        assert response.code == 500
    assert post("echo", "hello") == ["hello", "hello"]


# -- placement and end ------------------------------------------------------------------------------------------------


def test_every_replica_gets_gpus_of_its_own_and_closes_its_group(http_address: str, tmp_path: Path) -> None:
    replicas: dict[int, list[dict[str, Any]]] = {}
    launch_options = {"num_workers": 2, "gpus_per_worker": 1, "args": (str(tmp_path),)}
    with _deployed("gpus", (Worker, launch_options), gpus_per_worker=1, num_replicas=2) as handle:

        def both_answered() -> bool:
            replicas.update([handle.where.remote().result(timeout_s=WATCHDOG)])
            return len(replicas) == 2

        _wait(both_answered, "both replicas to be asked")
    workers = [worker for group in replicas.values() for worker in group]
    assert [worker["rank"] for worker in workers] == [0, 1, 0, 1]
    assert all(worker["visible"] == ",".join(worker["gpus"]) for worker in workers)
    assert len({worker["visible"] for worker in workers}) == 4
    _wait(lambda: _gone([*replicas, *(worker["pid"] for worker in workers)]), "replicas and workers to leave")
    # Exit handlers ran, which they do not when Ray kills a worker.
    assert {path.name for path in tmp_path.iterdir()} == {str(worker["pid"]) for worker in workers}


def test_a_constructor_that_raises_fails_the_deployment_and_leaves_nothing(http_address: str) -> None:
    from ray import serve

    options = deployment_options(2, replica_cpus=0.5, max_constructor_retry_count=1)
    try:
        with pytest.raises(RuntimeError):
            serve.run(serve.deployment(**options)(GroupReplica).bind(BrokenWorker), name="broken", route_prefix=None)
        deployment = serve.status().applications["broken"].deployments["GroupReplica"]
        assert "its constructor: ValueError: no such weights" in deployment.message
    finally:
        serve.delete("broken")


def test_a_replica_that_lost_a_worker_is_replaced_and_a_killed_one_takes_its_workers_along(http_address: str) -> None:
    with _deployed("fragile", (Worker, {}), health_check_period_s=0.3) as handle:
        replica, workers = handle.where.remote().result(timeout_s=WATCHDOG)
        os.kill(workers[1]["pid"], signal.SIGKILL)
        with pytest.raises(RpcError) as caught:
            _call(handle, "echo", 1)
        assert isinstance(caught.value.root_cause, WorkerDiedError)
        second, second_workers = _until_healthy(handle)
        assert second != replica
        assert [worker["rank"] for worker in second_workers] == [0, 1]
        _wait(lambda: _gone([replica, workers[0]["pid"]]), "the first replica and its other worker to leave")
        os.kill(second, signal.SIGKILL)
        _wait(lambda: _gone([w["pid"] for w in second_workers]), "the workers of the killed replica to leave")


def _until_healthy(handle: Any) -> tuple[int, list[dict[str, Any]]]:
    answers: list[tuple[int, list[dict[str, Any]]]] = []

    def answered() -> bool:
        try:
            answers.append(handle.where.remote().result(timeout_s=WATCHDOG))
        except RpcError:
            return False
        return True

    _wait(answered, "a healthy replica")
    return answers[0]


# -- the example ------------------------------------------------------------------------------------------------------


def test_example_goes_from_one_replica_to_two_and_back() -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=170, cwd="/", check=False
    )
    assert run.returncode == 0, f"stdout:\n{run.stdout}\nstderr:\n{run.stderr}"
    summary = run.stdout.splitlines()[-1]
    assert "replicas 1 -> 2 -> 1; " in summary
    assert " 0 failed; left over: nothing" in summary
