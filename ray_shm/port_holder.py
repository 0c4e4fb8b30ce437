"""Which process holds a TCP port of this machine, for the error of whoever finds it taken. Runs in any process.

The kernel lists listening sockets with their inodes, and every process its descriptors; those of other users, and of
other containers, only root may read, or nobody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_SHOWN = 120  # characters of a command line


def port_holder(port: int) -> str:
    """As in ``", held by pid 81 (python train.py)"``; says so where that cannot be seen; "" where nobody listens."""
    inodes = set(_listeners(port))
    if not inodes:
        return ""  # a socket that is bound and does not listen, or a connection that is ending
    found = dict.fromkeys(pid for pid, inode in _sockets() if inode in inodes)
    if not found:
        return ", held by a process of another user or container"
    return ", held by " + ", ".join(f"pid {pid} ({_command(pid)})" for pid in found)


def _listeners(port: int) -> Iterator[str]:
    """Inodes of the sockets that listen on this port, at whatever address of this network namespace."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _sockets() -> Iterator[tuple[int, str]]:
    """(pid, inode) of all sockets whose processes may be looked into."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    kind, _, inode = os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")
                    if kind == "socket":
                        yield int(pid), inode.strip("[]")


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return " ".join(word.decode(errors="replace") for word in words).strip()[:_SHOWN] or "?"
    return "ended just now"
