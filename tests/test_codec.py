"""Objects to frames and back, without a queue: what arrives is equal, writable and the receiver's own."""

from __future__ import annotations

import datetime
import enum
import pickle
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ray_shm import codec
from ray_shm.codec import OUT_OF_BAND_BYTES, decode, encode

WATCHDOG = 60.0  # seconds; only a hang comes near
Point = namedtuple("Point", "x y")


@dataclass
class Plain:
    x: Any


class Color(enum.Enum):
    RED = 1


def copied(obj: Any) -> Any:
    """`obj` as a receiver gets it: from copies of the frames, which are then overwritten."""
    frames = [bytearray(frame) for frame in encode(obj)]
    received = decode(frames)
    for frame in frames:
        frame[:] = b"\xff" * len(frame)
    return received


@pytest.mark.parametrize(
    "obj",
    [
        None,
        True,
        2**100,
        -1.5,
        "text",
        b"bytes" * 5000,
        bytearray(b"x" * 9000),
        [1, (2, {3: {4}})],
        Point(1, 2),
        Plain([1, 2]),
        Color.RED,
        datetime.datetime(2024, 1, 2),
        int,
        len,
        Plain,
        np.float32(2.5),
        np.dtype("f4"),
        {"a": None, "b": [b""] * 3},
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_plain_objects(obj: Any) -> None:
    received = copied(obj)
    assert received == obj
    assert type(received) is type(obj)


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    big = np.arange(3000, dtype=np.float64).reshape(50, 60)
    record = np.zeros(500, dtype=[("id", "i8"), ("name", "S7"), ("w", "f4", (3,))])
    record["id"] = range(500)
    return {
        "in band": np.arange(5),
        "at the border": np.zeros(OUT_OF_BAND_BYTES, np.uint8),
        "out of band": big,
        "0-dim": np.array(3.5),
        "empty": np.empty((0, 7), np.int16),
        "Fortran order": np.asfortranarray(big),
        "non-contiguous": big[::2, ::3],
        "reversed": big[::-1],
        "broadcast": np.broadcast_to(np.arange(60.0), (50, 60)),
        "structured": record,
        "objects": np.array([None, "x", {1: 2}], dtype=object),
        "strings": np.array(["a", "bcd"] * 2000),
        "big-endian": big.astype(">f8"),
        "bool": big > 7,
        "complex": big * 1j,
        "datetime": np.arange("2024-01", "2064-01", dtype="M8[D]"),
    }


@pytest.mark.parametrize("name", arrays())
def test_arrays(name: str) -> None:
    sent = arrays()[name]
    received = copied(sent)
    assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
    np.testing.assert_array_equal(received, sent)
    received[...] = received  # writable
    if name == "Fortran order":
        assert received.flags.f_contiguous


def test_large_buffers_travel_out_of_band_and_small_ones_do_not() -> None:
    assert len(encode(np.zeros(OUT_OF_BAND_BYTES, np.uint8))) == 2
    assert len(encode(np.zeros(OUT_OF_BAND_BYTES - 1, np.uint8))) == 1
    assert len(encode([np.zeros(9000)] * 3)) == 2, "one array three times is one buffer"


def test_identity_inside_an_object_is_kept() -> None:
    shared = np.arange(2000)
    a, b = copied((shared, [shared]))
    assert a is b[0]


TENSORS = """
import torch
from ray_shm.codec import decode, encode

def copied(obj):
    frames = [bytearray(f) for f in encode(obj)]
    received = decode(frames)
    for f in frames:
        f[:] = b"\\xff" * len(f)
    return received

def bits(t):
    return t.contiguous().reshape(-1).view(torch.uint8).tolist()

base = torch.arange(6000)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
              torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64):
    for shape in ((), (0,), (3, 0, 2), (3,), (60, 100)):
        n = 1
        for d in shape: n *= d
        sent = base[:n].to(dtype).reshape(shape)
        got = copied(sent)
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape), (dtype, shape)
        assert bits(got) == bits(sent), (dtype, shape)
        got.zero_()
matrix = base[:6000].reshape(60, 100)
for name, sent in {"t": matrix.t(), "step": matrix[::2, ::3], "expand": base[:1].expand(5000)}.items():
    assert torch.equal(copied(sent), sent), name
small_part = encode(base[:3])
assert sum(map(len, small_part)) < 1000, "a view takes its own bytes along, not its storage's"
with_grad = torch.ones(3, requires_grad=True)
got = copied(with_grad)
assert got.requires_grad and torch.equal(got, with_grad)
parameter = torch.nn.Parameter(torch.arange(5000.0))
assert type(copied(parameter)) is torch.nn.Parameter and torch.equal(copied(parameter), parameter)
sparse = torch.eye(3).to_sparse()
assert torch.equal(copied(sparse).to_dense(), torch.eye(3))
assert torch.equal(copied(torch.tensor([1 + 2j]).conj()), torch.tensor([1 - 2j]))
a, b = copied([matrix, matrix])
assert a is b
state = copied({"w": matrix.float(), "n": 3})
assert torch.equal(state["w"], matrix.float())
print("passed")
"""


def run_python(code: str) -> str:
    """What a new process prints: torch stays out of this one, and `__main__` is the code itself."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WATCHDOG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensors_of_every_dtype_and_shape() -> None:
    assert run_python(TENSORS) == "passed\n"


MAIN = """
import sys
from ray_shm.codec import encode

class Mine:
    def __init__(self, x): self.x = x
    def double(self): return factor() * self.x

def factor(): return 2

import numpy as np
obj = {"instance": Mine(21), "class": Mine, "function": factor, "lambda": lambda x: x + 1, "array": np.arange(9000)}
import pickle
sys.stdout.buffer.write(pickle.dumps([bytes(f) for f in encode(obj)]).hex().encode())
"""


def test_what_the_receiver_cannot_import_goes_by_value() -> None:
    """Of ``__main__`` of another process, classes and functions, and a large array beside them."""
    frames = pickle.loads(bytes.fromhex(run_python(MAIN)))
    assert len(frames) == 2
    received = decode(frames)
    assert received["instance"].double() == 42
    assert type(received["instance"]) is received["class"]
    assert received["class"](3).double() == 6
    assert (received["function"](), received["lambda"](1)) == (2, 2)
    np.testing.assert_array_equal(received["array"], np.arange(9000))


def test_nested_functions_and_classes_go_by_value() -> None:
    class Local:
        value = 5

    base = 10
    assert copied(lambda x: x + base)(1) == 11
    assert copied(Local).value == 5
    assert isinstance(copied(Local()), Local), "one cloudpickle knows the class it has shipped"


def test_importable_functions_go_by_name() -> None:
    assert copied(copied) is copied
    assert len(encode(Plain)[0]) < 100


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("cannot be pickled")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (threading.Lock, TypeError),
        (Unpicklable, ValueError),
        (lambda: (x for x in ()), TypeError),
    ],
    ids=["lock", "own error", "generator"],
)
def test_unpicklable_objects_leave_the_encoder_usable(make: Callable[[], Any], error: type[Exception]) -> None:
    big = np.arange(9000)
    for _ in range(2):
        with pytest.raises(error):
            encode([big, make()])
        assert len(encode([1, 2])) == 1
        np.testing.assert_array_equal(copied(big), big)


class SendsWhilePickled:
    def __reduce__(self) -> Any:
        assert copied([np.arange(9000)])[0][-1] == 8999
        return list, ()


def test_pickling_inside_of_pickling() -> None:
    big = np.arange(7000)
    first, nested, last = copied([big, SendsWhilePickled(), big * 2])
    np.testing.assert_array_equal(first, big)
    assert nested == []
    np.testing.assert_array_equal(last, big * 2)


def test_a_prefix_stands_before_the_pickle() -> None:
    frames = encode({"a": np.arange(9000)}, prefix=b"0123456789abcdef")
    assert bytes(frames[0][:16]) == b"0123456789abcdef"
    assert decode(frames, skip=16)["a"][-1] == 8999


def test_threads_have_their_own_encoders() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(200):
                np.testing.assert_array_equal(copied([np.full(2000, seed + i)])[0], np.full(2000, seed + i))
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG)
    assert not failures
    assert codec.encoder() is codec.encoder()
