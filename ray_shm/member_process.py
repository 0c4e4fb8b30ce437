"""The process behind one member of a coordinator group, as the members tell each other when they meet.

A pure value, and one look into /proc. Runs in every worker.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from ray_shm.segment import pid_space, start_time


@dataclass(frozen=True, slots=True)
class MemberProcess:
    """Attributes: pid, started: as `segment.start_time` has it. space: as `segment.pid_space`. host: its name."""

    pid: int
    started: int
    space: str
    host: str

    @classmethod
    def own(cls) -> MemberProcess:
        return cls(os.getpid(), start_time(os.getpid()), pid_space(), socket.gethostname())

    @classmethod
    def parse(cls, text: str) -> MemberProcess:
        """The inverse of `text`. Raises ValueError for anything else."""
        pid, started, space, host = text.split("|", 3)
        return cls(int(pid), int(started), space, host)

    @property
    def text(self) -> str:
        return f"{self.pid}|{self.started}|{self.space}|{self.host}"

    def is_gone(self) -> bool:
        """Whether it has ended; False as well where this process cannot know."""
        return self.space == pid_space() and start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}{', which is gone' if self.is_gone() else ''}"
