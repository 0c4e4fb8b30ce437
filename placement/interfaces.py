"""Which network interface has an address of this node, for libraries that want its name. Runs in workers."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import socket
from collections.abc import Iterator

NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"
_ADDRESS_BYTES = {socket.AF_INET: (4, 8), socket.AF_INET6: (8, 24)}  # where it lies in struct sockaddr_in and _in6


class _Entry(ctypes.Structure):
    """struct ifaddrs, as far as it is read."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interface_of(ip: str) -> str | None:
    """Name of the interface that has this very address, IPv4 or IPv6; None: none has."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        wanted = socket.inet_pton(family, ip.partition("%")[0])
    except OSError:  # a host name, say
        return None
    return next((name for name, kind, address in _addresses() if (kind, address) == (family, wanted)), None)


def name_nccl_interface(ip: str) -> None:
    """Have NCCL use the interface with this address, unless the user has said which; before NCCL is first used.

    Else NCCL takes the first one it finds, which is often one that other nodes do not reach.
    """
    name = interface_of(ip)
    if name is not None:
        os.environ.setdefault(NCCL_VARIABLE, f"={name}")  # "=": this name, not those that begin with it


def _addresses() -> Iterator[tuple[str, int, bytes]]:
    """(interface, family, address) of all; see getifaddrs(3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Entry)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    try:
        entry = first
        while entry:
            found = entry.contents
            if found.address:
                family = ctypes.c_ushort.from_address(found.address).value
                if family in _ADDRESS_BYTES:
                    start, end = _ADDRESS_BYTES[socket.AddressFamily(family)]
                    yield found.name.decode(), family, ctypes.string_at(found.address + start, end - start)
            entry = found.next
    finally:
        libc.freeifaddrs(first)
