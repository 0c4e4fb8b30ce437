"""Where groups listen: ports, their range, interfaces; and many groups that are launched at once."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import pytest
from faulty_worker import HANG, Background, pids
from group_members import Member, rpc, totals
from netns import lay_cable
from reader_pool import Me

import ray_shm
from ray_shm import StartError
from ray_shm.placement.interfaces import NCCL_VARIABLE, interface_of

START = 300.0  # seconds for 32 processes on a small machine


# ---- ports and interfaces -------------------------------------------------------------------------------------------


def free_range(count: int) -> tuple[int, int]:
    """That many ports in a row below the kernel's own, that nobody listens on."""
    taken = {c.laddr.port for c in psutil.net_connections(kind="tcp")}
    first = next(p for p in range(20_000, 30_000) if not taken & set(range(p, p + count)))
    return first, first + count - 1


def held_in(ports: tuple[int, int], pid: int) -> int:
    """How many of these ports this process listens on."""
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return sum(c.status == psutil.CONN_LISTEN and ports[0] <= c.laddr.port <= ports[1] for c in connections)


@pytest.mark.slow
def test_what_listens_to_other_nodes_keeps_to_the_range_of_ports(ray_local: None) -> None:
    ports = free_range(5)
    with ray_shm.launch(Member, num_workers=2, gpus_per_worker=1, transport="zmq", port_range=ports) as far:
        # Driver: requests and orders; rank 0: its replies and the store; rank 1: its replies.
        assert [held_in(ports, pid) for pid in (os.getpid(), *pids(far))] == [2, 2, 1]
        node_ip = far.workers[0].node_ip
        assert rpc(far, "variable", NCCL_VARIABLE) == [f"={interface_of(node_ip)}"] * 2
        taken = rf"rank 0 \(pid .*binding a port.*ports {ports[0]}\.\.{ports[1]} of {node_ip}: all are in use"
        with pytest.raises(StartError, match=taken):
            ray_shm.launch(Member, num_workers=1, port_range=ports)
    for wrong in ((5, 4), (0, 10), (1, 70_000), (1,), 20_000):
        with pytest.raises(ValueError, match="port_range"):
            ray_shm.launch(Member, num_workers=1, port_range=wrong)  # type: ignore[arg-type]


def test_interfaces_are_found_by_their_addresses() -> None:
    assert interface_of("127.0.0.1") == "lo"
    for none in ("127.0.0.2", "192.0.2.1", "2001:db8::1", "a-host", ""):
        assert interface_of(none) is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                found = interface_of(address.address)
                assert found == name or address.address in {a.address for a in psutil.net_if_addrs()[found or ""]}


def check_interface(me: Me, ip: str) -> str | None:
    return interface_of(ip)


@pytest.mark.slow
def test_the_interface_of_a_host_is_the_one_that_others_reach(ray_local: None) -> None:
    for one, other in lay_cable():
        for host in (one, other):
            assert [host.run(check_interface, ip) for ip in (host.ip, host.ip6, "127.0.0.1")] == [
                "cable",
                "cable",
                "lo",
            ]
        assert one.run(check_interface, other.ip) is None


# ---- many at once ---------------------------------------------------------------------------------------------------


def launch_at_once(groups: int, size: int, torch_in: int) -> None:
    """`groups` groups of `size` with declared groups and stores of their own, from as many threads.

    In `torch_in` of them the ranks meet; the others hold their ports, and import no torch.
    """
    every = list(range(size))

    def one(i: int) -> list[Any]:
        declared = {"tp": [every], "pp": [every[::-1]]} if i < torch_in else None
        with ray_shm.launch(
            Member, num_workers=size, gpus_per_worker=0.1, groups=declared, start_timeout=START
        ) as group:
            if i < torch_in:
                group.create_groups({"more": [every]}, timeout=HANG)
                assert totals(group, "more", every) == [int("1" * size)] * size
            store = group._runtime.store
            return [store, rpc(group, "rank")]

    threads = [Background(lambda i=i: one(i)) for i in range(groups)]
    outcomes = [thread.result(START) for thread in threads]
    assert [outcome[1] if isinstance(outcome, list) else outcome for outcome in outcomes] == [every] * groups


@pytest.mark.slow
def test_groups_are_launched_at_once(ray_local: None) -> None:
    launch_at_once(groups=4, size=2, torch_in=1)


@pytest.mark.slow
@pytest.mark.timeout(2 * START)
@pytest.mark.parametrize("turn", range(20))
def test_eight_groups_of_four_are_launched_at_once(ray_local: None, turn: int) -> None:
    launch_at_once(groups=8, size=4, torch_in=2)
