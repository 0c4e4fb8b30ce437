"""CUDA tensors from a queue's writer to its readers, from one GPU memory to the other, by CUDA IPC.

Runs in every process; imports torch only where a CUDA tensor is at hand. Only queues whose readers are all on this
node share (queue_writer.py), and only tensors of SHARE_BYTES and more (tensor_codec.py); everything else goes through
host memory. One message::

    writer   copies the tensor on its GPU (the caller's is the caller's again when `enqueue` returns), waits for the
             copy, and shares it: where its memory is travels behind the message's own frames
    reader   while it unpickles: opens that, copies it to memory of its own on its current device, and lets go

The writer keeps its copy until every reader's cursor is past the message, or that reader is gone; handles and mappings
are torch's (cuda_memory.py).

Whether a reader can open the writer's memory (peer access, containers, the allocator's settings, the driver) is tried,
not guessed. A reader's word in the ring (`RingReader.device`) says how that went, and the writer shares only while all
of them say CAN::

    UNKNOWN   CUDA tensors go through host memory, and each message takes a probe along: a few random bytes in GPU
              memory, and the same in plain sight. It stays so while the reader has not imported torch
    CAN       the reader has opened a probe and has found the bytes
    CANNOT    it has not, or could not open a tensor later: through host memory, until another process has its place

All of a writer's tensors are shared from one of its devices, the probe's, so that one word is enough.

What is unread is bounded as a queue's other memory is: beyond it tensors go through host memory. A writer that ends
takes its GPU memory along, so what is unread then cannot be opened any more, unlike all else in a queue; one that is
killed leaves torch's file of counters behind (/dev/shm/torch_<pid>_..., 80 kB).
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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ray_shm.cuda_memory import CudaMemory, Shared, Token
from ray_shm.errors import PeerLostError
from ray_shm.ring import ATTACHED, CAN, CANNOT, UNKNOWN
from ray_shm.segment import start_time

if TYPE_CHECKING:
    from ray_shm.ring import RingReader, RingWriter

_PROBE_BYTES = 64

_log = logging.getLogger(__name__)
_here = threading.local()


memory = CudaMemory()


class StaleError(Exception):
    """After a message that shares GPU memory was pickled, a reader came that has not shown that it can open it."""


class DeviceFrame(bytes):
    """The last frame of a message that takes GPU memory along: a pickled _Contents.

    Attributes:
        outgoing: what it stands for, in the process that sends it.
    """

    outgoing: Outgoing


_Contents = tuple[int, int, bytes, list[Token]]  # writer's pid and start, content of a probe or nothing, memory


class Outgoing:
    """GPU memory that one message takes along. Used by the thread that pickles it, then by the Sharer of the queue."""

    def __init__(self, sharer: Sharer, probes: bool) -> None:
        """probes: tensors go through host memory, and a probe goes along."""
        self._sharer, self._probes = sharer, probes
        self._pid = os.getpid()
        self._tensors: list[Any] = []
        self._shared: list[Shared] = []
        self._reserved = 0
        self._sent = False

    @property
    def shares(self) -> bool:
        """Whether there is more than a probe."""
        return self._reserved > 0

    def take(self, tensor: Any) -> int | None:
        """Number of a contiguous tensor among those that go along; None: it goes through host memory."""
        if self._probes:
            self._sharer.device = self._sharer.device or tensor.device
            return None
        if not self._sharer.reserve(tensor.nbytes):
            return None
        import torch

        self._reserved += tensor.nbytes
        self._tensors.append(tensor.reshape(-1).view(torch.uint8))
        return len(self._tensors) - 1

    def restart(self) -> None:
        """The message is pickled once more."""
        self._tensors = []
        self._free()

    def frame(self) -> DeviceFrame | None:
        """To send behind the other frames; None where there is nothing. Lets go of the tensors.

        Raises:
            whatever torch does where it cannot share. Nothing is left behind.
        """
        tensors, self._tensors, content = self._tensors, [], b""
        device = self._sharer.device
        try:
            if self._probes:
                import torch

                content = secrets.token_bytes(_PROBE_BYTES)
                tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8)]
            for tensor in tensors:
                self._shared.append(memory.share(memory.copy(tensor, device)))
        except BaseException:
            self.release()
            raise
        if not self._shared:
            return None
        contents: _Contents = self._pid, start_time(self._pid), content, [shared.token for shared in self._shared]
        frame = DeviceFrame(pickle.dumps(contents, pickle.HIGHEST_PROTOCOL))
        frame.outgoing = self
        return frame

    def require_current(self) -> None:
        """Raises StaleError. With the queue's lock held, so that no reader is replaced until the message is sent."""
        if self.shares and not self._sharer.may_share():
            raise StaleError

    def send(self, end: int) -> None:
        """It is about to be published, and lasts until all have read up to the ring's position `end`."""
        self._sent = True
        self._sharer.keep(self, end)

    def release(self) -> None:
        """Nobody is to open it any more."""
        shared, self._shared = self._shared, []
        for one in shared:
            memory.unshare(one)
        self._free()

    def _free(self) -> None:
        reserved, self._reserved = self._reserved, 0
        self._sharer.free(reserved)

    def __del__(self) -> None:
        if not self._sent and self._pid == os.getpid():
            with contextlib.suppress(Exception):  # at interpreter exit, torch may be gone
                self.release()


class Sharer:
    """What of GPU memory goes through one queue. At its writer; from any thread.

    Attributes:
        device: of the memory that is shared, from the first probe on. messages: those with more than a probe.
    """

    def __init__(self, ring: RingWriter, bound: int) -> None:
        """bound: bytes of GPU memory that readers may leave unread; a single tensor may be larger."""
        self._ring: RingWriter | None = ring  # until the queue is closed, and all is read
        self._bound = bound
        self._reserved = 0
        self._lock = threading.RLock()
        self._in_flight: deque[tuple[int, Outgoing]] = deque()  # ring position after which it is read, and what
        self._off = False
        self.device: Any = None
        self.messages = 0

    def begin(self) -> Outgoing | None:
        """For a message that has something to share; None: all of it goes through host memory, as things stand."""
        _trim_closed()
        self.trim()
        words = self._words()
        return None if CANNOT in words or not words else Outgoing(self, UNKNOWN in words)

    def may_share(self) -> bool:
        return self._words() == {CAN}

    def _words(self) -> set[int]:
        """Of the readers that count; none where nothing is to be shared."""
        ring = self._ring
        if ring is None or self._off:
            return set()
        return {ring.device(i) for i in range(ring.shape.n_readers) if i not in ring.dropped}

    def reserve(self, nbytes: int) -> bool:
        with self._lock:
            fits = not self._reserved or self._reserved + nbytes <= self._bound
            self._reserved += nbytes if fits else 0
            return fits

    def free(self, nbytes: int) -> None:
        with self._lock:
            self._reserved -= nbytes

    def failed(self, exc: Exception) -> None:
        """This process could not share. It tries again if only its GPU memory was short."""
        if memory.is_full(exc):
            return
        self._off = True
        _log.warning("CUDA tensors of pid %d go through host memory: sharing GPU memory failed: %s", os.getpid(), exc)

    def keep(self, outgoing: Outgoing, end: int) -> None:
        with self._lock:
            self._in_flight.append((end, outgoing))
            self.messages += outgoing.shares

    def trim(self) -> None:
        """Let go of what was read."""
        ring = self._ring
        if self._in_flight and ring is not None:
            self._release(ring.slowest())

    def _release(self, read: int) -> None:
        """read: ring position up to which every reader has consumed."""
        with self._lock:
            while self._in_flight:
                first = self._in_flight.popleft()
                if first[0] > read:
                    self._in_flight.appendleft(first)
                    return
                first[1].release()

    def close(self) -> None:
        """Readers that are attached may still read what they have; it is looked for later whether they did."""
        self._off = True
        self._trim_closed()
        if self._in_flight:
            _closed.append(self)

    def _trim_closed(self) -> bool:
        """Whether all is read or nobody is left who could."""
        ring = self._ring
        if self._in_flight and ring is not None:
            left = [i for i in range(ring.shape.n_readers) if i not in ring.dropped and _reads(ring, i)]
            lag = max((ring.lag(i) for i in left), default=0)
            self._release(ring.published - lag if lag else sys.maxsize)  # also what was never published
        if not self._in_flight:
            self._ring = None  # whoever keeps this object does not keep the memory mapped
        return not self._in_flight


def _reads(ring: RingWriter, i: int) -> bool:
    return ring.state(i) == ATTACHED and start_time(ring.pid(i)) == ring.started(i)


_closed: list[Sharer] = []  # of queues that were closed with GPU memory unread


def _trim_closed() -> None:
    for sharer in list(_closed):
        if sharer._trim_closed():
            with contextlib.suppress(ValueError):  # by another thread
                _closed.remove(sharer)


os.register_at_fork(after_in_child=_closed.clear)


class Received(bytes):
    """A DeviceFrame as a reader has it, in place of that frame."""

    _ring: RingReader
    _pid: int  # the writer's
    _started: int
    _tokens: list[Token]

    @classmethod
    def of(cls, frame: memoryview, ring: RingReader) -> Received:
        """Tries to open a probe, and says in the ring how it went; raises nothing."""
        self = cls(frame)
        self._ring = ring
        contents: _Contents = pickle.loads(self)
        self._pid, self._started, content, self._tokens = contents
        # Who has not imported torch will have, once it has unpickled this message's tensor.
        if content and ring.device == UNKNOWN and "torch" in sys.modules:
            self._say(self._try(content))
        return self

    def _say(self, why_not: str) -> None:
        self._ring.device = CANNOT if why_not else CAN
        if why_not:
            _log.info("CUDA tensors from pid %d to pid %d go through host memory: %s", self._pid, os.getpid(), why_not)

    def _try(self, content: bytes) -> str:
        """Why a probe cannot be opened here; empty: it can."""
        if self._pid == os.getpid():
            return "a process cannot open its own"
        try:
            found = memory.content(memory.open(self._tokens[0]))
        except Exception as exc:  # whatever the driver, the allocator or this version of torch has against it
            return f"{type(exc).__name__}: {exc}"
        return "" if found == content else "other memory is found where it should be"

    def opened(self, number: int) -> Any:
        """See the function."""
        try:
            return memory.open(self._tokens[number])
        except Exception as exc:
            if memory.is_full(exc):
                raise
            if start_time(self._pid) != self._started:
                raise PeerLostError(
                    f"a CUDA tensor cannot be received: its writer (pid {self._pid}) is gone, and its GPU memory with "
                    f"it: {exc}"
                ) from exc
            self._say(f"{type(exc).__name__}: {exc}")
            raise RuntimeError(
                f"GPU memory of pid {self._pid} cannot be opened in pid {os.getpid()} any more: {type(exc).__name__}: "
                f"{exc}. This message is lost here; the next ones come through host memory"
            ) from exc

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
        torch.OutOfMemoryError: there is no room for it.
    """
    received: Received = _here.received
    return received.opened(number)
