"""Objects to byte frames and back: pickle protocol 5, large buffers out of band. Runs in every process.

Frames of an object: the pickle, then one frame for each buffer of at least OUT_OF_BAND_BYTES (NumPy arrays, CPU torch
tensors, anything that supports protocol 5). `decode` copies every buffer, so that what a receiver holds is its own,
writable, and never changes under it.

One reused C pickler does the common case (255 ns for a small call against 950 ns for a new one). Functions and classes
that the receiver cannot import (of ``__main__``, nested, lambdas) go by value: the object is pickled again by
cloudpickle. Which copy of cloudpickle is chosen by `use_cloudpickle`: two copies have two class trackers, and a class
shipped by one fails isinstance against the same class shipped by the other.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ray_shm.ring import Buffer

OUT_OF_BAND_BYTES = 4096
PROTOCOL = 5

_cloudpickle: Any = None


def use_cloudpickle(module: types.ModuleType) -> None:
    """Choose the cloudpickle module for functions and classes that go by value (default: PyPI's)."""
    global _cloudpickle
    _cloudpickle = module


def cloudpickle() -> Any:
    """The module in use."""
    if _cloudpickle is None:
        import cloudpickle as module

        use_cloudpickle(module)
    return _cloudpickle


class _ByValue(Exception):
    """The object graph holds a function or class that the receiver cannot import."""


def _goes_by_value(obj: Any) -> bool:
    """Whether a function or class has to travel by value: its module is no importable module that has it."""
    module = sys.modules.get(obj.__module__ or "")
    if module is None or obj.__module__ in ("__main__", "__mp_main__"):
        return True
    if _cloudpickle is not None and obj.__module__.split(".")[0] in _by_value_modules():
        return True
    found: Any = module
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is not obj


def _by_value_modules() -> set[str]:
    return {name.split(".")[0] for name in _cloudpickle.list_registry_pickle_by_value()}


def _reduce_tensor(tensor: Any) -> Any:
    """A dense CPU tensor as one buffer; NotImplemented leaves it to torch's own pickling."""
    torch = sys.modules["torch"]
    if (
        type(tensor) is not torch.Tensor
        or tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.requires_grad
        or tensor.is_conj()
        or tensor.is_neg()
    ):
        return NotImplemented
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return _rebuild_tensor, (pickle.PickleBuffer(flat.numpy()), tensor.dtype, tuple(tensor.shape))


def _rebuild_tensor(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    if memoryview(buffer).readonly:  # a small one, pickled in band
        buffer = bytearray(buffer)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)


def _reduce(obj: Any) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return _reduce_tensor(obj)
    return NotImplemented


class _Pickler(pickle.Pickler):
    """The fast one: gives up at what goes by value."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType):
            if _goes_by_value(obj):
                raise _ByValue
            return NotImplemented
        return _reduce(obj)


class Encoder:
    """Turns objects into frames. Holds a pickler for reuse; one per thread (`encoder`)."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._buffers: list[pickle.PickleBuffer] = []
        self._pickler = _Pickler(self._file, PROTOCOL, buffer_callback=self._keep)
        self._busy = False

    def encode(self, obj: Any, prefix: bytes = b"") -> list[Buffer]:
        """Frames of `obj`; the first starts with `prefix`. Buffers in them belong to `obj` still: send, then drop.

        Raises:
            whatever pickling `obj` raises (TypeError, PicklingError, ...); the encoder stays usable.
        """
        if self._busy:  # a __reduce__ method that itself sends
            return Encoder().encode(obj, prefix)
        self._busy = True
        try:
            self._start(prefix)
            try:
                self._pickler.dump(obj)
            except (_ByValue, pickle.PicklingError, AttributeError, TypeError):
                self._pickler.clear_memo()
                self._start(prefix)
                _by_value_pickler(self._file, self._keep).dump(obj)
            return [self._file.getvalue(), *(buffer.raw() for buffer in self._buffers)]
        finally:
            self._buffers = []
            self._pickler.clear_memo()
            self._busy = False

    def _start(self, prefix: bytes) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(prefix)
        self._buffers.clear()

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        """True: pickle it in band."""
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        self._buffers.append(buffer)
        return False


def _by_value_pickler(file: io.BytesIO, keep: Callable[[pickle.PickleBuffer], bool]) -> Any:
    base: Any = cloudpickle().CloudPickler

    class ByValuePickler(base):  # type: ignore[misc]  # its base is chosen at run time
        def reducer_override(self, obj: Any) -> Any:
            reduced = _reduce(obj)
            return super().reducer_override(obj) if reduced is NotImplemented else reduced

    return ByValuePickler(file, PROTOCOL, buffer_callback=keep)


_local = threading.local()


def encoder() -> Encoder:
    """This thread's encoder."""
    own: Encoder | None = getattr(_local, "encoder", None)
    if own is None:
        own = _local.encoder = Encoder()
    return own


def encode(obj: Any, prefix: bytes = b"") -> list[Buffer]:
    """Frames of `obj`; see Encoder.encode."""
    return encoder().encode(obj, prefix)


def decode(frames: Sequence[Buffer], skip: int = 0) -> Any:
    """The object of `frames`, all of its memory its own. `skip`: bytes of prefix in the first frame.

    Raises:
        whatever unpickling raises.
    """
    first = memoryview(frames[0])[skip:] if skip else frames[0]
    if len(frames) == 1:
        return pickle.loads(first)
    return pickle.loads(first, buffers=[_own_copy(frame) for frame in frames[1:]])


def _own_copy(frame: Buffer) -> memoryview:
    # Uninitialised memory: a bytearray would be zeroed first, and is aligned to 16 bytes only.
    copy = np.empty(len(frame), dtype=np.uint8)
    copy[:] = np.frombuffer(frame, dtype=np.uint8)
    return copy.data
