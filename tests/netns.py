"""Separate hosts on one machine: each with its own network, process ids, /dev/shm and IPC, joined by a cable.

Runs in the pytest process, as root. A host is a process in namespaces of its own that have no names: whatever ends
that process, or pytest, the kernel then removes the namespaces, all processes in them and the cable. Processes on a
host run checks on command, as those of reader_pool.py do.

    hosts = lay_cable(); hosts[0].ip, hosts[1].ip6; hosts[0].run(check, ...); hosts[0].spawn() -> one more process there
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from reader_pool import WATCHDOG, serve_checks

REQUIRE = "RAY_SHM_REQUIRE_NETNS"  # set to 1 where a skip would hide that nothing is tested
_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"]
_OWN_SHM = ["sh", "-c", 'mount -t tmpfs -o size=256m tmpfs /dev/shm && exec "$@"', "sh"]
_SERVE = "import sys, netns; netns.serve(int(sys.argv[1]))"


def require_namespaces() -> None:
    """Skip the test, or fail it under `REQUIRE`, where this machine cannot make hosts."""
    reason = _obstacle()
    if reason and os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{REQUIRE}=1, but {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


def _obstacle() -> str:
    missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if missing:
        return f"separate hosts need the commands {missing} (Debian packages iproute2, util-linux)"
    if os.geteuid() != 0:
        return "separate hosts need root"
    tried = subprocess.run([*_UNSHARE, *_OWN_SHM, "true"], capture_output=True, text=True, timeout=WATCHDOG)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else ""


def serve(descriptor: int) -> None:
    """The life of a process on a host. It ends with the pytest process, whatever ended that."""
    pipe = Connection(descriptor)
    pipe.send("up")
    with contextlib.suppress(EOFError, ConnectionError):
        serve_checks(pipe)


class HostProcess:
    """A process on a host that runs checks.

    Attributes:
        pid: as seen from here; on its host it has another one.
    """

    def __init__(self, enter: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*enter, sys.executable, "-c", _SERVE, str(theirs.fileno())]
            self._launcher = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.pipe: Connection[Any, Any] = Connection(ours.detach())
        try:
            self._receive()
            children = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text()
            self.pid = int(children)
        except BaseException:
            self._launcher.kill()
            self._launcher.wait(WATCHDOG)
            self.pipe.close()
            raise

    def start(self, check: Callable[..., Any], *args: Any) -> None:
        self.pipe.send((check, args))

    def result(self) -> Any:
        passed, value = self._receive()
        if not passed:
            pytest.fail(f"in a process on the other host:\n{value}")
        return value

    def run(self, check: Callable[..., Any], *args: Any) -> Any:
        self.start(check, *args)
        return self.result()

    def kill(self, sig: int = signal.SIGKILL) -> None:
        os.kill(self.pid, sig)

    def close(self) -> None:
        """End the process and all that it started. Idempotent."""
        if self.pipe.closed:
            return
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(self.pid)
            self._kill()
            select.select([process], [], [], WATCHDOG)
            os.close(process)
        self._launcher.wait(WATCHDOG)

    def _kill(self) -> None:
        self.kill()

    def _receive(self) -> Any:
        if not self.pipe.poll(WATCHDOG):
            pytest.fail("a process on another host hangs")
        try:
            return self.pipe.recv()
        except EOFError:
            pytest.fail(f"a process on another host ended with {self._launcher.wait(WATCHDOG)}")


class Host(HostProcess):
    """A host, and the process with id 1 on it. When that ends, so do all others there.

    Attributes:
        ip, ip6: its addresses on the cable.
    """

    def __init__(self, number: int) -> None:
        super().__init__([*_UNSHARE, *_OWN_SHM])
        self.ip, self.ip6 = f"10.77.0.{number}", f"fd77::{number}"
        self._others: list[HostProcess] = []

    def spawn(self) -> HostProcess:
        """One more process on this host, until `close_others`."""
        target = str(self.pid)
        self._others.append(HostProcess(["nsenter", "-t", target, "--net", "--mount", "--pid", "--ipc"]))
        return self._others[-1]

    def set_link(self, state: str) -> None:
        """Pull this host's end of the cable ("down"); the addresses of the other end stay as they are."""
        self._ip("link", "set", "cable", state)

    def bring_up(self) -> None:
        self._ip("address", "add", f"{self.ip}/24", "dev", "cable")
        self._ip("address", "add", f"{self.ip6}/64", "dev", "cable", "nodad")
        self._ip("link", "set", "cable", "up")
        self._ip("link", "set", "lo", "up")

    def close_others(self) -> None:
        """End what `spawn` made."""
        while self._others:
            self._others.pop().close()

    def close(self) -> None:
        self.close_others()
        super().close()

    def _kill(self) -> None:
        self._launcher.kill()  # and the kernel the process, as --kill-child says

    def _ip(self, *args: str) -> None:
        _check("nsenter", "-t", str(self.pid), "--net", "ip", *args)


def _check(*command: str) -> None:
    subprocess.run(command, check=True, timeout=WATCHDOG)


def lay_cable() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other; for fixtures: ``yield from lay_cable()``."""
    require_namespaces()
    hosts: list[Host] = []
    try:
        for number in (1, 2):
            hosts.append(Host(number))
        ends = [str(host.pid) for host in hosts]
        _check(
            "ip", "link", "add", "cable", "netns", ends[0], "type", "veth", "peer", "name", "cable", "netns", ends[1]
        )
        for host in hosts:
            host.bring_up()
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.close()
