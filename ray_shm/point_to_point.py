"""From one member of a group to another: tensors, objects, and dictionaries of both. Runs in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_shm.connection import TENSOR_TAG
from ray_shm.membership import Member
from ray_shm.tensor_collectives import flat

if TYPE_CHECKING:
    import torch


class PointToPoint(Member):
    """The part of StatelessGroupCoordinator in which two members take part."""

    def send_object(self, obj: Any, dst: int, *, timeout: float | None = None) -> None:
        """Sends to the member `dst` and returns when it has received; two members must not both send first.

        Raises:
            ValueError: `dst` is outside the group or this rank itself.
            PeerLostError: `dst` is gone or late. The group is gone.
        """
        self._members.peer(dst, "dst")
        from ray_shm import object_exchange

        object_exchange.send(self._link, obj, dst, timeout)

    def recv_object(self, src: int, *, timeout: float | None = None) -> Any:
        """The next object that the member `src` sends to this rank.

        Raises:
            ValueError: `src` is outside the group or this rank itself.
            RemoteError: `src` could not pickle its object. The group stays usable.
            PeerLostError: `src` is gone or late. The group is gone.
        """
        self._members.peer(src, "src")
        from ray_shm import object_exchange

        return object_exchange.recv(self._link, src, timeout)

    def send(self, tensor: torch.Tensor, dst: int | None = None, *, timeout: float | None = None) -> None:
        """Sends to the member `dst`, by default the next, and returns when it has received (nccl: when enqueued).

        Raises:
            ValueError: `dst` is outside the group or this rank itself.
            PeerLostError: `dst` is gone or late. The group is gone.
        """
        peer = self._members.peer((self.rank_in_group + 1) % self.world_size if dst is None else dst, "dst")
        if tensor.numel():
            self._link.run("send", "send", flat(tensor), peer, TENSOR_TAG, timeout=timeout)

    def recv(
        self, size: torch.Size, dtype: torch.dtype, src: int | None = None, *, timeout: float | None = None
    ) -> torch.Tensor:
        """The next tensor that the member `src`, by default the previous one, sends to this rank.

        Args:
            size: shape, and dtype: as sent. The result is on `device` with nccl, else on the CPU.

        Raises:
            ValueError: `src` is outside the group or this rank itself.
            PeerLostError: `src` is gone or late. The group is gone.
        """
        peer = self._members.peer((self.rank_in_group - 1) % self.world_size if src is None else src, "src")
        import torch

        on_gpu = self._link.connect("recv").nccl is not None
        tensor = torch.empty(size, dtype=dtype, device=self._link.device() if on_gpu else "cpu")
        if tensor.numel():
            self._link.run("recv", "recv", tensor.view(-1), peer, TENSOR_TAG, timeout=timeout)
        return tensor
