"""A bare process, up in a tenth of a second, that holds a death word and ends in all ways. Run as a program, too.

Commands come as lines on its standard input, one answer goes out for each.
"""

from __future__ import annotations

import ast
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from ray_shm.death_word import HeldWord, hold
from ray_shm.segment import Segment, SegmentRef

# Ways to end, and what is known of them afterwards.
ENDINGS: dict[str, tuple[Callable[[], object], str]] = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal 9 (SIGKILL)"),
    "SIGSEGV": (lambda: ctypes.string_at(0), "killed by signal 11 (SIGSEGV)"),
    "os._exit": (lambda: os._exit(3), "exited with code 3"),
    "sys.exit": (lambda: sys.exit(4), "exited with code 4"),
}


def end(how: str) -> None:
    faulthandler.disable()  # no report of a segfault that is wanted
    ENDINGS[how][0]()


class Holder:
    """The process, from the test's side."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self.process.pid

    def start(self, *command: Any) -> None:
        print(repr(command), file=self.process.stdin)

    def run(self, *command: Any) -> Any:
        self.start(*command)
        return ast.literal_eval(self.process.stdout.readline())

    def hold(self, ref: SegmentRef, offset: int) -> None:
        self.run("hold", (ref.pid, ref.fd, ref.size, ref.nonce, ref.boot_id, ref.start_time), offset)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class _Commands:
    held: HeldWord | None = None
    touched = b""

    def hold(self, ref: tuple[Any, ...], offset: int) -> None:
        self.held = hold(Segment.attach(SegmentRef(*ref)).view, offset)  # the word itself keeps the memory
        assert self.held is not None

    def release(self) -> None:
        self.held.release()
        self.held.release()

    def touch(self, mib: int) -> None:
        self.touched = b"\1" * (mib << 20)

    def fork(self, how: str) -> int:
        """End a child that has its copy of everything; its wait status."""
        if not (pid := os.fork()):
            self.held.release()  # not the child's to give
            end(how)
        return os.waitpid(pid, 0)[1]

    def hold_on_a_thread(self) -> str:
        raised: list[BaseException] = []

        def attempt() -> None:
            try:
                hold(memoryview(bytearray(64)), 0)
            except RuntimeError as exc:
                raised.append(exc)

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        return str(raised[0])

    def end(self, how: str) -> None:
        end(how)


if __name__ == "__main__":
    commands = _Commands()
    for line in sys.stdin:
        name, *args = ast.literal_eval(line)
        print(repr(getattr(commands, name)(*args)), flush=True)
