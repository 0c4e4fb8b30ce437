"""What a receiver holds: it never changes, nobody else sees what is written to it, and its memory is used again."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from holders import hold, hold_and_leave, keep_and_go_on, keep_uncopied, kept_values, make, return_at_once
from injection import HANG, result_within, wait_for
from queue_ends import holders
from reader_pool import Me, Peer, Wire

from ray_shm import lease
from ray_shm.message_queue import MessageQueue

MIB = 1 << 20
SIZES = (50, 3000, 100 << 10, MIB)  # in the pickle, in the ring, in a block and copied out, in a block and leased
KINDS = ("bytes", "bytearray", "memoryview", "array")


pytestmark = pytest.mark.usefixtures("what_stays")


# Aliasing after reuse


def check_that_nothing_changes(peer: Peer, more: int, kinds: tuple[str, ...] = KINDS) -> None:
    wire = Wire("local", [peer], max_chunk_bytes=4 * MIB)
    try:
        variants = [(kind, size) for kind in kinds for size in SIZES]
        peer.start(keep_and_go_on, len(variants), more)
        for k, (kind, size) in enumerate(variants):
            wire.queue.enqueue((kind, size, k, make(kind, size, k)), HANG)
        for k in range(more):
            size = SIZES[3] if k % 50 == 0 else SIZES[2] if k % 10 == 0 else SIZES[k % 2]
            wire.queue.enqueue(make("array", size, 100 + k % 100), HANG)
        changed = result_within(peer, HANG)
        assert changed == []
    finally:
        wire.close()


def test_what_was_received_never_changes(peer: Peer) -> None:
    check_that_nothing_changes(peer, 3000)


@pytest.mark.slow
def test_what_was_received_never_changes_for_long(peer: Peer) -> None:
    check_that_nothing_changes(peer, 50_000, (*KINDS, "tensor"))


@pytest.mark.parametrize("naive", [keep_uncopied, return_at_once])
def test_a_naive_receiver_would_see_changes(peer: Peer, naive: Callable[[Me], None]) -> None:
    peer.run(naive)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_that_nothing_changes(peer, 3000)


# Whatever is derived from a received object keeps its memory


class Node:
    """For a cycle."""


def in_a_cycle(x: Any) -> Any:
    node = Node()
    node.me, node.x = node, x  # type: ignore[attr-defined]
    return node


def grown(x: torch.Tensor) -> torch.Tensor:
    """A result whose autograd graph has saved the received tensor."""
    weight = torch.ones_like(x, requires_grad=True)
    return (weight * x).sum()


FROM_ARRAY: dict[str, Callable[[Any], Any]] = {
    "slice": lambda x: x[5:900_000],
    "view of a view": lambda x: x[1000:][::2][10:].view(),
    "one element's view": lambda x: x[77:78],
    "transposed": lambda x: x.reshape(1024, -1).T,
    "other dtype": lambda x: x.view(np.float32),
    "torch.from_numpy": torch.from_numpy,
    "slice of torch.from_numpy": lambda x: torch.from_numpy(x)[9:],
    "torch.as_tensor": torch.as_tensor,
    "memoryview": memoryview,
    "slice of a memoryview": lambda x: memoryview(x)[100:200],
    "np.frombuffer": lambda x: np.frombuffer(x, np.uint16),
    "np.from_dlpack": np.from_dlpack,
    "torch.from_dlpack": torch.from_dlpack,
    "its base": lambda x: x.base,
    "its iterator": lambda x: x.flat,
    "in a list in a dict": lambda x: {"a": [x[3:4]]},
    "in a cycle": in_a_cycle,
    "subclass": lambda x: x.view(np.matrix),
    "record array": lambda x: x.view([("a", np.uint32), ("b", np.uint32)])["b"],
}
FROM_TENSOR: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda t: t.numpy(),
    "slice of numpy": lambda t: t.numpy()[4:],
    "slice": lambda t: t[1:],
    "view of a view": lambda t: t.view(1024, -1)[3:].T[2:],
    "storage": lambda t: t.untyped_storage(),
    "detached": lambda t: t.detach(),
    "other dtype": lambda t: t.view(torch.int32),
    "autograd": lambda t: grown(t.view(torch.float32)),
    "leaf of a graph": lambda t: t.view(torch.float32).requires_grad_(),
    "np.from_dlpack": np.from_dlpack,
    "torch.from_dlpack": torch.from_dlpack,
    "a capsule": torch.utils.dlpack.to_dlpack,
    "unbound": lambda t: t.view(1024, -1).unbind()[9],
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


def content(obj: Any) -> Any:
    """A value that shows every byte that `obj` leads to."""
    if isinstance(obj, Node):
        return content(obj.x)  # type: ignore[attr-defined]
    if isinstance(obj, dict):
        return content(obj["a"][0])
    if type(obj).__name__ == "PyCapsule":
        return None  # it can be looked into once only
    if isinstance(obj, torch.UntypedStorage):
        return content(torch.empty(0, dtype=torch.uint8).set_(obj))
    if isinstance(obj, torch.Tensor):
        if obj.grad_fn is None:
            return bytes(obj.detach().contiguous().view(torch.uint8).numpy())
        (saved,) = (s for s in (obj.grad_fn.next_functions[0][0]._saved_self, _other(obj)) if s is not None)
        return content(saved.detach())
    if isinstance(obj, np.flatiter):
        return bytes(np.asarray(obj.base))
    return np.ascontiguousarray(obj).tobytes() if isinstance(obj, np.ndarray) else bytes(obj)


def _other(obj: torch.Tensor) -> Any:
    return obj.grad_fn.next_functions[0][0]._saved_other  # type: ignore[union-attr]


def pattern(kind: str, seed: int) -> Any:
    """1 MiB of finite floats."""
    data = np.random.default_rng(seed).random(MIB // 4, np.float32).view(np.uint8)
    return torch.from_numpy(data) if kind == "tensor" else data


def pass_by(ends: tuple[MessageQueue, MessageQueue], count: int) -> None:
    """Send and drop large messages, so that every free block is written."""
    writer, reader = ends
    for k in range(count):
        writer.enqueue(pattern("array", 1000 + k), HANG)
        assert reader.dequeue(HANG).nbytes == MIB


def fault_of(ends: tuple[MessageQueue, MessageQueue], kind: str, derive: Callable[[Any], Any]) -> str:
    """What is wrong with the lease of an object of which only `derive` of it is left."""
    writer, reader = ends
    expected = content(derive(pattern(kind, 1)))
    writer.enqueue(pattern(kind, 1))
    derived = derive(reader.dequeue(HANG))
    if lease.held()[0] != 1:
        return "ended at once"
    pass_by(ends, 4)
    if lease.held()[0] != 1 or list(holders(writer)) != [0]:
        return "ended early"
    if content(derived) != expected:
        return "changed"
    del derived
    gc.collect()
    return "" if lease.held() == (0, 0) and holders(writer) == {} else "never ended"


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_what_is_derived_keeps_the_memory(ends: tuple[MessageQueue, MessageQueue], kind: str) -> None:
    table = FROM_ARRAY if kind == "array" else FROM_TENSOR
    faults = {name: fault_of(ends, kind, derive) for name, derive in table.items()}
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_a_released_block_is_used_again(ends: tuple[MessageQueue, MessageQueue]) -> None:
    writer, reader = ends
    pass_by(ends, 3)
    before = writer.stats().arena_bytes
    for k in range(30):
        writer.enqueue(pattern("array", k))
        view = reader.dequeue(HANG)[100:][::3]
        del view
    assert writer.stats().arena_bytes == before
    kept = []
    for k in range(5):
        writer.enqueue(pattern("array", k))
        kept.append(reader.dequeue(HANG))
    stats = reader.stats()
    assert stats.leased_blocks == 5
    assert 5 * MIB <= stats.leased_bytes < 6 * MIB
    assert writer.stats().arena_bytes >= 5 * MIB
    kept.clear()
    grown = writer.stats().arena_bytes
    pass_by(ends, 30)
    assert writer.stats().arena_bytes == grown


def test_a_lease_ends_in_another_thread(ends: tuple[MessageQueue, MessageQueue]) -> None:
    writer, reader = ends
    writer.enqueue(pattern("array", 1))
    box = [reader.dequeue(HANG)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join(HANG)
    assert lease.held() == (0, 0)
    assert holders(writer) == {}


def test_leases_end_wherever_a_cycle_is_collected(ends: tuple[MessageQueue, MessageQueue]) -> None:
    """Also inside of the queue's own calls: the collector runs at every allocation here."""
    writer, reader = ends
    thresholds = gc.get_threshold()
    try:
        for k in range(60):
            writer.enqueue(pattern("array", k), HANG)
            in_a_cycle(reader.dequeue(HANG)[k:])
            gc.set_threshold(1, 1, 1)
            writer.enqueue(k, HANG)
            assert reader.dequeue(HANG) == k
            gc.set_threshold(*thresholds)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert lease.held() == (0, 0)
    assert holders(writer) == {}


def test_leases_in_many_threads_at_once(ends: tuple[MessageQueue, MessageQueue]) -> None:
    """Taken, checked and dropped by four threads, while the writer goes on: no value of another message is seen."""
    writer, reader = ends
    wrong: list[int] = []

    def work() -> None:
        last: tuple[int, Any] = (0, np.zeros(1, np.uint8))
        while True:
            number, array = reader.dequeue(HANG)
            if number < 0:
                return
            for n, a in (last, (number, array)):
                if a[0] != n % 251 or a[-1] != n % 251:
                    wrong.append(n)
            last = (number, array)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for k in range(400):
        writer.enqueue((k, np.full(300_000, k % 251, np.uint8)), HANG)
    for _ in threads:
        writer.enqueue((-1, None), HANG)
    for thread in threads:
        thread.join(HANG)
    assert wrong == []


AT_EXIT = """
import sys, threading
import numpy as np
from ray_shm.message_queue import MessageQueue
from ray_shm import lease

writer = MessageQueue(1, 1)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
for k in range(6):
    writer.enqueue(np.full(1 << 20, k, np.uint8))
class Cycle: pass
a, b, c = reader.dequeue(), reader.dequeue()[7:], Cycle()
if sys.argv[1] == "open":
    import torch
    b = torch.from_numpy(b)
c.me, c.x = c, reader.dequeue()
sys.kept = reader.dequeue().reshape(2, -1)
class Late:
    def __del__(self, x=reader.dequeue()): assert x[5] == 4 and x[-1] == 4
late = Late()
local = threading.local(); local.x = reader.dequeue()
assert lease.held()[0] == 6
if sys.argv[1] == "closed":
    writer.close(); reader.close()
if sys.argv[1] == "thread":
    threading.Thread(target=lambda: reader.dequeue(), daemon=True).start()
"""


@pytest.mark.parametrize("how", ["closed", "open", "thread"])
def test_interpreter_exit_with_leases_is_silent(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT, how], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_writer_goes_on_when_a_holder_has_exited(peer: Peer) -> None:
    """A reader that holds leases ends as programs end; what it held is used again."""
    wire = Wire("local", [peer], drop_dead_readers=True, max_chunk_bytes=8 * MIB)
    with wire.queue as queue:
        peer.start(hold, 5)
        for k in range(5):
            queue.enqueue(pattern("array", k), HANG)
        peer.result()
        assert holders(queue)[0][0] == 5
        peer.pipe.send(None)  # it returns from its main function
        wait_for(lambda: (queue.enqueue(1), not holders(queue))[1], "the leases of a process that has exited end")
        queue.enqueue(pattern("array", 9), HANG)


def test_leases_outlive_their_queue_but_not_their_process(peer: Peer) -> None:
    """A reader closes its end and keeps what it got: that stays as it is, until the process ends."""
    other = Peer()
    wire = Wire("local", [peer, other], drop_dead_readers=True, max_chunk_bytes=8 * MIB)
    try:
        with wire.queue as queue:
            wire.start(hold_and_leave, 3)
            for k in range(3):
                queue.enqueue(np.full(MIB, k, np.uint8), HANG)
            wire.results()
            for k in range(100):  # the writer notices when the queue is full
                queue.enqueue(np.full(MIB, 100 + k % 100, np.uint8), HANG)
            assert peer.run(kept_values) == [0, 1, 2]
            assert [holders(queue)[i][0] for i in range(2)] == [3, 3]
            peer.kill()
            wait_for(lambda: 0 not in (queue.enqueue(1), holders(queue))[1], "the leases of a dead process end", 5)
            assert other.run(kept_values) == [0, 1, 2]
    finally:
        other.close()


def test_a_kept_closed_queue_holds_no_memory(ends: tuple[MessageQueue, MessageQueue]) -> None:
    """Nor until the next collection, which an idle process never comes to."""
    writer, reader = ends
    gc.disable()
    try:
        for size in SIZES:
            writer.enqueue(make("array", size, 1))
            assert len(reader.dequeue(HANG)) == size
        assert mapped() > 0
        writer.close()
        reader.close()
        assert mapped() == 0
    finally:
        gc.enable()


def mapped() -> int:
    """Mappings of queues in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:ray_shm")
