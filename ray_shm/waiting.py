"""How to wait for a condition that another process makes true: a few guarded yields, then sleep on a word.

Runs in every process. Measured round trips over 1/2/4/8 readers on two cores, p50 in µs: park only 5/12/16/37,
20 guarded yields 5/5/12/22, 1,000 loads 2/49/93/183: spinning long loses as soon as processes outnumber cores.
The guard: a yield that takes over SLOW_YIELD means that others want the core, and bans yields for 20 ms, doubling to 1
s (unguarded, one busy process per core makes a call cost 4-8 ms).

To tune: the environment variable RAY_SHM_YIELDS (yields before a sleep; 0: always sleep at once), read on import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ray_shm.deadline import Deadline
from ray_shm.futex import Word

YIELDS = int(os.environ.get("RAY_SHM_YIELDS", "20"))
IDLE_PARK = 0.5  # seconds; how often a sleeper looks up by itself: at most 2 wake-ups a second
CANCEL_PARK = 0.05  # seconds, while a threading.Event is watched: it cannot wake a futex
SLOW_YIELD = 100_000  # ns
_FIRST_BAN = 20_000_000  # ns
_LONGEST_BAN = 1_000_000_000  # ns


class Waiter:
    """Waits on one word. Keeps what its yields cost; one per waiting thread or per lock, not shared freely.

    Attributes:
        waits, yields, parks: how often it had to wait, gave up the core for a moment, and slept; for statistics.
    """

    __slots__ = ("_ban", "_banned_until", "parks", "waits", "yields")

    def __init__(self) -> None:
        self._ban = _FIRST_BAN
        self._banned_until = 0
        self.waits = self.yields = self.parks = 0

    def wait(
        self,
        ready: Callable[[], bool],
        word: Word,
        deadline: Deadline,
        longest_park: float = IDLE_PARK,
        on_park: Callable[[], object] | None = None,
    ) -> bool:
        """Until `ready()`; False when the deadline comes first.

        `word` must change whenever `ready()` may have become true. `on_park` runs after every sleep, woken or not: it
        may look for dead peers, and ends the wait by raising.
        """
        self.waits += 1
        if self._spin(ready):
            return True
        while True:
            seen = word.load()  # SYNC POINT: word before state; the other side changes state, then the word
            if ready():
                return True
            if deadline.expired():
                return False
            self.parks += 1
            word.wait(seen, deadline.slice(longest_park))
            if ready():
                return True
            if on_park is not None:
                on_park()
            if self._spin(ready):
                return True

    def _spin(self, ready: Callable[[], bool]) -> bool:
        before = time.perf_counter_ns()
        if before < self._banned_until:
            return False
        for number in range(YIELDS):
            if ready():
                self.yields += number
                return True
            os.sched_yield()
            now = time.perf_counter_ns()
            if now - before > SLOW_YIELD:
                self.yields += number
                self._banned_until = now + self._ban
                self._ban = min(2 * self._ban, _LONGEST_BAN)
                return ready()
            before = now
        self.yields += YIELDS
        self._ban = _FIRST_BAN
        return False
