"""A rank of the channel between nodes whose place a new reader takes, while the old one lives on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import zmq
from injection import wait_for

from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_wire import LIFELINE, Hello
from ray_shm.zmq_writer import ZmqWriter

pytestmark = pytest.mark.usefixtures("what_stays")


def test_an_old_reader_across_nodes_that_lives_on_does_not_disturb() -> None:
    """A host that was cut off: its reader's words, and the end of its connections, are not the new reader's."""
    writer = ZmqWriter([0], 1000, "127.0.0.1")
    with closing(writer), closing(ZmqReader(writer.address, 0, 1)) as old:
        wait_for(lambda: not writer.missing(), "the first reader")
        writer.ready()
        writer.send([bytes(900)], 900)
        wait_for_frames(old)
        writer.drop(0)
        assert writer.room(900)
        writer.send([b"for nobody"], 10)
        writer.readmit(0)
        assert not writer.room(900)
        with late_lifeline(writer, writer._replaced[0]):
            wait_for(lambda: writer.refused == 1, "it is refused")
        with closing(ZmqReader(writer.address, 0, 2)) as new:
            wait_for(lambda: not writer.missing(), "the second reader")
            wait_for(lambda: new.peek() is None and new.ready, "the queue was ready before")
            send_zeros(writer, 900)
            old.release()  # which acknowledges
            assert old.peek() is None
            old.close()  # which says goodbye
            wait_for(lambda: writer.refused and len(writer._peers) == 1, "the end of the old connections")
            assert writer.late() == [(0, 900)]
            assert not writer.room(900), "the old reader's credit is not the new one's"
            assert len(wait_for_frames(new)[0]) == 900
            new.release()
            new.peek()
            wait_for(lambda: writer.room(900), "an acknowledgement")
            send_zeros(writer, 450)
            send_zeros(writer, 450)
            wait_for_frames(new)
            new.release()
            wait_for(lambda: writer.probe() or writer.late() != [(0, 900)], "an acknowledgement of the first")
            assert writer.late() == [(0, 450)]
            assert writer.refused == 1
            assert writer.pid(0) == 2


def send_zeros(writer: ZmqWriter, nbytes: int) -> None:
    assert writer.room(nbytes)
    writer.send([bytes(nbytes)], nbytes)


def wait_for_frames(reader: ZmqReader) -> list[memoryview]:
    wait_for(lambda: reader.peek() is not None, "a message")
    frames = reader.peek()
    assert frames is not None
    return frames


@contextmanager
def late_lifeline(writer: ZmqWriter, nonce: bytes) -> Iterator[None]:
    """The second connection of the reader that had `nonce`, so late that its rank was readmitted meanwhile."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.curve_serverkey = writer.address.server_key
    dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    dealer.connect(writer.address.endpoint)
    dealer.send(Hello(LIFELINE, writer.address.token, 0, 1, nonce).pack())
    try:
        yield
    finally:
        dealer.close()
        context.term()
