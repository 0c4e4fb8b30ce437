"""Ports that a worker holds until whom they are for binds them."""

from __future__ import annotations

import socket

import pytest

from ray_shm.errors import PlacementError
from ray_shm.placement.ports import HeldPort

PLENTY = 60.0  # s; against hangs only


class TestHeldPort:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
    def test_is_held_until_closed(self, host: str) -> None:
        with HeldPort.bind(host) as held:
            assert held.host == host
            socket.create_connection((host, held.port), PLENTY).close()
            with pytest.raises(PlacementError):
                HeldPort.bind(host, (held.port, held.port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, held.port), PLENTY)
        held.close()

    def test_take_passes_the_open_socket_on(self) -> None:
        with HeldPort.bind("127.0.0.1") as held:
            taken = held.take()
        with taken, pytest.raises(RuntimeError):
            held.take()
        with HeldPort.bind("127.0.0.1") as held, held.take() as taken:
            assert taken.getsockname() == ("127.0.0.1", held.port)
            socket.create_connection(taken.getsockname(), PLENTY).close()
            taken.accept()[0].close()

    def test_range_skips_what_is_in_use(self) -> None:
        with HeldPort.bind("127.0.0.1") as first:
            last = min(first.port + 50, 65535)
            with HeldPort.bind("127.0.0.1", (first.port, last)) as second:
                assert first.port < second.port <= last

    @pytest.mark.parametrize("bad", [(0, 10), (20, 10), (65000, 65536)])
    def test_a_wrong_range_is_refused(self, bad: tuple[int, int]) -> None:
        with pytest.raises(ValueError):
            HeldPort.bind("127.0.0.1", bad)

    def test_an_address_of_another_machine(self) -> None:
        with pytest.raises(PlacementError, match="address of this node"):
            HeldPort.bind("203.0.113.1")

    def test_dropped_it_is_closed_and_warned_about(self) -> None:
        held = [HeldPort.bind("127.0.0.1")]
        port = held[0].port
        with pytest.warns(ResourceWarning, match=f"port {port}"):
            held.clear()
        HeldPort.bind("127.0.0.1", (port, port)).close()
