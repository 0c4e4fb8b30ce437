"""Which members of a coordinator group have come to an operation that takes long, and which have not.

Runs in every worker; imports no torch. A rank counts the collectives that it calls in a group, which is all while they
are quick. Whoever waits longer than its patience writes a mark on the group's store: one key per rank, short text.

    rank 0   ── all_reduce ── "in" ───────────── timeout: "gave-up", closes its sockets, reads the marks ─► names 2
    rank 1        ── all_reduce ── "in" ──────── woken by that: "failed", reads the marks ────────────────► names 2
    rank 2   (elsewhere, and no mark of this collective)

A rank that came less than its patience before the end has no mark yet, so readers wait that long for it; a mark says
how long its rank had waited, which tells those who came before the end from those who came after. send and recv are
not counted and leave a mark only when they fail: gloo ends a connection whose wait is cut short. All work at the store
is done on a thread that is left behind if the store does not answer; then nobody is named, and no error is held up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_shm.deadline import Deadline
from ray_shm.member_process import MemberProcess
from ray_shm.membership import Membership

PATIENCE = 0.25  # seconds that a rank waits before it says so; at most a quarter of the operation's timeout
_GRACE = 0.15  # seconds beyond that, in which the marks of others come
_CAUSE = 0.25  # seconds in which it turns out why a peer closed its connections
_STORE = 0.5  # seconds for a write or a look; a store that takes longer is not asked again
_PAUSE = 0.01  # seconds between two looks
_OUT = ("gave-up", "failed")
_SOURCE_WAITS = "; the source of the object has come to it, and waited for another member"
_PAIRWISE = frozenset(("send", "recv", "send_all", "start_send", "start_recv", "finish"))


class Attempt(Deadline):
    """One operation of this rank, and when it has to be over.

    Attributes:
        number: of the collective, counted from 1; 0 for send and recv.
        primitive, args: of `ProcessGroups`, without the deadline.
    """

    operation: str
    number: int
    primitive: str
    args: Sequence[Any]
    arrivals: Arrivals
    told = False

    @property
    def patience(self) -> float | None:
        """Seconds after which whoever waits for it calls `tell`; None: never, its wait cannot be cut short."""
        return min(PATIENCE, self.timeout / 4) if self.number and self.timeout else None

    @property
    def waited(self) -> float:
        """Seconds till now."""
        return 0.0 if self.at is None or self.timeout is None else time.monotonic() - self.at + self.timeout

    def tell(self) -> None:
        """Writes that this rank waits in the operation."""
        self.told = True
        self.arrivals.write(self, "in")

    def finish(self) -> None:
        """It is over. Does something only if it was long."""
        if self.told:
            self.arrivals.write(self, "left")

    def uncount(self) -> None:
        """It was refused on this rank before anything was sent."""
        if self.number:
            self.arrivals.count -= 1


@dataclass(frozen=True, slots=True)
class Mark:
    """What a rank wrote last. state: "in", "left", "gave-up", "failed". waited: seconds in the operation till then."""

    state: str
    number: int
    waited: float
    operation: str

    @classmethod
    def parse(cls, text: str) -> Mark:
        state, number, waited, operation = text.split(" ", 3)
        return cls(state, int(number), float(waited), operation)

    @property
    def text(self) -> str:
        return f"{self.state} {self.number} {self.waited:.4f} {self.operation}"

    @property
    def place(self) -> str:
        return f"{self.operation}, its collective {self.number}" if self.number else self.operation

    def is_of(self, attempt: Attempt) -> bool:
        if self.state == "left":
            return self.number >= attempt.number  # it was there
        return (self.number, self.operation) == (attempt.number, attempt.operation)


@dataclass(frozen=True, slots=True)
class Account:
    """Why an operation failed, in words, as far as that is known. ranks: global ranks that are late or gone."""

    text: str = ""
    ranks: list[int] = field(default_factory=list)


class Arrivals:
    """One rank's view of one formation of a group; for the group's one thread.

    Attributes:
        count: collectives that this rank has called.
    """

    def __init__(self, store: Any, members: Membership, processes: Mapping[int, MemberProcess]) -> None:
        """Args: store: under the formation's prefix. processes: by rank in the group."""
        self.count = 0
        self._store, self._members, self._processes = store, members, processes
        self._others = [r for r in range(members.world_size) if r != members.rank_in_group]
        self._silent = False  # the store failed, or did not answer in time
        self._marks: dict[int, tuple[Mark, float]] = {}  # of the others, each with when its rank had come, by our clock
        self._ended = float("inf")  # when this rank closed its connections; whoever came after that is late

    def begin(self, operation: str, primitive: str, args: Sequence[Any], seconds: float | None) -> Attempt:
        """The next one, counted."""
        attempt = self.attempt(operation, primitive, args, Deadline.after(seconds), self.count + 1)
        if attempt.number:
            self.count = attempt.number  # last: a signal's handler may raise in any call before
        return attempt

    def attempt(self, operation: str, primitive: str, args: Sequence[Any], deadline: Deadline, number: int) -> Attempt:
        attempt = Attempt(*deadline)
        attempt.operation, attempt.primitive, attempt.args, attempt.arrivals = operation, primitive, args, self
        attempt.number = 0 if primitive in _PAIRWISE else number
        return attempt

    def write(self, attempt: Attempt, state: str) -> None:
        mark = Mark(state, attempt.number, attempt.waited, attempt.operation)
        self._ask(lambda: self._store.set(f"at/{self._members.rank_in_group}", mark.text), _STORE)

    def end(self, attempt: Attempt, gave_up: bool) -> None:
        """Tells the others that this rank is about to close its connections, and takes a first look at their marks."""
        self.write(attempt, "gave-up" if gave_up else "failed")
        self._ask(self._look, _STORE)
        self._ended = time.monotonic()

    def account(self, attempt: Attempt, gave_up: bool, late: Sequence[int] | None) -> Account:
        """Once the connections are closed. Returns within a second.

        Args:
            gave_up: its timeout came; else a peer has closed its connections.
            late: ranks in the group that have not arrived, where the operation knows it by itself.
        """
        if gave_up:
            grace = (attempt.patience or PATIENCE) + _GRACE
            self._watch(lambda: all(self._is_settled(r) for r in self._late(attempt, late)), grace)
            return self._of_late(attempt, self._late(attempt, late), self._silent and late is None)
        self._watch(lambda: bool(self._quitters() or self._gone()), _CAUSE)
        if not self._quitters():
            gone = self._gone()
            return self._of_gone(attempt, gone) if gone else Account(ranks=self._global(late or []))
        self._watch(lambda: not self._late(attempt, None), PATIENCE + _GRACE)
        return self._of_quitters(attempt)

    def close(self) -> None:
        """Lets go of the store, which a traceback would keep open."""
        self._store, self._silent = None, True

    # Who is late

    def _late(self, attempt: Attempt, late: Sequence[int] | None) -> list[int]:
        if late is not None:
            return list(late)
        if attempt.primitive in _PAIRWISE:
            return list(attempt.args[1:2])
        if attempt.primitive == "take":  # of an object, from a queue
            return [r for r in attempt.args[:1] if not self._has_come(r, attempt)]
        if attempt.primitive == "broadcast":
            return self._late_in_tree(attempt, attempt.args[1])
        return self._absent(attempt)

    def _absent(self, attempt: Attempt) -> list[int]:
        return [r for r in self._others if not self._has_come(r, attempt)]

    def _has_come(self, rank: int, attempt: Attempt) -> bool:
        mark, came = self._marks.get(rank, (None, 0.0))
        return mark is not None and mark.is_of(attempt) and came <= self._ended

    def _late_in_tree(self, attempt: Attempt, src: int) -> list[int]:
        """In gloo's broadcast, rank v (counted from `src`) gets the data from v without its highest bit. Whoever sits
        above a waiting rank is in the operation as well, or late. Those below `src` may have left already."""
        size = self._members.world_size
        own = (self._members.rank_in_group - src) % size
        if own == 0:
            children = [1 << i for i in range(size.bit_length()) if 1 << i < size]
            return [r for r in ((src + v) % size for v in children) if not self._has_come(r, attempt)]
        above = own
        while above:
            above &= ~(1 << (above.bit_length() - 1))
            rank = (src + above) % size
            if not self._has_come(rank, attempt):
                return [rank]
        return []

    def _is_settled(self, rank: int) -> bool:
        """Whether no better news of this late rank can come."""
        mark, _ = self._marks.get(rank, (None, 0.0))
        return (mark is not None and mark.state in _OUT) or self._processes[rank].is_gone()

    def _quitters(self) -> list[int]:
        return [r for r, (mark, _) in self._marks.items() if mark.state == "gave-up"]

    def _gone(self) -> list[int]:
        return [r for r in self._others if self._processes[r].is_gone()]

    # In words

    def _of_gone(self, attempt: Attempt, gone: list[int]) -> Account:
        return Account(f"; {self._names('are gone', gone, attempt)}", self._global(gone))

    def _of_late(self, attempt: Attempt, late: list[int], unknown: bool) -> Account:
        what = f"; it timed out after {attempt.timeout} s"
        if attempt.number:
            what += f", as collective {attempt.number} of this group"
        if not late and attempt.primitive == "take":
            return Account(what + _SOURCE_WAITS)
        if not late:
            return Account(f"{what}; all ranks have come to it, the last of them too late")
        if unknown and len(late) > 1:
            gone = self._gone()
            why = f"{what}; who is late is not known, because the group's store does not answer"
            return Account(why + self._of_gone(attempt, gone).text, self._global(gone)) if gone else Account(why)
        unsure = self._may_be_through(attempt, late)
        verb = "have not arrived, or are through with it already" if unsure else "have not arrived"
        return Account(f"{what}; {self._names(verb, late, attempt)}", self._global(late))

    def _of_quitters(self, attempt: Attempt) -> Account:
        quitters = self._quitters()
        who = f"; global ranks {self._global(quitters)} gave up after their timeout"
        if not attempt.number:
            return Account(f"{who}; {self._names('are elsewhere', quitters, attempt)}", self._global(quitters))
        absent = self._late(attempt, None)
        if absent:
            unsure = self._may_be_through(attempt, absent)
            verb = "had not arrived, or were through with it" if unsure else "had not arrived"
            names = self._names(verb, absent, attempt)
            return Account(f"{who}; {names}", self._global(absent))
        if attempt.primitive == "take":
            return Account(who + _SOURCE_WAITS)
        left = [r for r, (mark, _) in self._marks.items() if mark.state in _OUT]
        return Account(f"{who}, before this rank came to collective {attempt.number}", self._global(left))

    def _may_be_through(self, attempt: Attempt, late: Sequence[int]) -> bool:
        """Whether some of `late` may have left again: a broadcast's source waits for one of them, or for more."""
        return attempt.primitive == "broadcast" and attempt.args[1] == self._members.rank_in_group and len(late) > 1

    def _names(self, verb: str, ranks: Sequence[int], attempt: Attempt) -> str:
        return f"global ranks {self._global(ranks)} {verb}: {'; '.join(self._name(r, attempt) for r in ranks)}"

    def _name(self, rank: int, attempt: Attempt) -> str:
        name = f"rank {self._members.ranks[rank]} ({self._processes[rank]})"
        mark, came = self._marks.get(rank, (None, 0.0))
        if mark is None:
            return name
        if mark.state == "left":
            return f"{name} was last seen leaving {mark.place}"
        if attempt.number and mark.is_of(attempt):
            return f"{name} came {came - self._ended:.2f} s too late"
        return f"{name} is in {mark.place}"

    def _global(self, ranks: Sequence[int]) -> list[int]:
        return sorted(self._members.ranks[r] for r in ranks)

    # At the store

    def _watch(self, enough: Callable[[], bool], seconds: float) -> None:
        """Looks at the marks again and again, until that is `enough`."""
        deadline = Deadline.after(seconds)
        while not enough() and not deadline.expired():
            time.sleep(deadline.slice(_PAUSE))
            self._ask(self._look, _STORE)

    def _look(self) -> None:
        for rank in self._others:
            key = f"at/{rank}"
            if self._store.check([key]):
                mark = Mark.parse(bytes(self._store.get(key)).decode())
                known, came = self._marks.get(rank, (None, 0.0))
                if mark != known:
                    same = known is not None and (known.number, known.operation) == (mark.number, mark.operation)
                    self._marks[rank] = mark, came if same else time.monotonic() - mark.waited

    def _ask(self, work: Callable[[], object], seconds: float) -> None:
        """Runs `work` at the store, on a thread: torch's client may wait without limit, for its lock or its server."""
        if self._silent:
            return
        done: list[bool] = []

        def run() -> None:
            with contextlib.suppress(Exception):  # torch raises several kinds where the server is gone
                work()
                done.append(True)

        thread = threading.Thread(target=run, name="ray-shm-arrivals", daemon=True)
        thread.start()
        thread.join(seconds)
        self._silent = not done
