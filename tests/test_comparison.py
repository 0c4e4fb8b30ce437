"""reduce="equal": what counts as equal, and how a difference is shown. Plain values, no Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import ray_shm
from ray_shm.actors.comparison import difference, require_equal


@dataclass
class Layer:
    blocks: int
    dtype: str = "float32"


NAN = float("nan")

SAME = [
    (1, 1),
    (1, 1.0),
    (None, None),
    ({"a": torch.ones(2)}, {"a": torch.ones(2)}),
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])),
    (torch.zeros(0), torch.zeros(0)),
    (np.array(["a", "b"]), np.array(["a", "b"])),
    ([Layer(1), (2, {})], [Layer(1), (2, {})]),
]

DIFFERENT = [
    (1, 2, ("", 1, 2)),
    (1, "1", ("", 1, "1")),
    (torch.ones(1), 1.0, None),
    ({"a": [1, 2]}, {"a": [1, 3]}, ("['a'][1]", 2, 3)),
    (Layer(1), Layer(1, "int8"), (".dtype", "float32", "int8")),
    (torch.zeros(2), torch.zeros(3), (".shape", torch.Size([2]), torch.Size([3]))),
    (torch.zeros(2), torch.zeros(2, dtype=torch.int8), (".dtype", torch.float32, torch.int8)),
    (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [0, 4]]), ("[1, 0] of shape (2, 2)", 3, 0)),
    (np.array([1.0, NAN]), np.array([1.0, 2.0]), None),
    ({"a": np.array(5)}, {"a": np.array(6)}, ("['a']", 5, 6)),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_equal_by_value(a: object, b: object) -> None:
    assert difference(a, b) is None


@pytest.mark.parametrize(("a", "b", "expected"), DIFFERENT)
def test_the_first_difference_is_found(a: object, b: object, expected: object) -> None:
    found = difference(a, b)
    assert found is not None
    assert expected is None or found == expected


def test_a_missing_place_is_shown_as_nothing() -> None:
    for a, b, text in (
        ({"a": 1}, {"b": 1}, "rank 1 has nothing, rank 0 has 1 at ['a']"),
        ([1], [1, 2], "rank 1 has 2, rank 0 has nothing at [1]"),
    ):
        with pytest.raises(ray_shm.MismatchError) as info:
            require_equal([a, b], [0, 1])
        assert text in str(info.value)


def test_each_differing_rank_is_shown_up_to_five() -> None:
    with pytest.raises(ray_shm.MismatchError) as info:
        require_equal([0, 1, 0, 1, 1, 1, 1, 1], list(range(8)))
    text = str(info.value)
    assert text.startswith("ranks [1, 3, 4, 5, 6, 7] differ from rank 0: rank 1 has 1, rank 0 has 0; ")
    assert text.endswith("; and 1 more ranks")
    assert info.value.results == dict(enumerate([0, 1, 0, 1, 1, 1, 1, 1]))


def test_long_values_are_cut() -> None:
    with pytest.raises(ray_shm.MismatchError) as info:
        require_equal(["x" * 10_000, "y" * 10_000], [0, 1])
    assert len(str(info.value)) < 400
