"""A death is noticed whatever ends the process, told once and at once, and explained a moment later.

The first half needs plain processes only; the second half watches real Ray actors that block in `run`, as workers do.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from word_holder import ENDINGS, Holder, end

from ray_shm import death_word
from ray_shm.actors.supervision import DeathWatch
from ray_shm.death_word import SLOT_BYTES, DeathWords, hold
from ray_shm.errors import RpcError, WorkerDiedError
from ray_shm.exit_cause import ExitWatch, describe
from ray_shm.placement.topology import RankPlace, WorkerPlace
from ray_shm.segment import Segment, SegmentRef

WATCHDOG = 60.0  # seconds; only a hang comes near
needs_words = pytest.mark.skipif(not death_word.has_futex_waitv(), reason="no futex_waitv (Linux < 5.16, or refused)")

# --- plain processes -------------------------------------------------------------------------------------------------


class Board:
    """Death words of peers, one slot each, and the deaths told."""

    def __init__(self) -> None:
        self.segment = Segment.create(4096, "test-board")
        self.words = DeathWords()
        self.told: queue.Queue[Any] = queue.Queue()

    @staticmethod
    def slot(rank: int) -> int:
        return SLOT_BYTES * (rank + 1)

    def hold(self, rank: int, holder: Holder) -> int:
        holder.hold(self.segment.ref, self.slot(rank))
        return holder.pid

    def watch(self, rank: int, pid: int, name: object = None) -> Callable[[], None]:
        name = rank if name is None else name
        ended = self.words.watch(self.segment.view, self.slot(rank), pid, lambda: self.told.put(name))
        assert ended is not None
        return ended

    def next(self) -> Any:
        return self.told.get(timeout=WATCHDOG)

    def close(self) -> None:
        self.words.close()
        self.words.close()
        self.segment.close()
        del self.segment  # pytest holds this object a moment longer


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.close()
    assert made.told.empty()  # nobody was told of twice, nor of a living process


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    """Two bare processes."""
    made = [Holder(), Holder()]
    yield made
    for one in made:
        one.close()


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder()
    yield made
    made.close()


@needs_words
@pytest.mark.parametrize("how", ENDINGS)
def test_the_word_and_the_exit_status_tell_of_any_end(holder: Holder, board: Board, how: str) -> None:
    board.watch(0, board.hold(0, holder))
    ended = ExitWatch(holder.pid)
    assert ended.status() is None
    assert not ended.has_ended()
    holder.run("touch", 64)
    holder.start("end", how)
    assert board.next() == 0
    holder.process.wait(WATCHDOG)
    status, kernel_tells = ended.status(), ended.events == 0
    assert ended.has_told()
    ended.close()
    ended.close()
    if not kernel_tells:
        pytest.skip("this kernel does not say how a process ended that is reaped")
    assert status is not None
    assert describe(status).text.removesuffix(", core dumped") == ENDINGS[how][1]


def test_a_zombie_tells_without_the_ioctl(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_shm.exit_cause._GET_INFO", 0)  # as on an old kernel: ENOTTY
    ended = ExitWatch(holder.pid)
    holder.start("end", "os._exit")
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert ended.has_told()
    assert ended.status() == 3 << 8
    holder.process.wait(WATCHDOG)
    assert ended.status() is None
    ended.close()


@needs_words
def test_one_thread_tells_who_died(holders: list[Holder], board: Board) -> None:
    for rank, holder in enumerate(holders):
        board.watch(rank, board.hold(rank, holder))
    holders[1].process.kill()
    assert board.next() == 1
    assert len([t for t in threading.enumerate() if t.name == "ray_shm-death-words"]) == 1
    holders[0].process.stdin.close()  # a normal end
    assert board.next() == 0


@needs_words
def test_a_word_may_be_watched_before_it_is_held_and_after_its_holder_died(holders: list[Holder], board: Board) -> None:
    first, second = holders
    board.watch(0, first.pid, "before it is held")
    board.hold(0, first)
    first.process.kill()
    assert board.next() == "before it is held"
    board.watch(0, first.pid, "after the death")
    assert board.next() == "after the death"
    board.watch(0, second.pid, "the next in the same slot")  # whose word still tells of the first
    board.hold(0, second)
    second.process.kill()
    assert board.next() == "the next in the same slot"


@needs_words
def test_the_end_of_a_forked_child_says_nothing(holder: Holder, board: Board) -> None:
    board.watch(0, board.hold(0, holder))
    for how in ("SIGKILL", "os._exit"):
        assert holder.run("fork", how)
    word = memoryview(board.segment.view).cast("I")[board.slot(0) // 4]
    assert word == 0x80000000 | holder.pid  # still held, still with the bit that has the kernel wake us
    holder.process.kill()
    assert board.next() == 0


@needs_words
def test_ended_watches_and_released_words_tell_nothing(holders: list[Holder], board: Board) -> None:
    unwatch = board.watch(0, board.hold(0, holders[0]), "unwatched")
    board.watch(1, board.hold(1, holders[1]), "released")
    unwatch()
    unwatch()
    holders[1].run("release")
    for holder in holders:
        holder.close()
    board.words.close()  # joins the thread: what it had to tell it has told
    assert board.words.watch(board.segment.view, board.slot(0), 1, print) is None


@needs_words
def test_words_may_be_closed_by_whom_they_tell(holder: Holder, board: Board) -> None:
    board.hold(0, holder)
    board.words.watch(
        board.segment.view, board.slot(0), holder.pid, lambda: (board.words.close(), board.told.put("closed"))
    )
    holder.process.kill()
    assert board.next() == "closed"


@needs_words
def test_no_more_words_than_the_kernel_takes() -> None:
    board, words = memoryview(bytearray(SLOT_BYTES)), DeathWords()
    assert all(words.watch(board, 0, 1, print) for _ in range(death_word.MOST_WORDS))
    assert words.watch(board, 0, 1, print) is None
    words.close()


def test_only_the_main_thread_holds(holder: Holder) -> None:
    assert "must be held by the main thread" in holder.run("hold_on_a_thread")


def test_where_the_kernel_refuses_pidfds_alone_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(death_word, "_SYS_FUTEX_WAITV", -1)  # as under a seccomp filter: ENOSYS
    death_word.has_futex_waitv.cache_clear()
    try:
        assert not death_word.has_futex_waitv()
        assert DeathWords().watch(memoryview(bytearray(SLOT_BYTES)), 0, 1, print) is None
    finally:
        monkeypatch.undo()
        death_word.has_futex_waitv.cache_clear()


# --- Ray actors ------------------------------------------------------------------------------------------------------


class Blocking:
    """As a worker: `run` keeps the main thread until something ends it."""

    def place(self, ref: SegmentRef | None, offset: int) -> WorkerPlace:
        if ref is not None:
            segment = Segment.attach(ref)
            hold(segment.view, offset)
        self._go, there = os.pipe()
        fifo = f"/proc/{os.getpid()}/fd/{there}"  # whoever writes there has `run` go on
        return WorkerPlace(0, fifo, "10.0.0.2", os.getpid(), (), None)

    def run(self, how: str) -> None:
        os.read(self._go, 1)
        if how in ENDINGS:
            end(how)
        if how == "raise":
            raise ValueError("no\nmore")
        if how == "exit_actor":
            ray.actor.exit_actor()


class Watched:
    """A watch over fresh actors, and what it told."""

    def __init__(self, words: bool) -> None:
        self.board = Segment.create(4096, "test-board") if words else None
        self.reports: queue.Queue[tuple[WorkerDiedError, str]] = queue.Queue()
        self.explained: queue.Queue[tuple[WorkerDiedError, str]] = queue.Queue()
        self.watch = DeathWatch(self._report, None if self.board is None else self.board.view)
        self.watch.subscribe(self._broken)
        self.watch.subscribe(lambda death: self.explained.put((death, threading.current_thread().name)))
        self.actors: dict[int, Any] = {}
        self.places: dict[int, WorkerPlace] = {}

    def _report(self, death: WorkerDiedError) -> None:
        self.reports.put((death, str(death)))  # the text waits for nothing here

    def _broken(self, death: WorkerDiedError) -> None:
        raise LookupError("a subscriber's own trouble")

    def start(self, *how: str, first_rank: int = 0) -> None:
        """One actor for each way to end; `replace` where a rank has one."""
        ranks = range(first_rank, first_rank + len(how))
        ref = None if self.board is None else self.board.ref
        actors = {rank: ray.remote(num_cpus=0)(Blocking).remote() for rank in ranks}
        places = ray.get([actors[rank].place.remote(ref, self.slot(rank) or 0) for rank in ranks], timeout=WATCHDOG)
        for rank, place, then in zip(ranks, places, how, strict=True):
            watch = self.watch.replace if rank in self.actors else self.watch.add
            self.actors[rank], self.places[rank] = actors[rank], place
            watch(
                rank, RankPlace(rank, rank, 0, place), actors[rank].run.remote(then), visible=True, slot=self.slot(rank)
            )

    def slot(self, rank: int) -> int | None:
        return None if self.board is None else SLOT_BYTES * (rank + 1)

    def add_remote(self, rank: int, sleeper: tuple[WorkerPlace, Any]) -> None:
        """A rank that only Ray and its connection tell of."""
        place, run = sleeper
        self.watch.add(rank, RankPlace(rank, rank, 0, place), run, visible=False)

    def go(self, rank: int) -> None:
        with open(self.places[rank].node_id, "wb", buffering=0) as pipe:
            pipe.write(b".")

    def next(self) -> WorkerDiedError:
        """The next death: reported once, explained once, on the thread for it."""
        death, _ = self.reports.get(timeout=WATCHDOG)
        again, thread = self.explained.get(timeout=WATCHDOG)
        assert again is death
        assert thread == "ray_shm-on-death"
        return death

    def close(self) -> None:
        self.watch.stop()
        self.watch.stop()
        for actor in self.actors.values():
            if ray.is_initialized():
                ray.kill(actor)
        self.actors.clear()
        if self.board is not None:
            self.board.close()
            self.board = None  # pytest holds this object a moment longer
        assert self.reports.empty()
        assert self.explained.empty()


@pytest.fixture
def watched(own_ray: None, request: pytest.FixtureRequest) -> Iterator[Watched]:
    made = Watched(words=getattr(request, "param", True))
    yield made
    made.close()


@pytest.fixture(scope="module")
def sleeper(own_ray: None) -> Iterator[tuple[WorkerPlace, Any]]:
    """Place of an actor that lives, and the reference of its `run`."""
    actor = ray.remote(num_cpus=0)(Blocking).remote()
    place = ray.get(actor.place.remote(None, 0), timeout=WATCHDOG)
    yield place, actor.run.remote("return")
    if ray.is_initialized():
        ray.kill(actor)


def test_deaths_of_actors_are_told_at_once_and_explained_later(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.start("SIGKILL", "SIGSEGV", "os._exit")
    for rank, how in enumerate(["SIGKILL", "SIGSEGV", "os._exit"]):
        watched.go(rank)
        death = watched.next()
        assert (death.rank, death.pid, death.node) == (rank, watched.places[rank].pid, "10.0.0.2")
        assert death.cause.removesuffix(", core dumped") == ENDINGS[how][1]
    assert "a subscriber's own trouble" in caplog.text


@pytest.mark.parametrize("watched", [False], indirect=True, ids=["pidfds"])
def test_a_replaced_rank_is_watched_anew(watched: Watched) -> None:
    pids = []
    for _ in range(2):
        watched.start("SIGKILL")
        pids.append(watched.places[0].pid)
        watched.go(0)
        death = watched.next()
        assert (death.pid, death.signal) == (pids[-1], 9)
    assert len(set(pids)) == 2


def test_what_ray_says_counts_where_it_says_something(watched: Watched, sleeper: tuple[WorkerPlace, Any]) -> None:
    watched.start("killed", "exit_actor", "raise", "return")
    ray.kill(watched.actors[0])
    death = watched.next()
    assert (death.cause, death.exit_code) == ("killed by `ray.kill`", 1)
    watched.go(1)
    assert "exit_actor() is called" in watched.next().cause
    watched.go(2)
    assert watched.next().cause == "its loop raised ValueError: no more"
    watched.watch.remove(3)
    watched.watch.lost(3, "nobody listens")
    watched.go(3)
    watched.add_remote(4, sleeper)
    watched.watch.lost(4, "its connection broke")
    watched.watch.lost(4, "told once")
    assert watched.next().cause == "unknown: its connection broke, and Ray has not said why"


def test_stop_leaves_no_reader_waiting_and_expects_all_ends(watched: Watched, sleeper: tuple[WorkerPlace, Any]) -> None:
    watched.add_remote(0, sleeper)
    watched.add_remote(1, sleeper)
    watched.watch.lost(0, "its connection broke")
    death, at_once = watched.reports.get(timeout=WATCHDOG)
    assert "unknown" in at_once
    watched.watch.stop()
    assert death.cause == "unknown: its connection broke, and Ray has not said why"
    watched.watch.lost(1, "after the end")


def test_the_report_may_stop_the_watch(sleeper: tuple[WorkerPlace, Any]) -> None:
    causes = queue.Queue[str]()
    place, run = sleeper

    def stop(death: WorkerDiedError) -> None:
        watch.stop()
        causes.put(death.cause)

    watch = DeathWatch(stop)
    watch.subscribe(causes.put)
    watch.add(0, RankPlace(0, 0, 0, place), run, visible=True)
    watch.lost(0, "its connection broke")
    assert "unknown" in causes.get(timeout=WATCHDOG)
    watch.stop()
    assert causes.empty()


def test_a_subscriber_may_stop_the_watch(watched: Watched, sleeper: tuple[WorkerPlace, Any]) -> None:
    stopped = threading.Event()
    watched.watch.subscribe(lambda death: (watched.watch.stop(), stopped.set()))
    watched.add_remote(0, sleeper)
    watched.watch.lost(0, "its connection broke")
    watched.next()
    assert stopped.wait(WATCHDOG)


def test_an_rpc_error_comes_whole_through_ray(watched: Watched) -> None:
    failures = {1: ValueError("no"), 3: WorkerDiedError(3, 81, "10.0.0.2", "its node is gone")}
    error = RpcError("call 7 'train'", failures, [2], targets=4, late_where={2: "running"})
    again = ray.get(ray.put(error), timeout=WATCHDOG)
    assert (type(again), str(again), again.late_ranks) == (RpcError, str(error), [2])

    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise error

    with pytest.raises(RpcError) as caught:
        ray.get(fail.remote(), timeout=WATCHDOG)
    assert str(error) in str(caught.value)
    assert isinstance(caught.value.root_cause, WorkerDiedError)
    assert list(caught.value.failures) == [1, 3]
    only = caught.value.subgroup(ValueError)
    assert only is not None
    assert (
        str(only)
        == "call 7 'train' failed on 1 of 4 ranks: rank 1: ValueError: no; no outcome yet from rank 2 (running)"
    )


def test_ray_may_be_shut_down_under_the_watch(watched: Watched) -> None:
    """The last test, since no Ray remains."""
    watched.start("return")
    ray.shutdown()
    assert watched.next().rank == 0
