"""CUDA tensors to frames and back: on the receiver's device, or an error; never silently elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from codec_receiver import check_same, copied, random_bits

from ray_shm import tensor_codec

MATRIX = torch.arange(6000.0).reshape(60, 100)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Sent:
    """Pickles as what the codec makes of a tensor where there is a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __reduce__(self) -> Any:
        data = bytearray(np.arange(2000.0).tobytes())
        return tensor_codec._rebuild_contiguous, (data, "float64", (20, 100), self.device)


def test_a_tensor_is_put_on_the_device_it_is_sent_for() -> None:
    assert torch.equal(copied(Sent("cpu")), torch.arange(2000.0, dtype=torch.float64).view(20, 100))


@pytest.mark.parametrize("device", ["xpu", "mps", "no_such_device"])
def test_a_device_that_is_not_there_is_an_error_never_another_device(device: str) -> None:
    with pytest.raises(RuntimeError, match=f"{device}.*Send tensor"):
        copied(Sent(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_cuda_tensor_where_there_is_no_cuda_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"'cuda' was sent to process \d+ .*Send tensor\.cpu\(\)") as caught:
        copied(Sent("cuda"))
    assert platform.node() in str(caught.value)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_cuda_tensors_of_several_dtypes_arrive_on_the_current_device(dtype: torch.dtype) -> None:
    sent = random_bits((60, 100), dtype).cuda()
    received = copied(sent)
    assert received.device == torch.device("cuda", torch.cuda.current_device())
    check_same(received.cpu(), sent.cpu())


@needs_cuda
@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.t(),
        lambda m: m[::2, ::3],
        lambda m: m[:0],
        lambda m: m[:1].expand(500, 100),
        torch.nn.Parameter,
        lambda m: m.clone().requires_grad_(),
        lambda m: (m * 1j).conj(),
        lambda m: m.to_sparse(),
    ],
    ids=["transposed", "gaps", "empty", "expanded", "parameter", "requires_grad", "conjugate", "sparse"],
)
def test_cuda_tensors_of_every_sort(make: Callable[[Any], Any]) -> None:
    sent = make(MATRIX.cuda())
    received = copied(sent)
    assert type(received) is type(sent)
    assert received.is_cuda
    assert (received.dtype, received.shape, received.layout) == (sent.dtype, sent.shape, sent.layout)
    assert received.requires_grad == sent.requires_grad
    assert torch.equal(received.to_dense() if sent.is_sparse else received, sent.to_dense() if sent.is_sparse else sent)


@needs_cuda
def test_cuda_tensors_that_share_memory_share_it_after_arrival() -> None:
    whole = torch.arange(5000, device="cuda")
    part, got = copied([whole[100:200], whole])
    got[150] = -1
    assert part[50].item() == -1
    assert whole[150].item() == 150


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_of_the_second_cuda_device_arrives_on_the_current_one() -> None:
    received = copied(torch.arange(5000, device="cuda:1"))
    assert received.device == torch.device("cuda", torch.cuda.current_device())
