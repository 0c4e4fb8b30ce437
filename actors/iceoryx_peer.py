"""iceoryx2 as a peer of ``ray-shm bench queue``: publish-subscribe of bytes, an event to wake readers up.

Used only where the package iceoryx2 is installed (tried with 0.10). One service carries the payload to all readers,
pickled with the array out of band and copied straight into the loaned sample, so that one copy goes in and none comes
out; a second one carries all replies back. iceoryx2 leaves files in /dev/shm, also after a clean end: they carry the
run's own prefix, by which the driver removes them (`remove_files`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import pickle
from pathlib import Path
from typing import Any

from ray_shm.actors.queue_peers import REPLY, STOP, Desk, Message, ReaderEnd, Seat, UnavailableError, WriterEnd

SHARED_MEMORY = Path("/dev/shm")
SAMPLES = 3  # preallocated: one at the readers, one on its way, one to spare
_SPECIFICATION = tuple[str, str, int, int]  # root folder, prefix, readers, largest bytes
_WORD, _ALIGNMENT = 8, 64


def is_installed() -> bool:
    return importlib.util.find_spec("iceoryx2") is not None


def prefix_of(folder: Path) -> str:
    """What the names of all files of the run with this private folder start with."""
    return f"rsb_{folder.name.rpartition('-')[2]}_"


def remove_files(folder: Path) -> None:
    """Remove what iceoryx2 left in /dev/shm. All processes of the run have ended or closed their ends.

    Where the driver is killed by SIGKILL nobody does this: the payload of one cell may stay there.
    """
    for path in SHARED_MEMORY.glob(f"{prefix_of(folder)}*"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


class _Ports:
    """A node with its two services and their events. `writes` says which end this is."""

    def __init__(self, specification: _SPECIFICATION, writes: bool) -> None:
        root, prefix, readers, size = specification
        self.iox = iox = importlib.import_module("iceoryx2")  # not imported by name: it is optional, for mypy too
        iox.set_log_level(iox.LogLevel.Error)
        config = iox.config.default()
        config.global_cfg.root_path = iox.Path.new(root)
        config.global_cfg.prefix = iox.FileName.new(prefix)
        builder = iox.NodeBuilder.new().config(config).signal_handling_mode(iox.SignalHandlingMode.Disabled)
        self.node = builder.create(iox.ServiceType.Ipc)
        calls, called = self._service("calls", 1, readers), self._event("called", 1, readers)
        replies, replied = self._service("replies", readers, 1), self._event("replied", readers, 1)
        out, out_event, back, back_event = calls, called, replies, replied
        if not writes:
            out, out_event, back, back_event, size = replies, replied, calls, called, 1024
        self.publisher = self._publisher(out, size)
        self.notifier = out_event.notifier_builder().create()
        self.listener = back_event.listener_builder().create()
        self.subscriber = back.subscriber_builder().create()
        self.second = iox.Duration.from_secs(1)
        self.sample: Any = None

    def _service(self, name: str, publishers: int, subscribers: int) -> Any:
        builder = self.node.service_builder(self.iox.ServiceName.new(name))
        builder = builder.publish_subscribe(self.iox.Slice[ctypes.c_uint8]).max_nodes(publishers + subscribers)
        builder = builder.max_publishers(publishers).max_subscribers(subscribers).history_size(0)
        builder = builder.subscriber_max_buffer_size(2).subscriber_max_borrowed_samples(1)
        return builder.enable_safe_overflow(False).open_or_create()

    def _event(self, name: str, notifiers: int, listeners: int) -> Any:
        builder = self.node.service_builder(self.iox.ServiceName.new(name)).event()
        builder = builder.max_notifiers(notifiers).max_listeners(listeners).max_nodes(notifiers + listeners)
        return builder.open_or_create()

    def _publisher(self, service: Any, size: int) -> Any:
        builder = service.publisher_builder().initial_max_slice_len(size).max_loaned_samples(1)
        builder = builder.backpressure_strategy(self.iox.BackpressureStrategy.RetryUntilDelivered)
        return builder.override_sample_preallocation(SAMPLES).create()

    def send(self, message: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(message, 5, buffer_callback=buffers.append)
        raw = buffers[0].raw() if buffers else memoryview(b"")  # a message holds one array at most
        begin = -(-(_WORD + len(head)) // _ALIGNMENT) * _ALIGNMENT
        sample = self.publisher.loan_slice_uninit(begin + len(raw))
        view = memoryview((ctypes.c_ubyte * (begin + len(raw))).from_address(sample.payload_ptr)).cast("B")
        view[:_WORD] = len(head).to_bytes(_WORD, "little")
        view[_WORD : _WORD + len(head)] = head
        view[begin:] = raw
        sample.assume_init().send()
        self.notifier.notify()

    def receive(self) -> Any:
        """The next message; its array is valid until the next `receive` or `drop`."""
        self.drop()
        while (sample := self.subscriber.receive()) is None:
            self.listener.timed_wait(self.second)  # not blocking_wait: signals are looked at only in between
        self.sample = sample
        view = sample.payload().as_memory_view().cast("B")
        end = _WORD + int.from_bytes(view[:_WORD], "little")
        buffer = view[-(-end // _ALIGNMENT) * _ALIGNMENT :]
        return pickle.loads(view[_WORD:end], buffers=[buffer])

    def drop(self) -> None:
        if self.sample is not None:
            self.sample.delete()
            self.sample = None


class IceoryxWriter(WriterEnd):
    """The driver's end.

    Raises:
        UnavailableError: iceoryx2 cannot be used here, or its interface has changed.
    """

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        size = desk.cell.payload_bytes + 4096  # bytes; the rest is for the pickle's head
        self.specification = (str(desk.folder), prefix_of(desk.folder), desk.cell.readers, size)
        try:
            self.ports: Any = _Ports(self.specification, writes=True)
        except Exception as exc:
            raise UnavailableError(f"{type(exc).__name__}: {exc}") from exc

    def specs(self) -> list[Any]:
        return [self.specification] * len(self.pipes)

    def call(self) -> None:
        self.ports.send(self.message)
        for _ in self.pipes:
            self.ports.receive()

    def stop(self) -> None:
        self.ports.send(STOP)

    def close(self) -> None:
        self.ports = None


class IceoryxReader(ReaderEnd):
    """A worker's end."""

    def __init__(self, spec: Any, seat: Seat) -> None:
        super().__init__(spec, seat)
        self.ports: Any = _Ports(spec, writes=False)

    def receive(self) -> Message:
        message: Message = self.ports.receive()
        return message

    def reply(self) -> None:
        self.ports.drop()
        self.ports.send(REPLY)

    def close(self) -> None:
        self.ports = None
