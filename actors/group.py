"""ActorGroup: the handle that users hold. Runs in the driver's process. Thin: state lives in GroupRuntime."""

from __future__ import annotations

import html
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ray_shm.actors.call import REDUCTIONS, Reduce
from ray_shm.actors.future import RpcFuture
from ray_shm.actors.runtime import CLOSE_TIMEOUT, GroupRuntime
from ray_shm.actors.wire import Method
from ray_shm.deadline import Deadline


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker of a group. transport: "shm" or "zmq". state: "alive" or "dead", as known when asked."""

    rank: int
    local_rank: int
    node_id: str
    node_ip: str
    pid: int
    gpu_ids: tuple[str, ...]
    transport: str
    state: str


class ActorGroup:
    """A running group of workers, made by `ray_shm.launch`. Any thread may call it. A context manager.

    Dropped without `close()`, it is closed with a ResourceWarning; at interpreter exit it is closed silently.
    """

    def __init__(self, runtime: GroupRuntime) -> None:
        self._runtime = runtime
        self._finalizer = weakref.finalize(self, _close_dropped, runtime)
        self._finalizer.atexit = False  # the runtime has its own hook, which runs before Ray's

    @property
    def world_size(self) -> int:
        return len(self._runtime.ranks)

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers in rank order."""
        dead = self._runtime.dispatcher.dead
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
            After each of these the group is usable, but for ranks that died.
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
        """`collective_rpc` without blocking the event loop. Cancelling the awaiting task drops the call's replies."""
        return await self.collective_rpc(
            method,
            timeout,
            args,
            kwargs,
            non_block=True,
            target_ranks=target_ranks,
            unique_reply_rank=unique_reply_rank,
            reduce=reduce,
        )

    def check_health(self, timeout: float | None = 10.0) -> None:
        """Have every rank answer within `timeout` seconds.

        Raises:
            RpcError: ranks are dead. RpcTimeoutError: ranks are late. GroupClosedError.
        """
        self._runtime.check_health(timeout)

    def close(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Let calls in flight finish for at most `timeout` seconds, end the workers, and free everything.

        Ranks that are still busy then are killed. Idempotent, from any thread; afterwards calls raise GroupClosedError.
        """
        self._finalizer.detach()
        self._runtime.close(timeout)

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

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [
                str(w.rank),
                str(w.local_rank),
                w.node_ip,
                str(w.pid),
                ",".join(w.gpu_ids) or "-",
                w.transport,
                w.state,
            ]
            for w in self.workers
        ]
        return ["rank", "local rank", "node", "pid", "GPU", "transport", "state"], rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head, rows = self._table()
        table = Table(*head, title=repr(self).strip("<>"), title_justify="left")
        for row in rows:
            table.add_row(*row)
        yield table

    def _repr_html_(self) -> str:
        head, rows = self._table()
        th = "".join(f"<th>{html.escape(h)}</th>" for h in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        return f"<b>{html.escape(repr(self).strip('<>'))}</b><table><tr>{th}</tr>{body}</table>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's plain text: the same table."""
        console = Console(width=100, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        printer.text(capture.get().rstrip())


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


def _close_dropped(runtime: GroupRuntime) -> None:
    if not runtime.closed:
        warnings.warn(
            f"an actor group ({runtime.summary()}) was dropped without close(); closing it. "
            "Use `with ray_shm.launch(...) as actor:` or call close().",
            ResourceWarning,
            stacklevel=2,
        )
        runtime.close()
