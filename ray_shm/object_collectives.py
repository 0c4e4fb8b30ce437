"""Collectives on objects: pickled, among the members only, never through the store. Runs in every worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_shm.membership import Member
from ray_shm.tensor_arguments import flat

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from ray_shm.handle import Handle
    from ray_shm.message_queue import MessageQueue

_CHUNK_BYTES, _CHUNKS = 1 << 22, 6  # of the queues that a user makes over a group, as vLLM's


class ObjectCollectives(Member):
    """The part of StatelessGroupCoordinator that gives one member's objects to all.

    With `use_message_queue_broadcaster` they go through queues, made by all members at the first broadcast from each
    `src`: `src` may go on before the others have read, and waits, up to the timeout, where they are so far behind that
    their unread objects fill the queue. What others got never changes with what `src` does to its object afterwards,
    and what they write to theirs nobody else sees.
    """

    use_message_queue_broadcaster: bool  # set by the coordinator
    _exchange: Callable[..., Any] | None = None

    def broadcast_object(self, obj: Any = None, src: int = 0, *, timeout: float | None = None) -> Any:
        """The object of the member `src`; there, `obj` itself.

        Raises:
            ValueError: `src` is outside the group.
            RemoteError: `src` could not pickle its object; there the original error is raised. The group stays
                usable, as it does when unpickling raises.
            StartError: on every member: no memory, or no address, for a queue. The group stays usable.
            PeerLostError: a peer is gone or late. The group is gone.
        """
        self._members.member(src, "src")
        if self.world_size == 1:
            return obj
        exchange = self._exchange or self._choose_exchange()  # as `_broadcast` does, with a call less on the hot path
        return exchange(self._link, "broadcast_object", obj, src, timeout)

    def _broadcast(self, operation: str, obj: Any, src: int, timeout: float | None) -> Any:
        exchange = self._exchange or self._choose_exchange()
        return exchange(self._link, operation, obj, src, timeout)

    def _choose_exchange(self) -> Callable[..., Any]:
        """At the first object, because it imports torch; once, because an import costs as much as an enqueue."""
        if self.use_message_queue_broadcaster:
            from ray_shm.queue_broadcast import broadcast
        else:
            from ray_shm.object_exchange import broadcast
        self._exchange = broadcast
        return broadcast

    def broadcast_object_list(
        self, obj_list: list[Any], src: int = 0, group: ProcessGroup | None = None, *, timeout: float | None = None
    ) -> list[Any]:
        """Overwrites the elements of `obj_list` with those of the member `src`, and returns it.

        Args:
            group: taken for compatibility.

        Raises:
            ValueError: `src` is outside the group, or its list has another length; `obj_list` is as before.
            RemoteError, StartError, PeerLostError: as `broadcast_object`.
        """
        self._members.member(src, "src")
        if self.world_size == 1:
            return obj_list
        received = self._broadcast("broadcast_object_list", obj_list, src, timeout)
        if len(received) != len(obj_list):
            raise ValueError(
                f"broadcast_object_list: rank {self.ranks[src]} sent {len(received)} objects, "
                f"this list has {len(obj_list)} places"
            )
        obj_list[:] = received
        return obj_list

    def broadcast_tensor_dict(
        self,
        tensor_dict: dict[str, Any] | None = None,
        src: int = 0,
        group: ProcessGroup | None = None,
        metadata_group: ProcessGroup | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """The dictionary of the member `src`; there, `tensor_dict` itself.

        Tensors on the CPU travel with the rest through the queue, one copy in and, if large, none out; without a queue,
        over the CPU group. CUDA tensors go through nccl and arrive on `device`; where the group has no nccl, through
        host memory.

        Args:
            tensor_dict: counts at `src` only. Picklable values, any tensors among them, and dictionaries of such.
            group, metadata_group: taken for compatibility.
            timeout: seconds, for the dictionary and again for each tensor that does not go through the queue.

        Raises:
            ValueError: `src` is outside the group. TypeError: at `src`, `tensor_dict` is none. Nothing was sent.
            RemoteError, StartError, PeerLostError: as `broadcast_object`.
        """
        self._members.member(src, "src")
        if src == self.rank_in_group and not isinstance(tensor_dict, dict):
            raise TypeError(f"broadcast_tensor_dict: a {type(tensor_dict).__name__} is no dictionary")
        if self.world_size == 1:
            return tensor_dict
        from ray_shm import tensor_places

        over_nccl = self._link.connect("broadcast_tensor_dict").nccl is not None
        if self.use_message_queue_broadcaster and not over_nccl:
            return self._broadcast("broadcast_tensor_dict", tensor_dict, src, timeout)
        give = partial(self._broadcast, "broadcast_tensor_dict", src=src, timeout=timeout)
        # What may fail on one member only comes last, when nothing is left that it would miss.
        if src == self.rank_in_group:
            left, places, tensors = tensor_places.take_out(tensor_dict, over_nccl, self.use_message_queue_broadcaster)
            give(places)
            self._broadcast_each(tensors, src, timeout)
            give(left)
            return tensor_dict
        tensors = [place.empty(self._link.device()) for place in give(None)]
        self._broadcast_each(tensors, src, timeout)
        return tensor_places.put_in(give(None), tensors)

    def _broadcast_each(self, tensors: list[torch.Tensor], src: int, timeout: float | None) -> None:
        for tensor in tensors:
            self._link.run(
                "broadcast_tensor_dict", "broadcast", flat("broadcast_tensor_dict", tensor), src, timeout=timeout
            )

    # Queues of the user's own

    def create_mq_broadcaster(
        self, writer_rank: int = 0, external_writer_handle: Handle | None = None, blocking: bool = True
    ) -> MessageQueue:
        """A queue from `writer_rank`, a rank in the group, to all others; the caller's to close.

        Raises as MessageQueue.create_from_process_group.
        """
        from ray_shm.message_queue import MessageQueue

        return MessageQueue.create_from_process_group(
            self._link.connect().cpu_group, _CHUNK_BYTES, _CHUNKS, writer_rank, external_writer_handle, blocking
        )

    def create_single_reader_mq_broadcasters(
        self, reader_rank_in_group: int = 0, blocking: bool = False
    ) -> tuple[MessageQueue, list[Handle]]:
        """A queue from each member to one, and there the handles of all; the caller's to close.

        Raises as MessageQueue.create_from_process_group_single_reader.
        """
        from ray_shm.message_queue import MessageQueue

        return MessageQueue.create_from_process_group_single_reader(
            self._link.connect().cpu_group, _CHUNK_BYTES, _CHUNKS, reader_rank_in_group, blocking
        )
