"""Executor over real Ray actors that hold a model: its steps, its failures, and the traces of its profiler."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ray_shm
from ray_shm import Executor

SIZE = 2
HIDDEN, VOCABULARY = 16, 32
WATCHDOG = 30.0  # seconds; only a hang comes near


@dataclass(frozen=True)
class LayerSpec:
    num_blocks: int
    dtype: str = "float32"


@dataclass(frozen=True)
class KVCacheConfig:
    num_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """A step: a token after those before it. gate: a file that rank 1 waits for, and then raises."""

    token_id: int
    position: int
    gate: str | None = None


class ModelWorker:
    """One rank of a tiny tensor-parallel model: its columns of one matrix, a KV cache, and a greedy sampler."""

    def __init__(self, odd_layer: int | None = None) -> None:
        context = ray_shm.get_context()
        self.rank = context.rank
        self.tp = context.group("tp")
        self.odd_layer = odd_layer
        weights = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(7))
        self.shard = weights.chunk(context.world_size, dim=0)[self.rank]
        self.cache: torch.Tensor | None = None

    def determine_available_memory(self) -> int:
        return 1_000_000 - 1000 * self.rank

    def get_kv_cache_spec(self) -> dict[str, LayerSpec]:
        specs = {f"layers.{i}": LayerSpec(16) for i in range(40)}
        if self.odd_layer is not None:
            specs[f"layers.{self.odd_layer}"] = LayerSpec(16 + self.rank)
        return specs

    def initialize(self, config: KVCacheConfig) -> None:
        if config.num_tokens < 1:
            raise ValueError(f"no room for {config.num_tokens} tokens")
        self.cache = torch.zeros(config.num_tokens, HIDDEN)

    def cached_tokens(self) -> int:
        return 0 if self.cache is None else len(self.cache)

    def execute_model(self, step: SchedulerOutput) -> dict[str, Any]:
        if step.gate is not None and self.rank == 1:
            deadline = time.monotonic() + WATCHDOG
            while not os.path.exists(step.gate) and time.monotonic() < deadline:
                time.sleep(0.002)
            raise ArithmeticError("the sampler met NaN")
        if step.gate is not None:
            return {"rank": self.rank}
        self.cache[step.position] = step.token_id % 5 + 1
        hidden = self.cache[: step.position + 1].mean(dim=0).chunk(SIZE)[self.rank]
        logits = self.tp.all_reduce(hidden @ self.shard)
        return {"rank": self.rank, "token_id": int(logits.argmax())}


@pytest.fixture(scope="module")
def executor(ray_local: None) -> Iterator[Executor]:
    with Executor(launch()) as executor:
        executor.initialize(KVCacheConfig(8))
        executor.execute_model(SchedulerOutput(0, 0))
        yield executor


def launch(**kwargs: Any) -> ray_shm.ActorGroup:
    return ray_shm.launch(ModelWorker, num_workers=SIZE, groups={"tp": [list(range(SIZE))]}, kwargs=kwargs)


# ---- steps --------------------------------------------------------------------------------------------------------


def test_the_start_of_an_engine(executor: Executor) -> None:
    assert executor.determine_available_memory() == 999_000  # the smallest
    assert executor.get_kv_cache_spec()["layers.39"] == LayerSpec(16)
    executor.initialize(KVCacheConfig(8))
    assert executor.group.collective_rpc("cached_tokens") == [8, 8]
    executor.check_health()


def test_a_scatter_gives_each_rank_its_own_configuration(executor: Executor) -> None:
    executor.initialize(ray_shm.Scatter([KVCacheConfig(9), KVCacheConfig(8)]))
    assert executor.group.collective_rpc("cached_tokens") == [9, 8]


def test_a_step_gives_the_output_of_rank_0(executor: Executor) -> None:
    outputs = [executor.execute_model(SchedulerOutput(3, 0)) for _ in range(2)]
    assert outputs[0] == outputs[1] == {"rank": 0, "token_id": expected_token(3)}


def test_steps_in_flight_keep_their_order(executor: Executor) -> None:
    steps = [SchedulerOutput(token, 0) for token in (1, 2, 3, 4)]
    futures = [executor.execute_model(step, non_block=True) for step in steps]
    assert [future.result(WATCHDOG)["token_id"] for future in futures] == [expected_token(s.token_id) for s in steps]


def expected_token(token_id: int) -> int:
    weights = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(7))
    return int((torch.full((HIDDEN,), token_id % 5 + 1.0) @ weights).argmax())


def test_a_rank_that_fails_after_rank_0_has_replied_is_told(executor: Executor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    future = executor.execute_model(SchedulerOutput(0, 0, str(gate)), non_block=True)
    # Ranks answer in order: with this reply rank 0's output has arrived, too.
    assert executor.group.collective_rpc("cached_tokens", target_ranks=[0]) != []
    gate.touch()
    with pytest.raises(ray_shm.RpcError, match="execute_model") as info:
        future.result(WATCHDOG)
    assert list(info.value.failures) == [1]
    assert isinstance(info.value.root_cause, ArithmeticError)
    assert executor.execute_model(SchedulerOutput(3, 0))["token_id"] == expected_token(3)


def test_a_configuration_that_is_refused(executor: Executor) -> None:
    with pytest.raises(ray_shm.RpcError) as info:
        executor.initialize(ray_shm.Scatter([KVCacheConfig(5), KVCacheConfig(0)]))
    assert list(info.value.failures) == [1]
    assert executor.group.collective_rpc("cached_tokens") == [5, 8]  # rank 0 did, rank 1 keeps what it had
    executor.initialize(KVCacheConfig(8))


def test_layouts_that_differ_a_death_and_the_end(ray_local: None, tmp_path: Path) -> None:
    executor = Executor(launch(odd_layer=31))
    with executor:
        with pytest.raises(ray_shm.MismatchError) as mismatch:
            executor.get_kv_cache_spec()
        assert str(mismatch.value) == (
            "ranks [1] differ from rank 0: rank 1 has 17, rank 0 has 16 at ['layers.31'].num_blocks"
        )
        assert mismatch.value.results[1]["layers.31"] == LayerSpec(17)
        step = executor.execute_model(SchedulerOutput(0, 0, str(tmp_path / "never")), non_block=True)
        os.kill(executor.group.workers[1].pid, signal.SIGKILL)
        with pytest.raises(ray_shm.RpcError) as death:
            step.result(WATCHDOG)
        assert isinstance(death.value.root_cause, ray_shm.WorkerDiedError)
        with pytest.raises(ray_shm.RpcError):
            executor.check_health()
    executor.shutdown()  # once more does nothing
    with pytest.raises(ray_shm.GroupClosedError):
        executor.determine_available_memory()


# ---- profile ------------------------------------------------------------------------------------------------------


def test_profile_writes_a_trace_per_rank(executor: Executor, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "traces"
    assert executor.profile(True, directory=folder) is None
    executor.execute_model(SchedulerOutput(3, 0))
    executor.group.collective_rpc(exclusive_or_on_rank_1)
    paths = executor.profile(False)
    assert paths == [str(folder / f"rank{rank}.json") for rank in range(SIZE)]
    for rank, path in enumerate(paths):
        trace = json.loads(Path(path).read_text())
        assert (trace["distributedInfo"]["rank"], trace["distributedInfo"]["world_size"]) == (rank, SIZE)
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"aten::matmul", "aten::mean"} <= names
        assert ("aten::bitwise_xor" in names) == (rank == 1)  # its own calls, not another rank's


def exclusive_or_on_rank_1(worker: ModelWorker) -> None:
    if worker.rank == 1:
        torch.ones(3, dtype=torch.int64) ^ torch.ones(3, dtype=torch.int64)


def test_profile_in_a_fresh_folder_and_again(executor: Executor, tmp_path: Path) -> None:
    temporary = executor.group.collective_rpc(lambda worker: __import__("tempfile").gettempdir(), reduce="equal")
    seen: list[str] = []
    for _ in range(2):
        executor.profile(True)
        executor.execute_model(SchedulerOutput(3, 0))
        paths = executor.profile(False)
        assert paths is not None
        assert all(path.startswith(os.path.join(temporary, "ray_shm_profile-")) for path in paths)
        assert len({os.path.dirname(path) for path in paths}) == 1
        seen += paths
        for path in paths:
            json.loads(Path(path).read_text())
    assert len(set(seen)) == 2 * SIZE
    for path in seen:
        os.unlink(path)
    for folder in {os.path.dirname(path) for path in seen}:
        os.rmdir(folder)


def test_profile_out_of_turn(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no profile was started; call profile\(True\) first"):
        executor.profile(False)
    with pytest.raises(ValueError, match="directory"):
        executor.profile(False, directory=tmp_path)
    executor.profile(True, directory=tmp_path)
    with pytest.raises(RuntimeError, match=rf"ranks \[0, 1\] are being profiled already, into {tmp_path}/rank0.json;"):
        executor.profile(True, directory=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    executor.execute_model(SchedulerOutput(3, 0))
    assert executor.profile(False) == [str(tmp_path / f"rank{rank}.json") for rank in range(SIZE)]


def test_a_rank_that_joined_later_is_named(executor: Executor, tmp_path: Path) -> None:
    """As after a rank was replaced: then the others profile and it does not."""
    from ray_shm.actors.profiling import stop_profile

    executor.profile(True, directory=tmp_path)
    executor.group.collective_rpc(stop_profile, target_ranks=[1])
    with pytest.raises(RuntimeError, match=r"ranks \[1\] were not being profiled .*rank0\.json"):
        executor.profile(False)
    executor.profile(True, directory=tmp_path)
    executor.group.collective_rpc(stop_profile, target_ranks=[0])
    with pytest.raises(RuntimeError, match=r"ranks \[1\] are being profiled already.*the others have started now"):
        executor.profile(True, directory=tmp_path)
    assert executor.profile(False) is not None


def test_a_folder_that_cannot_be_made(executor: Executor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ray_shm.RpcError) as info:
        executor.profile(True, directory=tmp_path / "file" / "below")
    assert all(isinstance(error, NotADirectoryError) for error in info.value.failures.values())
    with pytest.raises(RuntimeError, match="no profile was started"):
        executor.profile(False)
