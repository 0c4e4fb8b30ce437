"""The worker of the tests of calls in flight: it waits, streams, and remembers what became of its generators."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time

import ray_shm


class Broken:
    """Can be pickled, not unpickled."""

    def __reduce__(self):
        return int, ("broken",)


class Waits:
    def __init__(self):
        self.log = []
        self.lock = threading.Lock()
        self.lock.acquire()

    def rank(self):
        return ray_shm.get_context().rank

    def recall(self):
        log, self.log = self.log, []
        return log

    def sleep(self, seconds):
        return self._logged(lambda: time.sleep(seconds))

    def spin(self, seconds):
        def spin():
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                pass

        return self._logged(spin)

    def await_lock(self, seconds):
        return self._logged(lambda: self.lock.acquire(timeout=seconds))

    def await_event(self, seconds):
        return self._logged(lambda: threading.Event().wait(seconds))

    async def asleep(self, seconds):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.log.append("cancelled in an await")
            raise
        return "slept"

    async def asleep_blocking(self, seconds):
        return self.sleep(seconds)

    def hold_the_interpreter(self, seconds):
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return "held"

    def echo(self, value):
        return value

    def swallow(self, seconds):
        try:
            time.sleep(seconds)
        except ray_shm.RpcCancelledError:
            return "cleaned up"

    def items(self, n, fail_at=None):
        try:
            for i in range(n):
                if i == fail_at:
                    raise ValueError(f"no item {i}")
                self.log.append(i)
                yield i
        except GeneratorExit:
            self.log.append("closed")
            raise

    def fail_on(self, rank, n):
        if self.rank() == rank:
            yield from self.items(n, fail_at=n - 1)
        else:
            yield from self.items(10**9)

    def slow_items(self, seconds):
        self.log.append("begun")
        yield 0
        self._logged(lambda: time.sleep(seconds))
        yield 1

    async def aitems(self, n):
        try:
            for i in range(n):
                await asyncio.sleep(0)
                yield i
        finally:
            self.log.append("async generator closed")

    def broken_items(self):
        yield Broken()
        yield from self.items(10**9)

    def stubborn_items(self):
        i = 0
        while True:
            try:
                yield i
                i += 1
                self.log.append("asleep")
                time.sleep(600)
            except Exception as exc:
                self.log.append(type(exc).__name__)

    async def astubborn_items(self):
        i = 0
        while True:
            try:
                yield i
                i += 1
                self.log.append("asleep")
                await asyncio.sleep(600)
            except asyncio.CancelledError as exc:
                self.log.append(type(exc).__name__)

    async def begin_background(self):
        async def compute():
            try:
                while True:
                    until = time.monotonic() + 0.05
                    while time.monotonic() < until:
                        pass
                    await asyncio.sleep(0)
            except ray_shm.RpcCancelledError:
                self.log.append("the background task was hit")

        self.background = asyncio.get_running_loop().create_task(compute())

    async def end_background(self):
        alive = not self.background.done()
        self.background.cancel()
        return alive

    def one(self):
        yield threading.Lock()

    def _logged(self, wait):
        try:
            wait()
        except ray_shm.RpcCancelledError as exc:
            self.log.append(type(exc).__name__)
            raise
        return "done"
