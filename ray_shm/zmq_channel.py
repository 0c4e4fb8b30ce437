"""Names of the ZeroMQ channel under one module: ZmqWriter (zmq_writer.py) and ZmqReader (zmq_reader.py)."""

from ray_shm.zmq_reader import ZmqReader
from ray_shm.zmq_wire import HELLO, MESSAGE
from ray_shm.zmq_writer import ZmqWriter

__all__ = ["HELLO", "MESSAGE", "ZmqReader", "ZmqWriter"]
