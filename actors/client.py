"""ClientRuntime: what an ActorGroup refers to in a process that is a client of a driver actor.

Calls run here as in a local driver, with a Dispatcher of their own; only their frames go through the actor (relay.py).
Joined on first use, so that a handle can be pickled into a Ray task and costs nothing where it is not used.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.cloudpickle

from ray_shm import codec, death_watch
from ray_shm.actors import admission, driver_line, standing, termination
from ray_shm.actors.admission import CALLS_PER_CLIENT, Ranks
from ray_shm.actors.call import Call, CallOptions, closed_error
from ray_shm.actors.dispatcher import Dispatcher
from ray_shm.actors.driver_line import DriverLine, RayDriverLine, ShmDriverLine, gone_error
from ray_shm.actors.rank import Rank, summary
from ray_shm.actors.reports import GroupStats
from ray_shm.actors.runtime import CLOSE_TIMEOUT
from ray_shm.actors.spec import Groups
from ray_shm.actors.status_board import Standing, StatusBoard
from ray_shm.actors.worker import ping
from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, RayShmError, RpcError, RpcTimeoutError, WorkerDiedError
from ray_shm.late_cause import WAIT, DeathCause, LateCause
from ray_shm.placement.bundles import remove_abandoned
from ray_shm.segment import AttachError, pid_space

logger = logging.getLogger("ray_shm")

_TURN = 0.02  # seconds between looks while something other than a call is awaited
_SLACK = 30.0  # seconds beyond a timeout for the driver actor to say that it has come
_JOIN = 2.0  # seconds for a subscriber that is at work when the handle is closed
_NEVER = Deadline.after(None)
_SILENT = CallOptions(slow_call_warning=None)

Subscriber = Callable[[WorkerDiedError], object]


@dataclass(frozen=True)
class Ticket:
    """Admits to a driver actor; picklable wherever Ray's actor handles are. label: of the actor, for people."""

    actor: Any
    label: str


class ClientRuntime:
    """One process's share in a group. `owned`: this process launched it, and `close` ends it."""

    def __init__(self, ticket: Ticket, owned: bool = False) -> None:
        self.ticket = ticket
        self.owned = owned
        self._lock = threading.RLock()
        self._line: DriverLine | None = None
        self._dispatcher: Dispatcher | None = None
        self._board: StatusBoard | None = None
        self._ranks: dict[int, Rank] = {}
        self._worker_name = "?"
        self._heals = 0
        self._healing = False
        self._causes: dict[tuple[int, int], LateCause] = {}  # (rank, pid) of deaths whose cause is to come
        self._cause_calls: list[Call] = []  # what the callback thread awaits until then
        self._end_watch: Callable[[], None] | None = None
        self._subscribers: list[Subscriber] = []
        self._told: queue.SimpleQueue[WorkerDiedError | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None
        self._closed = False

    # ---- joining --------------------------------------------------------------------------------------------------

    @property
    def dispatcher(self) -> Dispatcher:
        """Joins first. Raises GroupClosedError, StartError."""
        return self._dispatcher if self._dispatcher is not None else self.join()

    def join(self) -> Dispatcher:
        with self._lock:
            if self._dispatcher is not None:
                return self._dispatcher
            if self._closed:
                raise closed_error()
            codec.use_cloudpickle(ray.cloudpickle)
            line = driver_line.join(self.ticket.actor, self.owned)
            try:
                dispatcher = self._start(line)
            except BaseException:
                line.close()
                raise
            self._line, self._dispatcher = line, dispatcher
            atexit.register(self.close)  # before Ray's own hook, which was registered earlier
            return dispatcher

    def _start(self, line: DriverLine) -> Dispatcher:
        welcome = line.welcome
        options = replace(welcome.options, where=self.where)
        first_id = welcome.number * CALLS_PER_CLIENT + 1
        dispatcher = Dispatcher(
            line.requests, line.control, line.replies, len(welcome.ranks.ranks), options, first_id=first_id
        )
        self._worker_name = welcome.worker_name
        same_space = welcome.pid_space == pid_space()
        self._see(welcome.ranks, same_space)
        dispatcher.epoch = welcome.ranks.epoch
        for death in welcome.deaths:
            dispatcher.report_death(death)
        dispatcher.on_news = lambda news: self._on_news(dispatcher, line, same_space, news)
        dispatcher.await_heal = self._await_heal
        if isinstance(line, ShmDriverLine):
            if welcome.board is not None:
                with contextlib.suppress(AttachError):
                    self._board = StatusBoard.attach(welcome.board)
            cut = gone_error("it closed the way to this process, which had not read its replies")
            dispatcher.add_poll(lambda: self._end(dispatcher, line, cut) if line.is_cut() else None)
            self._end_watch = death_watch.watch(
                welcome.pid, welcome.started, lambda: self._on_driver_death(dispatcher, line)
            )
        elif isinstance(line, RayDriverLine):
            dispatcher.add_source(line)
            line.ring = lambda: dispatcher.lead.bell.ring()
            line.lost = lambda why: self._end_far(dispatcher, line, why)
            line.start()
        return dispatcher

    def _see(self, ranks: Ranks, same_space: bool) -> None:
        self._ranks = {rank: replace(e, visible=e.visible and same_space) for rank, e in ranks.ranks.items()}
        self._heals, self._healing = ranks.heals, ranks.healing

    # ---- what the actor tells; by the leader ----------------------------------------------------------------------

    def _on_news(self, dispatcher: Dispatcher, line: DriverLine, same_space: bool, news: tuple[Any, ...]) -> None:
        kind, *rest = news
        if kind == admission.DEATH:
            self._on_death(dispatcher, *rest)
        elif kind == admission.CAUSE:
            self._on_cause(*rest)
        elif kind == admission.RANKS:
            ranks: Ranks = rest[0]
            self._see(ranks, same_space)
            for rank in dispatcher.dead.keys() - ranks.dead:
                dispatcher.revive(rank)
            dispatcher.epoch = ranks.epoch
        elif kind == admission.CLOSED:
            self._end(dispatcher, line, GroupClosedError(f"the actor group was closed: {rest[0]}"))

    def _on_death(self, dispatcher: Dispatcher, rank: int, pid: int, healing: bool) -> None:
        place = self._ranks[rank].place.place
        self._healing = healing
        if place.pid != pid:
            return
        late = self._causes[rank, pid] = LateCause()
        dispatcher.report_death(WorkerDiedError(rank, pid, place.node_ip, late))
        # Whoever reads the cause waits for it without leading: another thread has to take it in.
        call = Call(dispatcher.new_id(), "cause of a death", (rank,), None, None, Deadline.after(WAIT), _SILENT)
        self._cause_calls.append(call)
        dispatcher.serve(call)

    def _on_cause(self, rank: int, pid: int, cause: DeathCause) -> None:
        late = self._causes.pop((rank, pid), None)
        if late is not None:
            late.fill(cause)
        if not self._causes:
            for call in self._cause_calls:
                call.finish()
            self._cause_calls.clear()
        if self._subscribers:
            node_ip = self._ranks[rank].place.place.node_ip
            self._told.put(WorkerDiedError(rank, pid, node_ip, cause))

    # ---- the actor's end ------------------------------------------------------------------------------------------

    def _on_driver_death(self, dispatcher: Dispatcher, line: DriverLine) -> None:
        """On the watching thread, which must not wait: what the actor said last is to be taken in first."""

        def look_and_end() -> None:
            with contextlib.suppress(RayShmError):
                with dispatcher.lead.held():
                    pass  # who led has drained before
                dispatcher.drain_if_free()
            welcome = line.welcome
            self._end(dispatcher, line, gone_error(f"its process {welcome.pid} on node {welcome.node_ip} ended"))
            _free_bundles(line)

        threading.Thread(target=look_and_end, name="ray_shm-driver-ended", daemon=True).start()

    def _end_far(self, dispatcher: Dispatcher, line: DriverLine, why: str) -> None:
        """On the thread that receives."""
        self._end(dispatcher, line, gone_error(why))
        _free_bundles(line)

    def _end(self, dispatcher: Dispatcher, line: DriverLine, error: Exception) -> None:
        """Nothing more will come; the first reason counts."""
        if line.ended is None:
            line.fail(error)
            dispatcher.fail(error)

    # ---- what an ActorGroup asks for ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed or (self._line is not None and self._line.ended is not None)

    @property
    def ranks(self) -> Mapping[int, Rank]:
        if self._dispatcher is None and not self._closed:
            self.join()
        return self._ranks

    @property
    def dead(self) -> Mapping[int, WorkerDiedError]:
        if self._dispatcher is None:
            return {}
        self._take_news()
        return self._dispatcher.dead

    def summary(self) -> str:
        if self._dispatcher is None:
            return f"of {self.ticket.label}, not joined yet"
        return f"{summary(self._worker_name, self._ranks)} and {self.ticket.label}"

    def where(self, rank: int) -> str:
        """Where a rank is and what it does, in words."""
        return self._ranks[rank].where(self._board)

    def row(self, rank: int) -> Standing | None:
        """What the rank wrote into shared memory; None where this process cannot reach that."""
        return self._ranks[rank].row(self._board)

    def standings(self, timeout: float) -> dict[int, Standing]:
        return standing.standings(self._live_dispatcher(), self.row, timeout)

    def stacks(self, ranks: Sequence[int], timeout: float) -> dict[int, str]:
        return standing.stacks(self._live_dispatcher(), self._ranks, ranks, timeout)

    def stats(self) -> GroupStats:
        dispatcher = self.dispatcher
        dead = tuple(sorted(self.dead))
        return GroupStats(
            dispatcher.calls, dispatcher.in_flight, dispatcher.dropped, dead, self._heals, dispatcher.epoch
        )

    def check_health(self, timeout: float | None) -> None:
        """Raises RpcError or RpcTimeoutError."""
        self.dispatcher.call(ping, timeout)

    def heal(self, timeout: float | None) -> list[int]:
        """By the driver actor; returns once this process knows of it, too."""
        dispatcher = self._live_dispatcher()
        if timeout is not None and timeout > threading.TIMEOUT_MAX:  # infinite, say
            timeout = None
        wait = None if timeout is None else timeout + _SLACK
        healed, epoch = driver_line.ask(self.ticket.actor.heal, timeout, timeout=wait)
        self._await(dispatcher, lambda: dispatcher.epoch >= epoch, Deadline.after(_SLACK))
        return list(healed)

    def create_groups(self, groups: Groups, backend: str, timeout: float | None) -> None:
        """By the driver actor, after this process's calls under way."""
        self._ask_in_order(self.ticket.actor.create_groups, groups, backend, timeout)

    def destroy_groups(self, names: Sequence[str], timeout: float | None) -> None:
        """By the driver actor, after this process's calls under way."""
        self._ask_in_order(self.ticket.actor.destroy_groups, names, timeout)

    def _ask_in_order(self, method: Any, *args: Any) -> None:
        """`args` end with the timeout. What this process has sent travels another way, and may be slower."""
        dispatcher, deadline = self._live_dispatcher(), Deadline.after(args[-1])
        if dispatcher.in_flight:
            self._await_sent(dispatcher, deadline)
        left = deadline.remaining()
        driver_line.ask(method, *args[:-1], left, timeout=None if left is None else left + _SLACK)

    def _await_sent(self, dispatcher: Dispatcher, deadline: Deadline) -> None:
        """Until the living ranks have executed what this process sent. Raises as Dispatcher.wait."""
        while living := dispatcher.alive:
            with contextlib.suppress(RpcError):  # one has just died
                fence = dispatcher.submit(ping, (), {}, living, None, None, deadline)
                dispatcher.wait(fence, deadline)
                return

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        dispatcher = self._live_dispatcher()
        with self._lock:
            self._subscribers.append(callback)
            if self._teller is None:
                self._teller = threading.Thread(target=self._tell, name="ray_shm-on-death", daemon=True)
                self._teller.start()
                # From now on somebody has to take in news, whether or not there are calls.
                dispatcher.serve(Call(dispatcher.new_id(), "news", (), None, None, _NEVER, _SILENT))

        def end() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return end

    def _tell(self) -> None:
        while (death := self._told.get()) is not None:
            for callback in list(self._subscribers):
                try:
                    callback(death)
                except Exception:
                    logger.exception("a callback for worker deaths raised, for rank %d", death.rank)

    def _live_dispatcher(self) -> Dispatcher:
        dispatcher = self.dispatcher
        self._take_news()
        if self._line is not None and self._line.ended is not None:
            raise copy.copy(self._line.ended)
        return dispatcher

    def _take_news(self) -> None:
        with contextlib.suppress(RayShmError):  # closed meanwhile
            if self._dispatcher is not None:
                self._dispatcher.drain_if_free()

    def _await_heal(self, deadline: Deadline) -> bool:
        """Before a call to a dead rank is refused: somebody may have healed it, or the group does so by itself."""
        dispatcher = self.dispatcher
        self._take_news()
        self._await(dispatcher, lambda: not (dispatcher.dead and self._healing), deadline)
        return not self._healing

    def _await(self, dispatcher: Dispatcher, condition: Callable[[], bool], deadline: Deadline) -> None:
        """Take in news until `condition` holds, the deadline comes, or nothing more will come."""
        turns = Call(dispatcher.new_id(), "news", (), None, None, _NEVER, _SILENT)
        while not (condition() or deadline.expired() or self.closed):
            with contextlib.suppress(RpcTimeoutError):
                dispatcher.wait_once(turns, Deadline.after(deadline.slice(_TURN)))

    # ---- the end --------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """End the group if this process launched it, and it is not detached; else detach."""
        if self.owned:
            self.shutdown(timeout)
        else:
            self.detach(timeout)

    def detach(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Let this process's calls finish, and leave. Idempotent."""
        deadline = Deadline.after(timeout)
        with self._lock:
            dispatcher = self._dispatcher
            if not self._closed and dispatcher is not None:
                dispatcher.refuse_calls()
                self._await(dispatcher, lambda: not dispatcher.in_flight, deadline)
            self._free()

    def shutdown(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """End the group for all its clients, after the calls under way. Idempotent."""
        with self._lock:
            if self._closed:
                return
            if self._dispatcher is not None:
                self._dispatcher.refuse_calls()
            pids = self._driver_pids()
            try:
                if ray.is_initialized() and not self.closed:
                    self._ask_to_end(timeout)
            finally:  # also on Ctrl-C
                try:
                    termination.kill([self.ticket.actor], pids)
                finally:
                    self._free()

    def _ask_to_end(self, timeout: float | None) -> None:
        why = f"pid {os.getpid()} has shut it down"
        end = self.ticket.actor.shutdown.remote(timeout, why)
        deadline = Deadline.after(None if timeout is None else timeout + _SLACK)
        done: list[Any] = []
        while not done and not deadline.expired() and ray.is_initialized():
            # Short waits: a long one crashes when Ray is torn down under it, and replies have to be taken meanwhile.
            done, _ = ray.wait([end], timeout=deadline.slice(0.1))
            self._take_news()
        if done:
            with contextlib.suppress(ray.exceptions.RayError, GroupClosedError):  # it is gone: so is the group
                ray.get(done[0]).get()

    def _driver_pids(self) -> list[int]:
        welcome = self._line.welcome if self._line is not None else None
        visible = welcome is not None and welcome.pid_space == pid_space() and not self.closed
        return [welcome.pid] if welcome is not None and visible else []

    def _free(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._end_watch is not None:
            self._end_watch()
        if self._dispatcher is not None:
            self._dispatcher.close()
        if self._line is not None:
            self._line.close()
        if self._board is not None:
            self._board.close()
        teller = self._teller
        if teller is not None:
            self._told.put(None)
            if teller is not threading.current_thread():
                teller.join(_JOIN)
        if self._dispatcher is not None:
            self._dispatcher.on_news = self._dispatcher.await_heal = None  # what refers back to this


def _free_bundles(line: DriverLine) -> None:
    """The driver actor is gone. Ray keeps the placement group of an actor that is not detached until its job ends, and
    with it the GPUs: so its clients remove it."""
    if line.welcome.bundles is not None:
        remove_abandoned(line.welcome.bundles)
