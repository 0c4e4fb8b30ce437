"""Torch tensors to buffers and back, for codec.py. Imported only where torch already is, in any process.

What arrives is a tensor of the same type, dtype, shape and values, on the same kind of device, whose memory is the
receiver's own. How the bytes travel:

==========================================  ============================================================================
contiguous; dense in another order; expand  the bytes it covers, as they lie; the strides are kept
with gaps (``t[::2]``, ``t[:, :3]``)        a contiguous copy of its elements
several that overlap in memory              the bytes they cover together, once; they share memory after arrival too
Parameter, simple subclass, requires_grad,  as the plain tensor below, dressed again by the receiver
conjugate or negative bit, attributes
CUDA, of SHARE_BYTES and more               beside the message where the queue can (cuda_ipc.py), else as the next
on another device                           through host memory, to the receiver's current device of that type
sparse, quantized, nested, meta, wrappers   by torch's own pickling, its storages out of band
==========================================  ============================================================================

A small slice of a large storage takes its own bytes along, never the storage's. Autograd history, ``.grad`` and hooks
do not travel: a tensor that requires grad arrives as a leaf that does, as from `torch.save`.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from pickle import PickleBuffer
from typing import Any

import torch

from ray_shm import cuda_ipc

WORTH_SHARING = 4  # overlapping views go as one region unless that is so many times the bytes of the views themselves
_BY_ADDRESS = ("cuda", "xpu")  # devices with ordinary storages; others are copied by torch alone
_NUMPY_HAS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
_NUMPY_HAS += [torch.uint64, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128]
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _DTYPES}  # a string pickles faster than a dtype
_EXPORTED_AS = {dtype: _SAME_SIZE[dtype.itemsize] for dtype in _DTYPES if dtype not in _NUMPY_HAS}
_STORAGES = (torch.UntypedStorage, torch.TypedStorage)

# ---- the sender's side ----------------------------------------------------------------------------------------------


class _Region:
    """Memory [start, end), by address, that tensors of one message cover."""

    __slots__ = ("base", "end", "members", "n_bytes", "start")

    def __init__(self, start: int, end: int, n_bytes: int, tensor: Any, base: Any) -> None:
        self.start = start
        self.end = end
        self.n_bytes = n_bytes  # of the elements, gaps left out, counting twice what two of `members` have in common
        self.base = base  # the tensor in the message that carries it; None: each tensor travels by itself
        self.members = [tensor]  # alive, so that no other tensor gets these addresses


class SentMemory:
    """Which memory the tensors pickled so far of one message cover, so that what they share is sent once.

    The usual tensor covers memory of its own. One that lies inside of an earlier one becomes a view of that. Where they
    overlap otherwise the earlier one is already pickled too small: `overlap` is set, and the message must be pickled
    again after `merge`.

    Attributes:
        outgoing: GPU memory that goes beside the message; None as long as there is none.
    """

    __slots__ = ("_regions", "_sharer", "_starts", "outgoing", "overlap")

    def __init__(self, sharer: cuda_ipc.Sharer | None) -> None:
        self._sharer = sharer
        self.outgoing: cuda_ipc.Outgoing | None = None
        self._starts: list[int] = []  # of the regions, sorted; regions are disjoint
        self._regions: list[_Region] = []
        self.overlap = False

    def claim(self, tensor: Any, start: int, end: int, n_bytes: int) -> _Region | None:
        """The region that carries [start, end) already; None: `tensor` carries it itself."""
        after = bisect_right(self._starts, start)
        first = after - 1 if after and self._regions[after - 1].end > start else after
        last = after
        while last < len(self._starts) and self._starts[last] < end:
            last += 1
        if first == last:
            carries = end - start <= n_bytes
            self._starts.insert(first, start)
            self._regions.insert(first, _Region(start, end, n_bytes, tensor, tensor if carries else None))
            return None
        region = self._regions[first]
        inside = region.start <= start and end <= region.end and (start - region.start) % tensor.itemsize == 0
        if inside and region.base is not None:
            return region
        for other in self._regions[first + 1 : last]:
            region.members += other.members
            region.n_bytes += other.n_bytes
        region.members.append(tensor)
        region.n_bytes += n_bytes
        region.start, region.end = min(region.start, start), max(self._regions[last - 1].end, end)
        region.base = None
        self._regions[first:last] = [region]
        self._starts[first:last] = [region.start]
        self.overlap = True
        return None

    def merge(self) -> None:
        """Make ready to pickle the same message again: regions of several tensors get a base of their own."""
        self._regions = [region for region in self._regions if len(region.members) > 1]
        for region in self._regions:
            region.base = _base_of(region)
        self._starts = [region.start for region in self._regions]
        self.overlap = False
        if self.outgoing is not None:
            self.outgoing.restart()

    def beside(self, tensor: Any) -> int | None:
        """Number of a contiguous tensor that goes beside the message; None: it goes through host memory."""
        if self._sharer is None or not cuda_ipc.memory.suits(tensor):
            return None
        if self.outgoing is None:
            self.outgoing = self._sharer.begin()
        return None if self.outgoing is None else self.outgoing.take(tensor)


def _base_of(region: _Region) -> Any:
    """A flat tensor over the region; None where its tensors are to travel one by one."""
    if region.end - region.start > WORTH_SHARING * region.n_bytes:
        return None
    for tensor in region.members:
        storage = tensor.untyped_storage()
        origin = storage.data_ptr()
        if origin <= region.start and region.end <= origin + storage.nbytes():
            # Every dtype's elements lie at multiples of their size from the origin; the largest has 16 bytes.
            region.start -= (region.start - origin) % 16
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            return flat.set_(storage, region.start - origin, (region.end - region.start,), (1,))
    return None  # two storages over the same memory, as torch.from_numpy makes them


def reduce(obj: Any, sent: SentMemory) -> Any:
    """What `reducer_override` returns for a tensor or storage; NotImplemented leaves anything else to its own way."""
    kind = type(obj)
    if kind is torch.Tensor:
        return _reduce_plain(obj, sent)
    if issubclass(kind, torch.Tensor):
        return _reduce_dressed(obj, kind) if _simple(kind) else NotImplemented
    if issubclass(kind, _STORAGES):
        return _reduce_storage(obj)
    return NotImplemented


def _reduce_plain(tensor: Any, sent: SentMemory) -> Any:
    device = None if tensor.is_cpu else tensor.device.type
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or not _addressed(device):
        return _reduce_special(tensor, device)
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.__dict__:
        return _reduce_dressed(tensor, None)
    name, shape, n_bytes = _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes
    if not n_bytes:
        return _rebuild_empty, (name, shape, tensor.stride(), device)
    contiguous = tensor.is_contiguous()
    covered = n_bytes if contiguous else _covered(tensor)
    start = tensor.data_ptr()
    region = sent.claim(tensor, start, start + covered, n_bytes)
    if region is not None and region.base is not tensor:
        return _rebuild_view, (region.base, name, shape, tensor.stride(), start - region.start)
    if contiguous:
        return _rebuild_contiguous, (_exported(tensor, sent), name, shape, device)
    if covered <= n_bytes:
        flat = tensor.as_strided((covered // tensor.itemsize,), (1,))
        return _rebuild_strided, (_exported(flat, sent), name, shape, tensor.stride(), device)
    return _rebuild_contiguous, (_exported(tensor.contiguous(), sent), name, shape, device)


def _addressed(device: str | None) -> bool:
    return device is None or device in _BY_ADDRESS


def _covered(tensor: Any) -> int:
    """Bytes from its first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    covered: int = (last + 1) * tensor.itemsize
    return covered


def _exported(tensor: Any, sent: SentMemory | None = None) -> PickleBuffer | int:
    """The bytes of a contiguous tensor; from another device a copy in host memory, or its number beside the message."""
    if sent is not None and not tensor.is_cpu and (number := sent.beside(tensor)) is not None:
        return number
    same_size = _EXPORTED_AS.get(tensor.dtype)
    if same_size is not None:
        tensor = tensor.view(same_size)
    return PickleBuffer((tensor if tensor.is_cpu else tensor.cpu()).numpy())


def _reduce_special(tensor: Any, device: str | None) -> Any:
    if device is None or device == "meta":
        return NotImplemented
    return _rebuild_moved, (tensor.detach().cpu(), device, tensor.requires_grad)


def _simple(kind: type) -> bool:
    """Whether a subclass adds no pickling and no dispatch of its own, so that it is a plain tensor with a type."""
    own_reduce = (torch.Tensor.__reduce_ex__, torch.nn.Parameter.__reduce_ex__)
    reduces: Any = kind.__reduce_ex__
    dispatch: Any = kind.__torch_dispatch__  # type: ignore[attr-defined]
    return (
        reduces in own_reduce
        and kind.__reduce__ is torch.Tensor.__reduce__
        and dispatch is torch.Tensor.__torch_dispatch__
    )


def _reduce_dressed(tensor: Any, kind: type | None) -> Any:
    """As a plain tensor over the same memory, and what makes this one of it. `kind` None: torch.Tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        torch.utils.hooks.warn_if_has_hooks(tensor)
        plain = tensor.detach()
        if type(plain) is not torch.Tensor:
            plain = plain.as_subclass(torch.Tensor)
        is_conj, is_neg = plain.is_conj(), plain.is_neg()
        if is_conj:
            plain = plain.conj()
        if is_neg:
            plain = torch._neg_view(plain)
        args = (plain, kind, tensor.requires_grad, is_conj, is_neg)
    return _rebuild_dressed, args, tensor.__getstate__(), None, None, _set_state


def _reduce_storage(storage: Any) -> Any:
    """Torch's own pickling of a tensor ends here; of a storage it would be another, nested pickle in band."""
    is_typed = isinstance(storage, torch.TypedStorage)
    untyped = storage._untyped_storage if is_typed else storage
    device = untyped.device.type
    if device == "meta":
        return NotImplemented
    flat = torch.empty(0, dtype=torch.uint8, device=untyped.device).set_(untyped)
    name = _NAMES[storage.dtype] if is_typed else None
    buffer = _exported(flat) if flat.numel() else None
    return _rebuild_storage, (buffer, name, None if device == "cpu" else device)


# ---- the receiver's side --------------------------------------------------------------------------------------------


def _flat(buffer: Any, name: str, device: str | None) -> Any:
    if type(buffer) is int:
        return cuda_ipc.opened(buffer).view(getattr(torch, name))
    if device is None:
        return torch.frombuffer(buffer, dtype=getattr(torch, name))
    return _placed(torch.frombuffer(buffer, dtype=torch.uint8), device).view(getattr(torch, name))


def _rebuild_contiguous(buffer: Any, name: str, shape: tuple[int, ...], device: str | None) -> Any:
    flat = _flat(buffer, name, device)
    return flat if len(shape) == 1 else flat.view(shape)


def _rebuild_strided(buffer: Any, name: str, shape: tuple[int, ...], stride: tuple[int, ...], device: Any) -> Any:
    return _flat(buffer, name, device).as_strided(shape, stride)


def _rebuild_view(base: Any, name: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Any:
    """`offset`: bytes from the start of `base`, whose storage starts there."""
    dtype = getattr(torch, name)
    empty = torch.empty(0, dtype=dtype, device=base.device)
    return empty.set_(base.untyped_storage(), offset // dtype.itemsize, shape, stride)


def _rebuild_empty(name: str, shape: tuple[int, ...], stride: tuple[int, ...], device: str | None) -> Any:
    empty = torch.empty_strided(shape, stride, dtype=getattr(torch, name), device="cpu")
    return empty if device is None else _placed(empty, device)


def _rebuild_dressed(plain: Any, kind: Any, requires_grad: bool, is_conj: bool, is_neg: bool) -> Any:
    if is_neg:
        plain = torch._neg_view(plain)
    if is_conj:
        plain = plain.conj()
    if kind is not None:
        return torch.Tensor._make_subclass(kind, plain, requires_grad)
    return plain.requires_grad_() if requires_grad else plain


def _set_state(tensor: Any, state: Any) -> None:
    """Attributes, as torch's own pickling restores them."""
    if type(tensor).__setstate__ is not torch.Tensor.__setstate__:
        tensor.__setstate__(state)
        return
    for values in state if isinstance(state, tuple) else (state,):  # __dict__, and with slots theirs
        for key, value in (values or {}).items():
            setattr(tensor, key, value)


def _rebuild_moved(tensor: Any, device: str, requires_grad: bool) -> Any:
    return _placed(tensor, device).requires_grad_(requires_grad)


def _rebuild_storage(buffer: Any, name: str | None, device: str | None) -> Any:
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    if buffer is not None:
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
    untyped = (flat if device is None else _placed(flat, device)).untyped_storage()
    if name is None:
        return untyped
    return torch.TypedStorage(wrap_storage=untyped, dtype=getattr(torch, name), _internal=True)


def _placed(tensor: Any, device: str) -> Any:
    """On this process's current device of that type.

    Raises:
        RuntimeError: this process has none. It would be a surprise to get the tensor anywhere else.
    """
    if not _has(device):
        raise RuntimeError(
            f"a tensor on device {device!r} was sent to process {os.getpid()} on node {platform.node()}, which cannot "
            f"use such a device (torch.{device}.is_available() is False). Send tensor.cpu(), or start the receiving "
            "process with a device of that type (gpus_per_worker > 0)."
        )
    return tensor.to(device)


def _has(device: str) -> bool:
    for module in (getattr(torch, device, None), getattr(torch.backends, device, None)):
        is_available = getattr(module, "is_available", None)
        if is_available is not None:
            return bool(is_available())
    return False


REBUILDERS = {
    _rebuild_contiguous,
    _rebuild_strided,
    _rebuild_view,
    _rebuild_empty,
    _rebuild_dressed,
    _set_state,
    _rebuild_moved,
    _rebuild_storage,
}
