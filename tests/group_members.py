"""A worker that uses coordinator groups, and what tests of created groups share. `Member` runs in the workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from faulty_worker import HANG, await_gate

import ray_shm
from ray_shm import ActorGroup, PeerLostError


class Member:
    """Sums over groups: rank r gives 10 ** r, so a sum shows whose numbers are in it."""

    def __init__(self) -> None:
        self.context = ray_shm.get_context()
        self.lost = ""

    def rank(self):
        return self.context.rank

    def total(self, name="world"):
        import torch

        return int(self.context.group(name).all_reduce(torch.tensor([10**self.context.rank]))[0])

    def give(self, value, leaver=None):
        """Rank 0's value; the leaver raises before it comes to that."""
        if self.context.rank == leaver:
            raise ValueError("left")
        return self.context.group().broadcast_object(value)

    def destroy(self, name):
        self.context.group(name).destroy()

    def epoch_of(self, name):
        return self.context.group(name).epoch

    def why_not(self, name):
        try:
            self.context.group(name)
        except LookupError as exc:
            return str(exc)
        return ""

    def nap(self, seconds):
        time.sleep(seconds)

    def hold(self, gate):
        await_gate(gate)

    def hold_and_total(self, gate, name):
        await_gate(gate)
        return self.total(name)

    def reduce_for_ever(self, name):
        """Until a collective raises; its words are kept for `told`."""
        try:
            while True:
                self.total(name)
        except PeerLostError as exc:
            self.lost = str(exc)
            raise

    def told(self):
        return self.lost

    def handles(self):
        return handles(os.getpid())

    def variable(self, name):
        return os.environ.get(name)


def handles(pid: int) -> dict[str, int]:
    process = psutil.Process(pid)
    listening = [c for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    shared = [path for path in os.listdir("/dev/shm") if not path.startswith(("plasma", "sem."))]
    return {"fds": process.num_fds(), "threads": process.num_threads(), "ports": len(listening), "files": len(shared)}


@contextmanager
def three_members() -> Iterator[ActorGroup]:
    """A group for a module's tests, whose thread for callbacks runs: it stays, and is no leak of the first test."""
    with ray_shm.launch(Member, num_workers=3) as group:
        group.collective_rpc("rank", non_block=True).add_done_callback(lambda future: None)
        yield group


def rpc(group: ActorGroup, method: str, *args: Any, **options: Any) -> Any:
    return group.collective_rpc(method, HANG, args, **options)


def totals(group: ActorGroup, name: str, ranks: list[int]) -> list[int]:
    return rpc(group, "total", name, target_ranks=ranks)


def at_work(group: ActorGroup, what: str, *ranks: int) -> bool:
    return all(group.status()[rank].method == what and group.status()[rank].state == "running" for rank in ranks)
