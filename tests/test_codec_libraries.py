"""pandas and Arrow objects to frames and back: values, types, and their memory out of band, copied or not."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from codec_receiver import copied
from pandas.testing import assert_frame_equal, assert_index_equal, assert_series_equal

from ray_shm.codec import decode, encode

N = 3000


def in_band(obj: Any) -> int:
    return len(encode(obj)[0])


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "int": np.arange(N),
            "float": np.arange(N) / 7,
            "float32": np.arange(N, dtype=np.float32),
            "bool": np.arange(N) % 2 == 0,
            "time": pd.date_range("2024-01-01", periods=N, freq="s"),
            "zone": pd.date_range("2024-01-01", periods=N, freq="s", tz="Europe/Paris"),
            "delta": pd.to_timedelta(np.arange(N), unit="s"),
            "text": [f"row {k}" for k in range(N)],
            "category": pd.Categorical(["a", "b", "c"] * (N // 3)),
            "nullable": pd.array([1, None, 3] * (N // 3), dtype="Int64"),
            "period": pd.period_range("2024-01-01", periods=N, freq="h"),
            "arrow": pd.array(np.arange(N), dtype=pd.ArrowDtype(pa.int64())),
        },
        index=pd.Index(np.arange(N) * 2, name="id"),
    )


FRAMES: dict[str, Callable[[], pd.DataFrame]] = {
    "every dtype": frame,
    "numbers": lambda: pd.DataFrame(np.arange(4.0 * N).reshape(N, 4), columns=list("abcd")),
    "slice": lambda: frame().iloc[100:2000:3],
    "columns": lambda: frame()[["float", "text"]],
    "empty": lambda: frame().iloc[:0],
    "no columns": lambda: pd.DataFrame(index=range(5)),
    "multi-index": lambda: frame().set_index(["category", "int"]),
    "objects": lambda: pd.DataFrame({"o": [None, {1: 2}, "x"] * N}, dtype=object),
    "read-only": lambda: pd.DataFrame(np.frombuffer(np.arange(N).tobytes(), np.int64).reshape(-1, 3)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_data_frames(name: str) -> None:
    sent = FRAMES[name]()
    received = copied(sent)
    assert_frame_equal(received, sent, check_exact=True, check_freq=True)
    if len(sent) and len(sent.columns):  # writable
        received.isetitem(0, received.iloc[:, 0].to_list())
        received.iloc[:, -1:] = received.iloc[:, -1:]


def test_a_data_frames_columns_go_out_of_band() -> None:
    numbers = FRAMES["numbers"]()
    assert len(encode(numbers)) == 2
    assert in_band(numbers) < 1500
    assert frame().memory_usage(deep=True).sum() > 200_000
    assert in_band(frame()) < 15_000  # three columns of less than a page among them


@pytest.mark.parametrize("column", frame().columns)
def test_series_and_their_index(column: str) -> None:
    sent = frame()[column]
    assert_series_equal(copied(sent), sent, check_exact=True)
    index = pd.Index(sent)
    assert_index_equal(copied(index), index, exact=True)


def test_data_frames_in_memory_that_is_the_receivers() -> None:
    sent = FRAMES["numbers"]()
    first, data = encode(sent)
    block = (ctypes.c_char * memoryview(data).nbytes).from_buffer_copy(data)
    gone: list[Any] = []
    watch = weakref.ref(block, gone.append)
    received = decode([first, memoryview(block).cast("B")], owned=True)
    start, block = ctypes.addressof(block), None  # type: ignore[assignment]
    assert_frame_equal(received, sent)
    values = received["b"].to_numpy()
    assert start <= values.ctypes.data < start + sent.to_numpy().nbytes, "not copied"
    received = None
    assert not gone
    assert values[1] == 5
    del values
    assert gone == [watch]


# ---- Arrow ----------------------------------------------------------------------------------------------------------


def table() -> pa.Table:
    return pa.table(
        {
            "int": np.arange(N),
            "missing": pa.array([1, None, 3] * (N // 3), pa.int32()),
            "text": pa.array([f"row {k}" for k in range(N)]),
            "binary": pa.array([b"ab", None, b""] * (N // 3)),
            "list": pa.array([[1, 2], None, []] * (N // 3)),
            "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}] * (N // 3)),
            "dictionary": pa.array(["u", "v", None] * (N // 3)).dictionary_encode(),
            "time": pa.array(np.arange(N), pa.timestamp("us", "UTC")),
            "decimal": pa.array(range(N), pa.decimal128(12, 2)),
            "half": pa.array(np.arange(N).astype(np.float16)),
        }
    ).replace_schema_metadata({"origin": "test"})


ARROW: dict[str, Callable[[], Any]] = {
    "table": table,
    "slice": lambda: table().slice(100, 1000),
    "chunks": lambda: pa.concat_tables([table(), table()]),
    "batch": lambda: table().to_batches()[0],
    "array": lambda: table()["text"].chunk(0),
    "array with an offset": lambda: table()["missing"].chunk(0)[5:],
    "chunked array": lambda: table()["struct"],
    "schema": lambda: table().schema,
    "scalar": lambda: table()["decimal"][7],
    "empty table": lambda: table().slice(0, 0),
    "buffer": lambda: pa.py_buffer(b"x" * 9000),
}


@pytest.mark.parametrize("name", ARROW)
def test_arrow(name: str) -> None:
    sent = ARROW[name]()
    received = copied(sent)
    assert type(received) is type(sent)
    assert received.equals(sent)
    if hasattr(sent, "validate"):
        received.validate(full=True)
    if name == "table":
        assert received.schema.equals(sent.schema, check_metadata=True)


def test_arrow_goes_out_of_band() -> None:
    assert table().nbytes > 200_000
    assert in_band(table()) < 10_000  # bitmaps of less than a page among them


def test_arrow_in_memory_that_is_the_receivers() -> None:
    sent = pa.table({"a": np.arange(N)})
    first, data = encode(sent)
    block = (ctypes.c_char * memoryview(data).nbytes).from_buffer_copy(data)
    gone: list[Any] = []
    watch = weakref.ref(block, gone.append)
    received = decode([first, memoryview(block).cast("B")], owned=True)
    start, block = ctypes.addressof(block), None  # type: ignore[assignment]
    assert received.equals(sent)
    array = received["a"].chunk(0)[5:]
    assert array.buffers()[1].address == start, "not copied"
    received = None
    values = array.to_numpy()
    del array
    assert not gone
    assert values[0] == 5
    del values
    assert gone == [watch]
