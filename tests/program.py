"""A program of a few lines in a process of its own, as a user would run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def start(code: str, *args: str, folder: Path) -> subprocess.Popen[str]:
    """Run in a session of its own, with `folder` as the working directory and for temporary files."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process: subprocess.Popen[str], line: str, timeout: float) -> tuple[str, str]:
    """Ctrl-C, once it has written a line that ends with `line` to standard error; what it wrote to both after that."""
    assert process.stderr is not None
    next(said for said in process.stderr if said.rstrip("\n").endswith(line))
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=timeout)
