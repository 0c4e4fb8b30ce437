"""What the processes of a queue do in the hazard tests: exchange messages at random gaps, block, be naive.

No torch here, which takes a process seconds to import.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from injection import HANG
from reader_pool import Me

from ray_shm import arena, ring, shm_writer, waiting
from ray_shm.handle import Handle
from ray_shm.message_queue import MessageQueue


def make_queue(me: Me, n_readers: int = 1, **bounds: Any) -> Handle:
    me.queue = MessageQueue(n_readers, n_readers, **bounds)
    return me.queue.export_handle()


def await_ready(me: Me) -> None:
    me.queue.wait_until_ready(HANG)


def content(k: int, size: int) -> np.ndarray[Any, Any]:
    """What message k consists of: no two neighbours have a byte in common."""
    return np.full(size, k % 251, np.uint8)


def is_content(got: Any, k: int, size: int) -> bool:
    return len(got) == size and bool((got == k % 251).all())


# Gaps around the spin budget


def pause(rng: random.Random, longest: float) -> None:
    """Nothing, busy, or asleep for up to `longest` seconds: around the time that a waiter yields before it sleeps."""
    kind, seconds = rng.randrange(4), rng.random() * longest
    if kind == 0:
        time.sleep(seconds)
    elif kind < 3:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


def send_with_gaps(me: Me, seed: int, count: int, longest: float) -> int:
    rng = random.Random(seed)
    for k in range(count):
        pause(rng, longest)
        me.queue.enqueue((k, bytes(rng.choice((0, 100, 150)))))
    return int(me.queue.stats().parks)


def take_with_gaps(me: Me, seed: int, count: int, longest: float) -> int:
    rng = random.Random(seed + 1)
    for k in range(count):
        pause(rng, longest)
        got, _ = me.queue.dequeue()
        assert got == k, f"message {k} is number {got}"
    return int(me.queue.stats().parks)


def play_first(me: Me, seed: int, count: int, longest: float) -> int:
    """Writes to me.queue, reads the answers from me.kept[0]."""
    rng = random.Random(seed)
    answers = me.kept[0]
    for k in range(count):
        pause(rng, longest)
        me.queue.enqueue(k)
        pause(rng, longest / 4)
        assert answers.dequeue() == k
    return int(answers.stats().parks)


def play_second(me: Me, seed: int, count: int, longest: float) -> int:
    """Reads me.queue, writes the answers to me.kept[0]."""
    rng = random.Random(seed + 1)
    answers = me.kept[0]
    for k in range(count):
        got = me.queue.dequeue()
        assert got == k
        pause(rng, longest)
        answers.enqueue(got)
    return int(me.queue.stats().parks)


def send_large_with_gaps(me: Me, seed: int, count: int, longest: float) -> int:
    """The arena is small, so the writer waits for large messages to be read."""
    rng = random.Random(seed)
    for k in range(count):
        pause(rng, longest)
        me.queue.enqueue(content(k, 400_000))
    return int(me.queue.stats().parks)


def take_large_with_gaps(me: Me, seed: int, count: int, longest: float) -> int:
    rng = random.Random(seed + 1)
    for k in range(count):
        got = me.queue.dequeue()
        assert is_content(got, k, 400_000)
        pause(rng, longest)
        del got
    return int(me.queue.stats().parks)


def add_answers(me: Me) -> Handle:
    queue = MessageQueue(1, 1)
    me.kept.append(queue)
    return queue.export_handle()


def attach_answers(me: Me, handle: Handle) -> None:
    me.kept.append(MessageQueue.create_from_handle(handle, 0))


def close_all(me: Me) -> None:
    for queue in (*me.kept, me.queue):
        if queue is not None:
            queue.close()
    me.kept.clear()
    me.queue = None


# Naive variants, each a mistake that a hazard's test has to find


def wake_without_changing_the_word(_me: Me | None = None) -> None:
    ring.RingWriter.announce = lambda self: self.event.wake()  # type: ignore[assignment, method-assign, return-value]


def ring_without_changing_the_word(_me: Me | None = None) -> None:
    waiting.YIELDS = 0  # whoever waits sleeps
    ring.Bell.ring = lambda self: self.word.wake()  # type: ignore[assignment, method-assign, return-value]


def look_at_nobody_waiting(_me: Me | None = None) -> None:
    """A writer that does not say that it wants to be woken."""
    ring.RingWriter.want = lambda self, wanted: None  # type: ignore[method-assign]


def keep_references(monkeypatch: Any) -> None:
    """A writer that copies a message when the next one comes, not before `enqueue` returns."""
    late: list[Callable[[], object]] = []

    def soon(function: Any) -> Any:
        def call(*args: Any) -> None:
            for work in late:
                work()
            late[:] = [lambda: function(*args)]

        return call

    monkeypatch.setattr(arena, "fill", soon(arena.fill))
    write = ring.write_record

    def write_header_now(view: memoryview, at: int, kind: int, frames: Any, total: int) -> None:
        write(view, at, kind, [bytes(len(frame)) if k else frame for k, frame in enumerate(frames)], total)
        soon_write(view, at, kind, frames, total)

    soon_write = soon(write)
    monkeypatch.setattr(ring, "write_record", write_header_now)


def forget_what_was_cut_off(monkeypatch: Any) -> None:
    """A writer that starts on a message before there is room for it, and leaves the start there on a timeout."""
    room = shm_writer.ShmWriter.room

    def start_at_once(self: Any, lengths: Any) -> bool:
        fits = room(self, lengths)
        if not fits:
            self.ring._limit = 1 << 62  # pretends
            at = self.ring.reserve(64)
            self.ring.write(at, ring.INLINE, [b"\x80\x05N."], 64)
            self.ring.publish(64)
        return fits

    monkeypatch.setattr(shm_writer.ShmWriter, "room", start_at_once)


# Blocking


def outcome(call: Callable[[], Any]) -> str:
    """Name of what a call raised, and its text; or what it returned."""
    try:
        return f"returned {call()!r:.60}"
    except BaseException as exc:
        return f"{type(exc).__name__}: {exc}"


def blocked_dequeue(me: Me) -> str:
    return outcome(lambda: me.queue.dequeue(indefinite=True))


def blocked_enqueue(me: Me, size: int) -> str:
    return outcome(lambda: me.queue.enqueue(bytes(size)))


def take(me: Me, count: int = 1) -> list[Any]:
    return [me.queue.dequeue(HANG) for _ in range(count)]


def put(me: Me, *objects: Any) -> None:
    for obj in objects:
        me.queue.enqueue(obj, HANG)


def keep(me: Me, count: int = 1) -> None:
    me.kept += take(me, count)


def drop_kept(me: Me) -> None:
    me.kept.clear()
