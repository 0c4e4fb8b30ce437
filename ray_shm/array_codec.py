"""NumPy arrays and memoryviews to buffers and back. Runs in every process.

Arrays of numbers, text, datetime64 and structured dtypes, and memory maps, travel as one buffer, in C or Fortran order
as they are; one with gaps is copied together first. NumPy would copy most of these into the pickle, and takes three
times as long for the rest. All arrive writable, read-only ones too: what a receiver holds is its own. Object and string
(StringDType) arrays, subclasses and masked arrays go NumPy's way, in the pickle.
"""

from __future__ import annotations

from pickle import PickleBuffer
from typing import Any

import numpy as np

_EXPORTED = "biufcSU"  # kinds that the buffer protocol knows
_BY_NAME = _EXPORTED + "mM"  # kinds that dtype.str tells all of; pickling a dtype takes longer than all the rest


class _Alias:
    """Bytes of a read-only array, as a writable buffer: the flag would arrive with the buffer."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps the memory
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {"data": (address, False), "shape": (array.nbytes,), "typestr": "|u1", "version": 3}


def reduce_array(array: np.ndarray[Any, Any]) -> Any:
    """What `reducer_override` returns for an ndarray or memmap; NotImplemented leaves it to NumPy's own pickling."""
    dtype = array.dtype
    if dtype.hasobject or dtype.isbuiltin == 2 or not array.nbytes:  # 2: registered by another package
        return NotImplemented
    flags = array.flags
    if not flags.forc:
        array = np.array(array, order="C", subok=True)
        flags = array.flags
    order = "C" if flags.c_contiguous else "F"
    is_memmap = type(array) is np.memmap
    described = dtype.str if dtype.kind in _BY_NAME and dtype.metadata is None else dtype
    return _rebuild_array, (PickleBuffer(_exported(array)), described, array.shape, order, is_memmap)


def _exported(array: np.ndarray[Any, Any]) -> Any:
    """Something with the bytes of a contiguous array that supports the buffer protocol and is writable."""
    if not array.flags.writeable:
        return np.asarray(_Alias(array))
    return array if array.dtype.kind in _EXPORTED else np.asarray(array).ravel("K").view(np.uint8)


def _rebuild_array(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any, is_memmap: bool) -> Any:
    array = np.frombuffer(buffer, dtype)
    if len(shape) != 1:
        array = array.reshape(shape, order=order)
    return array.view(np.memmap) if is_memmap else array  # of no file: its `filename` is None


def reduce_memoryview(view: memoryview) -> Any:
    """As a memoryview of the same format, shape and values; in C order, and writable.

    Raises:
        TypeError: of a format that NumPy does not know, such as pointers.
    """
    try:
        array = np.ascontiguousarray(view).reshape(view.shape)  # of 0 dimensions, ascontiguousarray makes 1
    except (RuntimeError, ValueError) as exc:
        raise TypeError(f"cannot pickle a memoryview of format {view.format!r}; send bytes(view) instead") from exc
    return _rebuild_memoryview, (array, view.format)


def _rebuild_memoryview(array: Any, format: Any) -> memoryview[Any]:
    view: memoryview[Any] = memoryview(array)
    if view.format == format or len(format) > 1 or not view.nbytes:  # only single native characters can be cast to
        return view
    return view.cast("B").cast(format, array.shape)


REBUILDERS = {_rebuild_array, _rebuild_memoryview}
