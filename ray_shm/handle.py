"""What travels to the readers of a queue: frozen, versioned values, safe to pickle. Built by the writer's process."""

from __future__ import annotations

from dataclasses import dataclass

from ray_shm.ring import Shape
from ray_shm.segment import SegmentRef

HANDLE_VERSION = 4


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """A ring: its segment and shape."""

    ref: SegmentRef
    shape: Shape


@dataclass(frozen=True, slots=True)
class ZmqAddress:
    """A bound ROUTER socket and what admits a reader to it. Whoever holds this may read: treat as a secret.

    Attributes:
        endpoint: ``tcp://host:port``. server_key: CURVE public key of the writer, never sent over the wire: without
            it there is no handshake. token: 16 random bytes that a reader's hello must carry.
    """

    endpoint: str
    server_key: bytes
    token: bytes

    def __repr__(self) -> str:
        return f"ZmqAddress({self.endpoint!r})"  # keys stay out of logs


@dataclass(frozen=True, slots=True)
class Handle:
    """Everything a reader needs to attach to a queue (``MessageQueue.create_from_handle``).

    Attributes:
        version: HANDLE_VERSION of the writer's package. n_reader: number of readers, local and remote.
        local_reader_ranks: ranks that read through shared memory. remote_reader_ranks: those that read through ZeroMQ.
        max_chunk_bytes: see MessageQueue. pid, node: the writer's process and host name, for messages.
    """

    version: int
    n_reader: int
    local_reader_ranks: tuple[int, ...]
    remote_reader_ranks: tuple[int, ...]
    max_chunk_bytes: int
    shm: ShmAddress | None
    zmq: ZmqAddress | None
    pid: int
    node: str

    def require_version(self) -> None:
        """Raises ValueError where the writer runs another version of the layout."""
        if self.version != HANDLE_VERSION:
            raise ValueError(
                f"queue handle version {self.version} from pid {self.pid} on {self.node}; this package reads "
                f"version {HANDLE_VERSION}. Install the same ray-shm on every node."
            )
