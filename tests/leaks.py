"""What a test may leave behind, as a snapshot: taken before and after each test, the difference is a leak.

Runs in the pytest process. Other programs on the machine do not count: every process that the tests start,
however far it was re-parented, carries `MARK` in its environment. Of what belongs to this process only our
own kinds count (memfds and threads named after ray_shm, pidfds, listening TCP sockets): Ray makes others.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from pathlib import Path

import psutil

MARK = f"RAY_SHM_TEST_RUN={os.getpid()}-{int(psutil.Process().create_time())}"

# Titles of the processes that run our actors; Ray's own (ray::IDLE, ray::DashboardAgent) come and go.
_ACTOR_TITLES = ("WorkerActor", "DriverActor")
_STAYS = "ray_shm-copy"  # a process keeps the threads that share its large copies
_RAYS_FILES = ("plasma", "sem.obj", "sem.hdr")  # in /dev/shm: its object store and its compiled graphs


def snapshot() -> Counter[str]:
    """Everything that counts, one line of text per thing, and how often it is there."""
    things: Counter[str] = Counter()
    things.update(_file_descriptors())
    things.update(_listening_sockets())
    things.update(_threads())
    things.update(_processes())
    things.update(_shared_memory_files())
    things.update(_placement_groups())
    return things


def _file_descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor that listed the folder, or one another thread closed
            continue
        if link.startswith("/memfd:ray_shm") or link == "anon_inode:[pidfd]":
            found.append(f"open file descriptor {link}")
    return found


def _listening_sockets() -> list[str]:
    connections = psutil.Process().net_connections(kind="tcp")
    return [f"listening socket {c.laddr.ip}:{c.laddr.port}" for c in connections if c.status == psutil.CONN_LISTEN]


def _threads() -> list[str]:
    return [
        f"thread {t.name} (id {t.native_id})"
        for t in threading.enumerate()
        if t.name.startswith(("ray_shm", "ray-shm")) and not t.name.startswith(_STAYS)
    ]


def _shared_memory_files() -> list[str]:
    """Ray's own (its object store, its compiled graphs) are not ours to close, nor is what only others have mapped."""
    files = [path for path in Path("/dev/shm").iterdir() if not path.name.startswith(_RAYS_FILES)]
    return [f"file {path}" for path in files if not _is_a_strangers(path)]


def _is_a_strangers(path: Path) -> bool:
    holders = {pid for pid in psutil.pids() if _maps(pid, str(path))}
    ours = {os.getpid(), *(process.pid for process in marked_processes())}
    return bool(holders) and not holders & ours


def _maps(pid: int, name: str) -> bool:
    try:
        return name in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:  # gone by now, or another user's
        return False


def marked_processes() -> list[psutil.Process]:
    """Every live process that was started by this test run, this one left out."""
    mark = MARK.encode()
    found = []
    for pid in psutil.pids():
        if pid == os.getpid():
            continue
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(pid))
        except (OSError, psutil.Error):  # gone by now, or another user's
            continue
    return found


def _processes() -> list[str]:
    found = []
    for process in {*marked_processes(), *psutil.Process().children()}:
        try:
            title = " ".join(process.cmdline())[:120].strip() or f"{process.name()} ({process.status()})"
            if _below_a_raylet(process) and not _runs_our_code(process, title):
                continue
        except (OSError, psutil.Error):  # gone by now
            continue
        if title.startswith("ray::"):
            title = title.partition(".")[0]  # Ray appends what the actor does at the moment
        found.append(f"process {process.pid}: {title}")
    return found


def _below_a_raylet(process: psutil.Process) -> bool:
    """Ray starts and ends its workers as it likes: the raylet counts as a leak, what it started does not."""
    return any(parent.name() == "raylet" for parent in process.parents())


def _runs_our_code(process: psutil.Process, title: str) -> bool:
    if title.startswith("ray::") and any(name in title for name in _ACTOR_TITLES):
        return True
    return _maps(process.pid, "/memfd:ray_shm")


def _placement_groups() -> list[str]:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    from ray.util import placement_group_table

    return [
        f"placement group {key} ({row['state']}, bundles {row['bundles']})"
        for key, row in placement_group_table().items()
        if row["state"] != "REMOVED"
    ]
