"""The driver actor's ends of the ways to its clients, with real queues and without Ray."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from ray_shm.actors import client_line
from ray_shm.actors.admission import Application
from ray_shm.actors.client_line import RayLine, ShmLine
from ray_shm.deadline import Deadline
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.segment import start_time

HANG = 60.0


@pytest.fixture
def shm():
    """(the line, the client's reader of replies, the client's requests writer, an event: the driver was rung for)"""
    rung = threading.Event()
    with contextlib.ExitStack() as made:
        requests, control = (
            made.enter_context(contextlib.closing(QueueWriter([0], [], 1 << 20, 1, None, watch_readers=False)))
            for _ in range(2)
        )
        application = Application(os.getpid(), start_time(os.getpid()), "here", requests.handle, control.handle)
        line = ShmLine(1, 7, application, requests.handle, control.handle, rung.set)
        made.callback(line.close)
        reader = made.enter_context(contextlib.closing(QueueReader(line.replies, 0)))
        yield line, reader, requests, rung


def receive(reader):
    return reader.receive(lambda frames, owned: [bytes(frame) for frame in frames], Deadline.after(HANG))


def test_what_a_client_does_not_read_waits_in_order(shm):
    line, reader, _, _ = shm
    sizes = [30 << 20] * 10  # more than the queue of replies takes
    for number, size in enumerate(sizes):
        line.send([number.to_bytes(4, "little"), bytes(size)])
    assert line.gone == ""
    assert any(t.name == "ray_shm-client-1" for t in threading.enumerate())
    for number, size in enumerate(sizes):
        first, second = receive(reader)
        assert (int.from_bytes(first, "little"), len(second)) == (number, size)
    line.send([b"next"])
    assert receive(reader) == [b"next"]


def test_a_client_that_never_reads_is_given_up(shm, monkeypatch):
    line, _, _, rung = shm
    monkeypatch.setattr(client_line, "MOST_UNREAD", 40 << 20)
    assert line.quiet()
    for _ in range(10):
        line.send([bytes(30 << 20)])
    assert "has not read" in line.gone
    assert rung.is_set()
    assert not line.quiet()


def test_a_client_that_leaves_is_noticed_once_all_is_read(shm):
    line, _, requests, _ = shm
    requests.send([b"last words"])
    requests.close()
    assert not line.quiet()
    assert line.gone == ""
    assert [bytes(f) for f in line.requests.poll()] == [b"last words"]
    line.requests.release()
    assert not line.quiet()
    assert line.gone == "it left"


def test_a_client_is_searched_for_where_no_pidfd_tells(shm):
    line, *_ = shm
    line._end_watch()
    line._end_watch = None
    assert line.quiet()
    line._client = Application(os.getpid(), 1, "here", None, None)  # another process had this pid
    line._next_search = 0.0
    assert not line.quiet()
    assert line.gone == "its process ended"


@pytest.fixture
def through_ray():
    rung = threading.Event()
    return RayLine(3, Application(1, 2, "far", None, None), rung.set), rung


def test_messages_through_ray_are_put_in_order(through_ray):
    line, rung = through_ray
    line.receive(1, False, [b"second"])
    assert line.quiet()
    line.receive(2, True, [b"an order"])
    line.receive(0, False, [b"first", b"of two frames"])
    assert rung.is_set()
    assert not line.quiet()
    assert [bytes(f) for f in line.requests.poll()] == [b"first", b"of two frames"]
    line.requests.release()
    assert [bytes(f) for f in line.requests.poll()] == [b"second"]
    line.requests.release()
    assert line.requests.poll() is None
    assert [bytes(f) for f in line.control.poll()] == [b"an order"]
    line.control.release()
    line.send([memoryview(b"reply")])
    assert line.take() == ([[b"reply"]], len(b"firstof two framessecondan order"))


def test_who_waits_through_ray_is_told_of_the_end(through_ray):
    line, _ = through_ray
    taken = []
    waiter = threading.Thread(target=lambda: taken.append(line.take()))
    waiter.start()
    line.close()
    waiter.join(HANG)
    assert taken == [None]


def test_a_silent_client_through_ray_is_given_up(through_ray, monkeypatch):
    line, _ = through_ray
    assert line.quiet()
    monkeypatch.setattr(client_line, "LEASE", -1.0)
    assert not line.quiet()
    assert "nothing was heard" in line.gone


def test_one_that_does_not_take_its_replies_is_given_up(through_ray, monkeypatch):
    line, _ = through_ray
    monkeypatch.setattr(client_line, "MOST_UNREAD", 100)
    line.send([bytes(101)])
    assert "has not taken" in line.gone
    assert line.take() is None
