"""Ctrl-C and other signals, whose handlers run in the midst of a queue's calls."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import hazard_checks as checks
import numpy as np
import pytest
from hazard_checks import content, is_content
from injection import (
    HANG,
    be_patient,
    patient,
    result_within,
    wait_for,
    wait_until_asleep,
)
from queue_ends import Ends, close_only, make_bounded, patient_wire, pid_of
from reader_pool import Me, Peer, Wire

from ray_shm import arena, lease, ring
from ray_shm.errors import QueueClosedError
from ray_shm.message_queue import MessageQueue

FAILED = (AssertionError, pytest.fail.Exception)
SOON = 0.1  # seconds: a timeout that is meant to run out


pytestmark = pytest.mark.usefixtures("what_stays")


def close_from_a_handler(me: Me, call: Callable[..., str], *args: Any) -> str:
    """The thread that waits closes its own end, from a signal handler."""
    signal.signal(signal.SIGALRM, lambda *_: me.queue.close())
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return call(me, *args)


def test_close_in_a_signal_handler_ends_a_dequeue(peer: Peer) -> None:
    wire = patient_wire([peer])
    peer.start(close_from_a_handler, checks.blocked_dequeue)
    try:
        assert result_within(peer, 5).startswith("QueueClosedError: this end of the queue was closed in this process")
    finally:
        peer.kill()
        wire.queue.close()


def test_close_in_a_signal_handler_ends_an_enqueue(peer: Peer) -> None:
    handle = peer.run(make_bounded, {"max_chunk_bytes": 1000, "max_chunks": 1})
    peer.run(be_patient)
    with MessageQueue.create_from_handle(handle, 0) as reader:
        peer.run(checks.await_ready)
        peer.run(checks.put, bytes(900))
        peer.start(close_from_a_handler, checks.blocked_enqueue, 900)
        assert result_within(peer, 5).startswith("QueueClosedError: this end of the queue was closed in this process")
        assert reader.dequeue(HANG) == bytes(900)
        with pytest.raises(QueueClosedError):
            reader.dequeue(HANG)


def holders_of(me: Me) -> Any:
    return me.queue._writer._shm.holders()


def test_ctrl_c_breaks_a_dequeue(peer: Peer) -> None:
    wire = patient_wire([peer])
    for k in range(3):
        peer.start(checks.blocked_dequeue)
        wait_until_asleep(pid_of(peer))
        os.kill(pid_of(peer), signal.SIGINT)
        assert result_within(peer, HANG).startswith("KeyboardInterrupt")
        wire.queue.enqueue(k)
        assert peer.run(checks.take) == [k]
    wire.close()


def test_ctrl_c_breaks_an_enqueue(peer: Peer) -> None:
    handle = peer.run(make_bounded, {"max_chunk_bytes": 1000, "max_chunks": 2})
    peer.run(be_patient)
    with MessageQueue.create_from_handle(handle, 0) as reader:
        peer.run(checks.await_ready)
        for k in range(3):
            peer.run(checks.put, ("first", k, bytes(700)), ("second", k, bytes(700)))
            peer.start(checks.blocked_enqueue, 800)
            wait_until_asleep(pid_of(peer))
            os.kill(pid_of(peer), signal.SIGINT)
            assert result_within(peer, HANG).startswith("KeyboardInterrupt")
            assert [reader.dequeue(HANG)[:2] for _ in range(2)] == [("first", k), ("second", k)]
            with pytest.raises(TimeoutError):
                reader.dequeue(0)


class Interrupted(BaseException):
    """As KeyboardInterrupt, at a time of the test's choice."""


def interrupt(*_: object) -> None:
    raise Interrupted


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Raises Interrupted in the main thread after so many seconds; 0: never."""
    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)  # type: ignore[misc, return-value]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(alarm: Callable[[float], None], seconds: float, call: Callable[[], Any]) -> bool:
    """Whether the call was cut short."""
    try:
        alarm(seconds)
        call()
        alarm(0)
    except Interrupted:
        return True
    return False


def test_an_interrupted_copy_does_not_reach_into_the_next_message(
    alarm: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large copy is shared by threads; Ctrl-C breaks it while one of them is amid its part."""
    copy, begun, go_on, late = np.copyto, threading.Event(), threading.Event(), []

    def slow_elsewhere(to: Any, of: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            go_on.wait(HANG)
            late.append(time.monotonic())
        else:
            begun.wait(HANG)
        copy(to, of)

    with Ends(max_chunk_bytes=1 << 24) as ends:
        monkeypatch.setattr(arena.np, "copyto", slow_elsewhere)
        timer = threading.Timer(0.5, go_on.set)
        timer.start()
        assert interrupted(alarm, 0.2, lambda: ends.writer.enqueue(content(1, 9 << 20)))
        assert late, "the interrupted enqueue ended before its threads did"
        monkeypatch.undo()
        timer.join()
        ends.writer.enqueue(content(2, (8 << 20) - 9000))  # into the same block, and by one thread
        assert is_content(ends.readers[0].dequeue(HANG), 2, (8 << 20) - 9000), "part of another message is in it"


def test_a_copy_that_is_interrupted_while_it_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when a thread has its part already."""
    copy, begun, late = np.copyto, threading.Event(), []

    def slow_elsewhere(to: Any, of: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(0.3)
            late.append(time.monotonic())
        copy(to, of)

    def submit_and_raise(self: Any, work: Callable[[], None]) -> None:
        submit(self, work)
        assert begun.wait(HANG)
        raise Interrupted

    submit = ThreadPoolExecutor.submit
    with Ends(max_chunk_bytes=1 << 24) as ends:
        monkeypatch.setattr(arena.np, "copyto", slow_elsewhere)
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_raise)
        with pytest.raises(Interrupted):
            ends.writer.enqueue(content(1, 9 << 20))
        assert late, "the interrupted enqueue ended before its threads did"
        monkeypatch.undo()
        ends.writer.enqueue(content(2, 9 << 20))
        assert is_content(ends.readers[0].dequeue(HANG), 2, 9 << 20)


def close_amid(me: Me, inside: str) -> str:
    """A handler that closes this end, and raises nothing, runs amid a large message."""
    reader = MessageQueue.create_from_handle(me.queue.export_handle(), 0)
    me.queue.wait_until_ready(HANG)
    if inside == "fill":
        layout = arena.layout

        def layout_and_close(lengths: Any) -> Any:
            if sys._getframe(1).f_code.co_name == "fill":
                me.queue.close()
            return layout(lengths)

        arena.layout = layout_and_close  # type: ignore[assignment]
    else:
        me.queue.enqueue(content(1, 1 << 20))
        window = lease.Leases.window

        def window_and_close(self: lease.Leases, *args: int) -> Any:
            found = window(self, *args)
            reader.close()
            return found

        lease.Leases.window = window_and_close  # type: ignore[method-assign]
    try:
        return checks.outcome(
            lambda: me.queue.enqueue(content(1, 1 << 20)) if inside == "fill" else len(reader.dequeue(HANG))
        )
    finally:
        reader.close()
        me.queue.close()


@pytest.mark.parametrize("inside", ["fill", "window"])
def test_close_in_a_signal_handler_amid_a_large_message(peer: Peer, inside: str) -> None:
    peer.run(make_bounded, {"max_chunk_bytes": 1 << 22, "max_chunks": 6})
    peer.start(close_amid, inside)
    assert result_within(peer, HANG)  # it lives


def storm_writer(me: Me, count: int, seed: int) -> list[int]:
    """Sends under a storm of interrupts; returns what was surely sent."""
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, interrupt)
    sent = []
    for k in range(count):
        size = rng.choice((0, 10, 5000, 90_000, 300_000))
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 300e-6 + 1e-6)
            me.queue.enqueue((k, size, content(k, size)))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            continue
        sent.append(k)
    me.queue.enqueue(None, HANG)
    return sent


def test_an_interrupted_writer_sends_each_message_wholly_or_not(peer: Peer) -> None:
    handle = peer.run(make_bounded, {"max_chunk_bytes": 100_000, "max_chunks": 6})
    with MessageQueue.create_from_handle(handle, 0) as reader:
        peer.run(checks.await_ready)
        peer.start(storm_writer, 2000, 1)
        got = []
        while (message := reader.dequeue(HANG)) is not None:
            k, size, data = message
            assert is_content(data, k, size)
            got.append(k)
        sent = peer.result()
        assert got == sorted(set(got))
        assert set(sent) <= set(got)
        assert 100 < len(sent) < 1950, "the storm was too strong or too weak"
        peer.run(checks.put, *range(20))
        assert [reader.dequeue(HANG) for _ in range(20)] == list(range(20))
        assert peer.run(holders_of) == {}


def storm_reader(me: Me, seed: int) -> tuple[list[int], int]:
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, interrupt)
    got = []
    broken = 0
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 300e-6 + 1e-6)
            message = me.queue.dequeue()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            broken += 1
            continue
        if message is None:
            return got, broken
        k, size, data = message
        assert is_content(data, k, size)
        got.append(k)
        message = data = None


def test_an_interrupted_reader_gets_nothing_twice_or_torn(peer: Peer) -> None:
    with Wire("local", [peer], max_chunk_bytes=100_000, max_chunks=6).queue as queue:
        peer.start(storm_reader, 1)
        rng = random.Random(2)
        for k in range(2000):
            size = rng.choice((0, 10, 5000, 90_000, 300_000))
            queue.enqueue((k, size, content(k, size)), HANG)
        for _ in range(200):  # an interrupt may take one
            queue.enqueue(None, HANG)
        got, broken = peer.result()
        assert got == sorted(set(got))
        assert broken > 50
        assert len(got) > 1000
        while queue._writer._shm.ring.lag(0):  # type: ignore[union-attr]
            peer.run(checks.take)
        wait_for(lambda: not queue._writer._shm.holders(), "no lease is left")  # type: ignore[union-attr]
        queue.enqueue("usable")
        assert peer.run(checks.take) == ["usable"]
        peer.run(close_only)


@pytest.mark.parametrize("where", ["sys.is_finalizing", "drop_own_pages", "_open_pagemap"])
def test_a_lease_ends_although_its_callback_was_interrupted(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C comes when the last reference goes; what it raises in there nobody gets."""
    lost: list[Any] = []
    with Ends(max_chunk_bytes=1 << 24) as ends:
        ends.writer.enqueue(content(1, 1 << 20))
        received = ends.readers[0].dequeue(HANG)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "unraisablehook", lambda args: lost.append(args.exc_type))
            module, _, name = where.rpartition(".")
            inside = sys if module else lease
            patch.setattr(inside, name, interrupt_once(getattr(inside, name)))
            del received
        assert lost == [Interrupted]
        assert ends.writer._writer._shm.holders() == {}  # type: ignore[union-attr]


def test_a_message_taken_again_after_an_interrupt_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback of Ctrl-C (a notebook keeps the last one) refers to the message's memory, too."""
    with Ends(max_chunk_bytes=1 << 24) as ends:
        ends.writer.enqueue(content(1, 1 << 20))
        with monkeypatch.context() as patch:
            patch.setattr(arena, "contents", interrupt_once(arena.contents))
            with pytest.raises(Interrupted) as kept:
                ends.readers[0].dequeue(HANG)
        received = ends.readers[0].dequeue(HANG)
        assert kept.value.__traceback__
        del kept
        gc.collect()
        for k in range(2, 5):
            ends.writer.enqueue(content(k, 1 << 20))
            assert is_content(ends.readers[0].dequeue(HANG), k, 1 << 20)
        assert is_content(received, 1, 1 << 20), "another message came into its memory"
        del received
        assert ends.writer._writer._shm.holders() == {}  # type: ignore[union-attr]


def test_an_older_lease_that_ends_while_a_message_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback of Ctrl-C is garbage, and is collected just then."""

    def partial_after_a_collection(*args: Any) -> Any:
        gc.collect()
        return functools.partial(*args)

    with Ends(max_chunk_bytes=1 << 24) as ends:
        ends.writer.enqueue(content(1, 1 << 20))
        with monkeypatch.context() as patch:
            patch.setattr(arena, "contents", interrupt_once(arena.contents))
            try:
                ends.readers[0].dequeue(HANG)
            except Interrupted as exc:
                garbage: list[Any] = [exc.with_traceback(exc.__traceback__)]
                garbage.append(garbage)
        del garbage
        with monkeypatch.context() as patch:
            patch.setattr(lease, "functools", SimpleNamespace(partial=partial_after_a_collection))
            received = ends.readers[0].dequeue(HANG)
        for k in range(2, 5):
            ends.writer.enqueue(content(k, 1 << 20))
            assert is_content(ends.readers[0].dequeue(HANG), k, 1 << 20)
        assert is_content(received, 1, 1 << 20), "another message came into its memory"


def test_a_writer_interrupted_before_it_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes between publishing and waking: a message that can be seen wakes who waits for it."""
    patient(monkeypatch)
    announce = ring.RingWriter.announce
    with Ends() as ends:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(ends.readers[0].dequeue()))
        thread.start()
        wait_for(lambda: ends.readers[0]._reader._waiter.parks, "the reader sleeps")  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(ring.RingWriter, "announce", interrupt_once(announce))
            with pytest.raises(Interrupted):
                ends.writer.enqueue("published")
        thread.join(HANG)
        early = list(got)
        ends.writer.enqueue("next")
        thread.join(HANG)
        assert got == ["published"]
        assert early == got, "it slept until the next message"


def interrupt_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """As if the signal came when `function` is entered."""
    left = [1]

    def call(*args: Any) -> Any:
        if left:
            left.pop()
            raise Interrupted
        return function(*args)

    return call
