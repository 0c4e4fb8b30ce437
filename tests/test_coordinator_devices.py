"""Coordinator groups and GPUs: NCCL by itself, and two processes on one GPU, which NCCL refuses and gloo serves."""

from __future__ import annotations

from collections.abc import Iterator

import conformance_checks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conformance_checks import REDUCTIONS, same, values
from rank_pool import WATCHDOG, Pool, Rank

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import StartError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    assert pool.close() == [0, 0]


@needs_no_cuda
def test_nccl_where_there_is_no_gpu_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(StartError, match=r"nccl needs a GPU.*use auto or gloo"):
        StatelessGroupCoordinator([[0]], 0, "nccl", False)


@needs_cuda
@pytest.mark.parametrize("backend", ["nccl", "auto"])
def test_nccl_group_of_one(backend: str) -> None:
    with StatelessGroupCoordinator([[0]], 0, backend, False, group_name="alone") as group:
        assert (group.backend, group.device.type) == ("nccl", "cuda")
        tensor = torch.arange(6.0, device=group.device).view(2, 3)
        dist.all_reduce(tensor, group=group.device_group)
        gathered = torch.empty_like(tensor)
        dist.all_gather_into_tensor(gathered, tensor, group=group.device_group)
        assert torch.equal(gathered.cpu(), torch.arange(6.0).view(2, 3))
        assert group.all_reduce(tensor) is tensor
        for check in conformance_checks.ALL.values():
            check(group)


def check_shared_gpu(me: Rank) -> None:
    group = StatelessGroupCoordinator(
        [[0, 1]], 0, "auto", False, group_name="shared GPU", coord_store=me.store, global_rank=me.rank, timeout=WATCHDOG
    )
    with group:
        assert group.backend == "gloo"
        collectives_on_cuda(group)
        point_to_point_on_cuda(group)


def collectives_on_cuda(group: StatelessGroupCoordinator) -> None:
    parts = [values(r, (2, 4), "float32") for r in group.ranks]
    own = torch.from_numpy(parts[group.rank_in_group]).cuda()
    for op, reduction in REDUCTIONS.items():
        same_on_cuda(group.all_reduce(own, op), reduction.reduce(parts))
    same_on_cuda(group.all_reduce(own.t()), np.add.reduce(parts).T)
    with pytest.raises(TypeError, match="int16"):
        group.all_reduce(own.short())
    for dim in (0, 1):
        whole = np.concatenate(parts, dim)
        same_on_cuda(group.all_gather(own, dim), whole)
        same_on_cuda(group.all_gatherv(own, dim), whole)
        same_on_cuda(group.all_gatherv([own], dim, [own.shape[dim]] * 2)[0], whole)
        gathered = group.gather(own, 1, dim)
        assert (gathered is None) == (group.rank_in_group == 0)
        if gathered is not None:
            same_on_cuda(gathered, whole)
    total = np.add.reduce(parts)
    same_on_cuda(group.reduce_scatter(own), np.split(total, 2, 1)[group.rank_in_group])
    same_on_cuda(group.reduce_scatterv(own, 1, [1, 3]), np.split(total, [1], 1)[group.rank_in_group])
    strided = torch.zeros(4, 2, device="cuda").t()
    if group.rank_in_group == 1:
        strided.copy_(own)
    assert group.broadcast(strided, 1) is strided
    same_on_cuda(strided, parts[1])


def point_to_point_on_cuda(group: StatelessGroupCoordinator) -> None:
    array = values(0, (3, 4), "float32")
    on_gpu = torch.from_numpy(array).cuda()
    sent = {"gpu": on_gpu, "cpu": torch.ones(2), "deep": {"gpu": torch.ones(3).cuda().bfloat16()}}
    if group.is_first_rank:
        group.send(on_gpu)
        for handle in group.isend_tensor_dict(sent):
            handle.wait()
    else:
        same_on_cuda(group.recv(torch.Size((3, 4)), torch.float32), array)
        received = group.recv_tensor_dict()
        assert received is not None
        same_on_cuda(received["gpu"], array)
        assert received["cpu"].is_cpu
        assert received["deep"]["gpu"].is_cuda
        assert torch.equal(received["deep"]["gpu"].cpu(), torch.ones(3).bfloat16())
    handles = group.isend_tensor_dict({"gpu": torch.full((5,), float(group.rank), device="cuda")})  # both at once
    other = group.recv_tensor_dict()
    assert other is not None
    assert other["gpu"].is_cuda
    assert other["gpu"].tolist() == [float(group.prev_rank)] * 5
    for handle in handles:
        handle.wait()


def same_on_cuda(got: torch.Tensor, expected: np.ndarray) -> None:
    assert got.is_cuda
    same(got.cpu(), expected)


@needs_cuda
def test_cuda_tensors_between_two_processes_on_one_gpu(pool: Pool) -> None:
    pool.run(check_shared_gpu)
