"""Objects to frames and back, without a queue: what arrives is equal, writable and the receiver's own."""

from __future__ import annotations

import datetime
import enum
import functools
import gc
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
from codec_receiver import copied

from ray_shm import codec
from ray_shm.codec import OUT_OF_BAND_BYTES, decode, encode

WATCHDOG = 60.0  # seconds; only a hang comes near
Point = namedtuple("Point", "x y")


@dataclass
class Plain:
    x: Any


class Color(enum.Enum):
    RED = 1


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


# ---- large bytes -----------------------------------------------------------------------------------------------------

PIECE = codec.PIECE_BYTES


@pytest.mark.parametrize(
    "obj",
    [
        b"x" * PIECE,
        b"x" * (PIECE - 1),
        bytearray(b"x" * PIECE),
        "ä" * PIECE,
        [b"a" * PIECE, 1, b"b" * (2 * PIECE), bytearray(b"c" * PIECE), "d", b"e" * PIECE],
        {"big": b"a" * PIECE, "array": b"b" * 70_000, "list": list(range(100_000)), "last": bytearray(90_000)},
        [b"ab" * 50_000] * 3 + [bytes(70_000), b"z" * PIECE],
    ],
    ids=["one", "one less", "bytearray", "str", "several", "among others", "twice"],
)
def test_large_bytes(obj: Any) -> None:
    received = copied(obj)
    assert received == obj
    assert type(received) is type(obj)


def test_large_bytes_are_frames_of_their_own_not_copied_to_send_them() -> None:
    big, other = b"x" * PIECE, bytearray(PIECE)
    frames = encode({"a": big, "b": np.zeros(9000), "c": [other]}, prefix=b"head")
    assert frames[1] is big
    assert isinstance(frames[2], memoryview)
    assert frames[2].obj is other
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [PIECE, PIECE, 72_000]
    assert len(frames[0]) < 500
    received = decode([memoryview(bytes(frame)) for frame in frames], skip=4)
    assert received["a"] == big
    assert received["c"] == [other]


def test_large_bytes_and_arrays_in_memory_that_is_the_receivers() -> None:
    array = np.arange(9000)
    obj = [b"x" * PIECE, array, bytearray(b"y" * PIECE), array + 1]
    frames = [bytearray(frame) for frame in encode(obj)]
    received = decode([memoryview(frame) for frame in frames], owned=True)
    assert received[0] == obj[0]
    assert received[2] == obj[2]
    for got, sent, frame in ((received[1], array, frames[3]), (received[3], array + 1, frames[4])):
        np.testing.assert_array_equal(got, sent)
        assert np.shares_memory(got, np.frombuffer(frame, np.uint8))


class Resizes:
    def __init__(self, data: bytearray) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        self.data += b"more"
        return list, ()


def test_large_strings_stay_in_the_first_frame() -> None:
    """They are read through a copy anyway; and who looks at frames[0] alone finds error texts whole."""
    assert len(encode(["x" * PIECE, "y", "z" * 5 * PIECE])) == 1
    assert len(encode([b"\x8e\0\0", "x" * PIECE])) == 1, "where the opcode of bytes of over 4 GiB would be"


@pytest.mark.parametrize("size", [70_000, PIECE])
def test_a_bytearray_resized_while_it_is_pickled_is_an_error_not_a_broken_message(size: int) -> None:
    data = bytearray(size)
    with pytest.raises(RuntimeError, match="changed its size"):
        encode([data, Resizes(data)])
    assert copied([data]) == [data]


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda b: memoryview(bytearray(b))])
@pytest.mark.parametrize("skip", [0, 16])
def test_frames_of_any_sort_of_memory(make: Callable[[bytes], Any], skip: int) -> None:
    for obj in ([1, "x"], [np.arange(9000), 2], [b"z" * PIECE], b"y" * 70_000):
        frames = [make(bytes(frame)) for frame in encode(obj, prefix=bytes(skip))]
        received = decode(frames, skip)
        assert str(received) == str(obj)


# ---- buffers ---------------------------------------------------------------------------------------------------------


def test_large_buffers_travel_out_of_band_and_small_ones_do_not() -> None:
    assert len(encode(np.zeros(OUT_OF_BAND_BYTES, np.uint8))) == 2
    assert len(encode(np.zeros(OUT_OF_BAND_BYTES - 1, np.uint8))) == 1
    assert len(encode([np.zeros(9000)] * 3)) == 2, "one array three times is one buffer"


def test_identity_inside_an_object_is_kept() -> None:
    shared = np.arange(2000)
    a, b = copied((shared, [shared]))
    assert a is b[0]


def run_python(code: str) -> str:
    """What a new process prints, whose `__main__` is the code itself."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WATCHDOG)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_nothing_of_the_first_try_is_left_when_something_goes_by_value() -> None:
    frames = encode([np.arange(9000), bytes(100_000), lambda: 1])
    assert len(frames) == 2
    assert len(frames[0]) < 102_000
    array, data, function = decode(frames)
    np.testing.assert_array_equal(array, np.arange(9000))
    assert (data, function()) == (bytes(100_000), 1)


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


@pytest.mark.parametrize("hide", [lambda x: x, lambda x: [1, {"k": x}], Plain, lambda x: np.array([x, None])])
def test_the_error_names_the_type_that_cannot_be_pickled(hide: Callable[[Any], Any]) -> None:
    for obj, name in ((threading.Lock(), "_thread.lock"), ((x for x in ()), "generator")):
        with pytest.raises(TypeError, match=re.escape(name)) as caught:
            encode(hide(obj))
        assert caught.value.__context__ is None, "nothing of how it was tried"


def test_nothing_of_a_message_is_kept_alive_by_the_encoder() -> None:
    for fails in (False, True):
        array, plain = np.arange(9000), Plain(1)
        watch = [weakref.ref(array), weakref.ref(plain)]
        obj: Any = [array, plain, functools.partial(print, array)]
        if fails:
            with pytest.raises(TypeError):
                encode([*obj, threading.Lock()])
        else:
            encode(obj)
        obj = array = plain = None  # type: ignore[assignment]
        gc.collect()  # the exception's traceback
        assert [w() for w in watch] == [None, None]


def test_a_message_after_a_failed_one_is_what_a_new_encoder_makes() -> None:
    obj = [1, "x", Plain(2), b"y" * 70_000, np.arange(5)]
    expected = [bytes(frame) for frame in codec.Encoder().encode(obj)]
    own = codec.Encoder()
    for _ in range(3):
        with pytest.raises(TypeError):
            own.encode([np.arange(9000), "a", threading.Lock()])
        assert [bytes(frame) for frame in own.encode(obj)] == expected


class Meta(type):
    """Its classes cannot be hashed."""

    def __eq__(cls, other: object) -> bool:
        return cls is other


class OfMeta(metaclass=Meta):
    pass


def test_classes_that_cannot_be_hashed() -> None:
    assert copied(OfMeta) is OfMeta


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


@pytest.mark.slow
def test_buffers_of_more_than_4_gib() -> None:
    """Peak: the array and the copy that is the receiver's."""
    size = (4 << 30) + 4097
    if psutil.virtual_memory().available < 2.5 * size:
        pytest.skip(f"needs {2.5 * size / 2**30:.0f} GiB of free memory")
    sent = np.zeros(size, np.uint8)
    marks = [0, 1, (1 << 31) + 1, (4 << 30) - 1, 4 << 30, size - 1]
    sent[marks] = range(1, len(marks) + 1)
    frames = encode({"array": sent}, prefix=b"head")
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [size]
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), sent)
    owned = decode(frames, 4, owned=True)["array"]
    assert np.shares_memory(owned, sent)
    del owned
    received = decode(frames, 4)["array"]
    assert received.shape == (size,)
    assert received[marks].tolist() == list(range(1, len(marks) + 1))
    assert np.count_nonzero(received) == len(marks)


@pytest.mark.slow
def test_bytes_of_more_than_4_gib() -> None:
    size = (4 << 30) + 4097
    if psutil.virtual_memory().available < 2.5 * size:
        pytest.skip(f"needs {2.5 * size / 2**30:.0f} GiB of free memory")
    frames = encode([bytes(size), 1])
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [size]
    received = decode(frames)
    assert (len(received[0]), received[1]) == (size, 1)
    assert not any(received[0][:: 1 << 20])
