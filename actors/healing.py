"""Replaces dead ranks in place: a new process in the same bundle, with the same rank, for the same group.

    make sure the old process is gone -> new actor -> hello -> start (constructor) -> its places in the queues
      -> attach to them -> run and watch -> all re-form their coordinator groups, in order with the calls

The living keep their process, memory and state; nothing of theirs is reloaded. Calls to them go on meanwhile: nobody
has a place in a queue, and so is waited for, before it reads. Runs in the driver's process, on the thread of the
caller, or on one of its own where the group heals by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_shm.actors import termination
from ray_shm.actors.call import closed_error
from ray_shm.actors.recruiting import Lines, Recruit, Recruiter, attach_replies
from ray_shm.actors.spec import Started
from ray_shm.deadline import Deadline
from ray_shm.errors import GroupClosedError, StartError, WorkerDiedError
from ray_shm.locks import acquired
from ray_shm.placement import devices
from ray_shm.placement.topology import RankPlace
from ray_shm.segment import pid_space

if TYPE_CHECKING:
    from ray_shm.actors.runtime import GroupRuntime

logger = logging.getLogger("ray_shm")

AUTO_TIMEOUT = 120.0  # seconds for a replacement that nobody asked for
_ATTEMPTS = 3  # of healing by itself, for one death


class Healer:
    """Replaces the dead ranks of one group; one replacement at a time."""

    def __init__(self, runtime: GroupRuntime, recruiter: Recruiter) -> None:
        self._runtime = runtime
        self._recruiter = recruiter
        self._lock = threading.Lock()
        self.heals = 0  # ranks replaced
        self._deaths = threading.Event()
        self._change = threading.Condition()  # of what follows, and of who is dead
        self._noted = 0  # deaths so far
        self._gave_up = False  # healing by itself, until the next death
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._end_subscription: Callable[[], None] = lambda: None

    def heal(self, timeout: float | None) -> list[int]:
        """Replace every dead rank; see ActorGroup.heal."""
        if timeout is not None and timeout > threading.TIMEOUT_MAX:  # infinite, say
            timeout = None
        deadline = Deadline.after(timeout)
        self._require_open()
        taken = False
        try:
            taken = acquired(self._lock, True, deadline.slice(threading.TIMEOUT_MAX))
            if not taken:
                raise StartError(f"another heal() of this group did not end within {timeout} s")
            self._require_open()
            return self._heal(deadline)
        except Exception as exc:
            if self._stopped and not isinstance(exc, GroupClosedError):
                raise closed_error() from exc
            raise
        finally:
            if taken:
                self._lock.release()
            with self._change:
                self._change.notify_all()

    def _heal(self, deadline: Deadline) -> list[int]:
        dead = dict(self._runtime.dead)
        if dead and deadline.expired():
            raise StartError(f"ranks {sorted(dead)} were not replaced: no time was left of {deadline.timeout} s")
        if dead:
            self._replace(dead, deadline)
            self.heals += len(dead)
        return sorted(dead)

    def _require_open(self) -> None:
        if self._stopped or self._runtime.closed:
            raise closed_error()

    # ---- by itself ------------------------------------------------------------------------------------------------

    def heal_by_itself(self) -> None:
        """From now on heal after each death, and have calls that need a dead rank wait for that."""
        self._thread = threading.Thread(target=self._run, name="ray_shm-heal", daemon=True)
        self._thread.start()
        end = self._runtime.watch.subscribe(lambda death: self._deaths.set())
        self._runtime.dispatcher.await_heal = self._await_whole
        self._end_subscription = end

    def on_death(self) -> None:
        """A rank has just died; nobody else knows yet."""
        with self._change:
            self._noted += 1
            self._gave_up = False

    @property
    def healing(self) -> bool:
        """Whether it heals by itself, and has a death to deal with."""
        return self._thread is not None and not (self._gave_up or self._stopped) and bool(self._runtime.dead)

    def _await_whole(self, deadline: Deadline) -> bool:
        """Until no rank is dead, or it has given up; False: the deadline came first. Raises GroupClosedError."""
        with self._change:
            whole = self._change.wait_for(lambda: not self.healing, deadline.slice(threading.TIMEOUT_MAX))
        if self._stopped:
            raise closed_error()
        return whole

    def stop(self, deadline: Deadline) -> None:
        """The group is being closed: wait for a replacement that is under way, which is then taken back."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._end_subscription()
        self._deaths.set()
        if self._lock.acquire(timeout=deadline.slice(AUTO_TIMEOUT)):
            self._lock.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(deadline.slice(AUTO_TIMEOUT))

    def _run(self) -> None:
        while True:
            self._deaths.wait()
            self._deaths.clear()
            while self.healing:  # again where another one died meanwhile: of that, this thread hears later
                self._heal_patiently()
            if self._stopped:
                return

    def _heal_patiently(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            noted = self._noted
            try:
                if healed := self.heal(AUTO_TIMEOUT):
                    logger.warning("ranks %s had died, and were replaced", healed)
                return
            except Exception as exc:  # whatever a constructor raises; the thread has to go on
                if self._stopped:
                    return
                logger.error("healing failed, attempt %d of %d: %s", attempt, _ATTEMPTS, exc)
        with self._change:
            self._gave_up = self._noted == noted
            self._change.notify_all()

    # ---- the steps ------------------------------------------------------------------------------------------------

    def _replace(self, dead: dict[int, WorkerDiedError], deadline: Deadline) -> None:
        runtime = self._runtime
        old = [runtime.ranks[rank] for rank in dead]
        for rank in dead:
            runtime.watch.remove(rank)
        pids = [entry.place.place.pid if entry.visible else None for entry in old]
        termination.kill([entry.actor for entry in old], pids)  # a lost connection is no dead process
        runtime.actors = [actor for actor in runtime.actors if all(actor is not entry.actor for entry in old)]
        new = {rank: self._recruiter.create(runtime.ranks[rank].position) for rank in sorted(dead)}
        runtime.actors.extend(new.values())
        pids = [None] * len(new)
        try:
            self._require_open()  # it may have been closed before it knew of these
            recruits = self._meet(new, deadline)
            own_space = pid_space()
            pids = [r.hello.place.pid if r.hello.pid_space == own_space else None for r in recruits.values()]
            self._start({rank: self._place(rank, recruit) for rank, recruit in recruits.items()}, deadline)
            self._require_open()
        except BaseException:
            self._take_back(new, pids, dead)
            raise

    def _meet(self, new: dict[int, Any], deadline: Deadline) -> dict[int, Recruit]:
        labels = [f"the replacement of rank {rank}" for rank in new]
        recruits = self._recruiter.meet(list(new.values()), labels, deadline, logger.info)
        runtime = self._runtime
        places = [recruit.hello.place for recruit in recruits]
        living = [entry.place.place for rank, entry in runtime.ranks.items() if rank not in new]
        devices.verify([*living, *places], self._recruiter.resources.gpus)
        return dict(zip(new, recruits, strict=True))

    def _place(self, rank: int, recruit: Recruit) -> tuple[RankPlace, Recruit]:
        """Its numbers stay; so does the way to it, since the queues have it among their local or remote readers."""
        entry = self._runtime.ranks[rank]
        if entry.transport == "shm" and not recruit.hello.attached:
            raise StartError(
                f"the replacement of rank {rank} (pid {recruit.hello.place.pid}, node {recruit.hello.place.node_ip}) "
                f"cannot reach the driver's shared memory as the old one could: {recruit.hello.why_not} Launch anew."
            )
        if entry.transport == "zmq":
            recruit = replace(recruit, hello=replace(recruit.hello, attached=False))
        return replace(entry.place, place=recruit.hello.place), recruit

    def _start(self, places: dict[int, tuple[RankPlace, Recruit]], deadline: Deadline) -> None:
        runtime, recruiter = self._runtime, self._recruiter
        if runtime.requests is None or runtime.control is None:
            raise StartError("the group has no request queue: a bug in ray-shm")
        for rank in places:
            if runtime.board is not None:
                runtime.board.clear(rank)
        if 0 in places:
            runtime.store = recruiter.hold_port(places[0][1], deadline)
        queues = (runtime.requests.handle, runtime.control.handle)
        lines = Lines(*queues, runtime.store, runtime.releaser.new_epoch(), True, runtime.directory.plans)
        started = recruiter.start(places, lines, deadline, logger.info)
        for rank in places:
            runtime.requests.readmit(rank)
            runtime.control.readmit(rank)
        recruiter.attach(places, deadline, logger.info)
        for rank, (place, recruit) in places.items():
            self._take_up(rank, place, recruit, started[rank])
        runtime.dispatcher.epoch += 1
        # The replacements, too: the living may have ordered a formation after these started, or since they are back.
        runtime.directory.order_reform(runtime.releaser.new_epoch(), deadline)
        for rank, death in list(runtime.dead.items()):  # died meanwhile: the replacements do not know
            why = f"pid {death.pid} on node {death.node} died while others were replaced"
            runtime.releaser.release_dead(rank, why)
        try:
            for queue in (runtime.requests, runtime.control):
                queue.wait_until_ready(deadline)
        except TimeoutError as exc:
            raise StartError(f"the replacements of ranks {sorted(places)} started, but do not listen: {exc}") from exc
        for rank in places:
            if rank in runtime.dead:
                raise StartError(f"rank {rank} died as soon as it was replaced: {runtime.dead[rank]}")

    def _take_up(self, rank: int, place: RankPlace, recruit: Recruit, started: Started) -> None:
        """From now on this process is the rank."""
        runtime = self._runtime
        entry = runtime.ranks[rank]
        entry.place, entry.actor = place, recruit.actor
        entry.visible = recruit.hello.pid_space == pid_space()
        entry.stacks_fd = started.stacks_fd
        old = runtime.replies.get(rank)
        reader = attach_replies(rank, started)
        runtime.dispatcher.readmit(rank, reader)
        runtime.run(rank, reader)
        if old is not None:
            old.close()

    def _take_back(
        self, new: Mapping[int, Any], pids: Sequence[int | None], dead: Mapping[int, WorkerDiedError]
    ) -> None:
        """The replacements did not come about: their ranks are as dead as before."""
        runtime = self._runtime
        try:
            for rank in new:
                runtime.watch.remove(rank)
        except StartError:  # the group was closed, and freed, meanwhile
            pass
        finally:
            termination.kill(list(new.values()), pids)
        runtime.actors = [actor for actor in runtime.actors if all(actor is not other for other in new.values())]
        for rank in new:
            for queue in (runtime.requests, runtime.control):
                if queue is not None:
                    queue.drop(rank)
            runtime.dispatcher.report_death(dead[rank])  # where it had been taken up
