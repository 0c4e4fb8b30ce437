"""Outbox: where requests and orders go from the driver's process or a client's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ray_shm.deadline import Deadline
from ray_shm.ring import Bell, Buffer


class Outbox(Protocol):
    """A QueueWriter, or the way to a driver actor; see QueueWriter."""

    @property
    def bell(self) -> Bell | None: ...

    def send(
        self, frames: Sequence[Buffer], deadline: Deadline = ..., on_wait: Callable[[], object] | None = None
    ) -> None: ...

    def drop(self, rank: int) -> None: ...
