"""Small CPU tensors between the members of a group on one node: through shared memory, in the order of ranks.

Runs in every worker. Formed where all members share memory, which is tried out; used by one thread at a time::

    all_reduce up to AT_ONCE_BYTES    one step: each writes its tensor; each adds all of them, rank 0's first
    all_reduce of more                two steps: each adds its own slice of all tensors; each copies all slices
    all_gather, broadcast, barrier    one step

Every element is reduced in the order of ranks by the same code, so all members get the same bits, and get them again
the next time. What a step is, who waits for whom, and why nothing is overwritten that somebody reads: node_board.py.

float16 and bfloat16 are added and multiplied in float32, and rounded once. Sums of integers wrap around; min and max of
a NaN and a number are NaN. What gloo reduces and is not in REDUCED stays gloo's. Imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ray_shm import futex, node_board
from ray_shm.deadline import Deadline
from ray_shm.errors import StartError
from ray_shm.node_areas import FOLDS, PURPOSE, NodeAreas
from ray_shm.node_board import (
    GAVE_UP,
    INTERRUPTED,
    LOST,
    MISMATCHED,
    RELEASED,
    ExchangeEndedError,
    LateRanksError,
    NodeBoard,
)
from ray_shm.rendezvous import Rendezvous
from ray_shm.segment import Segment, SegmentRef, pid_space

# Bytes of each rank's tensor, at most. Up to 1 MiB this way was the faster one in all that was measured; more would
# cost each rank memory for good. Lower quartiles in µs on 2 busy cores, gloo in the same run (once / slices / gloo):
#   float32 all_reduce   2 KiB             64 KiB            256 KiB           1 MiB
#   2 ranks              35 / 108 / 253    68 / 134 / 305    230 / 259 / 453   1,005 / 1,215 / 1,309
#   3 ranks              93 / 280 / 1,090  140 / 284 / 945   382 / 402 / 936   2,358 / 2,198 / 4,921
#   4 ranks              145 / 376 / 4,907 296 / 570 / 4,847 939 / 894 / 6,445 9,082 / 4,379 / 8,525
# all_gather of 1 MiB by 2 / 3 / 4 ranks: 837 / 2,556 / 6,099, gloo 4,228 / 7,842 / 12,575; broadcast and a barrier:
# 313 / 496 / 719, gloo 687 / 1,592 / 2,151.
REDUCE_BYTES = 1 << 20
GATHER_BYTES = 1 << 20
BROADCAST_BYTES = 1 << 20
AT_ONCE_BYTES = 128 << 10  # up to here one step is faster than two
REDUCED = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)
_AREA = max(REDUCE_BYTES, GATHER_BYTES, BROADCAST_BYTES)

# What a rank does in a step, in 64 bits that the others compare with their own: bytes 32, source or kind of reduction
# 16, dtype 8, operation 8. The dtypes are numbered by name, which is the same in all processes of one torch.
_OPERATIONS = ("", "barrier", "all_reduce", "the second step of all_reduce", "all_gather", "broadcast")
_BARRIER, _REDUCE, _SECOND, _GATHER, _BROADCAST = range(1, 6)
_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_OP_CODES = {op: code for code, op in enumerate(FOLDS)}


class NodeExchange:
    """One member's end. Any error of an operation ends it for all members; `close` is still to be called."""

    def __init__(self, meeting: Rendezvous, segment: Segment, places: list[node_board.Place]) -> None:
        own = meeting.members.rank_in_group
        self._size, self._own = len(places), own
        self._board: NodeBoard | None = NodeBoard(segment, places, own)
        self._memory: NodeAreas | None = NodeAreas(segment, len(places), own, _AREA)
        self._late: list[int] = []
        self._sent = False  # the last step was a broadcast of this rank's
        self._cancelled = False  # the last operation came through, and then raised what had interrupted it
        meeting.release.on_request(self._board.ender(RELEASED))
        self._board.watch()

    @classmethod
    def form(cls, meeting: Rendezvous) -> NodeExchange | None:
        """Made by all members at the same time, through the meeting's store.

        Returns:
            None, on all members, unless all of them can attach to the same memory and see each other's processes.

        Raises:
            RuntimeError: members did not come, or the store is gone. ReleasedError: released.
        """
        if meeting.members.world_size == 1:
            return None
        segment = _offered(meeting) if meeting.members.rank_in_group == 0 else _attached(meeting)
        try:
            places = _places(meeting, segment is not None)
            return None if segment is None or places is None else cls(meeting, segment, places)
        finally:
            if segment is not None:
                segment.close()  # who was to attach has; the mapping stays for as long as it is used

    @staticmethod
    def takes(operation: str, nbytes: int, dtype: torch.dtype | None = None) -> bool:
        """Whether this operation goes through shared memory: the same answer on all members that call it alike.

        Args:
            operation: "all_reduce", "all_gather", "broadcast" or "barrier".
            nbytes: of the tensor of one rank.
        """
        if operation == "all_reduce":
            return 0 < nbytes <= REDUCE_BYTES and dtype in REDUCED
        if operation == "barrier":
            return True
        return 0 < nbytes <= (GATHER_BYTES if operation == "all_gather" else BROADCAST_BYTES)

    # The operations, on flat and contiguous CPU tensors that `takes` accepts. Each raises
    #   LateRanksError: members had not come at the deadline.
    #   ExchangeEndedError: a member has left, died, was released, or called something else.
    # and has then ended for all members.

    def all_reduce(self, flat: torch.Tensor, op: str, deadline: Deadline) -> None:
        """In place. op: a key of connection.REDUCE_OPS."""
        self._run(self._reduce_at_once if flat.nbytes <= AT_ONCE_BYTES else self._reduce_by_slices, deadline, flat, op)

    def all_gather(self, gathered: torch.Tensor, part: torch.Tensor, deadline: Deadline) -> None:
        """gathered: the members' parts, one after the other."""
        self._run(self._gather, deadline, gathered, part)

    def broadcast(self, flat: torch.Tensor, src: int, deadline: Deadline) -> None:
        """Overwrites `flat` with that of rank `src` in the group, which returns as soon as its own is written."""
        self._run(self._send if src == self._own else self._receive, deadline, flat, src)

    def barrier(self, deadline: Deadline) -> None:
        self._run(self._meet, deadline)

    def enter(self) -> None:
        """This rank begins a collective operation, here or through gloo: what `late` compares."""
        if self._board is not None:
            self._board.enter()

    def late(self) -> list[int]:
        """Ranks in the group that have not begun the collective operation which this rank is in, or was in last."""
        board = self._board
        return self._late if board is None else board.not_entered()

    def came_through(self) -> bool:
        """Whether the operation that has just raised a cancelled call's error was over before."""
        cancelled, self._cancelled = self._cancelled, False
        return cancelled

    def close(self) -> None:
        """Leave: members that wait for this rank raise. Frees the memory. Idempotent; not during an operation."""
        board, self._board = self._board, None
        if board is not None:
            self._late = board.not_entered()
            board.close()
        self._memory = None

    def _run(self, steps: Callable[..., None], deadline: Deadline, *args: Any) -> None:
        board = self._board
        if board is None:
            raise ExchangeEndedError("this rank has left the group", [])
        try:
            steps(board, deadline, *args)
        except BaseException as exc:  # the members have not all made the same steps: nothing sound can follow
            board.end(self._own, _why(exc))
            if board.interruption is not None:
                raise board.interruption from exc
            raise
        if board.interruption is not None:
            interruption, board.interruption = board.interruption, None
            self._cancelled = True
            raise interruption

    # The steps. No local variable holds a view of the memory during a wait: a traceback would keep it mapped.

    def _reduce_at_once(self, board: NodeBoard, deadline: Deadline, flat: torch.Tensor, op: str) -> None:
        parity = board.begin() & 1
        self._give(board, deadline, flat, _what(_REDUCE, flat.nbytes, _DTYPE_CODES[flat.dtype], _OP_CODES[op]))
        self._await(board, deadline)
        self._areas.fold(parity, op, flat, flat, 0, flat.numel())

    def _reduce_by_slices(self, board: NodeBoard, deadline: Deadline, flat: torch.Tensor, op: str) -> None:
        parity = board.begin() & 1
        code = _DTYPE_CODES[flat.dtype]
        self._give(board, deadline, flat, _what(_REDUCE, flat.nbytes, code, _OP_CODES[op]))
        self._await(board, deadline)
        board.begin()
        board.await_readers(deadline)
        self._areas.fold_slice(parity, op, flat)
        board.publish(_what(_SECOND, flat.nbytes, code, _OP_CODES[op]))
        self._await(board, deadline)
        self._areas.take_slices(1 - parity, flat)

    def _gather(self, board: NodeBoard, deadline: Deadline, gathered: torch.Tensor, part: torch.Tensor) -> None:
        parity = board.begin() & 1
        self._give(board, deadline, part, _what(_GATHER, part.nbytes, _DTYPE_CODES[part.dtype], 0))
        self._await(board, deadline)
        size, to = part.nbytes, gathered.data_ptr()
        for rank in range(self._size):
            self._areas.take(rank, parity, to + size * rank, size)

    def _send(self, board: NodeBoard, deadline: Deadline, flat: torch.Tensor, src: int) -> None:
        board.begin()
        self._give(board, deadline, flat, _what(_BROADCAST, flat.nbytes, _DTYPE_CODES[flat.dtype], src))
        self._sent = True

    def _receive(self, board: NodeBoard, deadline: Deadline, flat: torch.Tensor, src: int) -> None:
        parity = board.begin() & 1
        board.publish(_what(_BROADCAST, flat.nbytes, _DTYPE_CODES[flat.dtype], src))
        board.await_members([src], deadline)
        self._compare(board, [src], board.step)
        self._areas.take(src, parity, flat.data_ptr(), flat.nbytes)

    def _meet(self, board: NodeBoard, deadline: Deadline) -> None:
        board.begin()
        board.require()
        board.publish(_what(_BARRIER, 0, 0, 0))
        self._await(board, deadline)

    @property
    def _areas(self) -> NodeAreas:
        if self._memory is None:
            raise ExchangeEndedError("this rank has left the group", [])
        return self._memory

    def _give(self, board: NodeBoard, deadline: Deadline, flat: torch.Tensor, what: int) -> None:
        board.await_readers(deadline)
        if self._sent:  # and has not looked at its receivers' line
            self._compare(board, board.others, board.step - 1)
            self._sent = False
        self._areas.put(board.step & 1, flat)
        board.publish(what)

    def _await(self, board: NodeBoard, deadline: Deadline) -> None:
        board.await_members(board.others, deadline)
        self._compare(board, board.others, board.step)

    def _compare(self, board: NodeBoard, ranks: list[int], step: int) -> None:
        own = board.what(self._own, step)
        for rank in ranks:
            other = board.what(rank, step)
            if other != own:
                raise _MismatchError(f"{board.name([rank])} called {_in_words(other)}, this rank {_in_words(own)}", [])


class _MismatchError(ExchangeEndedError):
    """Members called different operations, or the same one with other sizes, dtypes or sources."""


def _why(exc: BaseException) -> int:
    if isinstance(exc, LateRanksError):
        return GAVE_UP
    if isinstance(exc, ExchangeEndedError):
        return MISMATCHED if isinstance(exc, _MismatchError) else LOST
    return INTERRUPTED


def _what(operation: int, nbytes: int, dtype: int, detail: int) -> int:
    return nbytes << 32 | detail << 16 | dtype << 8 | operation


def _in_words(what: int) -> str:
    operation, detail = what & 0xFF, what >> 16 & 0xFFFF
    text = _OPERATIONS[operation]
    if operation == _BARRIER:
        return text
    if operation in (_REDUCE, _SECOND):
        text += f" ({list(FOLDS)[detail]})"
    text += f" of {what >> 32} bytes of {_DTYPES[what >> 8 & 0xFF]}"
    return f"{text} from rank {detail} in the group" if operation == _BROADCAST else text


# Forming. What goes through the store is text: it has no authentication.


def _offered(meeting: Rendezvous) -> Segment | None:
    """The first member's: makes the memory, and says where it is."""
    size = meeting.members.world_size
    begin = node_board.data(size)
    try:
        futex.require_supported()
        segment = Segment.create(begin + 2 * size * _AREA, PURPOSE, reserved=begin)
    except StartError:
        meeting.store.set("node", "")
        return None
    ref = asdict(segment.ref)
    meeting.store.set("node", json.dumps({**ref, "nonce": ref["nonce"].hex()}))
    return segment


def _attached(meeting: Rendezvous) -> Segment | None:
    text = meeting.store.get("node").decode()
    if not text:
        return None
    try:
        futex.require_supported()
        fields = json.loads(text)
        return Segment.attach(SegmentRef(**{**fields, "nonce": bytes.fromhex(fields["nonce"])}))
    except StartError:
        return None


def _places(meeting: Rendezvous, attached: bool) -> list[node_board.Place] | None:
    """Where all members are; None if one could not attach, or does not see the others' processes."""
    members, store = meeting.members, meeting.store
    own = node_board.own_place(members.ranks[members.rank_in_group])
    told = {"attached": attached, "space": pid_space(), "pid": own.pid, "started": own.started}
    store.set(f"node/{members.rank_in_group}", json.dumps(told))
    answers = [json.loads(store.get(f"node/{rank}")) for rank in range(members.world_size)]
    if not all(answer["attached"] and answer["space"] == told["space"] for answer in answers):
        return None
    return [node_board.Place(r, a["pid"], a["started"]) for r, a in zip(members.ranks, answers, strict=True)]
