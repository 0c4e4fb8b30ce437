"""Collectives on objects: pickled, among the members only, never through the store. Runs in every worker."""

from __future__ import annotations

from typing import Any

from ray_shm.membership import Member


class ObjectCollectives(Member):
    """The part of StatelessGroupCoordinator that gives one member's objects to all."""

    def broadcast_object(self, obj: Any = None, src: int = 0, *, timeout: float | None = None) -> Any:
        """The object of the member `src`; there, `obj` itself.

        Raises:
            ValueError: `src` is outside the group.
            RemoteError: `src` could not pickle its object; there the original error is raised. The group stays
                usable, as it does when unpickling raises.
            PeerLostError: a peer is gone or late. The group is gone.
        """
        self._members.member(src, "src")
        if self.world_size == 1:
            return obj
        from ray_shm import object_exchange

        return object_exchange.broadcast(self._link, obj, src, timeout)

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0, *, timeout: float | None = None) -> list[Any]:
        """Overwrites the elements of `obj_list` with those of the member `src`, and returns it.

        Raises:
            ValueError: `src` is outside the group, or its list has another length; `obj_list` is as before.
            RemoteError, PeerLostError: as `broadcast_object`.
        """
        received = self.broadcast_object(obj_list, src, timeout=timeout)
        if len(received) != len(obj_list):
            raise ValueError(
                f"broadcast_object_list: rank {self.ranks[src]} sent {len(received)} objects, "
                f"this list has {len(obj_list)} places"
            )
        obj_list[:] = received
        return obj_list
