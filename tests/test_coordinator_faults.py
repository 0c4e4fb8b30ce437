"""Coordinator groups and their store when something is missing: a store, a port, a member, a live peer."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time

import pytest
from free_ports import free_port
from rank_pool import LOOPBACK, WATCHDOG, Pool, Rank, growth, open_handles

from ray_shm.coordinator import StatelessGroupCoordinator
from ray_shm.errors import GroupClosedError, PeerLostError, StartError
from ray_shm.membership import Membership
from ray_shm.store import GroupStore

# The store


def check_store_errors(me: Rank, stale: int) -> None:
    begun = time.monotonic()
    with pytest.raises(StartError, match=rf"no coordinator store at {LOOPBACK}:{stale}.*0\.3 s.*refused"):
        GroupStore.connect(LOOPBACK, stale, timeout=0.3)
    assert time.monotonic() - begun >= 0.3
    with socket.create_server(("0.0.0.0", 0)) as everywhere:
        with pytest.raises(ValueError, match="every interface"):
            GroupStore.serve(everywhere)
        assert everywhere.fileno() >= 0  # still the caller's
    with socket.socket() as silent:
        silent.bind((LOOPBACK, 0))
        with pytest.raises(ValueError, match="does not listen"):
            GroupStore.serve(silent)


def test_store_errors(pool: Pool) -> None:
    pool.run(check_store_errors, free_port(LOOPBACK), ranks=(1,))


def check_store_life(me: Rank) -> None:
    open_and_close_a_store()  # torch keeps something from the first time
    before = open_handles()
    for _ in range(5):
        open_and_close_a_store()
    assert growth(before) == (0, 0)


def open_and_close_a_store() -> None:
    port = free_port(LOOPBACK)
    listener = socket.create_server((LOOPBACK, port))
    with GroupStore.serve(listener) as server, GroupStore.connect(LOOPBACK, port) as client:
        assert listener.fileno() == -1  # the store's now
        assert (server.host, server.port, client.port) == (LOOPBACK, port, port)
        client.prefix("a").set("key", "1")
        client.prefix("b").set("key", "2")
        assert server.prefix("a").get("key") == b"1"
    client.close()
    with pytest.raises(GroupClosedError):
        client.prefix("a")
    socket.create_server((LOOPBACK, port)).close()  # free again


def test_store_shares_keys_by_prefix_and_frees_its_port(pool: Pool) -> None:
    pool.run(check_store_life, ranks=(0,))


# Members that disagree


def check_agreement(me: Rank, name: str, wanted: list[str]) -> str:
    from ray_shm.release import Release
    from ray_shm.rendezvous import MeetingStore, Rendezvous

    members = Membership.find([[0, 1, 2]], me.rank)
    release = Release()
    store = MeetingStore(me.store.prefix(name), release, WATCHDOG)
    meeting = Rendezvous(store, "the group", members, "127.0.0.1", WATCHDOG, release)
    try:
        return meeting.agree(wanted[me.rank])
    except StartError as exc:
        return str(exc)


@pytest.mark.parametrize(
    ("wanted", "agreed"),
    [
        (["auto:GPU-a", "auto:GPU-b", "auto:GPU-c"], "nccl"),
        (["auto:GPU-a", "auto:GPU-b", "auto:GPU-a"], "gloo"),  # fractions of one GPU
        (["auto:GPU-a", "auto:", "auto:GPU-c"], "gloo"),
        (["auto:", "auto:", "auto:"], "gloo"),
        (["nccl", "nccl", "nccl"], "nccl"),
        (
            ["gloo", "nccl", "gloo"],
            "the group: members ask for different backends, by global rank: {0: 'gloo', 1: 'nccl'",
        ),
        (["gloo", "auto:", "gloo"], "the group: members ask for different backends"),
    ],
    ids=str,
)
def test_members_agree_on_a_backend(pool: Pool, wanted: list[str], agreed: str) -> None:
    for answer in pool.run(check_agreement, f"agreement {wanted}", wanted):
        assert answer == agreed or (" " in agreed and answer.startswith(agreed))


# Members that are absent, late or gone


def check_absent(me: Rank) -> str:
    with pytest.raises(StartError) as caught:
        me.group("absent", timeout=0.5)
    return str(caught.value)


def test_absent_member_is_named(pool: Pool) -> None:
    for text in pool.run(check_absent, ranks=(0, 1)):
        assert "global ranks [2] did not come within 0.5 s" in text


def check_taken_port(me: Rank, port: int) -> str:
    with pytest.raises(StartError) as caught:
        me.group("taken", coord_store=None, group_ports=[[port]], host=LOOPBACK, timeout=0.5)
    return str(caught.value)


def test_taken_port_is_named_and_nobody_waits_for_the_stranger(pool: Pool) -> None:
    with socket.create_server((LOOPBACK, 0)) as stranger:  # accepts, and never says a word
        port = stranger.getsockname()[1]
        first, *others = pool.run(check_taken_port, port)
    assert f"could not bind {LOOPBACK}:{port} for the store: Address already in use" in first
    assert f"in use, held by pid {os.getpid()} ({sys.orig_argv[0]} " in first
    for text in others:
        assert f"{LOOPBACK}:{port}" in text
        assert "does not answer as a store" in text


def check_late(me: Rank) -> str:
    group = me.group("late", timeout=1.0)
    if me.rank == 2:
        me.kept["late"] = group
        return ""
    with pytest.raises(PeerLostError) as caught:
        group.barrier()
    with pytest.raises(PeerLostError):  # the group is gone
        group.barrier()
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), PeerLostError)
    assert isinstance(caught.value.__cause__, (RuntimeError, TimeoutError))
    return str(caught.value)


def check_came_late(me: Rank) -> str:
    with pytest.raises(PeerLostError) as caught:
        me.kept.pop("late").barrier()
    return str(caught.value)


def test_late_peer(pool: Pool) -> None:
    texts = [*pool.run(check_late)[:2], *pool.run(check_came_late, ranks=(2,))]
    for rank, text in enumerate(texts):
        assert f"barrier failed in coordinator group 'late/0/0' (global ranks [0, 1, 2], this rank {rank})" in text
        assert "next epoch" in text


def reduce_for_ever(group: StatelessGroupCoordinator) -> None:
    import torch

    while True:
        group.all_reduce(torch.ones(576))


def check_killed(me: Rank) -> tuple[str, float]:
    import torch

    group = me.group("killed", timeout=WATCHDOG)
    pair = me.group("pair", [[0, 1], [2]])
    if me.rank == 2:
        group.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()
    begun = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        reduce_for_ever(group)
    waited = time.monotonic() - begun
    assert pair.all_reduce(torch.ones(1)).item() == 2.0  # the survivors' group is whole
    with me.group("survivors", [[0, 1]]) as again:
        assert again.broadcast_object(me.rank, 1) == 1
    pair.destroy()
    return str(caught.value), waited


# The last test of the module: its pool is short of a rank afterwards


def test_killed_peer_raises_on_the_others_and_spares_their_other_groups(pool: Pool) -> None:
    pool.start(check_killed)
    for rank in (0, 1):
        text, waited = pool.result(rank)
        assert f"all_reduce failed in coordinator group 'killed/0/0' (global ranks [0, 1, 2], this rank {rank})" in text
        assert waited < WATCHDOG / 2  # not by the timeout
