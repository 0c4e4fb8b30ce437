"""ActorGroup: the handle that users hold. Thin: state lives in a GroupRuntime, or a ClientRuntime of a driver actor."""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from ray_shm.actors import profiling
from ray_shm.actors.call import REDUCTIONS, Reduce, cancelled_error
from ray_shm.actors.client import ClientRuntime, Ticket
from ray_shm.actors.future import RpcFuture
from ray_shm.actors.group_directory import CREATE_TIMEOUT
from ray_shm.actors.reports import GroupStats, GroupStatus, Sheet, Stacks, WorkerInfo, sheet_of, status_of
from ray_shm.actors.runtime import CLOSE_TIMEOUT, GroupRuntime
from ray_shm.actors.spec import Groups
from ray_shm.actors.stream import RpcStream
from ray_shm.actors.wire import Method
from ray_shm.deadline import Deadline
from ray_shm.errors import RpcTimeoutError, WorkerDiedError


class ActorGroup:
    """A running group of workers, made by `ray_shm.launch` or `connect`. Any thread may call it. A context manager.

    Dropped without `close()`, it is closed with a ResourceWarning; at interpreter exit it is closed silently. A handle
    that is connected to a driver actor detaches instead, silently. Such a handle can be sent to Ray tasks and actors.
    """

    def __init__(self, runtime: GroupRuntime | ClientRuntime) -> None:
        self._runtime = runtime
        self._finalizer = weakref.finalize(self, _close_dropped, runtime)
        self._finalizer.atexit = False  # the runtime has its own hook, which runs before Ray's

    @property
    def world_size(self) -> int:
        return len(self._runtime.ranks)

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers in rank order."""
        dead = self._runtime.dead
        rows = []
        for rank, entry in sorted(self._runtime.ranks.items()):
            place = entry.place.place
            state = "dead" if rank in dead else "closed" if self._runtime.closed else "alive"
            local_rank = entry.place.local_rank
            rows.append(
                WorkerInfo(
                    rank, local_rank, place.node_id, place.node_ip, place.pid, place.gpu_ids, entry.transport, state
                )
            )
        return rows

    def collective_rpc(
        self,
        method: Method,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        non_block: bool = False,
        target_ranks: Sequence[int] | None = None,
        unique_reply_rank: int | None = None,
        reduce: Reduce | None = None,
    ) -> Any:
        """Call `method` on all ranks, or on `target_ranks`, at once.

        Args:
            method: name of a worker's method, or a callable that takes the worker as its first argument.
            timeout: seconds from now; None waits for ever. A late rank goes on, its late reply is dropped.
            args, kwargs: for the method. A `Scatter` value gives the k-th target rank its element k.
            non_block: return an RpcFuture at once.
            target_ranks: ranks to call, each once; results come in this order.
            unique_reply_rank: return this rank's bare result; the others execute, and reply failures only.
            reduce: "equal" (all the same, by value), "min", "max", "sum" (by +), or a callable on the list of results.

        Returns:
            list of results in rank order, or what `non_block`, `unique_reply_rank`, `reduce` say.

        Raises:
            ValueError, TypeError: wrong arguments, or arguments that cannot be pickled; nothing was sent.
            RpcError: ranks raised or died; it holds every outcome known by then. The others get 2 s after an exception,
                none after a death.
            RpcTimeoutError: ranks were late. MismatchError: ``reduce="equal"`` and they differ. GroupClosedError.
            After each of these the group is usable, but for ranks that died, which `heal` replaces. Ctrl-C cancels the
            call, as `RpcFuture.cancel` does.
        """
        targets = self._require_targets(target_ranks, unique_reply_rank)
        _require_call(method, args, kwargs, unique_reply_rank, reduce)
        dispatcher = self._runtime.dispatcher
        deadline = Deadline.after(timeout)
        call = dispatcher.submit(method, args, kwargs or {}, targets, unique_reply_rank, reduce, deadline)
        if non_block:
            return RpcFuture(dispatcher, call)
        dispatcher.wait(call, deadline)
        return call.outcome()

    async def collective_rpc_async(
        self,
        method: Method,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        target_ranks: Sequence[int] | None = None,
        unique_reply_rank: int | None = None,
        reduce: Reduce | None = None,
    ) -> Any:
        """`collective_rpc` without blocking the event loop. Cancelling the awaiting task cancels the call.

        Where there is no room to send, a thread of the loop's default executor waits for it.
        """
        targets = self._require_targets(target_ranks, unique_reply_rank)
        _require_call(method, args, kwargs, unique_reply_rank, reduce)
        dispatcher = self._runtime.dispatcher
        arguments = (method, args, kwargs or {}, targets, unique_reply_rank, reduce, Deadline.after(timeout))
        try:
            call = dispatcher.submit(*arguments, at_once=True)
        except RpcTimeoutError:
            sending = asyncio.ensure_future(asyncio.to_thread(dispatcher.submit, *arguments))
            try:
                call = await asyncio.shield(sending)
            except asyncio.CancelledError:
                sending.add_done_callback(lambda sent: sent.exception() or dispatcher.cancel(sent.result()))
                raise
        return await RpcFuture(dispatcher, call)

    def stream(
        self,
        method: Method,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        target_ranks: Sequence[int] | None = None,
    ) -> RpcStream:
        """Call a generator method (or async generator) on all ranks or `target_ranks`, and take its items as they come.

        Args:
            timeout: seconds from now for the whole stream; None: none. The others: as for `collective_rpc`.

        Returns:
            iterator, and async iterator, of (rank, item); a context manager. Closing it closes the generators.

        Raises:
            as `collective_rpc`, here or where the item would have come. TypeError there: no generator was returned.
        """
        targets = self._require_targets(target_ranks, None)
        _require_call(method, args, kwargs, None, None)
        dispatcher = self._runtime.dispatcher
        call = dispatcher.submit_stream(method, args, kwargs or {}, targets, Deadline.after(timeout))
        try:
            return RpcStream(dispatcher, call)
        except BaseException:  # Ctrl-C: nobody will take the items
            dispatcher.abandon(call, cancelled_error(call))
            raise

    def check_health(self, timeout: float | None = 10.0) -> None:
        """Have every rank answer within `timeout` seconds.

        Raises:
            RpcError: ranks are dead. RpcTimeoutError: ranks are late. GroupClosedError.
        """
        self._runtime.check_health(timeout)

    def heal(self, timeout: float | None = 120.0) -> list[int]:
        """Replace dead ranks: a new process in the same bundle with the same rank and GPUs, its constructor run anew.

        The other ranks keep process, memory and state; calls to them go on. Coordinator groups are formed again under
        a new epoch, in the same objects, when they are next used. Returns the ranks that were replaced.

        Raises:
            StartError: a replacement died, raised, or was late; nothing of it is left, and the ranks are as dead as
                before. PlacementError: it got other GPUs than promised. GroupClosedError.
        """
        return self._runtime.heal(timeout)

    def on_worker_death(self, callback: Callable[[WorkerDiedError], object]) -> Callable[[], None]:
        """Have `callback` called with each death from now on, once its cause is known (or after about a second).

        It runs on a thread of its own, may call the group and `heal`, and what it raises is logged. Returns a function
        that ends this.
        """
        return self._runtime.subscribe(callback)

    def status(self, timeout: float = 0.2) -> GroupStatus:
        """Where every rank stands: a table, readable also while ranks are stuck in C code.

        Args:
            timeout: seconds for the ranks' control threads, which add the collective that a rank is in.
        """
        return status_of(self.workers, self._runtime.standings(timeout))

    def stacks(self, ranks: Sequence[int] | None = None, timeout: float = 1.0) -> Stacks:
        """The Python stacks of all threads of `ranks` (default: all), the main thread's first, by rank.

        Where a rank's control thread does not answer in `timeout` seconds, and it is on this node, a signal has the
        stacks written, which works while C code holds the interpreter's lock.
        """
        return Stacks(self._runtime.stacks(self._require_targets(ranks, None) or range(self.world_size), timeout))

    def profile(self, is_start: bool, *, directory: str | os.PathLike[str] | None = None) -> list[str] | None:
        """Start torch.profiler in every rank, or stop it and write ``rank{N}.json``, a Chrome trace, for each.

        Args:
            is_start: True starts, False stops.
            directory: for the traces, on each rank's node; default: a fresh folder for temporary files.

        Returns:
            None at the start; at the stop, the paths in rank order (``node_ip:path`` for ranks on other nodes).

        Raises:
            RuntimeError: started already, or not started. ValueError: `directory` at the stop. RpcError.
        """
        return profiling.profile(self, is_start, directory)

    def create_groups(self, groups: Groups, backend: str = "auto", timeout: float | None = CREATE_TIMEOUT) -> None:
        """Make coordinator groups, in order with the calls under way; later calls find them by ``ctx.group(name)``.

        Groups may overlap, also in all their ranks, under names of their own. They are released and healed as those of
        `launch`. Any thread may create groups at the same time: all ranks see the same order.

        Args:
            groups: by name, each a list of disjoint lists of ranks, e.g. ``{"pp": [[0, 2], [1, 3]]}``.
            backend: "gloo", "nccl", or "auto" (nccl where there are GPUs).
            timeout: seconds for all members to have connected; ranks that are busy come to it after their calls. None:
                none, but for the 300 s that connected members wait for each other.

        Raises:
            ValueError, TypeError: a name that is taken or reserved, no such rank or backend; nothing was sent.
            RpcError: ranks could not form a group, and why, or are dead. RpcTimeoutError: ranks were late.
            GroupClosedError. After each of these nothing of the groups is left on any rank, once it has come to it.
        """
        self._runtime.create_groups(groups, backend, timeout)

    def destroy_groups(self, names: Sequence[str], timeout: float | None = CREATE_TIMEOUT) -> None:
        """Destroy coordinator groups, created or declared, in order with the calls under way; their names are free.

        Args:
            timeout: seconds for all ranks to have closed their sockets and threads; busy ones do it after their calls.

        Raises:
            ValueError, TypeError: there is no such group, or it is "world"; nothing was sent.
            RpcError, RpcTimeoutError: ranks failed, or were late; the groups are gone all the same, or will be.
            GroupClosedError.
        """
        self._runtime.destroy_groups(names, timeout)

    def stats(self) -> GroupStats:
        """Counters of this handle's process, as they stand now."""
        return self._runtime.stats()

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Let calls in flight finish for at most `timeout` seconds, end the workers, and free everything.

        Ranks that are still busy then are killed. Idempotent, from any thread; afterwards calls raise GroupClosedError.
        A handle from `connect`, or one whose group is detached, only lets go of the group: see `shutdown`.
        """
        self._finalizer.detach()
        self._runtime.close(timeout)

    def shutdown(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """End the group for everybody, also a detached one; otherwise as `close`.

        Calls of other clients that are still under way after `timeout` seconds, and later ones, raise GroupClosedError.
        """
        self._finalizer.detach()
        if isinstance(self._runtime, ClientRuntime):
            self._runtime.shutdown(timeout)
        else:
            self._runtime.close(timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._runtime, ClientRuntime):
            raise TypeError(
                "this actor group cannot be sent to another process: its queues live in this one. "
                'Launch it with driver="actor", or with a name.'
            )
        return _connected, (self._runtime.ticket,)

    def __enter__(self) -> ActorGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_targets(
        self, target_ranks: Sequence[int] | None, unique_reply_rank: int | None
    ) -> tuple[int, ...] | None:
        """The targets, or None for all. Raises ValueError."""
        size = self.world_size
        targets = None if target_ranks is None else tuple(target_ranks)
        if targets is not None:
            wrong = [r for r in targets if not isinstance(r, int) or not 0 <= r < size]
            if wrong or not targets or len(set(targets)) != len(targets):
                raise ValueError(
                    f"target_ranks={list(targets)}: give different ranks of 0..{size - 1}"
                    + (f"; there is no rank {wrong}" if wrong else "")
                )
        if unique_reply_rank is not None and unique_reply_rank not in (range(size) if targets is None else targets):
            raise ValueError(
                f"unique_reply_rank={unique_reply_rank} is none of the target ranks "
                f"{list(range(size) if targets is None else targets)}"
            )
        return targets

    def __repr__(self) -> str:
        state = "closed" if self._runtime.closed else "ready"
        return f"<ActorGroup {self._runtime.summary()}, {state}>"

    def _sheet(self) -> Sheet:
        return sheet_of(repr(self).strip("<>"), self.workers)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._sheet().__rich_console__(console, options)

    def _repr_html_(self) -> str:
        return self._sheet()._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's plain text: the same table."""
        self._sheet()._repr_pretty_(printer, cycle)


def _require_call(
    method: object,
    args: object,
    kwargs: object,
    unique_reply_rank: int | None,
    reduce: str | Callable[..., Any] | None,
) -> None:
    if not isinstance(method, str) and not callable(method):
        raise TypeError(f"method must be a method's name or a callable on the worker, not {method!r}")
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple or a list, not {type(args).__name__}; for one argument: args=(value,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping, not {type(kwargs).__name__}")
    if reduce is not None and unique_reply_rank is not None:
        raise ValueError("reduce needs every rank's result, and unique_reply_rank asks for one: give one of them")
    if reduce is not None and not isinstance(reduce, str) and not callable(reduce):
        raise TypeError(f"reduce must be one of {REDUCTIONS} or a callable on the list of results, not {reduce!r}")
    if isinstance(reduce, str) and reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is none of {REDUCTIONS}; or give a callable on the list of results")


def _connected(ticket: Ticket) -> ActorGroup:
    """A handle in another process; joins when first used."""
    return ActorGroup(ClientRuntime(ticket))


def _close_dropped(runtime: GroupRuntime | ClientRuntime) -> None:
    if isinstance(runtime, ClientRuntime) and not runtime.owned:
        runtime.detach(0.0)
    elif not runtime.closed:
        warnings.warn(
            f"an actor group ({runtime.summary()}) was dropped without close(); closing it. "
            "Use `with ray_shm.launch(...) as actor:` or call close().",
            ResourceWarning,
            stacklevel=2,
        )
        runtime.close()
