"""Why a worker died, in one line, out of its exit status and what Ray says. Runs in the driver's process.

Ray 2.60 has one text for SIGKILL, SIGSEGV and `os._exit` ("connection error code 2"): it is called vague here, and
counts only where nothing better is known. Its other texts do tell: ray.kill, exit_actor, SIGTERM, its own OOM killer, a
dead node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray.exceptions import RayTaskError

from ray_shm import exit_cause
from ray_shm.late_cause import DeathCause


@dataclass(frozen=True)
class RaysWord:
    """What Ray says about an actor's end. vague: as it says where it knows nothing. lives: its process did not end."""

    text: str
    vague: bool = False
    lives: bool = False


def join_causes(status: int | None, ray: RaysWord | None, sign: str) -> DeathCause:
    """One cause out of an exit status, what Ray says, and what the death looked like from here."""
    ended = None if status is None else exit_cause.describe(status)
    if ray is None or (ray.vague and ended is not None):
        return ended or DeathCause(f"unknown: {sign or 'its process is gone'}, and Ray has not said why")
    if ended is not None and ended.signal is not None:
        return DeathCause(f"{ended.text}; Ray says: {ray.text}", signal=ended.signal)
    if ray.vague:
        return DeathCause(f"unknown: {sign or 'its process is gone'}; Ray says: {ray.text}")
    # Ray ends a worker that was asked to exit in its own way, with another code; its reason tells more.
    named = re.search(r"exit code (\d+)", ray.text)
    code = int(named[1]) if named else ended.exit_code if ended is not None else None
    return DeathCause(ray.text, exit_code=code)


_IDLE_WORDS = re.compile(
    r"The actor died unexpectedly before finishing this task\.|The actor is dead because its worker process has died\."
    r"|The actor is dead because (it was )?|Worker exit type: \w+|Worker exit detail:"
)
_VAGUE = "connection error code 2"  # in what Ray says when a worker's socket closed, whatever the reason


def rays_word(error: BaseException | None) -> RaysWord:
    """What the outcome of an actor's `run` says about its end."""
    if error is None:
        return RaysWord("its loop ended without being asked to", lives=True)
    if isinstance(error, RayTaskError):
        cause = getattr(error, "cause", error)
        return RaysWord(f"its loop raised {type(cause).__name__}: {_one_line(_text(cause))}", lives=True)
    text = _one_line(_IDLE_WORDS.sub("", reason(error)).split(" Some common causes include:")[0]).rstrip(".")
    return RaysWord(text or type(error).__name__, vague=not text or _VAGUE in text)


def reason(error: BaseException) -> str:
    """What Ray says about an actor's end, in one line."""
    text = str(getattr(error, "error_msg", "")) or _text(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return " ".join(kept[:6])[:600] or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a user's __str__
        return "(its text cannot be shown)"
