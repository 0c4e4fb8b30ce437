"""How a process of this node ended: its exit status, read off a pidfd that was opened while it lived. In the driver.

Since Linux 6.15 the pidfd of a process that is gone gives its status (ioctl PIDFD_GET_INFO), from the moment its parent
has reaped it, which is when the pidfd hangs up. Older kernels tell only before that, in /proc/<pid>/stat of the zombie:
who is quick enough learns it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
from pathlib import Path

from ray_shm.late_cause import DeathCause

# struct pidfd_info, first version, from include/uapi/linux/pidfd.h: mask, cgroup id, 11 ids, exit code.
_INFO = struct.Struct("<QQ11Ii")
_GET_INFO = (3 << 30) | (_INFO.size << 16) | (0xFF << 8) | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_INFO_EXIT = 1 << 3
_EXIT_CODE_FIELD = 49  # of /proc/<pid>/stat behind the name: `exit_code`, field 52


class ExitWatch:
    """Watches one live process of this node for how it ends.

    Attributes:
        pidfd: readable once the process has ended; -1 once closed.
        events: what to poll `pidfd` for until `has_told`: only the hang-up where the kernel tells of reaped processes.
    """

    def __init__(self, pid: int) -> None:
        """Raises OSError: no such process, or the kernel or a seccomp filter refuses pidfds."""
        self._pid = pid
        self.pidfd = os.pidfd_open(pid)
        try:
            self._info()
            self.events = 0
        except OSError:
            self.events = select.POLLIN

    def has_ended(self) -> bool:
        return bool(self._ready(select.POLLIN))

    def has_told(self) -> bool:
        """Whether `status` will never say more than it says from now on."""
        return self.pidfd < 0 or bool(self._ready(self.events) & (self.events | select.POLLHUP))

    def status(self) -> int | None:
        """The wait status (as `os.waitpid` gives it), or None: it lives, or that is not to be had (yet)."""
        if self.pidfd < 0:
            return None
        try:
            mask, exit_code = self._info()
            if mask & _INFO_EXIT:
                return exit_code
        except OSError:  # the kernel is too old, or it is reaped and the kernel is a little too old
            pass
        return self._zombie_status()

    def close(self) -> None:
        """Idempotent."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _ready(self, events: int) -> int:
        if self.pidfd < 0:
            return 0
        poll = select.poll()
        poll.register(self.pidfd, events)
        return sum(ready for _, ready in poll.poll(0))

    def _info(self) -> tuple[int, int]:
        answer = bytearray(_INFO.size)
        answer[:8] = _INFO_EXIT.to_bytes(8, "little")
        fcntl.ioctl(self.pidfd, _GET_INFO, answer)
        fields = _INFO.unpack(answer)
        return fields[0], fields[-1]

    def _zombie_status(self) -> int | None:
        try:
            stat = Path(f"/proc/{self._pid}/stat").read_text()
            signal.pidfd_send_signal(self.pidfd, 0)  # still that process, and not another with its pid
        except OSError:
            return None
        fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces
        return int(fields[_EXIT_CODE_FIELD]) if fields[0] == "Z" else None


def describe(status: int) -> DeathCause:
    """A wait status in words, as in "killed by signal 9 (SIGKILL)" or "exited with code 3"."""
    if not os.WIFSIGNALED(status):
        code = os.WEXITSTATUS(status)
        return DeathCause(f"exited with code {code}", exit_code=code)
    number = os.WTERMSIG(status)
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"SIGRTMIN+{number - signal.SIGRTMIN}"
    dumped = ", core dumped" if os.WCOREDUMP(status) else ""
    return DeathCause(f"killed by signal {number} ({name}){dumped}", signal=number)
