"""What isend and irecv leave to be waited for: messages between two members, after the call that began them.

Runs in every worker. Works of torch are held by the process groups they belong to, never by a handle alone: a handle
that outlives its group keeps no socket open, and one that nobody waits for lets its messages go on. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray_shm.errors import PeerLostError

if TYPE_CHECKING:
    import torch

    from ray_shm.connection import GroupConnection


class Transfer:
    """The handle of messages in one direction. Wait for every one: until then, what it sends stays in memory.

    Used by the thread that uses the group, as the group's operations are.
    """

    def __init__(
        self,
        link: GroupConnection,
        operation: str,
        contents: Sequence[torch.Tensor],
        arrived: Callable[[], object] | None = None,
    ) -> None:
        """Args: contents: flat, contiguous; one message each. arrived: called once, when all of them are there."""
        self.contents = list(contents)
        self.works: list[Any] = []  # torch's; the process groups fill it, and empty it when they end
        self._link, self._operation, self._arrived = link, operation, arrived
        self._formation = link.label
        self._done = False

    def send(self, dst: int, tag: int, timeout: float | None = None) -> Transfer:
        """Begins to send."""
        self._link.run(self._operation, "start_send", self, dst, tag, timeout=timeout)
        return self

    def recv(self, src: int, tag: int, timeout: float | None = None) -> Transfer:
        """Begins to receive into the contents."""
        self._link.run(self._operation, "start_recv", self, src, tag, timeout=timeout)
        return self

    def is_completed(self) -> bool:
        """Whether it was waited for. Gloo does not tell before."""
        return self._done

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the receiver has got it, or it is received; with nccl, once the current stream waits for it.

        What was sent may be written to from now on. Idempotent.

        Args:
            timeout: seconds. Default: the group's.

        Raises:
            PeerLostError: the peer is gone or late, or the group was released or formed again meanwhile; this group,
                if it was not formed again, is gone.
            GroupClosedError: the group was destroyed.
        """
        if self._done:
            return
        if self._link.label != self._formation:
            raise PeerLostError(
                f"{self._operation} in {self._formation} was not waited for before the group was formed again, as "
                f"{self._link.label}; what it was to move is lost"
            )
        self._link.run(self._operation, "finish", self, timeout=timeout)
        self._done = True
        if self._arrived is not None:
            self._arrived()
        self.contents, self._arrived = [], None
