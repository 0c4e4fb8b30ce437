"""NumPy arrays and memoryviews to frames and back: dtype, shape, order and bits arrive, and writable memory."""

from __future__ import annotations

import ctypes
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_receiver import copied

from ray_shm.codec import OUT_OF_BAND_BYTES, decode, encode


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    big = np.arange(3000, dtype=np.float64).reshape(50, 60)
    record = np.zeros(500, dtype=[("id", "i8"), ("name", "S7"), ("w", "f4", (3,)), ("at", "M8[s]")])
    record["id"] = range(500)
    return {
        "in band": np.arange(5),
        "at the border": np.zeros(OUT_OF_BAND_BYTES, np.uint8),
        "out of band": big,
        "0-dim": np.array(3.5),
        "0-dim read-only": read_only(np.array(3.5)),
        "empty": np.empty((0, 7), np.int16),
        "of empty items": np.zeros(5, "S0"),
        "Fortran order": np.asfortranarray(big),
        "non-contiguous": big[::2, ::3],
        "small non-contiguous": np.arange(10)[::2],
        "reversed": big[::-1],
        "permuted": big.reshape(5, 10, 60).transpose(1, 2, 0),
        "broadcast": np.broadcast_to(np.arange(60.0), (50, 60)),
        "read-only": read_only(big),
        "read-only Fortran order": read_only(np.asfortranarray(big)),
        "read-only and small": read_only(np.arange(5)),
        "over bytes": np.frombuffer(b"x" * 9000, np.int32),
        "structured": record,
        "structured read-only": read_only(record),
        "a field": record["w"],
        "aligned": np.zeros(900, dtype=np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"]}, align=True)),
        "with metadata": np.zeros(900, dtype=np.dtype("f8", metadata={"unit": "m"})),
        "objects": np.array([None, "x", {1: 2}], dtype=object),
        "many objects": np.array([None, "x"] * 3000, dtype=object),
        "a field of objects": np.array([(1, "x"), (2, None)] * 500, dtype=[("n", "i4"), ("o", "O")]),
        "strings": np.array(["a", "bcd"] * 2000),
        "bytes": np.array([b"a", b"b\0d"] * 2000),
        "big-endian": big.astype(">f8"),
        "big-endian strings": np.array(["a", "bcd"] * 2000, dtype=">U3"),
        "void": np.arange(5000, dtype=np.uint8).view("V5"),
        "bool": big > 7,
        "complex": big * 1j,
        "float16": big.astype(np.float16),
        "longdouble": big.astype(np.longdouble),
        "clongdouble": big.astype(np.clongdouble),
        "datetime": np.arange("2024-01", "2064-01", dtype="M8[D]"),
        "big-endian datetime": np.arange("2024-01", "2064-01", dtype=">M8[D]"),
        "datetime of 10 ns": np.arange(900).astype("M8[10ns]"),
        "timedelta, Fortran order": np.asfortranarray(big.astype("m8[us]")),
        "NaN payloads": np.arange(0x7FF0000000000001, 0x7FF0000000000001 + 900).view(np.float64),
    }


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array = array.copy("K")
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("name", arrays())
def test_arrays(name: str) -> None:
    sent = arrays()[name]
    received = copied(sent)
    assert type(received) is np.ndarray
    assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
    assert received.dtype.metadata == sent.dtype.metadata
    assert received.dtype.isalignedstruct == sent.dtype.isalignedstruct
    if sent.dtype.hasobject:
        assert received.tolist() == sent.tolist()
    else:
        assert received.tobytes() == sent.tobytes()
    assert received.flags.writeable
    received[...] = received
    if sent.flags.f_contiguous and sent.size:
        assert received.flags.f_contiguous
        assert received.strides == sent.strides
    else:
        assert received.flags.c_contiguous
    if sent.nbytes >= OUT_OF_BAND_BYTES and not sent.dtype.hasobject:
        assert len(encode(sent)) == 2
        assert len(encode(sent)[0]) < 700


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="StringDType is of NumPy 2")
def test_arrays_of_strings_of_any_length() -> None:
    """Their elements are pointers."""
    sent = np.array(["a", "x" * 5000, "é"] * 900, dtype=np.dtypes.StringDType())
    received = copied(sent)
    assert received.dtype == sent.dtype
    assert received.tolist() == sent.tolist()


def test_scalars_of_numpy() -> None:
    for sent in (np.float32(2.5), np.datetime64("2024-01-02"), np.bool_(True), np.str_("x"), np.longdouble(1) / 3):
        received = copied(sent)
        assert type(received) is type(sent)
        assert received == sent


def test_memory_maps_arrive_as_memory_without_a_file(tmp_path: Path) -> None:
    data = np.arange(9000.0).reshape(90, 100)
    data.tofile(tmp_path / "data")
    for order, offset in (("C", 0), ("F", 0), ("C", 800)):
        shape = (90 - offset // 800, 100)
        sent = np.memmap(tmp_path / "data", np.float64, "r", offset, shape, order)
        received = copied(sent)
        assert type(received) is np.memmap
        assert received.filename is None
        np.testing.assert_array_equal(received, sent)
        received[0, 0] = -1
        assert len(encode(sent)) == 2
        step = copied(sent[::2])
        np.testing.assert_array_equal(step, sent[::2])
        assert type(step) is np.memmap


def test_masked_arrays_and_other_subclasses() -> None:
    sent = np.ma.masked_less(np.arange(5000), 2500)
    sent.fill_value = 77
    received = copied(sent)
    assert type(received) is np.ma.MaskedArray
    np.testing.assert_array_equal(received.mask, sent.mask)
    np.testing.assert_array_equal(received.data, sent.data)
    assert received.fill_value == 77
    records = np.rec.array([(1, "x"), (2, "y")] * 500, dtype=[("n", "i4"), ("s", "U3")])
    received = copied(records)
    assert type(received) is np.recarray
    assert received.n.tolist() == records.n.tolist()


def test_what_is_sent_does_not_change() -> None:
    for name, sent in arrays().items():
        flags, before = str(sent.flags), sent.tobytes()
        copied(sent)
        assert str(sent.flags) == flags, name
        assert sent.tobytes() == before, name


# ---- memoryviews ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        memoryview(b"abc"),
        memoryview(b"abc" * 5000),
        memoryview(bytearray(9000))[5:],
        memoryview(b"abc" * 5000)[::-2],
        memoryview(np.arange(6000).reshape(60, 100)),
        memoryview(np.arange(6000.0, dtype=np.float32).reshape(60, 100))[::7],
        memoryview(np.asfortranarray(np.arange(6000).reshape(60, 100))),
        memoryview(b"abc" * 5000).cast("c"),
        memoryview(b"abcd" * 5000).cast("q", (50, 50)),
        memoryview(bytes(16)).cast("?"),
        memoryview(b""),
        memoryview(np.array(5)),
        memoryview(np.zeros((0, 3))),
    ],
    ids=lambda view: f"{view.format}{view.shape}",
)
def test_memoryviews(view: Any) -> None:
    received = copied(view)
    assert type(received) is memoryview
    assert (received.format, received.shape, received.c_contiguous) == (view.format, view.shape, True)
    assert received.tobytes() == view.tobytes()
    assert not (received.readonly and received.nbytes)
    assert len(encode(view)) == 1 + (view.nbytes >= OUT_OF_BAND_BYTES)


def test_a_memoryview_of_unknown_format_is_an_error_that_says_so() -> None:
    with pytest.raises(TypeError, match=r"memoryview of format '&<i'; send bytes\(view\)"):
        encode(memoryview((ctypes.POINTER(ctypes.c_int) * 3)()))


def test_pickle_buffers_are_what_the_receiver_gets() -> None:
    received = copied(pickle.PickleBuffer(bytearray(b"ab") * 5000))
    assert bytes(received) == b"ab" * 5000
    received[0] = 7


# ---- whose memory ---------------------------------------------------------------------------------------------------

KEPT: dict[str, Callable[[Any], Any]] = {
    "itself": lambda a: a,
    "slice": lambda a: a[5:9],
    "transposed": lambda a: a.T,
    "view of a view": lambda a: a[3:][:, 1:].view("m8[s]")[::2],
    "memoryview": memoryview,
    "slice of a memoryview": lambda a: memoryview(a)[3:],
    "ctypes": lambda a: (ctypes.c_char * a.nbytes).from_buffer(a),
    "frombuffer": lambda a: np.frombuffer(a, np.uint8),
    "DLPack": np.from_dlpack,
    "PickleBuffer": pickle.PickleBuffer,
}


@pytest.mark.parametrize("sort", ["ordinary", "read-only", "Fortran order", "datetime", "memoryview", "buffer"])
def test_owned_memory_is_used_as_it_is_and_kept_until_the_last_view_is_gone(sort: str) -> None:
    original = np.arange(6000).reshape(60, 100)
    sent: Any = {
        "ordinary": original,
        "read-only": read_only(original),
        "Fortran order": np.asfortranarray(original),
        "datetime": original.astype("M8[us]"),
        "memoryview": memoryview(original),
        "buffer": pickle.PickleBuffer(original),
    }[sort]
    for name, view_of in KEPT.items():
        first, frame = encode(sent)
        block = (ctypes.c_char * original.nbytes).from_buffer_copy(frame)
        gone: list[Any] = []
        watch = weakref.ref(block, gone.append)
        received: Any = decode([first, memoryview(block).cast("B")], owned=True)
        start, block = ctypes.addressof(block), None  # type: ignore[assignment]
        array = np.asarray(received).view(np.int64).reshape(60, 100)
        received = None
        assert array.ctypes.data == start, "not copied"
        np.testing.assert_array_equal(array, original)
        array[0, 0] = 7
        assert original[0, 0] == 0
        if not array.flags.c_contiguous:
            array = array.T
        view = view_of(array)
        del array
        assert not gone, name
        del view
        assert gone == [watch], name
