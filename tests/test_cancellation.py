"""Cancellation by itself, in this process: what a cancel hits in an event loop, and what it leaves to later calls."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

import ray_shm
from ray_shm.actors import cancellation

LONG = 600  # seconds that nobody waits for: whatever ends earlier was ended


@pytest.fixture
def own_cancellation():
    """Of this process, as if it were a worker that runs call 5."""
    cancel = cancellation.Cancellation(0)
    cancel.running = 5
    yield cancel
    cancel.close()


def test_a_cancel_in_a_background_tasks_turn_is_for_the_call(own_cancellation):
    told = []

    async def background():
        own_cancellation.cancel(5, "now")  # the signal comes here
        told.append("goes on")

    async def call():
        other = asyncio.get_running_loop().create_task(background())
        try:
            await asyncio.sleep(LONG)
        finally:
            await other

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        with pytest.raises(ray_shm.RpcCancelledError, match="call 5 was cancelled on rank 0: now"):
            own_cancellation.run_task(loop, call())
    assert told == ["goes on"]


def test_a_task_cancelled_before_it_begins_is_not_left_to_the_next_call(own_cancellation):
    class Loop(asyncio.SelectorEventLoop):
        def create_task(self, *args, **kwargs):
            task = super().create_task(*args, **kwargs)
            if own_cancellation.running != 6:
                own_cancellation.cancel(5, "now")
            return task

    begun = []

    async def call(name):
        begun.append(name)
        return name

    with contextlib.closing(Loop()) as loop:
        with pytest.raises(ray_shm.RpcCancelledError, match="call 5 was cancelled on rank 0: now"):
            own_cancellation.run_task(loop, call("cancelled"))
        own_cancellation.running = 0
        assert own_cancellation.run_task(loop, call("next")) == "next"
    assert begun == ["next"]


def test_a_task_ends_with_its_call_even_if_another_one_ended_the_loop(own_cancellation):
    log = []

    async def leave():
        raise SystemExit(3)

    async def call():
        other = asyncio.get_running_loop().create_task(leave())
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        finally:
            assert other.done()

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        with pytest.raises(SystemExit):
            own_cancellation.run_task(loop, call())
        assert log == ["cancelled"]


def test_cancels_are_remembered_while_the_main_thread_takes_its_own_out(own_cancellation, monkeypatch):
    class Raced(dict):
        def __iter__(self):
            first = next(super().__iter__())
            self.pop(first)
            yield first

    monkeypatch.setattr(cancellation, "_REMEMBERED", 1)
    own_cancellation.pending = Raced({1: "first"})
    own_cancellation.cancel(2, "second")
    assert own_cancellation.pending == {2: "second"}
