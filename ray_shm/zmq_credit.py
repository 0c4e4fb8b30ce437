"""How much a writer may send to a reader on another node before it hears that the reader has read: pure bookkeeping.

Each reader may have `bound` bytes and WINDOW messages unread; one message that is larger goes alone. Until they are
read they lie in the reader's process, or, where the network or a stopped reader does not take them, in the writer's.

A reader acknowledges (cumulatively) when it has read all there is, and when it has consumed a message that asks for it.
Every message asks, except small ones, of which one in ASK_EVERY does. So a reader that pauses amid a burst of small
ones may have read a few of which the writer has not heard; the writer counts those as read. Hence it is never kept
waiting for room that is there, and a reader that reads nothing holds at most the bound and a 64th of it.

Runs in the writer's process, one Credit for each reader. No sockets here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW = 1024  # unread messages per reader
ASK_EVERY = 16  # of the small messages
_SMALL = 4096  # bytes, at most; ASK_EVERY of them are at most a 64th of the bound


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for all readers of a queue. `bound`: unread bytes of each."""

    bound: int

    def asks(self, sequence: int, nbytes: int) -> bool:
        """Whether message `sequence` asks to be acknowledged."""
        small = min(_SMALL, self.bound // (64 * ASK_EVERY))
        return nbytes > small or sequence % ASK_EVERY == ASK_EVERY - 1


@dataclass(slots=True)
class Credit:
    """What one reader has been sent and not yet acknowledged."""

    terms: Terms
    sent: int = 0  # messages; with those from before this reader's START
    acknowledged: int = 0  # likewise
    bytes: int = 0  # sent and not acknowledged
    _sizes: deque[int] = field(default_factory=deque)  # of those, one by one

    @property
    def late(self) -> bool:
        return self.sent != self.acknowledged

    def fits(self, nbytes: int) -> bool:
        """Whether a message of `nbytes` may be sent now."""
        unread = self.sent - self.acknowledged
        if not unread or (unread < WINDOW and self.bytes + nbytes <= self.terms.bound):
            return True
        n_read, read = self._read_unsaid()
        return unread - n_read < WINDOW and self.bytes - read + nbytes <= self.terms.bound

    def spend(self, nbytes: int) -> None:
        self.sent += 1
        self._sizes.append(nbytes)
        self.bytes += nbytes

    def acknowledge(self, count: int) -> None:
        """The reader has consumed `count` messages of the queue. What was never sent cannot be acknowledged."""
        while self.acknowledged < count and self._sizes:
            self.acknowledged += 1  # no call from here to the last one, in which a signal's handler might raise
            self.bytes -= self._sizes[0]
            self._sizes.popleft()

    def _read_unsaid(self) -> tuple[int, int]:
        """(messages, bytes) that may have been consumed without having asked the reader to say so."""
        count = total = 0
        for sequence, nbytes in enumerate(self._sizes, self.acknowledged):
            if self.terms.asks(sequence, nbytes):
                break
            count, total = count + 1, total + nbytes
        return count, total
