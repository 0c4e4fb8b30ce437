"""Operations of coordinator groups whose timeout comes: who has not arrived is named, whatever was waited in."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from rank_pool import WATCHDOG, Pool, Rank, growth, open_handles

from ray_shm import release
from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import PeerLostError, StartError
from ray_shm.store import GroupStore

SHORT = 1.0  # seconds; the timeout of what is to run into it
LARGE = 1 << 20  # elements; so many go through gloo, fewer through memory that the ranks share


def ones(size: int) -> Any:
    import torch

    return torch.ones(size)


Operation = Callable[[StatelessGroupCoordinator, int, float], Any]

# Each waits for the member `late` (its rank in the group), or for all.
OPERATIONS: dict[str, Operation] = {
    "all_reduce": lambda group, late, timeout: group.all_reduce(ones(8), timeout=timeout),
    "all_reduce of much": lambda group, late, timeout: group.all_reduce(ones(LARGE), timeout=timeout),
    "all_gather": lambda group, late, timeout: group.all_gather(ones(8), timeout=timeout),
    "broadcast": lambda group, late, timeout: group.broadcast(ones(8), late, timeout=timeout),
    "broadcast_object": lambda group, late, timeout: group.broadcast_object("an object", late, timeout=timeout),
    "barrier": lambda group, late, timeout: group.barrier(timeout=timeout),
    "send": lambda group, late, timeout: group.send(ones(8 * LARGE), late, timeout=timeout),
    "recv": lambda group, late, timeout: group.recv(ones(8).shape, ones(8).dtype, late, timeout=timeout),
    "recv_object": lambda group, late, timeout: group.recv_object(late, timeout=timeout),
}


def at_once(work: Callable[[str], Any]) -> dict[str, Any]:
    """All operations, each in a group and on a thread of its own, so that their timeouts come at the same time."""
    with ThreadPoolExecutor(len(OPERATIONS)) as threads:
        return dict(zip(OPERATIONS, threads.map(work, OPERATIONS), strict=True))


def lost(group: StatelessGroupCoordinator, operation: Callable[[], Any]) -> tuple[str, list[int]]:
    """Its text and ranks, which every later operation repeats."""
    with pytest.raises(PeerLostError) as caught:
        operation()
    assert group.operation is None
    with pytest.raises(PeerLostError) as repeated:
        group.barrier()
    assert (str(repeated.value), repeated.value.ranks) == (str(caught.value), caught.value.ranks)
    return str(caught.value), caught.value.ranks


def check_absent(me: Rank, absent: int) -> dict[str, tuple[str, list[int]]] | int:
    groups = {name: me.group(f"{name} without {absent}") for name in OPERATIONS}
    me.kept["groups"] = groups
    if me.rank == absent:
        return os.getpid()
    return at_once(lambda name: lost(groups[name], lambda: OPERATIONS[name](groups[name], absent, SHORT)))


def check_came_too_late(me: Rank) -> tuple[str, list[int]]:
    groups = me.kept.pop("groups")
    late = groups["all_reduce of much"]  # through gloo; in shared memory all have come now, which is enough
    found = lost(late, lambda: late.all_reduce(ones(LARGE)))
    for group in groups.values():
        group.destroy()
    return found


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_the_absent_rank_is_named_by_all_others_in_every_operation(pool: Pool, absent: int) -> None:
    answers = pool.run(check_absent, absent)
    pid = answers[absent]
    others = [rank for rank in range(3) if rank != absent]
    for rank in others:
        for name, (text, ranks) in answers[rank].items():
            operation = name.split()[0]
            who = f"coordinator group '{name} without {absent}/0/0' (global ranks [0, 1, 2], this rank {rank})"
            assert text.startswith(f"{operation} failed in {who}"), text
            assert ranks == [absent], (name, text)
            assert f"global ranks [{absent}] ha" in text, (name, text)  # have or had not arrived
            assert f"rank {absent} (pid {pid} on " in text
            assert f"timed out after {SHORT} s" in text or "gave up after their timeout" in text, (name, text)
            assert "next epoch" in text
    text, ranks = pool.run(check_came_too_late, ranks=(absent,))[0]
    assert ranks == others
    assert "gave up after their timeout, before this rank came to collective 1" in text
    pool.run(check_destroy_all, ranks=tuple(others))


def check_destroy_all(me: Rank) -> None:
    for group in me.kept.pop("groups").values():
        group.destroy()


# In time, but late


def wait_for(me: Rank, name: str, ranks: tuple[int, ...]) -> None:
    """Until these have said that they wait."""
    me.store.prefix(f"{name}/0/0").wait([f"at/{rank}" for rank in ranks], timedelta(seconds=WATCHDOG))


def check_late(me: Rank) -> str:
    """The groups' own timeout is over long before the last rank comes; that of the calls is not."""
    groups = {name: me.group(f"late {name}", timeout=SHORT / 2) for name in OPERATIONS}
    collective = [name for name in OPERATIONS if not name.startswith(("send", "recv"))]
    if me.rank == 2:
        wait_for(me, "late all_reduce of much", (0, 1))  # which goes through gloo, and so leaves marks
        time.sleep(SHORT)  # twice what the groups would wait

    def run(name: str) -> None:
        for _ in range(2):  # the group is as before
            if name not in collective and me.rank == 2:
                group = groups[name]
                for peer in (0, 1):
                    if name == "send":
                        group.recv(ones(8 * LARGE).shape, ones(1).dtype, peer, timeout=WATCHDOG)
                    elif name == "recv":
                        group.send(ones(8), peer, timeout=WATCHDOG)
                    else:
                        group.send_object("an object", peer, timeout=WATCHDOG)
            else:
                OPERATIONS[name](groups[name], 2, WATCHDOG)

    at_once(run)
    mark = me.store.prefix("late all_reduce of much/0/0").get("at/0").decode() if me.rank == 0 else ""
    for group in groups.values():
        group.barrier(timeout=WATCHDOG)
        group.destroy()
    return mark


def test_a_call_may_take_longer_than_its_group_does(pool: Pool) -> None:
    mark, *_ = pool.run(check_late)
    assert mark.startswith("left 1 ")  # and the second was quick


# Operations that do not fit together


def check_order(me: Rank) -> tuple[str, list[int]]:
    with me.group("order") as group:
        group.barrier()
        if me.rank == 2:
            return lost(group, lambda: group.broadcast(ones(8), 0, timeout=SHORT))
        return lost(group, lambda: group.all_reduce(ones(LARGE), timeout=SHORT))


def test_a_rank_in_another_operation_is_named_with_it(pool: Pool) -> None:
    *answers, (text, ranks) = pool.run(check_order)
    for rank, (theirs, late) in enumerate(answers):
        assert late == [2], theirs
        assert "is in broadcast, its collective 2" in theirs, (rank, theirs)
    assert "in all_reduce, its collective 2" in text
    assert ranks in ([0], [0, 1])  # it waits for rank 0, or was told by those who gave up first


def check_refused(me: Rank) -> tuple[str, list[int]]:
    """A call that this rank refuses by itself does not count."""
    import torch

    group = me.kept["refused"] = me.group("refused")
    if me.rank == 0:
        with pytest.raises(ValueError, match="on meta"):
            group.all_reduce(torch.ones(3, device="meta"))
        with pytest.raises(ValueError, match="timeout=0"):
            group.barrier(timeout=0)
    group.all_reduce(ones(LARGE))
    if me.rank == 0:  # so that the others say where they are
        wait_for(me, "refused", (1, 2))
    group.all_reduce(ones(LARGE))
    return ("", []) if me.rank == 2 else lost(group, lambda: group.all_reduce(ones(LARGE), timeout=SHORT))


def test_the_late_rank_was_last_seen_somewhere(pool: Pool) -> None:
    for text, ranks in pool.run(check_refused)[:2]:
        assert ranks == [2], text
        assert "as collective 3 of this group" in text or "gave up" in text
        assert "was last seen leaving all_reduce, its collective 2" in text
    pool.run(check_destroyed, "refused")


# More ranks than processes: every member on a thread


def check_tree(me: Rank) -> list[tuple[str, list[int]] | None]:
    """A broadcast from rank 1 to 6 members without rank 2, which would pass it on to ranks 4 and 0."""

    def member(rank: int) -> StatelessGroupCoordinator:
        six = [list(range(6))]
        return StatelessGroupCoordinator(
            six, 0, "gloo", False, group_name="tree", global_rank=rank, coord_store=me.store, timeout=WATCHDOG
        )

    def broadcast(group: StatelessGroupCoordinator) -> tuple[str, list[int]] | None:
        try:
            if group.rank != 2:
                group.broadcast(ones(LARGE), 1, timeout=SHORT)
        except PeerLostError as exc:
            return str(exc), exc.ranks
        return None

    with ThreadPoolExecutor(6) as threads:
        groups = list(threads.map(member, range(6)))
        answers = list(threads.map(broadcast, groups))
    for group in groups:
        group.destroy()
    return answers


def test_of_a_broadcast_only_the_rank_that_should_pass_it_on_is_late(pool: Pool) -> None:
    answers = pool.run(check_tree, ranks=(0,))[0]
    assert [answer and answer[1] for answer in answers] == [[2], [2, 3, 5], None, None, [2], None]
    gave_up_first = "global ranks [2, 3, 5] have not arrived, or are through with it already"
    assert gave_up_first in answers[1][0] or "global ranks [2, 3, 5] had not arrived, or were through" in answers[1][0]


# The store


def check_no_answer(me: Rank) -> tuple[str, list[int]] | None:
    """The connection to the store's server breaks once the group is formed."""
    if me.rank == 0:
        me.kept["no store"] = me.group("no store")
        return None
    before, handles = release.open_sockets(), open_handles()
    with GroupStore.connect("127.0.0.1", me.store.port, WATCHDOG) as store:
        connection = release.open_sockets() - before
        group = me.group("no store", coord_store=store)
        for ref in connection:
            ref.shut_down()
        found = lost(group, lambda: group.all_reduce(ones(LARGE), timeout=SHORT))
        group.destroy()
    gc.collect()  # what pytest.raises caught holds torch's works in a circle of frames
    assert growth(handles) == (0, 0)
    return found


def check_blocked_store(me: Rank) -> tuple[str, list[int]] | None:
    group = me.kept["blocked"] = me.group("blocked")
    if me.rank != 1:
        return None
    begun = threading.Event()

    def block() -> None:
        begun.set()
        with pytest.raises(RuntimeError):  # it times out
            me.store.prefix("blocked").wait(["never"], timedelta(seconds=10 * SHORT))

    thread = threading.Thread(target=block)
    thread.start()
    begun.wait()
    found = lost(group, lambda: group.all_reduce(ones(LARGE), timeout=SHORT))
    assert thread.is_alive()  # the store was of no use all the time
    thread.join()
    return found


def check_destroyed(me: Rank, name: str) -> None:
    me.kept.pop(name).destroy()


def test_a_store_that_is_gone_hides_nothing(pool: Pool) -> None:
    for text, ranks in pool.run(check_no_answer)[1:]:
        assert ranks == []
        assert "all_reduce failed in coordinator group 'no store/0/0'" in text
        assert "store does not answer" in text or "A peer is gone" in text
    pool.run(check_destroyed, "no store", ranks=(0,))


@pytest.mark.slow
def test_a_store_that_does_not_answer_holds_nothing_up(pool: Pool) -> None:
    _, (text, ranks), _ = pool.run(check_blocked_store)
    assert ranks == []
    assert "who is late is not known, because the group's store does not answer" in text
    pool.run(check_destroyed, "blocked")


# Forming


def check_forming(me: Rank) -> tuple[str, float]:
    group = me.group("never formed", lazy=True)
    begun = time.monotonic()
    with pytest.raises(StartError) as caught:
        group.barrier(timeout=SHORT / 2)
    group.destroy()
    return str(caught.value), time.monotonic() - begun


def test_the_timeout_of_a_call_counts_for_the_forming_of_its_group(pool: Pool) -> None:
    for text, seconds in pool.run(check_forming, ranks=(0, 1)):
        assert f"global ranks [2] did not come within {SHORT / 2} s" in text
        assert seconds < WATCHDOG / 2  # which is the group's timeout


# The last test of the module: its pool is short of a rank afterwards


def check_killed(me: Rank) -> tuple[str, list[int]]:
    group = me.group("killed")
    group.barrier()
    if me.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return lost(group, lambda: group.all_reduce(ones(LARGE)))


def test_a_process_that_is_gone_is_named_by_those_that_see_it(pool: Pool) -> None:
    pool.start(check_killed)
    for rank in (0, 1):
        text, ranks = pool.result(rank)
        assert ranks == [2], text
        assert f"rank 2 (pid {pool.processes[2].pid} on " in text
        assert "which is gone" in text
