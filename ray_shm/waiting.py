"""How to wait for a condition that another process makes true: a few guarded yields, then sleep on a word.

Runs in every process. Spinning long loses as soon as processes outnumber cores (measured on two cores, round trips with
1/2/4/8 readers, µs: 1,000 loads 2/49/93/183, 20 guarded yields 5/5/12/22, sleeping at once 5/12/16/37). Where several
processes share a core, one yield is mostly enough: it returns when the others have done their part.

The guard: a yield that takes over SLOW_YIELD means that somebody wants the core for himself, and bans yields for 20 ms,
doubling to 1 s (unguarded, one busy process per core makes a call cost 4-8 ms). The others' parts take longer than one
might think, so the limit must not be too low. Round trips with 4 / 8 readers on a slower machine with two cores, p50
µs, and with a busy process on each core: limit 100 µs 116 / 157 and 119 / -; 300 µs 105 / 135 and 76 / 166; 500 µs 70 /
153 and 84 / 176; 1 ms 71 / 140 and 80 / 266.

To tune: the environment variable RAY_SHM_YIELDS (yields before a sleep; 0: always sleep at once), read on import.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from os import sched_yield as _yield
from time import perf_counter_ns as _now

from ray_shm.deadline import Deadline
from ray_shm.futex import Word

YIELDS = int(os.environ.get("RAY_SHM_YIELDS", "20"))
IDLE_PARK = 0.5  # seconds; how often a sleeper looks up by itself: at most 2 wake-ups a second
CANCEL_PARK = 0.05  # seconds, while a threading.Event is watched: it cannot wake a futex
SLOW_YIELD = 500_000  # ns
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
        at = deadline.at
        while True:
            seen = word.load()  # SYNC POINT: word before state; the other side changes state, then the word
            if ready():
                return True
            if at is None:
                seconds = longest_park
            elif deadline.expired():
                return False
            else:
                seconds = deadline.slice(longest_park)
            self.parks += 1
            word.wait(seen, seconds)
            if ready():
                return True
            if on_park is not None:
                on_park()
            if word.load() != seen and self._spin(ready):  # something has happened, and more may come
                return True

    def _spin(self, ready: Callable[[], bool]) -> bool:
        before = _now()
        if before < self._banned_until:
            return False
        for number in range(YIELDS):
            if ready():
                self.yields += number
                return True
            _yield()
            now = _now()
            if now - before > SLOW_YIELD:
                self.yields += number
                self._banned_until = now + self._ban
                self._ban = min(2 * self._ban, _LONGEST_BAN)
                return ready()
            before = now
        self.yields += YIELDS
        self._ban = _FIRST_BAN
        return False
