"""What requests and replies look like: frames with a fixed prefix, (epoch, call id) in each.

Runs in the driver and in the workers. A request goes to all ranks through one queue, and names its targets; values
under `Scatter` travel once per target, everything else once. The prefix stands outside of the pickle, so that a call
that cannot be unpickled still gets its error reply, and a relay passes frames on without looking into them.

Request: ``call id, epoch, kind, reply rank, targets | pickle of (method, args, kwargs)``, its buffers, and with Scatter
one frame that counts frames, then those of each target. Reply: ``call id, epoch, status, rank | pickle of the result``.

Two queues lead to the workers. CALL, STREAM, REFORM and STOP go through the request queue, in order, to the thread that
runs user code. CANCEL, CREDIT, STATUS, STACKS, RELEASE and COUNTS go through the control queue to a thread beside it.
"""

from __future__ import annotations

import contextlib
import struct
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_shm import codec
from ray_shm.errors import RemoteError, RemoteExitError, RemoteTraceback
from ray_shm.ring import Buffer

CALL, STOP, STREAM, REFORM, FORM, DISSOLVE = range(6)  # through the request queue
CANCEL, CREDIT, STATUS, STACKS, RELEASE, ABANDON, COUNTS = range(16, 23)  # through the control queue
ORDERS = {FORM: "create groups", REFORM: "re-form groups", DISSOLVE: "destroy groups"}  # in line with the calls
OK, FAILED, ITEM = 0, 1, 2
NEWS = 3  # of the group, to a connected client: not a reply to any call
EVERY_RANK = 0xFFFF  # in place of a reply rank: all of them reply
OWN_VALUES = "ray_shm.own_values"  # key of a rank's own constructor values, no keyword a user could have
_REQUEST = struct.Struct(
    "<QIBxHHH"
)  # call id, epoch, kind, reply rank, number of targets (0: all), common frames (0: all)
_REPLY = struct.Struct("<QIBxH")

Method = str | Callable[..., Any]
# Answer to COUNTS: (name, ranks) of each group -> (epoch, its collectives so far), or None where it is to be formed
# again.
Counts = dict[tuple[str, tuple[int, ...]], tuple[int, int] | None]


def method_name(method: Method) -> str:
    """As messages and the ranks' rows show it."""
    return method if isinstance(method, str) else getattr(method, "__qualname__", "") or repr(method)


class Scatter:
    """A value in args or kwargs that differs by rank: element k goes to the k-th target rank."""

    __slots__ = ("values",)

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)

    def __repr__(self) -> str:
        return f"Scatter({self.values!r})"


@dataclass(frozen=True, slots=True)
class _Part:
    """Stands in the common arguments for element `index` of a rank's own frames."""

    index: int


def scattered(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    for value in args:  # plain loops: generators cost a microsecond more, on every call
        if type(value) is Scatter:
            return True
    return bool(kwargs) and any(type(value) is Scatter for value in kwargs.values())


def split_scatter(
    args: Sequence[Any], kwargs: Mapping[str, Any], n_targets: int
) -> tuple[tuple[Any, ...], dict[str, Any], list[list[Any]]]:
    """(args, kwargs) with placeholders, and for each target its own values.

    Raises:
        ValueError: a Scatter does not have one element per target.
    """
    columns: list[Scatter] = []

    def placeholder(value: Any) -> Any:
        if type(value) is not Scatter:
            return value
        if len(value.values) != n_targets:
            raise ValueError(
                f"Scatter has {len(value.values)} elements for {n_targets} target ranks; give one for each"
            )
        columns.append(value)
        return _Part(len(columns) - 1)

    common_args = tuple(placeholder(v) for v in args)
    common_kwargs = {k: placeholder(v) for k, v in kwargs.items()}
    return common_args, common_kwargs, [[c.values[k] for c in columns] for k in range(n_targets)]


def join_scatter(
    args: Sequence[Any], kwargs: Mapping[str, Any], own: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put a rank's own values in the placeholders."""

    def value(v: Any) -> Any:
        return own[v.index] if type(v) is _Part else v

    return tuple(value(v) for v in args), {k: value(v) for k, v in kwargs.items()}


def encode_call(
    call_id: int,
    epoch: int,
    method: Method,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    targets: Sequence[int] | None,
    n_targets: int,
    reply_rank: int,
    kind: int = CALL,
) -> list[Buffer]:
    """Frames of a call (`kind` STREAM: of one whose items are wanted as they come). `targets` None: all ranks.

    Raises:
        ValueError: a Scatter of the wrong length. Whatever pickling raises.
    """
    if scattered(args, kwargs):
        args, kwargs, parts = split_scatter(args, kwargs, n_targets)
    else:
        parts = []
    prefix = _request_prefix(call_id, epoch, kind, reply_rank, targets, 0)
    frames = codec.encode((method, args, kwargs), prefix)
    if parts:
        head = _REQUEST.pack(call_id, epoch, kind, reply_rank, len(targets or ()), len(frames))
        frames[0] = head + frames[0][len(head) :]
        own = [codec.encode(part) for part in parts]
        frames.append(struct.pack(f"<{len(own)}I", *(len(f) for f in own)))
        for part_frames in own:
            frames.extend(part_frames)
    return frames


def encode_stop(epoch: int) -> list[Buffer]:
    return [_REQUEST.pack(0, epoch, STOP, EVERY_RANK, 0, 1)]


def encode_order(
    kind: int, call_id: int, epoch: int, targets: Sequence[int] | None, payload: object = None
) -> list[Buffer]:
    """A request of the library's own: `payload` is plain data. `targets` None: all ranks."""
    return codec.encode(payload, _request_prefix(call_id, epoch, kind, EVERY_RANK, targets, 0))


def _request_prefix(
    call_id: int, epoch: int, kind: int, reply_rank: int, targets: Sequence[int] | None, common: int
) -> bytes:
    count = len(targets or ())
    prefix = _REQUEST.pack(call_id, epoch, kind, reply_rank, count, common)
    return prefix + struct.pack(f"<{count}H", *targets) if targets else prefix


@dataclass(slots=True)
class Request:
    """A request as a worker sees it; its frames are valid until the message is released."""

    call_id: int
    kind: int
    reply_rank: int
    epoch: int
    position: int | None  # of this rank among the targets; None: not for this rank
    frames: Sequence[Buffer]
    common: int  # frames of the common part
    skip: int  # bytes before the pickle in the first frame
    owned: bool  # the other frames may be kept; see codec.decode
    targets: tuple[int, ...] = ()  # empty: all ranks

    def decode(self) -> tuple[Method, tuple[Any, ...], dict[str, Any]]:
        """Raises whatever unpickling raises."""
        method, args, kwargs = codec.decode(self.frames[: self.common], self.skip, self.owned)
        if len(self.frames) > self.common:
            args, kwargs = join_scatter(args, kwargs, codec.decode(self._own_frames(), 0, self.owned))
        return method, args, kwargs

    def payload(self) -> Any:
        """Of an order. Raises whatever unpickling raises."""
        return codec.decode(self.frames, self.skip, self.owned)

    def _own_frames(self) -> Sequence[Buffer]:
        table = self.frames[self.common]
        counts = struct.unpack(f"<{len(table) // 4}I", table)
        position = self.position or 0
        start = self.common + 1 + sum(counts[:position])
        return self.frames[start : start + counts[position]]


def decode_request(frames: Sequence[Buffer], rank: int, owned: bool = False) -> Request:
    """As rank `rank` sees it."""
    first = frames[0]
    call_id, epoch, kind, reply_rank, count, common = _REQUEST.unpack(first[: _REQUEST.size])
    skip = _REQUEST.size + 2 * count
    position: int | None = rank
    targets: tuple[int, ...] = ()
    if count:
        targets = struct.unpack(f"<{count}H", first[_REQUEST.size : skip])
        position = targets.index(rank) if rank in targets else None
    return Request(call_id, kind, reply_rank, epoch, position, frames, common or len(frames), skip, owned, targets)


def encode_result(call_id: int, epoch: int, rank: int, result: Any, status: int = OK) -> list[Buffer]:
    """Raises whatever pickling raises."""
    return codec.encode(result, _REPLY.pack(call_id, epoch, status, rank))


def text_of(error: BaseException) -> str:
    """str(error), also where that raises."""
    try:
        return str(error)
    except Exception:  # a user's __str__
        return "(its text cannot be shown)"


def encode_failure(call_id: int, epoch: int, rank: int, error: BaseException) -> list[Buffer]:
    """The text always travels; the exception itself where it can be pickled."""
    text = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {text_of(error)}"
    is_exit = isinstance(error, SystemExit | KeyboardInterrupt)
    frames = codec.encode((what, text, is_exit), _REPLY.pack(call_id, epoch, FAILED, rank))
    if isinstance(error, Exception):
        try:
            frames.extend(codec.encode(error))
        except Exception:  # whatever a class's own __reduce__ does: its text stands in for it
            return frames[:1]
    return frames


@dataclass(slots=True)
class Reply:
    """A reply as the driver sees it."""

    call_id: int
    epoch: int
    status: int
    rank: int
    frames: Sequence[Buffer]
    owned: bool  # all frames but the first may be kept; see codec.decode

    def result(self) -> Any:
        """Raises whatever unpickling raises."""
        return codec.decode(self.frames, _REPLY.size, self.owned)

    def what(self) -> str:
        """Of a failure: "ValueError: text", without a look at the exception itself."""
        return str(codec.decode(self.frames[:1], _REPLY.size)[0])

    def error(self) -> Exception:
        """The worker's exception, its traceback as the cause."""
        what, text, is_exit = codec.decode(self.frames[:1], _REPLY.size)
        if is_exit:
            error: Exception = RemoteExitError(f"rank {self.rank} raised {what}; the worker lives on")
        else:
            error = self._original() or RemoteError(f"{what} (the exception itself could not be pickled)")
        with contextlib.suppress(Exception):  # a frozen dataclass refuses even this
            error.__cause__ = RemoteTraceback(text)
        return error

    def _original(self) -> Exception | None:
        if len(self.frames) < 2:
            return None
        try:
            error = codec.decode(self.frames[1:], 0, self.owned)
        except Exception:  # whatever a class's own constructor does: the text stands in for it
            return None
        return error if isinstance(error, Exception) else None


def decode_reply(frames: Sequence[Buffer], owned: bool = False) -> Reply:
    call_id, epoch, status, rank = _REPLY.unpack(frames[0][: _REPLY.size])
    return Reply(call_id, epoch, status, rank, frames, owned)
