"""A signal's handler that raises at a chosen step of a call.

Python runs handlers where a function is entered, where a C function has returned and where a loop goes round. At the
first two a profile function can raise; it does not hear of calls of classes and of ctypes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """As KeyboardInterrupt."""


def interrupted(at: int, call: Callable[[], Any]) -> BaseException | None:
    """Runs it, and raises at its step `at`; None: it has no such step, and has run."""
    steps = 0

    def profile(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal steps
        if event in ("call", "c_return"):
            steps += 1
            if steps == at + 1:  # not where this function itself is left
                raise Interrupted

    try:
        sys.setprofile(profile)
        call()
    except Interrupted as exc:
        return exc
    finally:
        sys.setprofile(None)
    return None
