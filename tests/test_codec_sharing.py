"""Torch tensors that share memory: with each other after arrival as before, and with the frames they arrived in."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from codec_receiver import Leased, check_same, copied, sent_bytes, shares

WATCHDOG = 60.0  # seconds; only a hang comes near
MATRIX = torch.arange(6000.0).reshape(60, 100)

QKV = torch.arange(12_000.0).reshape(40, 300)
FLAT = torch.arange(5000)
TOGETHER: dict[str, list[Any]] = {
    "whole, then views": [FLAT, FLAT[100:200], FLAT[::7], FLAT.view(50, 100).t()],
    "views, then whole": [FLAT[100:200], FLAT[::7], FLAT],
    "overlapping slices": [FLAT[:3000], FLAT[2000:]],
    "three that meet in the last": [FLAT[:2000], FLAT[2500:4000], FLAT[1900:2600]],
    "columns of one matrix": list(QKV.chunk(3, dim=1)),
    "another dtype": [FLAT, FLAT.view(torch.int32)[3:], FLAT.view(torch.uint8)[16:-8]],
    "another dtype, first": [FLAT.view(torch.uint8)[3:1000], FLAT[1:900]],
    "another dtype, askew": [FLAT.view(torch.uint8)[3:4000], FLAT[1:100]],
    "small": [FLAT[:5], FLAT[2:9], FLAT[:2]],
    "conjugate": [(c := torch.arange(3000) * (1 + 2j)), c.conj(), c.imag, c.conj().imag],
    "parameter": [(p := torch.nn.Parameter(torch.arange(2000.0))), p.detach(), p.detach()[5:]],
    "tied parameters": [(w := torch.nn.Parameter(torch.arange(2000.0))), torch.nn.Parameter(w.detach())],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_shares_memory_shares_it_after_arrival(name: str) -> None:
    sent = TOGETHER[name]
    received = copied(sent)
    for got, original in zip(received, sent, strict=True):
        check_same(got, original)
        assert got.stride() == original.stride()
        assert shares(got, received[0])
        assert got.data_ptr() - received[0].data_ptr() == original.data_ptr() - sent[0].data_ptr()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in sent}
    assert sent_bytes(sent) < sum(storages.values()) + 1500, "once"


def test_a_write_through_one_is_seen_through_the_other() -> None:
    part, whole = copied([FLAT[100:200], FLAT])
    whole[150] = -1
    assert part[50] == -1
    assert FLAT[150] == 150


def test_slices_that_do_not_overlap_stay_apart() -> None:
    storage = torch.arange(10_000_000)
    sent = [storage[:1000], storage[-1000:]]
    a, b = copied(sent)
    assert torch.equal(a, sent[0])
    assert torch.equal(b, sent[1])
    assert not shares(a, b)
    assert sent_bytes(sent) < 2 * 8000 + 400


def test_overlapping_columns_of_a_wide_matrix_do_not_take_it_along() -> None:
    matrix = torch.arange(1_000_000.0).reshape(1000, 1000)
    sent = [matrix[:, :20], matrix[:, 10:30]]
    received = copied(sent)
    assert all(torch.equal(a, b) for a, b in zip(received, sent, strict=True))
    assert sent_bytes(sent) < 2 * sent[0].nbytes + 400


def test_two_storages_over_the_same_memory_arrive_with_their_values() -> None:
    memory = np.arange(9000)
    sent = [torch.from_numpy(memory[:5000]), torch.from_numpy(memory[4000:])]
    received = copied(sent)
    for got, original in zip(received, sent, strict=True):
        check_same(got, original)


def test_a_thousand_columns() -> None:
    matrix = torch.arange(40_000).reshape(20, 2000)
    received = copied(matrix.unbind(1))
    assert torch.equal(torch.stack(received, 1), matrix)
    assert all(shares(column, received[0]) for column in received)


def test_many_views_of_one_storage_beside_others() -> None:
    numbers = np.random.default_rng(3)
    storage = torch.arange(20_000)
    sent = []
    for _ in range(300):
        start, length, step = numbers.integers(0, 15_000), numbers.integers(0, 4000), numbers.integers(1, 5)
        sent.append(storage[start : start + length : step])
        sent.append(torch.full((3,), int(start)))
    received = copied(sent)
    for got, original in zip(received, sent, strict=True):
        check_same(got, original)


def test_a_message_does_not_remember_the_one_before() -> None:
    """Addresses come again with other contents: nothing of an earlier message may be referred to."""
    for value in range(50):
        tensor = torch.full((2000,), value)
        assert torch.equal(copied([tensor, tensor[5:]])[1], tensor[5:])
        del tensor


class MakesViews:
    """Its pickled form holds tensors that exist during pickling only."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return list, ([self.tensor[10:], self.tensor[5:] + 0, self.tensor[:20]],)


def test_tensors_that_live_during_pickling_only() -> None:
    base = torch.arange(4000)
    for _ in range(20):
        views, whole, more = copied([MakesViews(base), base, MakesViews(base + 1)])
        for offset, got in ((0, views), (1, more)):
            assert torch.equal(got[0], base[10:] + offset)
            assert torch.equal(got[1], base[5:] + offset)
            assert torch.equal(got[2], base[:20] + offset)
        assert torch.equal(whole, base)


class Fickle:
    """Pickles otherwise each time, and a message of overlapping tensors is pickled twice."""

    def __init__(self) -> None:
        self.times = 0

    def __reduce__(self) -> Any:
        self.times += 1
        return list, ([FLAT[2400:3000], FLAT[2600:2900], FLAT[:10]] if self.times > 1 else [],)


def test_what_pickles_otherwise_the_second_time_arrives_with_its_values() -> None:
    fickle = Fickle()
    a, b, others = copied([FLAT[:2000], FLAT[1000:2500], fickle])
    assert fickle.times == 2
    for got, sent in zip([a, b, *others], [FLAT[:2000], FLAT[1000:2500], *fickle.__reduce__()[1][0]], strict=True):
        check_same(got, sent)


def test_the_same_tensor_twice_is_one_object() -> None:
    a, b = copied([MATRIX, {"again": MATRIX}])
    assert b["again"] is a


# ---- memory that is the receiver's already --------------------------------------------------------------------------


VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda t: t,
    "slice": lambda t: t[5:9],
    "transposed": lambda t: t.T,
    "view of a view": lambda t: t[3:][:, 1:][1:].view(torch.int32)[::2],
    "numpy": lambda t: t.detach().numpy(),
    "numpy view": lambda t: t.detach().numpy()[4:].T,
    "DLPack": lambda t: np.from_dlpack(t.detach()),
    "DLPack to torch": lambda t: torch.from_dlpack(t.detach().numpy()),
    "autograd": lambda t: (t.detach().requires_grad_() ** 2).sum(),  # the graph has saved it
    "detached": lambda t: t.detach(),
    "storage": lambda t: t.untyped_storage(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "shallow copy": lambda t: copy.copy(t.detach()),
    "memoryview": lambda t: memoryview(t.detach().numpy()),
    "cycle": lambda t: _cycle(t),
}


def _cycle(tensor: Any) -> Any:
    tensor.itself = tensor
    return tensor


@pytest.mark.parametrize("sort", ["plain", "transposed", "parameter", "shared"])
def test_owned_memory_is_used_as_it_is_and_kept_until_the_last_view_is_gone(sort: str) -> None:
    original = torch.arange(6000.0).reshape(60, 100)
    sent = {
        "plain": original,
        "transposed": original.t().contiguous().t(),
        "parameter": torch.nn.Parameter(original.clone()),
        "shared": [original[:30], original[10:]],
    }[sort]
    if sort == "shared":
        original = original[10:]
    for name, view_of in VIEWS.items():
        leased = Leased(sent)
        assert leased.alive == 1
        received = leased.decode()
        if sort == "shared":
            received = received[1]
        assert received.data_ptr() in leased.addresses[0], "not copied"
        assert torch.equal(received, original)
        view = view_of(received)
        received = None
        assert leased.alive == 1, name
        del view
        if name == "cycle":
            gc.collect()
        assert leased.alive == 0, name


def test_owned_memory_may_be_let_go_by_another_thread() -> None:
    leased = Leased(MATRIX)
    kept = [leased.decode()]
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join(WATCHDOG)
    assert leased.alive == 0


def test_a_receiver_may_write_to_owned_memory() -> None:
    received = Leased([MATRIX, FLAT[:1000], FLAT]).decode()
    for tensor in received:
        tensor.fill_(7)
    assert MATRIX[0, 1] == 1
    assert FLAT[1] == 1
