"""How far a writer on another node may be ahead of its readers: the bound, in bytes and in messages."""

from __future__ import annotations

import os
import random

from zmq_ends import BOUND, MakeChannel, has_room, send, take, wait, wait_heard

from ray_shm.zmq_credit import ASK_EVERY, WINDOW, Credit, Terms


def test_the_bound_is_exact(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    for size, fits in ((100_000, 10), (BOUND, 1), (BOUND // 2 + 1, 1), (BOUND // 4, 4)):
        for _ in range(fits):
            send(writer, bytes(size))  # waits for room, however long what was read takes to be said
        assert not has_room(writer, size)
        assert writer.late() == [(0, size * fits)]
        take(reader)
        wait(lambda size=size: writer.room(size), writer)  # type: ignore[misc]
        assert [n for _, n in writer.late()] == ([size * (fits - 1)] if fits > 1 else [])
        for _ in range(fits - 1):
            take(reader)


def test_a_message_larger_than_the_bound_goes_alone(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel()
    send(writer, b"small")
    assert not has_room(writer, 3 * BOUND)
    take(reader)
    send(writer, bytes(3 * BOUND))
    assert not has_room(writer, 1)
    assert take(reader) == [bytes(3 * BOUND)]
    send(writer, b"small")
    assert take(reader) == [b"small"]


def test_messages_are_bounded_too(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel(1, 240 << 20)
    while writer.room(10):
        send(writer, bytes(10))
    assert writer.late() == [(0, 10 * (WINDOW + ASK_EVERY - 1))]
    for _ in range(ASK_EVERY):
        assert not writer.room(10)
        take(reader)
    wait(lambda: writer.room(10), writer)


def test_room_follows_what_is_unread() -> None:
    """A writer with credit is never kept waiting for room that is there, nor goes a 64th beyond the bound.

    The reader reads at any time, says so only when asked or when all is read, and may pause anywhere.
    """
    for bound in (1000, 70_000, 10_000_000):
        check_room(bound, random.Random(bound))


def check_room(bound: int, rng: random.Random) -> None:
    credit = Credit(Terms(bound))
    unread: list[tuple[int, int]] = []
    read = 0
    for _ in range(20_000):
        nbytes = rng.choice([0, 10, bound // 5000, bound // 100, bound // 7, 2 * bound])
        true_room = not unread or (len(unread) < WINDOW and sum(n for _, n in unread) + nbytes <= bound)
        if true_room:
            assert credit.fits(nbytes)
        if credit.fits(nbytes) and rng.random() < 0.6:
            assert not unread or sum(n for _, n in unread) + nbytes <= bound + bound // 64
            unread.append((credit.sent, nbytes))
            credit.spend(nbytes)
        elif unread:
            sequence, consumed = unread.pop(0)
            read += 1
            if credit.terms.asks(sequence, consumed) or not unread:
                credit.acknowledge(read)
            assert credit.late == bool(unread)
    assert read > 1000


def test_few_acknowledgements_for_many_small_messages(make_channel: MakeChannel) -> None:
    writer, [reader] = make_channel(1, 240 << 20)
    said: list[bytes] = []
    tell, reader._tell = reader._tell, lambda word: (said.append(word), tell(word))[1]  # type: ignore[method-assign]
    rounds = []
    for _ in range(5):
        said.clear()
        for k in range(512):
            send(writer, b"%d" % k)
        assert [take(reader)[0] for k in range(512)] == [b"%d" % k for k in range(512)]
        wait_heard(lambda: not writer.late(), writer)
        rounds.append(len(said))
    assert min(rounds) < 128


def test_late_readers_are_named_and_no_others(make_channel: MakeChannel) -> None:
    writer, readers = make_channel(3)
    for k in range(5):
        send(writer, b"%d" % k * 100)
    for _ in range(5):
        take(readers[1])
    for _ in range(2):
        take(readers[2])
    wait_heard(lambda: 1 not in dict(writer.late()), writer)
    assert sorted(dict(writer.late())) == [0, 2]
    for _ in range(3):
        take(readers[2])
    wait_heard(lambda: 2 not in dict(writer.late()), writer)
    assert writer.late() == [(0, 500)]
    assert [writer.pid(rank) for rank in (0, 1, 2, 3)] == [os.getpid()] * 3 + [0]
