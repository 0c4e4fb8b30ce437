"""Objects from one member of a coordinator group to all others, through queues of ours instead of gloo.

Runs in every member. Each member that broadcasts has a queue of its own, which all make together at its first
broadcast; who shares memory with whom is tried out once for each formation of the group (process_group_queues.py)::

    src ──shared memory──► the members on its node
     └────ZeroMQ──► one member on each other node, the leader ──shared memory──► the members there

A leader passes the frames on as they came, in its own call of the operation and before it unpickles them: there is no
thread for it, nothing is pickled twice, and a leader that waits for its readers holds back `src`.

A message is one byte, _OBJECT and then the object's frames (codec.py), or _FAILURE and the text of the error that kept
the object from being sent, so that the readers raise too instead of waiting for it.

The queues belong to one formation of the group (ProcessGroups) and end with it. Any error but those that the whole
group shares (no queue could be made) or that concern one object closes them, so that whoever waits for this member
raises, too. Also an exception of a signal's handler does: whether the others have passed this broadcast is not known.
Imports torch: only process_group.py and, at the first object, object_collectives.py import this module.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch

from ray_shm import codec
from ray_shm.broadcast_tree import Tree
from ray_shm.connection import NOT_LAID, GroupConnection
from ray_shm.deadline import Deadline
from ray_shm.errors import PeerLostError, QueueClosedError, RemoteError, StartError, raise_unless_same
from ray_shm.handle import Handle
from ray_shm.membership import Membership
from ray_shm.message_queue import MAX_CHUNK_BYTES, MAX_CHUNKS
from ray_shm.process_group_queues import Gathering, try_out
from ray_shm.queue_end import QueueStats, close_all
from ray_shm.queue_reader import QueueReader
from ray_shm.queue_writer import QueueWriter
from ray_shm.ring import Buffer

_OBJECT, _FAILURE = b"\0", b"\1"
_LOOK_AGAIN = 0.01  # seconds; a look costs as much as a tenth of a broadcast

AllGather = Callable[[torch.Tensor, torch.Tensor, Deadline], None]


def broadcast(link: GroupConnection, operation: str, obj: Any, src: int, timeout: float | None) -> Any:
    """The object of the member `src`; `obj` counts there only.

    Raises:
        RemoteError: `src` could not send its object; the original error is raised there. What unpickling raises.
        StartError: on every member: no queue could be made. The group stays usable after each of these.
        PeerLostError: a peer is gone or late. The group is gone.
    """
    members = link.members
    if src != members.rank_in_group:
        got = link.run_laid(operation, "take", src, _read) if timeout is None else NOT_LAID
        if got is NOT_LAID:
            got = link.run(operation, "take", src, timeout=timeout)
        if type(got) is _Unread:
            got.reraise(members.ranks[src])
        return got
    error: Exception | None = None
    try:
        frames = codec.encode(obj, _OBJECT)
    except Exception as exc:  # whatever a user's __reduce__ raises
        error, frames = exc, _failure(f"could not pickle the object to send: {type(exc).__name__}: {exc}")
    if timeout is not None or link.run_laid(operation, "publish", src, frames) is NOT_LAID:
        link.run(operation, "publish", frames, timeout=timeout)
    if error is None:
        return obj
    try:
        raise error
    finally:
        del error  # its traceback holds this frame


def _failure(text: str) -> list[Buffer]:
    return [_FAILURE + text.encode(errors="replace")]


class _Unread:
    """In place of an object: what kept it from being there."""

    __slots__ = ("_error", "_text")

    def __init__(self, error: Exception | None, text: str = "") -> None:
        """text: of an error at the source, if there is none here."""
        self._error, self._text = error, text

    def reraise(self, source: int) -> NoReturn:
        """source: global rank."""
        error, self._error = self._error, None
        try:
            raise error or RemoteError(f"rank {source} {self._text}")
        finally:
            del error  # its traceback holds this frame


def _read(frames: Sequence[Buffer], owned: bool) -> Any:
    """The object, or an _Unread; raises nothing."""
    if frames[0][0]:  # _FAILURE
        return _Unread(None, bytes(frames[0][1:]).decode())
    try:
        return codec.decode(frames, 1, owned)
    except Exception as exc:  # whatever a user's __setstate__ raises
        return _Unread(exc)


@dataclass(slots=True)
class Route:
    """This rank's part in the broadcasts of one member.

    Attributes:
        reader: None at the member itself. writer: None at those who pass nothing on. source: whom `reader` reads, in
            words.
    """

    reader: QueueReader | None = None
    writer: QueueWriter | None = None
    source: str = ""
    _looked: float = 0.0  # monotonic seconds; when the readers of `writer` were last looked for

    @property
    def ends(self) -> list[QueueReader | QueueWriter]:
        return [end for end in (self.reader, self.writer) if end is not None]

    def send(self, frames: Sequence[Buffer], deadline: Deadline) -> None:
        """Raises StartError where memory is short; the readers have been told, and raise RemoteError."""
        writer = self.writer
        if writer is None:
            return
        now = time.monotonic()
        if now - self._looked > _LOOK_AGAIN:  # else one that sends into free room would never learn that they left
            self._looked = now
            writer.require_readers()
        try:
            writer.send(frames, deadline)
        except StartError as exc:
            writer.send(_failure(f"could not send the object: {exc}"), deadline)
            raise

    def receive(self, deadline: Deadline) -> Any:
        """What `_read` makes of it, once it is passed on, too."""
        if self.reader is None:
            raise RuntimeError("this rank reads no queue of that member: a bug in ray-shm")
        return self.reader.receive(_read if self.writer is None else partial(self._pass_on, deadline), deadline)

    @property
    def step(self) -> Callable[[Any, Deadline], object] | None:
        """`send`, or what takes a function for the frames in their place; None where this rank does both."""
        if self.reader is None:
            return self.send
        return self.reader.receive if self.writer is None else None

    def _pass_on(self, deadline: Deadline, frames: list[memoryview], owned: bool) -> Any:
        try:
            self.send(frames, deadline)
        except (TimeoutError, QueueClosedError, PeerLostError) as exc:  # not to be taken for one of `reader`
            raise RuntimeError(f"an object of {self.source} could not be passed on: {exc}") from exc
        except StartError:  # its readers know; this rank has the object
            pass
        return _read(frames, owned)


@dataclass(slots=True)
class _Ends:
    """Queue ends that are open. Whatever thread closes them, and however many do: when `close` returns all are.

    A thread that is inside of one of them (the unpickling of an object broadcasts in turn) may close them, too; another
    one is done once that one is out.
    """

    open: list[QueueReader | QueueWriter] = field(default_factory=list)
    ended: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)  # held for a few instructions

    def add(self, ends: Sequence[QueueReader | QueueWriter]) -> bool:
        """False: it has ended, and they are not taken."""
        with self.lock:
            if not self.ended:
                self.open += ends
            return not self.ended

    def end(self) -> bool:
        """From now on `add` takes none. Whether there is something to close."""
        with self.lock:
            self.ended = True
            return bool(self.open)

    def close(self) -> None:
        self.end()
        close_all(self.open)
        self.open = []  # last: who comes while they are closed waits for them, too


class QueueBroadcaster:
    """The queues of one formation of a group, as far as this rank has an end of them.

    Used by the thread that uses the group, but for `stop`.

    Attributes:
        steps: by the member that broadcasts: this rank's part (Route.step), once the queues are made; none if it both
            reads and writes. Whoever runs one passes what it raises to `failure`.
    """

    def __init__(self, members: Membership, ip: str) -> None:
        """ip: this node's address, to bind for readers on other nodes."""
        self._members, self._ip = members, ip
        self._attached: list[list[bool]] | None = None  # found at the first broadcast
        self._routes: dict[int, Route] = {}  # by the member that broadcasts, its rank in the group
        self.steps: dict[int, Callable[[Any, Deadline], object]] = {}
        self._ends = _Ends()

    @property
    def ended(self) -> bool:
        """Whether every broadcast raises."""
        return self._ends.ended

    def publish(self, frames: Sequence[Buffer], all_gather: AllGather, deadline: Deadline) -> None:
        """To all others. Returns when the message is on its way; waits for readers only where there is no room.

        Args:
            all_gather: over the group; used at the first broadcast only.

        Raises:
            TimeoutError: no room in time; names the readers that are behind. RuntimeError: one is gone, or `stop`.
            StartError: no queue could be made (on all members), or no memory for this object (the others raise
                RemoteError). Everything else has closed the queues.
        """
        src = self._members.rank_in_group
        route = self._laid(src, all_gather, deadline)
        try:
            route.send(frames, deadline)
        except BaseException as exc:
            raise_unless_same(self.failure(exc, src, deadline), exc)
            raise

    def take(self, src: int, all_gather: AllGather, deadline: Deadline) -> Any:
        """What `_read` makes of the next message of `src`, which is passed on if that is this rank's part.

        Raises:
            TimeoutError: nothing came in time. RuntimeError, StartError: as `publish`.
        """
        route = self._laid(src, all_gather, deadline)
        try:
            return route.receive(deadline)
        except BaseException as exc:
            raise_unless_same(self.failure(exc, src, deadline), exc)
            raise

    def failure(self, exc: BaseException, src: int, deadline: Deadline) -> BaseException:
        """What to raise for what came out of a step. Closes the queues, unless it concerns one object alone."""
        taking = src != self._members.rank_in_group
        if isinstance(exc, StartError) and not taking:
            return exc
        route = self._routes.get(src)
        source = f"nothing came from {route.source if route is not None else 'its queue'}"
        self.close()
        if isinstance(exc, TimeoutError):
            return TimeoutError(f"{source} within {deadline.timeout} s") if taking else exc
        if isinstance(exc, QueueClosedError | PeerLostError | OSError | StartError):
            return RuntimeError(f"{source}: {exc}" if taking else str(exc))
        return exc

    def stop(self) -> None:
        """Ends what waits in a queue, here and at the peers. From any thread; waits for nothing."""
        if self._ends.end():
            threading.Thread(target=self._ends.close, name="ray-shm-queues-close", daemon=True).start()

    def close(self) -> None:
        """Frees memory, descriptors and sockets; what was received stays valid. Idempotent."""
        self._ends.close()
        self.steps.clear()
        self._routes.clear()

    def stats(self) -> dict[int, list[QueueStats]]:
        """Rank in the group of each member that has broadcast -> counters of this rank's ends of its queues."""
        return {src: [end.stats() for end in route.ends] for src, route in self._routes.items()}

    def _laid(self, src: int, all_gather: AllGather, deadline: Deadline) -> Route:
        """The route of `src`, made now if there is none yet. Raises as `publish`."""
        route = self._routes.get(src)
        if route is not None:
            return route
        if self.ended:
            raise RuntimeError("its queues are closed: an earlier broadcast was interrupted on this rank")
        try:
            route = self._make(src, _Gathering(self._members, self._ip, all_gather, deadline))
        except StartError:
            raise
        except BaseException as exc:
            self.close()
            if isinstance(exc, QueueClosedError | PeerLostError | OSError) and not isinstance(exc, TimeoutError):
                raise RuntimeError(str(exc)) from exc
            raise
        self._routes[src] = route
        if (step := route.step) is not None:
            self.steps[src] = step
        return route

    def _make(self, src: int, gathering: _Gathering) -> Route:
        if self._attached is None:
            self._attached = try_out(gathering, writes=True, reads=True)[1]
        tree = Tree.of(src, self._attached)
        route = Route()
        try:
            handles = gathering.gather_or_raise(self._open_writer(route, src, tree))
            if {at for at, _ in handles} != {src}:
                by_rank = {g: self._members.ranks[at] for g, (at, _) in zip(self._members.ranks, handles, strict=True)}
                raise StartError(f"members called with different src, global rank -> global rank of its src: {by_rank}")
            gathering.gather_or_raise(self._open_reader(route, src, tree, [handle for _, handle in handles]))
            if not self._ends.add(route.ends):
                raise RuntimeError("released while its queues were made")
        except BaseException:
            for end in route.ends:
                end.close()
            raise
        if route.writer is not None:
            route.writer.wait_until_ready(gathering.deadline)
        return route

    def _open_writer(self, route: Route, src: int, tree: Tree) -> tuple[int, Handle | None] | Exception:
        own, names = self._members.rank_in_group, self._members.ranks
        local, remote = (tree.local, list(tree.branches)) if own == src else (tree.branches.get(own, []), [])
        if not local and not remote:
            return src, None
        readers = [names[r] for r in local], [names[r] for r in remote]
        try:
            route.writer = QueueWriter(*readers, MAX_CHUNK_BYTES, MAX_CHUNKS, self._ip)
        except (StartError, ValueError, OSError) as exc:
            return StartError(str(exc))
        return src, route.writer.handle

    def _open_reader(self, route: Route, src: int, tree: Tree, handles: list[Handle | None]) -> Exception | None:
        own, names = self._members.rank_in_group, self._members.ranks
        if own == src:
            return None
        source = tree.source(src, own)
        handle = handles[source]
        if handle is None:
            return StartError(f"rank {source} made no queue: a bug in ray-shm")
        passes = "" if source == src else f", by way of global rank {names[source]}"
        route.source = f"global rank {names[src]}{passes} (pid {handle.pid} on {handle.node})"
        try:
            route.reader = QueueReader(handle, names[own])
        except (StartError, ValueError, OSError) as exc:
            return StartError(str(exc))
        return None


class _Gathering(Gathering):
    """The members of a coordinator group, within one operation of it."""

    def __init__(self, members: Membership, ip: str, all_gather: AllGather, deadline: Deadline) -> None:
        self.rank, self.size = members.rank_in_group, members.world_size
        self._ip, self._all_gather, self.deadline = ip, all_gather, deadline

    def gather(self, own: Any) -> list[Any]:
        """Raises RuntimeError where a member is gone or late."""
        content = torch.frombuffer(bytearray(pickle.dumps(own, protocol=5)), dtype=torch.uint8)
        lengths = self._gather(torch.tensor([content.numel()], dtype=torch.int64, device="cpu")).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: content.numel()] = content
        rows = self._gather(padded).view(self.size, -1).numpy()
        return [pickle.loads(row[:length].data) for row, length in zip(rows, lengths, strict=True)]

    def own_address(self) -> str:
        return self._ip

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        gathered = part.new_empty(self.size * part.numel())
        self._all_gather(gathered, part, self.deadline)
        return gathered
