"""Names of the ZeroMQ channel under one module, until their users import them from zmq_writer, zmq_reader, zmq_wire."""

import struct

from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_wire import HELLO, MESSAGE
from ray_shm.zmq_writer import ZmqWriter

__all__ = ["HELLO", "MESSAGE", "ZmqReader", "ZmqWriter"]
_HELLO = struct.Struct("<16sIQ")
