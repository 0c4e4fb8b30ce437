"""Dictionaries of tensors and other values, from one member of a group to another.

Runs in every worker. All in one direction, under one tag, so it arrives in the order in which it was sent::

    header    int64 × 2        bytes of the table and the pickle; -1, or else the number of tensors that follow
    table     int64 × 2 each   bytes of the tensor; 1 if it comes from GPU to GPU, through nccl
    pickle    the dictionary, a `Placeholder` where a tensor was; nested dicts stay what they are
    tensors   as bytes, in the order of the placeholders; no empty ones; of one that is sent in parts, this rank's part

With -1, table and pickle are the text of an error. The table lets a receiver that cannot make use of the rest take it
off the line all the same. Imports torch: only `point_to_point` imports this module, at the first dictionary.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ray_shm.connection import DICT_TAG, GroupConnection
from ray_shm.errors import RemoteError
from ray_shm.tensor_arguments import flat
from ray_shm.transfer import Transfer

_PICKLE_PROTOCOL = 5
_FAILED = -1


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A tensor that comes by itself. `parts`: how many it is sent in, by as many senders."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_gpu: bool
    parts: int


def isend(
    link: GroupConnection,
    tensor_dict: dict[str, Any],
    dst: int,
    gather_group: Any,
    overrides: Mapping[str, Any] | None,
    timeout: float | None,
) -> list[Transfer]:
    """See PointToPoint.isend_tensor_dict."""
    if not isinstance(tensor_dict, dict):
        raise TypeError(f"tensor_dict is a {type(tensor_dict).__name__}, not a dict")
    through_host = link.connect("isend_tensor_dict").nccl is None
    parting = _Parting(gather_group)
    try:
        content = pickle.dumps(parting.placeholders(tensor_dict, overrides), _PICKLE_PROTOCOL)
    except Exception as exc:  # also whatever a user's __reduce__ raises
        text = f"{type(exc).__name__}: {exc}".encode(errors="replace")
        _start(link, _FAILED, text, [], dst, timeout)
        raise
    tensors = [tensor.cpu() if through_host else tensor for tensor in parting.tensors]
    table = b"".join(_row(tensor) for tensor in tensors)
    return [_start(link, len(tensors), table + content, tensors, dst, timeout)]


def _start(
    link: GroupConnection, count: int, content: bytes, tensors: list[torch.Tensor], dst: int, timeout: float | None
) -> Transfer:
    header = torch.tensor([len(content), count], dtype=torch.int64, device="cpu")
    messages = [header, torch.frombuffer(bytearray(content), dtype=torch.uint8), *tensors]
    return Transfer(link, "isend_tensor_dict", messages).send(dst, DICT_TAG, timeout)


def _row(tensor: torch.Tensor) -> bytes:
    return struct.pack("=qq", tensor.nbytes, tensor.is_cuda)


@dataclass(slots=True)
class _Parting:
    """Takes the tensors out of a dictionary, and of each the part that this rank sends."""

    gather_group: Any
    tensors: list[torch.Tensor] = field(default_factory=list)  # flat, contiguous, never empty

    def placeholders(self, values: dict[Any, Any], overrides: Any, path: str = "") -> dict[Any, Any]:
        """`values` with placeholders. `overrides`: a bool for all of them, or a mapping by key."""
        replaced: dict[Any, Any] = {}
        for key, value in values.items():
            here = overrides.get(key) if isinstance(overrides, Mapping) else overrides
            if type(value) is dict:
                replaced[key] = self.placeholders(value, here, f"{path}{key!r} → ")
            elif isinstance(value, torch.Tensor) and _plain(value):
                replaced[key] = self._taken(value, here, f"{path}{key!r}")
            else:
                replaced[key] = value
        return replaced

    def _taken(self, tensor: torch.Tensor, override: bool | None, path: str) -> Placeholder:
        content = flat("send_tensor_dict", tensor)
        parts = 1 if self.gather_group is None else int(self.gather_group.world_size)
        divisible = content.numel() % parts == 0
        if override and not divisible:
            raise ValueError(
                f"all_gather_tensors: the tensor {path} has {content.numel()} elements, which {parts} members of "
                "all_gather_group cannot share equally"
            )
        if override is False or not divisible or not content.numel():
            parts = 1
        if parts > 1:
            content = content.view(parts, -1)[self.gather_group.rank_in_group]
        if content.numel():
            self.tensors.append(content)
        return Placeholder(tuple(tensor.shape), tensor.dtype, tensor.is_cuda, parts)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether its values lie in memory one by one; else it is pickled, as other values are."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


def irecv(
    link: GroupConnection, src: int, gather_group: Any, timeout: float | None
) -> tuple[dict[str, Any], list[Transfer], list[Callable[[], None]]]:
    """See PointToPoint.irecv_tensor_dict."""
    header = torch.zeros(2, dtype=torch.int64, device="cpu")
    link.run("irecv_tensor_dict", "recv", header, src, DICT_TAG, timeout=timeout)
    nbytes, count = header.tolist()
    content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    link.run("irecv_tensor_dict", "recv", content, src, DICT_TAG, timeout=timeout)
    if count == _FAILED:
        text = bytes(content.numpy()).decode()
        raise RemoteError(f"rank {link.members.ranks[src]} could not send its dictionary: {text}")
    table = content[: 16 * count].view(torch.int64).view(count, 2).tolist()
    arriving = _Arriving(link, gather_group)
    try:
        received: dict[str, Any] = pickle.loads(content[16 * count :].numpy().data)
        arriving.make_places(received)
    except BaseException:
        _drop(link, src, table, timeout)
        raise
    if not arriving.places:
        return received, [], []
    handle = Transfer(link, "irecv_tensor_dict", arriving.places, arriving.settle).recv(src, DICT_TAG, timeout)
    return received, [handle], arriving.completions


def _drop(link: GroupConnection, src: int, table: list[list[int]], timeout: float | None) -> None:
    """Receives the tensors nevertheless, so that the next message is found where it begins."""
    places = [
        torch.empty(nbytes, dtype=torch.uint8, device=link.device() if through_nccl else "cpu")
        for nbytes, through_nccl in table
    ]
    Transfer(link, "irecv_tensor_dict", places).recv(src, DICT_TAG, timeout).wait(timeout)


class _Arriving:
    """Puts tensors where the placeholders are.

    Attributes:
        places: flat; what is received comes here.
        completions: for after that; they gather the parts of those that were sent in parts.
    """

    def __init__(self, link: GroupConnection, gather_group: Any) -> None:
        self.places: list[torch.Tensor] = []
        self.completions: list[Callable[[], None]] = []
        self._gather_group = gather_group
        self._through_host = link.connect("irecv_tensor_dict").nccl is None
        self._gpu = link.device()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # to a GPU, from the place in host memory

    def make_places(self, values: dict[Any, Any]) -> None:
        for holder, key, placeholder in list(_placeholders(values)):
            group = self._gather_group
            if placeholder.parts > 1 and (group is None or group.world_size != placeholder.parts):
                raise ValueError(
                    f"the tensor {key!r} comes in {placeholder.parts} parts: pass an all_gather_group of as many, not "
                    + ("None" if group is None else f"one of {group.world_size}")
                )
            numel = math.prod(placeholder.shape) // placeholder.parts
            part = torch.empty(numel, dtype=placeholder.dtype, device=self._device(placeholder))
            holder[key] = part.view(placeholder.shape) if placeholder.parts == 1 else part
            if placeholder.parts > 1:
                self.completions.append(partial(_complete, holder, key, part, placeholder.shape, group))
            if numel:
                self._expect(part)

    def _expect(self, part: torch.Tensor) -> None:
        if part.is_cuda and self._through_host:
            host = torch.empty_like(part, device="cpu")
            self._copies.append((part, host))
            part = host
        self.places.append(part)

    def settle(self) -> None:
        """All places are filled."""
        for part, host in self._copies:
            part.copy_(host)

    def _device(self, placeholder: Placeholder) -> torch.device:
        if not placeholder.on_gpu:
            return torch.device("cpu")
        if self._gpu.type != "cpu":
            return self._gpu
        if torch.cuda.is_available():  # and a group that was asked to run on gloo
            return torch.device("cuda", torch.cuda.current_device())
        raise ValueError("a tensor was sent from a GPU, and this process sees none; have it sent as tensor.cpu()")


def _placeholders(values: dict[Any, Any]) -> Iterator[tuple[dict[Any, Any], Any, Placeholder]]:
    for key, value in values.items():
        if type(value) is dict:
            yield from _placeholders(value)
        elif isinstance(value, Placeholder):
            yield values, key, value


def _complete(holder: dict[Any, Any], key: Any, part: torch.Tensor, shape: tuple[int, ...], group: Any) -> None:
    holder[key] = group.all_gather(part, 0).view(shape)
