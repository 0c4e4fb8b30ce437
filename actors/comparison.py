"""``reduce="equal"``: did all ranks return the same, and if not, where do they differ? Runs in the driver's process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from ray_shm.errors import MismatchError

_SHOWN = 120  # characters of a value
_MOST = 5  # differing ranks shown
_ABSENT = object()

Difference = tuple[str, Any, Any]  # path, the first rank's value there, the other's


def require_equal(results: Sequence[Any], ranks: Sequence[int]) -> Any:
    """The first of the results.

    Raises:
        MismatchError: others differ from it; its text says in which place, for each of them.
    """
    first = results[0]
    found = {rank: d for rank, r in zip(ranks, results, strict=True) if (d := difference(first, r)) is not None}
    if not found:
        return first
    lines = [
        f"rank {rank} has {_show(there)}, rank {ranks[0]} has {_show(here)}{f' at {path}' if path else ''}"
        for rank, (path, here, there) in list(found.items())[:_MOST]
    ]
    more = f"; and {len(found) - _MOST} more ranks" if len(found) > _MOST else ""
    raise MismatchError(
        f"ranks {list(found)} differ from rank {ranks[0]}: {'; '.join(lines)}{more}",
        dict(zip(ranks, results, strict=True)),
    )


def difference(a: Any, b: Any, path: str = "") -> Difference | None:
    """The first place where two values differ; None if they are equal by value.

    Element-wise for torch tensors and NumPy arrays (with dtype and shape; NaN equals NaN), and inside of dicts, lists,
    tuples and dataclasses; all else by ``==``.
    """
    if type(a) is not type(b):
        same = not hasattr(a, "shape") and not hasattr(b, "shape") and bool(a == b)
        return None if same else (path, a, b)
    if isinstance(a, dict):
        return _first((f"{path}[{key!r}]", a.get(key, _ABSENT), b.get(key, _ABSENT)) for key in {**a, **b})
    if isinstance(a, list | tuple):
        pairs = enumerate(zip_longest(a, b, fillvalue=_ABSENT))
        return _first((f"{path}[{i}]", x, y) for i, (x, y) in pairs)
    if hasattr(a, "shape") and hasattr(a, "dtype"):
        return _array_difference(a, b, path)
    if dataclasses.is_dataclass(a) and not isinstance(a, type) and type(a).__eq__ is not object.__eq__:
        names = [field.name for field in dataclasses.fields(a) if field.compare]
        return _first((f"{path}.{name}", getattr(a, name), getattr(b, name)) for name in names)
    equal = a == b
    return None if (bool(equal.all()) if hasattr(equal, "all") else bool(equal)) else (path, a, b)


def _first(places: Any) -> Difference | None:
    for path, x, y in places:
        if x is _ABSENT or y is _ABSENT:
            return path, x, y
        found = difference(x, y, path)
        if found is not None:
            return found
    return None


def _array_difference(a: Any, b: Any, path: str) -> Difference | None:
    for name in ("dtype", "shape"):
        if getattr(a, name) != getattr(b, name):
            return f"{path}.{name}", getattr(a, name), getattr(b, name)
    if type(a).__module__.split(".")[0] == "torch":
        import torch

        if torch.equal(a, b):
            return None
    unequal = a != b
    unequal = unequal & ~((a != a) & (b != b))  # NaN is what differs from itself
    if not bool(unequal.any()):
        return None
    at = tuple(int(i) for i in _first_index(unequal))
    where = f"{path}[{', '.join(map(str, at))}] of shape {tuple(a.shape)}" if at else path
    return where, a[at].item() if hasattr(a[at], "item") else a[at], b[at].item() if hasattr(b[at], "item") else b[at]


def _first_index(mask: Any) -> Any:
    if hasattr(mask, "argwhere"):  # torch
        return mask.argwhere()[0]
    import numpy as np

    return np.argwhere(mask)[0]


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
