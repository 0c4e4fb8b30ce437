"""From one member of a group to another: tensors, objects, and dictionaries of both. Runs in every worker.

Between two members, messages of one kind (tensors, objects, dictionaries) arrive in the order in which they were sent,
whatever other members send meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray_shm.connection import TENSOR_TAG
from ray_shm.deadline import Deadline
from ray_shm.membership import Member
from ray_shm.tensor_arguments import flat
from ray_shm.transfer import Transfer

if TYPE_CHECKING:
    import torch


class PointToPoint(Member):
    """The part of StatelessGroupCoordinator in which two members take part.

    `dst` is by default the next member, `src` the previous one; both are ranks in the group. Every method takes
    `timeout`: seconds that this operation may take, instead of the group's.
    """

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
        """Sends to the member `dst` and returns when it has received (nccl: when enqueued).

        Args:
            tensor: any strided one. Nccl takes it from the GPU, so a tensor on the CPU is copied there first.

        Raises:
            ValueError: `dst` is outside the group or this rank itself.
            PeerLostError: `dst` is gone or late. The group is gone.
        """
        peer = self._next(dst)
        content = flat("send", tensor)
        if self._link.connect("send").nccl is not None:
            if content.numel():
                self._link.run("send", "send", content.to(self._link.device()), peer, TENSOR_TAG, timeout=timeout)
            return
        import torch

        header = torch.tensor([content.nbytes, _code(tensor.dtype), tensor.is_cuda], dtype=torch.int64, device="cpu")
        messages = [header, content.cpu()] if content.numel() else [header]
        self._link.run("send", "send_all", messages, peer, TENSOR_TAG, timeout=timeout)

    def recv(
        self, size: torch.Size, dtype: torch.dtype, src: int | None = None, *, timeout: float | None = None
    ) -> torch.Tensor:
        """The next tensor that the member `src` sends to this rank.

        Args:
            size: shape, and dtype: as sent. The result is on `device` with nccl; else on the CPU, unless it was sent
                from a GPU and this process has one, too.

        Raises:
            ValueError: `src` is outside the group or this rank itself; or (not with nccl) it sent another number of
                bytes or another dtype, and that tensor is dropped. The group stays usable.
            PeerLostError: `src` is gone or late. The group is gone.
        """
        peer = self._previous(src)
        import torch

        if self._link.connect("recv").nccl is not None:
            tensor = torch.empty(size, dtype=dtype, device=self._link.device())
            if tensor.numel():
                self._link.run("recv", "recv", tensor.view(-1), peer, TENSOR_TAG, timeout=timeout)
            return tensor
        deadline = Deadline.after(timeout)
        header = torch.zeros(3, dtype=torch.int64, device="cpu")
        self._link.run("recv", "recv", header, peer, TENSOR_TAG, timeout=timeout)
        nbytes, code, from_gpu = header.tolist()
        tensor = torch.empty(size, dtype=dtype, device="cpu")
        fits = (nbytes, code) == (tensor.nbytes, _code(dtype))
        place = tensor.view(-1) if fits else torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes:
            self._link.run("recv", "recv", place, peer, TENSOR_TAG, timeout=left(deadline))
        if not fits:
            other = "" if code == _code(dtype) else " of another dtype"
            raise ValueError(
                f"recv: rank {self.ranks[peer]} sent {nbytes} bytes{other}, which is not size={tuple(tensor.shape)}, "
                f"dtype={dtype} ({tensor.nbytes} bytes). They are dropped; give size and dtype as sent"
            )
        if not from_gpu or not torch.cuda.is_available():
            return tensor
        own = self._link.device()
        return tensor.to("cuda" if own.type == "cpu" else own)  # asked to run on gloo, it has none of its own

    def send_tensor_dict(
        self,
        tensor_dict: dict[str, Any],
        dst: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, Any] | None:
        """Sends tensors and other values to the member `dst`, and returns None when it has received them.

        Args:
            tensor_dict: values of any picklable type; nested dicts may hold tensors, too. Tensors that lie in other
                containers are pickled with them. Order and keys stay as they are.
            all_gather_group: a coordinator in which all members hold the same tensors, and each sends them to another
                member of the receivers' group: then each sends only its part of a tensor whose number of elements
                can be divided by the group's size, and the receivers gather the parts.
            all_gather_tensors: overrides that by key, as ``{"residual": False}``: False for tensors that are not the
                same in the group. A key of a nested dict may have a bool, for all in it, or such a mapping.

        Returns:
            In a group of one, `tensor_dict`; nothing is sent.

        Raises:
            ValueError: `dst` is outside the group or this rank itself; or `all_gather_tensors` has True for a tensor
                that cannot be divided. There, and for what cannot be pickled, the receiver raises RemoteError, and the
                group stays usable.
            PeerLostError: `dst` is gone or late. The group is gone.
        """
        if self.world_size == 1:
            return tensor_dict
        deadline = Deadline.after(timeout)
        for handle in self.isend_tensor_dict(tensor_dict, dst, all_gather_group, all_gather_tensors, timeout=timeout):
            handle.wait(left(deadline))
        return None

    def isend_tensor_dict(
        self,
        tensor_dict: dict[str, Any],
        dst: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Transfer]:
        """As `send_tensor_dict`, but waits for nobody.

        Returns:
            Handles, to be waited for before the tensors are written to. None in a group of one.
        """
        if self.world_size == 1:
            return []
        peer = self._next(dst)
        from ray_shm import tensor_dict as messages

        return messages.isend(self._link, tensor_dict, peer, all_gather_group, all_gather_tensors, timeout)

    def recv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, Any] | None:
        """The next dictionary that the member `src` sends to this rank; None in a group of one.

        Args:
            all_gather_group: the receivers' group, of the size of the senders' and with this rank at the sender's
                place in it; needed where `src` sends parts of tensors.
            all_gather_tensors: taken for compatibility: what the sender chose counts.

        Raises:
            ValueError: `src` is outside the group or this rank itself; `src` sent parts, and `all_gather_group` is not
                of that size; or it sent from a GPU, and this process has none. The dictionary is dropped, the group
                stays usable.
            RemoteError: `src` could not send its dictionary. The group stays usable, as when unpickling raises.
            PeerLostError: `src` is gone or late. The group is gone.
        """
        deadline = Deadline.after(timeout)
        received, handles, postprocess = self.irecv_tensor_dict(
            src, all_gather_group, all_gather_tensors, timeout=timeout
        )
        for handle in handles:
            handle.wait(left(deadline))
        for complete in postprocess:
            complete()
        return received

    def irecv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any] | None, list[Transfer], list[Callable[[], None]]]:
        """As `recv_tensor_dict`, but waits only until it is known what `src` sends.

        Returns:
            The dictionary, handles, and functions. Its tensors hold their values once every handle was waited for and
            then every function called; the functions gather parts, so every member of `all_gather_group` calls them.
            (None, [], []) in a group of one.
        """
        if self.world_size == 1:
            return None, [], []
        peer = self._previous(src)
        from ray_shm import tensor_dict as messages

        return messages.irecv(self._link, peer, all_gather_group, timeout)

    def _next(self, dst: int | None) -> int:
        return self._members.peer((self.rank_in_group + 1) % self.world_size if dst is None else dst, "dst")

    def _previous(self, src: int | None) -> int:
        return self._members.peer((self.rank_in_group - 1) % self.world_size if src is None else src, "src")


def left(deadline: Deadline) -> float | None:
    """Seconds for the next step of an operation; a moment where none are left, so that it says what is late."""
    remaining = deadline.remaining()
    return None if remaining is None else max(remaining, 0.001)


def _code(dtype: torch.dtype) -> int:
    return zlib.crc32(str(dtype).encode())
