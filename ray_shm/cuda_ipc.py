"""CUDA tensors from a queue's writer to its readers, from one GPU memory to the other, by CUDA IPC.

Runs in every process; imports torch only where a CUDA tensor is at hand. Only queues whose readers are all on this
node share (queue_writer.py), and only tensors of SHARE_BYTES and more (tensor_codec.py); everything else goes through
host memory. One message::

    writer   copies the tensor on its GPU (the caller's is the caller's again when `enqueue` returns), waits for the
             copy, and shares it with each reader: where its memory is travels behind the message's own frames
    reader   while it unpickles: opens that, copies it to memory of its own on its current device, and lets go

The sharing itself is torch's, as torch.multiprocessing does it (torch/csrc/StorageSharing.cpp, "CUDA IPC Refcounting
implementation explained"). Its counters are for one consumer each, hence one share per reader; the memory is torch's
again once all of them were let go of, also after the queue was closed.

Whether a reader can open the writer's memory (peer access, containers, the allocator's settings, the driver) is tried,
not guessed. A reader's word in the ring (`RingReader.device`) says how that went, and the writer shares only while all
of them say CAN::

    UNKNOWN   CUDA tensors go through host memory, and each message takes a probe along: a few random bytes in GPU
              memory, and the same in plain sight
    CAN       the reader has opened a probe and has found the bytes
    CANNOT    it has not: through host memory, until another process has this reader's place

What is unread is bounded as a queue's other memory is: beyond it tensors go through host memory. A writer that ends
takes its GPU memory along, so what is unread then cannot be opened any more, unlike all else in a queue.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray_shm.errors import PeerLostError
from ray_shm.ring import ATTACHED, CAN, CANNOT, UNKNOWN

if TYPE_CHECKING:
    from ray_shm.ring import RingReader, RingWriter

SHARE_BYTES = 1 << 20  # below, two copies between host and GPU cost less than opening memory (not measured: no GPU)
_PROBE_BYTES = 64

Token = tuple[Any, ...]  # says one reader where memory is

_log = logging.getLogger(__name__)
_here = threading.local()


class CudaMemory:
    """What torch is needed for. Tensors here are flat ones of uint8."""

    def suits(self, tensor: Any) -> bool:
        """Whether a tensor is worth sharing."""
        return bool(tensor.is_cuda) and tensor.nbytes >= SHARE_BYTES

    def copy(self, flat: Any) -> Any:
        """A copy on the same device, complete."""
        import torch

        own = flat.clone(memory_format=torch.contiguous_format)
        torch.cuda.current_stream(flat.device).synchronize()
        return own

    def probe(self, content: bytes, near: Any) -> Any:
        """`content` on the device of the tensor `near`, complete."""
        import torch

        return self.copy(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(near.device))

    def share(self, own: Any) -> Token:
        """For one reader. The memory is kept until it was opened and let go of, or `release`."""
        import torch

        index, *where = own.untyped_storage()._share_cuda_()
        return str(torch.cuda.get_device_properties(index).uuid), own.storage_offset(), own.numel(), tuple(where)

    def release(self, token: Token) -> None:
        """In place of a reader that has not opened it; does no harm where it has."""
        import torch

        _, _, _, (_, _, _, counters, counter, *_) = token
        torch.UntypedStorage._release_ipc_counter_cuda(counters, counter)

    def open(self, token: Token) -> Any:
        """What was shared, in memory of this process's current device; the writer's is let go of."""
        import torch

        uuid, offset, count, (handle, size, start, counters, counter, event, _) = token
        current = torch.cuda.current_device()
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        # A GPU that is not visible here is opened through the current one, if the two can reach each other.
        index = uuids.index(uuid) if uuid in uuids else current
        # The writer has waited for its copy, so nothing is left to wait for (the last argument).
        storage = torch.UntypedStorage._new_shared_cuda(index, handle, size, start, counters, counter, event, False)
        empty = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index))
        own = torch.empty(count, dtype=torch.uint8, device=torch.device("cuda", current))
        own.copy_(empty.set_(storage, offset, (count,), (1,)))
        for device in {index, current}:
            torch.cuda.current_stream(device).synchronize()
        return own

    def usable(self) -> str:
        """Why this process cannot open anything; empty if it may."""
        torch = sys.modules.get("torch")  # whoever has not imported it should not have to for a probe
        return "" if torch is not None and torch.cuda.is_available() else "it has not imported torch, or has no GPU"

    def content(self, flat: Any) -> bytes:
        data: bytes = flat.cpu().numpy().tobytes()
        return data


memory = CudaMemory()


class DeviceFrame(bytes):
    """The last frame of a message that takes GPU memory along: a pickled _Contents.

    Attributes:
        outgoing: what it stands for, in the process that sends it.
    """

    outgoing: Outgoing


_Contents = tuple[int, bytes, "list[list[Token | None]]"]  # writer's pid, content of a probe or nothing, tokens


class Outgoing:
    """GPU memory that one message takes along. Used by the thread that pickles it, then by the one that sends it."""

    def __init__(self, readers: Sequence[bool], probes: bool, room: int, alone: bool) -> None:
        """readers: which positions count. probes: tensors go through host memory, and a probe goes along. room: bytes
        that may go along. alone: nothing is unread, so one tensor may be larger than that."""
        self._readers, self._probes, self._room, self._alone = readers, probes, room, alone
        self._tensors: list[Any] = []
        self._probe: Any = None
        self._sent = False
        self.nbytes = 0
        self.tokens: list[list[Token | None]] = []  # of each tensor, by position; of probes likewise

    def take(self, tensor: Any) -> int | None:
        """Number of a contiguous tensor among those that go along; None: it goes through host memory."""
        if self._probes:
            self._probe = tensor
            return None
        if self.nbytes + tensor.nbytes > self._room and (self.nbytes or not self._alone):
            return None
        import torch

        self._tensors.append(tensor.reshape(-1).view(torch.uint8))
        self.nbytes += tensor.nbytes
        return len(self._tensors) - 1

    def restart(self) -> None:
        """The message is pickled once more."""
        self._tensors, self.nbytes = [], 0

    def frame(self) -> DeviceFrame | None:
        """To send behind the other frames; None where there is nothing. Lets go of the tensors.

        Raises:
            RuntimeError: no GPU memory, or the driver does not share any. Nothing is left behind.
        """
        tensors, probe, content = self._tensors, self._probe, b""
        self._tensors, self._probe = [], None
        try:
            if probe is not None:
                content = secrets.token_bytes(_PROBE_BYTES)
                self._share(memory.probe(content, probe))
            for tensor in tensors:
                self._share(memory.copy(tensor))
        except BaseException:
            self.release()
            raise
        if not self.tokens:
            return None
        frame = DeviceFrame(pickle.dumps((os.getpid(), content, self.tokens), pickle.HIGHEST_PROTOCOL))
        frame.outgoing = self
        return frame

    def _share(self, own: Any) -> None:
        tokens: list[Token | None] = [None] * len(self._readers)
        self.tokens.append(tokens)
        for position, counts in enumerate(self._readers):
            if counts:
                tokens[position] = memory.share(own)

    def sent(self) -> None:
        """From now on it is the readers' to let go of, and the Sharer's."""
        self._sent = True

    def release(self, positions: Sequence[int] | None = None) -> None:
        """In place of readers that have not opened it; None: of all."""
        for tokens in self.tokens:
            for position in range(len(tokens)) if positions is None else positions:
                token, tokens[position] = tokens[position], None
                if token is not None:
                    memory.release(token)

    def __del__(self) -> None:
        if not self._sent:
            with contextlib.suppress(Exception):  # at interpreter exit, torch may be gone
                self.release()


class Sharer:
    """What of GPU memory goes through one queue. At its writer; from any thread."""

    def __init__(self, ring: RingWriter, bound: int) -> None:
        """bound: bytes of GPU memory that readers may leave unread."""
        self._ring: RingWriter | None = ring  # until the queue is closed
        self._bound = bound
        self._lock = threading.RLock()
        self._in_flight: deque[tuple[int, Outgoing]] = deque()  # ring position after which it is read, and what
        self._off = False
        self.messages = 0  # that took more than a probe along

    def begin(self) -> Outgoing | None:
        """For a message that has something to share; None: all of it goes through host memory, as things stand."""
        ring = self._ring
        if ring is None or self._off:
            return None
        counted = [i not in ring.dropped for i in range(ring.shape.n_readers)]
        words = {ring.device(i) for i, counts in enumerate(counted) if counts}
        if not words or CANNOT in words:
            return None
        with self._lock:
            self._note_read(ring)
            unread = sum(outgoing.nbytes for _, outgoing in self._in_flight)
        return Outgoing(counted, UNKNOWN in words, self._bound - unread, not unread)

    def give_up(self, exc: Exception) -> None:
        """This process cannot share, as it has found out."""
        self._off = True
        _log.warning("CUDA tensors of pid %d go through host memory: sharing GPU memory failed: %s", os.getpid(), exc)

    def register(self, outgoing: Outgoing, end: int) -> None:
        """It is about to be published. end: ring position behind its message."""
        with self._lock:
            self._in_flight.append((end, outgoing))
            outgoing.sent()
            self.messages += bool(outgoing.nbytes)

    def _note_read(self, ring: RingWriter) -> None:
        slowest = ring.slowest()
        while self._in_flight and self._in_flight[0][0] <= slowest:
            self._in_flight.popleft()[1].release()  # also what readers have left, without having been able to open it

    def trim(self) -> None:
        """Forget what was read."""
        ring = self._ring
        if self._in_flight and ring is not None:
            with self._lock:
                self._note_read(ring)

    def close(self) -> None:
        """Those who are attached may still read what they have; torch keeps the memory for so long."""
        ring, self._ring = self._ring, None  # whoever keeps this object does not keep the memory mapped
        if ring is None:
            return
        gone = [i for i in range(ring.shape.n_readers) if i in ring.dropped or ring.state(i) != ATTACHED]
        with self._lock:
            self._note_read(ring)
            while self._in_flight:
                self._in_flight.popleft()[1].release(gone)


class Received(bytes):
    """A DeviceFrame as a reader has it, in place of that frame."""

    _pid: int  # the writer's
    _tokens: list[Token | None]  # this reader's, by number of the tensor

    @classmethod
    def of(cls, frame: memoryview, ring: RingReader, position: int) -> Received:
        """At the reader in this position. Tries to open a probe, and says in the ring how it went; raises nothing."""
        self = cls(frame)
        contents: _Contents = pickle.loads(self)
        self._pid, content, tokens = contents
        self._tokens = [by_position[position] for by_position in tokens]
        if content and ring.device == UNKNOWN:
            why = self._try(content)
            ring.device = CANNOT if why else CAN
            if why:
                _log.info("CUDA tensors from pid %d to pid %d go through host memory: %s", self._pid, os.getpid(), why)
        return self

    def _try(self, content: bytes) -> str:
        """Why a probe cannot be opened here; empty: it can."""
        if self._pid == os.getpid():
            return "a process cannot open its own"
        if why := memory.usable():
            return why
        try:
            found = memory.content(self.opened(0))
        except Exception as exc:  # whatever the driver, the allocator or this version of torch has against it
            return str(exc)
        return "" if found == content else "other memory is found where it should be"

    def opened(self, number: int) -> Any:
        """See the function."""
        token = self._tokens[number]
        if token is None:
            raise RuntimeError(f"pid {self._pid} shared no GPU memory with this reader: a bug in ray-shm")
        try:
            return memory.open(token)
        except Exception as exc:
            if not os.path.exists(f"/proc/{self._pid}"):
                raise PeerLostError(
                    f"a CUDA tensor cannot be received: its writer (pid {self._pid}) is gone, and its GPU memory with "
                    f"it: {exc}"
                ) from exc
            text = f"GPU memory of pid {self._pid} cannot be opened in pid {os.getpid()}: {type(exc).__name__}: {exc}"
            raise RuntimeError(text) from exc

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """While this thread unpickles its message, the function `opened` finds it."""
        before = getattr(_here, "received", None)  # unpickling may receive in turn
        _here.received = self
        try:
            yield
        finally:
            _here.received = before


def opened(number: int) -> Any:
    """The bytes of a tensor of the message that this thread unpickles, in memory of this process's current device.

    Raises:
        PeerLostError: the writer's process is gone, and its GPU memory with it. RuntimeError: it cannot be opened.
    """
    received: Received = _here.received
    return received.opened(number)
