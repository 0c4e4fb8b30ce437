"""Objects to byte frames and back: pickle protocol 5, large buffers out of band. Runs in every process.

Frames of an object: the pickle, then one frame for each buffer of at least OUT_OF_BAND_BYTES (NumPy arrays, torch
tensors, pandas, Arrow, anything that supports protocol 5; arrays and tensors: array_codec.py, tensor_codec.py). Large
``bytes`` and ``bytearray`` values, which protocol 5 copies into the pickle, are frames too::

    frame 0           frames 1 .. p                  frames p+1 ..
    prefix | pickle   (none)                         buffers
    prefix | cuts     pieces of at least             buffers          cuts: _CUT, p, and the position of each piece
           | pickle   PIECE_BYTES, cut out of it                      in the pickle with the pieces cut out

What a receiver holds is its own, writable, and never changes under it: `decode` copies each buffer, unless its memory
is the receiver's already (`owned`).

One reused C pickler does the common case (255 ns for a small call against 950 ns for a new one). Functions and classes
that the receiver cannot import (of ``__main__``, nested, lambdas) go by value: the object is pickled again by
cloudpickle. Which copy of cloudpickle is chosen by `use_cloudpickle`: two copies have two class trackers, and a class
shipped by one fails isinstance against the same class shipped by the other.
"""

from __future__ import annotations

import functools
import pickle
import struct
import sys
import threading
import types
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ray_shm import array_codec, cuda_ipc
from ray_shm.array_codec import reduce_array, reduce_memoryview
from ray_shm.ring import Buffer

OUT_OF_BAND_BYTES = 4096
PIECE_BYTES = 256 * 1024  # pickle hands over bytes of 64 KiB and more uncopied
PROTOCOL = 5
_CUT = 0  # a pickle starts with 0x80
_CUTS = struct.Struct("<BI")  # _CUT, number of pieces; a 64-bit position for each follows

_NAMED = (type, types.FunctionType)  # what is pickled by name, or by value
_OWN: set[Any] = set(array_codec.REBUILDERS)  # known to be importable

_cloudpickle: Any = None
_tensor_codec: Any = None  # imported when torch is there


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


class _Sent:
    """What is pickled so far of one message."""

    __slots__ = ("buffers", "memory", "sharer", "stream", "write")

    def __init__(self) -> None:
        self.stream: list[Any] = []  # the pickle, in the parts that pickle hands over: bytes, and large bytearrays
        self.write = self.stream.append  # what makes this a file for pickle
        self.buffers: list[memoryview] = []
        self.memory: Any = None  # tensor_codec.SentMemory, once there is a tensor
        self.sharer: cuda_ipc.Sharer | None = None  # of the queue that it is for

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        """True: pickle it in band."""
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        self.buffers.append(raw)
        return False

    def reduce(self, obj: Any) -> Any:
        """What `reducer_override` returns for anything but a function or class."""
        kind = type(obj)
        if kind is np.ndarray or kind is np.memmap:
            return reduce_array(obj)
        if kind is memoryview:
            return reduce_memoryview(obj)
        codec = _tensor_codec or _import_tensor_codec()
        if codec is None:
            return NotImplemented
        if self.memory is None:
            self.memory = codec.SentMemory(self.sharer)
        return codec.reduce(obj, self.memory)

    def frames(self, prefix: bytes) -> list[Buffer]:
        """Frames of a pickle in several parts: each large part stands behind one that ends with its opcode and size."""
        rest: list[Any] = [self.stream[0]]
        pieces: list[Buffer] = []
        positions: list[int] = []
        position = len(self.stream[0])
        for before, part in pairwise(self.stream):
            is_bytearray = type(part) is bytearray
            if is_bytearray and len(part) != int.from_bytes(before[-8:], "little"):
                raise RuntimeError("a bytearray changed its size while it was pickled; another thread still uses it")
            if len(part) >= PIECE_BYTES and (is_bytearray or _announces_bytes(before)):
                pieces.append(memoryview(part) if is_bytearray else part)
                positions.append(position)
            else:
                rest.append(part)
                position += len(part)
        if not pieces:
            return [b"".join((prefix, *rest)), *self.buffers]
        cuts = _CUTS.pack(_CUT, len(pieces)) + struct.pack(f"<{len(pieces)}Q", *positions)
        return [b"".join((prefix, cuts, *rest)), *pieces, *self.buffers]

    def clear(self) -> None:
        self.stream.clear()
        self.buffers = []

    def drop(self) -> None:
        self.clear()
        self.memory = None


def _announces_bytes(part: bytes) -> bool:
    """Whether a bytes object follows, not a str, which can only be read through another copy."""
    opcode = part[-5:-4]  # before a size of 4 bytes
    return opcode == pickle.BINBYTES or (opcode != pickle.BINUNICODE and part[-9:-8] == pickle.BINBYTES8)


def _import_tensor_codec() -> Any:
    """The module, or None where torch is not imported: no tensor can be here then."""
    global _tensor_codec
    if "torch" in sys.modules:
        from ray_shm import tensor_codec

        _OWN.update(tensor_codec.REBUILDERS)
        _tensor_codec = tensor_codec
    return _tensor_codec


class _Pickler(pickle.Pickler):
    """The fast one: gives up at what goes by value."""

    def __init__(self, sent: _Sent) -> None:
        super().__init__(sent, PROTOCOL, buffer_callback=sent.keep)
        self._reduce = sent.reduce

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _NAMED):
            if not (type(obj) is types.FunctionType and obj in _OWN) and _goes_by_value(obj):
                raise _ByValue
            return NotImplemented
        return self._reduce(obj)


@functools.cache
def _by_value_class(base: Any) -> Any:
    """The thorough one, on a CloudPickler."""

    class ByValuePickler(base):  # type: ignore[misc]  # its base is chosen at run time
        def __init__(self, sent: _Sent) -> None:
            super().__init__(sent, PROTOCOL, buffer_callback=sent.keep)
            self._reduce = sent.reduce

        def reducer_override(self, obj: Any) -> Any:
            reduced = NotImplemented if isinstance(obj, _NAMED) else self._reduce(obj)
            return super().reducer_override(obj) if reduced is NotImplemented else reduced

    return ByValuePickler


class Encoder:
    """Turns objects into frames. Holds a pickler for reuse; one per thread (`encoder`)."""

    __slots__ = ("_busy", "_pickler", "_sent")

    def __init__(self) -> None:
        self._sent = _Sent()
        self._pickler = _Pickler(self._sent)
        self._busy = False

    def encode(self, obj: Any, prefix: bytes = b"", sharer: cuda_ipc.Sharer | None = None) -> list[Buffer]:
        """Frames of `obj`; the first starts with `prefix`. Buffers in them belong to `obj` still: send, then drop.

        sharer: of the queue that they will be sent through, which CUDA tensors may then travel beside.

        Raises:
            whatever pickling `obj` raises (TypeError, PicklingError, ...); the encoder stays usable.
        """
        if self._busy:  # a __reduce__ method that itself sends
            return Encoder().encode(obj, prefix, sharer)
        self._busy = True
        sent = self._sent
        sent.sharer = sharer
        stream = sent.stream
        try:
            if not self._quick(obj):
                self._by_value(obj)
            if sharer is not None and sent.memory is not None and sent.memory.outgoing is not None:
                return self._with_device_frame(obj, prefix, sharer)
            if len(stream) > 1:
                return sent.frames(prefix)
            first = prefix + stream[0] if prefix else stream[0]
            return [first, *sent.buffers] if sent.buffers else [first]
        finally:
            stream.clear()
            if sent.buffers or sent.memory is not None:
                sent.drop()
            self._pickler.clear_memo()
            self._busy = False

    def _with_device_frame(self, obj: Any, prefix: bytes, sharer: cuda_ipc.Sharer) -> list[Buffer]:
        try:
            last = self._sent.memory.outgoing.frame()
        except Exception as exc:  # of the driver's
            sharer.failed(exc)
            return Encoder().encode(obj, prefix)
        frames = self._sent.frames(prefix)
        return frames if last is None else [*frames, last]

    def _quick(self, obj: Any) -> bool:
        """Whether the reused pickler could do it; not where something goes by value, or cloudpickle may know more."""
        try:
            self._pickler.dump(obj)
            memory = self._sent.memory
            if memory is not None and memory.overlap:
                self._again()
                self._pickler.dump(obj)
        except (_ByValue, pickle.PicklingError, AttributeError, TypeError):
            return False
        return True

    def _by_value(self, obj: Any) -> None:
        self._sent.drop()
        pickler = _by_value_class(cloudpickle().CloudPickler)
        pickler(self._sent).dump(obj)
        memory = self._sent.memory
        if memory is not None and memory.overlap:
            self._again()
            pickler(self._sent).dump(obj)

    def _again(self) -> None:
        """Before pickling the same object again: tensors overlap in memory, which is known only now."""
        self._sent.clear()
        self._pickler.clear_memo()
        self._sent.memory.merge()


_local = threading.local()


def encoder() -> Encoder:
    """This thread's encoder."""
    try:
        own: Encoder = _local.encoder
    except AttributeError:
        own = _local.encoder = Encoder()
    return own


def encode(obj: Any, prefix: bytes = b"", sharer: cuda_ipc.Sharer | None = None) -> list[Buffer]:
    """Frames of `obj`; see Encoder.encode."""
    try:
        own: Encoder = _local.encoder
    except AttributeError:
        own = encoder()
    return own.encode(obj, prefix, sharer)


def decode(frames: Sequence[Buffer], skip: int = 0, owned: bool = False) -> Any:
    """The object of `frames`, all of its memory its own.

    Args:
        frames: as `encode` made them; read-only memory will do, unless `owned`. frames[0] is never kept.
        skip: bytes of prefix in the first frame.
        owned: frames[1:] are the receiver's already: writable, and valid and unchanged for as long as anything refers
            to the memoryview. What arrives lies in them uncopied, and keeps them alive. Otherwise they are copied.

    Raises:
        whatever unpickling raises. RuntimeError where a tensor is from a type of device that this process lacks.
    """
    first = frames[0]
    if skip:  # slicing a few bytes costs less than a memoryview
        first = first[skip:] if type(first) is memoryview or len(first) < 4096 else memoryview(first)[skip:]
    if len(frames) == 1:
        return pickle.loads(first)
    last = frames[-1]
    if type(last) is cuda_ipc.Received:
        with last.at_hand():
            return decode(frames[:-1], skip, owned)
    buffers = frames[1:]
    if first[0] != _CUT:
        return pickle.loads(first, buffers=buffers if owned else [_own_copy(frame) for frame in buffers])
    n_pieces = _CUTS.unpack_from(first)[1]
    file = _CutPickle(memoryview(first), buffers[:n_pieces])
    buffers = buffers[n_pieces:]
    return pickle.Unpickler(file, buffers=buffers if owned else [_own_copy(frame) for frame in buffers]).load()


def _own_copy(frame: Buffer) -> memoryview:
    # Uninitialised memory: a bytearray would be zeroed first, and is aligned to 16 bytes only.
    source = np.frombuffer(frame, dtype=np.uint8)
    copy = np.empty(source.nbytes, dtype=np.uint8)
    copy[:] = source
    return copy.data


class _CutPickle:
    """A file for pickle to read from: the pickle with its pieces put in again, which are copied only where they go."""

    def __init__(self, first: memoryview, pieces: Sequence[Buffer]) -> None:
        start = _CUTS.size + 8 * len(pieces)
        cuts = struct.unpack_from(f"<{len(pieces)}Q", first, _CUTS.size)
        rest = first[start:]
        self._parts: list[memoryview] = []  # the next one last
        for begin, end, piece in zip((0, *cuts), cuts, pieces, strict=False):
            self._parts += rest[begin:end], memoryview(piece)
        self._parts.append(rest[cuts[-1] :])
        self._parts.reverse()

    def readinto(self, target: memoryview) -> int:
        done = 0
        while done < len(target) and self._parts:
            part = self._parts.pop()
            n = min(len(part), len(target) - done)
            target[done : done + n] = part[:n]
            if n < len(part):
                self._parts.append(part[n:])
            done += n
        return done

    def read(self, n: int) -> bytes:
        if self._parts and n <= len(self._parts[-1]):
            part = self._parts.pop()
            self._parts.append(part[n:])
            return bytes(part[:n])
        target = bytearray(n)
        return bytes(target[: self.readinto(memoryview(target))])

    def readline(self) -> bytes:
        raise pickle.UnpicklingError("no opcode of protocol 5 reads a line; the message was not made by encode")
