"""Ranks from places: pure, no Ray."""

from __future__ import annotations

import itertools

import pytest

from ray_shm.placement.topology import WorkerPlace, assign_ranks, sort_gpu_ids


def place(bundle: int, node: str, gpus: tuple[str, ...] = (), ip: str = "") -> WorkerPlace:
    return WorkerPlace(bundle, node, ip or f"10.0.0.{node}", 1000 + bundle, gpus, ",".join(gpus) or None)


def bundles(places: list[WorkerPlace], driver: str) -> list[int]:
    return [r.place.bundle_index for r in assign_ranks(places, driver)]


def test_ranks_are_by_node_then_gpu_whatever_the_bundle_order() -> None:
    places = [place(0, "2", ("1",)), place(1, "1", ("3",)), place(2, "2", ("0",)), place(3, "1", ("2",))]
    ranks = assign_ranks(places, driver_node_id="1")
    assert [(r.rank, r.node_rank, r.local_rank) for r in ranks] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    assert [r.place.bundle_index for r in ranks] == [3, 1, 2, 0]


@pytest.mark.parametrize("driver", ["1", "2", "9"])
def test_the_order_given_does_not_matter(driver: str) -> None:
    places = [place(0, "2", ("0",)), place(1, "1"), place(2, "2", ("1",)), place(3, "3")]
    first = assign_ranks(places, driver)
    for shuffled in itertools.permutations(places):
        assert assign_ranks(shuffled, driver) == first


def test_driver_node_comes_first_even_with_fewer_workers() -> None:
    assert bundles([place(0, "1"), place(1, "1"), place(2, "2")], driver="2") == [2, 0, 1]


def test_larger_nodes_come_before_smaller_ones() -> None:
    assert bundles([place(0, "1"), place(1, "2"), place(2, "2")], driver="elsewhere") == [1, 2, 0]


@pytest.mark.parametrize(
    ("low", "high"),
    [("10.0.0.9", "10.0.0.10"), ("fd00::9", "fd00::10"), ("10.0.0.9", "a-host-name"), ("fe80::1%eth0", "g")],
)
def test_equal_nodes_are_sorted_by_address_as_numbers(low: str, high: str) -> None:
    assert bundles([place(0, "a", ip=high), place(1, "b", ip=low)], driver="elsewhere") == [1, 0]


def test_two_nodes_of_one_address_are_still_two_nodes() -> None:
    ranks = assign_ranks([place(0, "b", ip="127.0.0.1"), place(1, "a", ip="127.0.0.1")], driver_node_id="elsewhere")
    assert [(r.place.node_id, r.node_rank, r.local_rank) for r in ranks] == [("a", 0, 0), ("b", 1, 0)]


def test_gpu_ids_are_numbers_where_they_can_be() -> None:
    assert sort_gpu_ids(["10", "GPU-b", "9", "GPU-a"]) == ("9", "10", "GPU-a", "GPU-b")
    places = [place(0, "1", ("10",)), place(1, "1", ("9",)), place(2, "1", ("GPU-5",))]
    assert bundles(places, driver="1") == [1, 0, 2]


def test_without_gpus_and_with_a_shared_gpu_the_bundle_decides() -> None:
    assert bundles([place(2, "1"), place(0, "1"), place(1, "1")], driver="1") == [0, 1, 2]
    assert bundles([place(1, "1", ("0",)), place(0, "1", ("0",))], driver="1") == [0, 1]


def test_no_workers_no_ranks() -> None:
    assert assign_ranks([], "1") == []
