"""Python objects between the members of a coordinator group, pickled, as byte tensors over gloo.

Runs in every worker. An object is two messages: 8 bytes of length, then the pickle. One that cannot be pickled
travels as the text of its error with a negative length, so that the receivers raise too instead of waiting for it.
Imports torch: only `coordinator` imports this module, at the first object.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from ray_shm.connection import OBJECT_TAG, GroupConnection
from ray_shm.errors import RemoteError

_PICKLE_PROTOCOL = 5


def broadcast(link: GroupConnection, operation: str, obj: Any, src: int, timeout: float | None) -> Any:
    """The object of the member `src`; `obj` counts there only."""
    if src != link.members.rank_in_group:
        return _receive(link, src, timeout, operation, "broadcast", src)
    _transmit(link, obj, timeout, operation, "broadcast", src)
    return obj


def send(link: GroupConnection, obj: Any, dst: int, timeout: float | None) -> None:
    _transmit(link, obj, timeout, "send_object", "send", dst, OBJECT_TAG)


def recv(link: GroupConnection, src: int, timeout: float | None) -> Any:
    return _receive(link, src, timeout, "recv_object", "recv", src, OBJECT_TAG)


def _transmit(
    link: GroupConnection, obj: Any, timeout: float | None, operation: str, primitive: str, *where: int
) -> None:
    error: Exception | None = None
    buffer = io.BytesIO()
    try:
        pickle.Pickler(buffer, protocol=_PICKLE_PROTOCOL).dump(obj)
    except Exception as exc:  # whatever a user's __reduce__ raises
        error, buffer = exc, io.BytesIO(f"{type(exc).__name__}: {exc}".encode(errors="replace"))
    content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    length = content.numel() if error is None else -content.numel()
    link.run(operation, primitive, torch.tensor([length], dtype=torch.int64, device="cpu"), *where, timeout=timeout)
    link.run(operation, primitive, content, *where, timeout=timeout)
    if error is not None:
        raise error


def _receive(
    link: GroupConnection, src: int, timeout: float | None, operation: str, primitive: str, *where: int
) -> Any:
    header = torch.zeros(1, dtype=torch.int64, device="cpu")
    link.run(operation, primitive, header, *where, timeout=timeout)
    length = int(header.item())
    content = torch.empty(abs(length), dtype=torch.uint8, device="cpu")
    link.run(operation, primitive, content, *where, timeout=timeout)
    if length < 0:
        text = bytes(content.numpy()).decode()
        raise RemoteError(f"rank {link.members.ranks[src]} could not pickle the object to send: {text}")
    return pickle.loads(content.numpy().data)
