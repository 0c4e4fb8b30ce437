"""Ports for those who need the number before anybody listens there."""

from __future__ import annotations

import functools
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str) -> int:
    """A port of `host` at which nobody listens, no two the same, and which the kernel gives to nobody unasked.

    One that it gave out itself (port 0) it may give to the next who binds to 0, before the test comes to use it.
    """
    for port in _ports():
        try:
            socket.create_server((host, port)).close()
        except OSError:
            continue
        return port
    raise RuntimeError(f"every port of {host} is taken or has been used, but for those that the kernel gives out")


@functools.cache
def _ports() -> Iterator[int]:
    low, high = map(int, _RANGE.read_text().split())
    ports = [port for port in range(20_000, 65_536) if not low <= port <= high]
    random.SystemRandom().shuffle(ports)
    return iter(ports)
