"""Orders: what control threads are told without a reply, kept until there is room. Runs in the driver's process.

Whoever gives an order must not wait: it may be a `__del__`, or hold the lead or a lock. So what finds the control queue
full stays here, and whoever leads tries again at each look.
"""

from __future__ import annotations

import threading
from collections import deque

from ray_shm.actors.outbox import Outbox
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError
from ray_shm.locks import acquired
from ray_shm.ring import Buffer

_MOST = 10_000
_AT_ONCE = Deadline.after(0)


class Orders:
    """Sends in the order given. Any thread may call, also from inside a call.

    Args:
        most: orders that may wait.

    Attributes:
        waiting: the frames of orders for which there was no room; empty where `send` need not be called.
    """

    def __init__(self, outbox: Outbox, most: int = _MOST) -> None:
        self.waiting: deque[list[Buffer]] = deque()
        self._outbox = outbox
        self._most = most
        self._sending = threading.Lock()

    def give(self, frames: list[Buffer]) -> bool:
        """Send now, or once there is room. False, and not taken: too much waits for a rank that does not listen."""
        if len(self.waiting) >= self._most:
            return False
        self.waiting.append(frames)
        self.send()
        return True

    def send(self) -> None:
        """What there is room for by now. Where the queue is closed, the orders are dropped."""
        while self.waiting:
            taken = False
            try:
                taken = acquired(self._sending, False)
                if not taken:
                    return
                self._outbox.send(self.waiting[0], _AT_ONCE)
                self.waiting.popleft()
            except (TimeoutError, RuntimeError):  # no room; or this is a __del__ inside of that very queue's send
                return
            except (QueueClosedError, PeerLostError):
                self.waiting.popleft()
            except IndexError:  # another thread was faster
                return
            finally:
                if taken:
                    self._sending.release()
