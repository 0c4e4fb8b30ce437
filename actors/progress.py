"""Says what a start is doing: a line on stderr where a person looks on, and always a log record. Runs in the driver.

Shown when stderr is a terminal or the driver is a notebook, or as RAY_SHM_PROGRESS=1 or =0 says.
"""

from __future__ import annotations

import logging
import os
import sys
import time

logger = logging.getLogger("ray_shm")


class Progress:
    """Lines with the seconds since the start."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._begun = time.monotonic()
        setting = os.environ.get("RAY_SHM_PROGRESS", "")
        self._shown = setting == "1" or (setting == "" and _somebody_looks())

    def __call__(self, text: str) -> None:
        seconds = time.monotonic() - self._begun
        logger.info("%s: %s", self._label, text)
        if self._shown:
            print(f"ray-shm [{seconds:5.1f} s] {text}", file=sys.stderr, flush=True)


def _somebody_looks() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
