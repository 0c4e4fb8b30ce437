"""Orders that control threads get without a reply: in order, bounded, and from wherever they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from queue_ends import Ends

from ray_shm.actors.orders import Orders
from ray_shm.deadline import Deadline
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Bell, Buffer

AT_ONCE = Deadline.after(0)


class Control:
    """A control queue with both its ends here; the one reader takes what it is told to."""

    bell: Bell | None = None

    def __init__(self, ends: Ends) -> None:
        assert ends.writer._writer is not None
        assert ends.readers[0]._reader is not None
        self.writer: QueueWriter = ends.writer._writer
        self.reader: QueueReader = ends.readers[0]._reader
        self.amid: Callable[[], object] = lambda: None  # runs inside of each send, as a __del__ might
        self.depth = self.deepest = 0

    def send(
        self, frames: Sequence[Buffer], deadline: Deadline = AT_ONCE, on_wait: Callable[[], object] | None = None
    ) -> None:
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        try:
            self.amid()
            self.writer.send(frames, deadline)
        finally:
            self.depth -= 1

    def drop(self, rank: int) -> None:
        raise NotImplementedError

    def fill(self) -> int:
        """How many messages it took until there was no room."""
        for count in range(1000):
            try:
                self.writer.send([b"full"], AT_ONCE)
            except TimeoutError:
                return count
        raise RuntimeError("a queue of 4 chunks takes 1000 messages")

    def take(self) -> list[bytes]:
        """All that has arrived."""
        taken = []
        while (frames := self.reader.poll()) is not None:
            taken.append(bytes(frames[0]))
            self.reader.release()
        return taken


@pytest.fixture
def control() -> Iterator[Control]:
    with Ends(max_chunk_bytes=256, max_chunks=4) as ends:
        yield Control(ends)


def number(k: int) -> list[Buffer]:
    return [b"%d" % k]


def test_orders_that_found_no_room_go_out_in_order_once_there_is(control: Control) -> None:
    orders = Orders(control)
    filled = control.fill()
    count = filled + filled // 2  # more than the queue takes at once
    assert all(orders.give(number(k)) for k in range(count))
    assert len(orders.waiting) == count
    taken = control.take()
    assert taken == [b"full"] * filled
    orders.send()
    assert 0 < len(orders.waiting) < count
    assert orders.give(number(count))  # behind those that wait
    told = control.take()
    orders.send()
    told += control.take()
    assert told == [b"%d" % k for k in range(count + 1)]
    assert not orders.waiting


def test_orders_that_wait_are_bounded(control: Control) -> None:
    orders = Orders(control, most=3)
    control.fill()
    assert [orders.give(number(k)) for k in range(5)] == [True, True, True, False, False]
    control.take()
    orders.send()
    assert control.take() == [b"0", b"1", b"2"]
    assert orders.give(number(3))
    assert control.take() == [b"3"]


def test_an_order_given_inside_of_a_send_is_sent_after_it(control: Control) -> None:
    orders = Orders(control)
    inner = iter(range(1, 4))
    control.amid = lambda: orders.give(number(k)) if (k := next(inner, None)) is not None else None
    assert orders.give(number(0))
    assert control.take() == [b"0", b"1", b"2", b"3"]
    assert control.deepest == 1


def test_an_order_given_inside_of_that_queues_own_send_waits(control: Control) -> None:
    orders = Orders(control)
    control.fill()
    given: list[bool] = []
    with pytest.raises(TimeoutError):  # it looks for room once or more
        control.writer.send([b"request"], AT_ONCE, lambda: given.append(orders.give(number(len(given)))))
    assert given
    assert all(given)
    assert len(orders.waiting) == len(given)
    control.take()
    orders.send()
    assert control.take() == [b"%d" % k for k in range(len(given))]


def test_a_closed_queue_drops_what_waits(control: Control) -> None:
    orders = Orders(control)
    control.fill()
    orders.give(number(0))
    control.writer.close()
    orders.send()
    assert not orders.waiting
    assert orders.give(number(1))
    assert not orders.waiting
