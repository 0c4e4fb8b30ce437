"""The store on which the members of one coordinator group meet: one that it is given, or its own on an explicit port.

Runs in every worker. Imports no torch by itself.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from ray_shm.errors import StartError
from ray_shm.membership import Membership
from ray_shm.port_holder import port_holder
from ray_shm.store import GroupStore


def prefixed(store: Any, name: str) -> Any:
    """A torch store whose keys all start with `name`."""
    if isinstance(store, GroupStore):
        return store.prefix(name)
    from torch.distributed import PrefixStore

    return PrefixStore(name, store)


def bound(host: str, port: int, label: str) -> socket.socket:
    """The listening socket of a store. Raises StartError, which names the holder of a port that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as exc:
        holder = port_holder(port) if exc.errno == errno.EADDRINUSE else ""
        raise StartError(
            f"{label}: its first rank could not bind {host}:{port} for the store: "
            f"{os.strerror(exc.errno or 0)}{holder}. "
            "Pass a free port of this node in group_ports, one outside of net.ipv4.ip_local_port_range (in it, anybody "
            "who binds to 0 may get it first), or a coord_store whose port was bound to 0 and held"
        ) from exc


def store_port(members: Membership, group_ports: list[list[int]] | None, coord_store: Any) -> int | None:
    """The port on which this group serves its own store; None if it is given one, or needs none."""
    if coord_store is not None or (group_ports is None and members.world_size == 1):
        if group_ports is not None:
            raise ValueError("coord_store and group_ports are alternatives; pass one of them")
        return None
    if group_ports is None:
        raise ValueError(
            f"a group of {members.world_size} ranks has to meet somewhere: pass coord_store, or group_ports "
            "with a port for each list of group_ranks"
        )
    ports = group_ports[members.index] if members.index < len(group_ports) else []
    if not ports or not 0 < ports[-1] < 65536:
        raise ValueError(
            f"group_ports {group_ports}: list {members.index} has to end with the port of the store of ranks "
            f"{list(members.ranks)}, 1 to 65535"
        )
    return ports[-1]
